# SPDX-License-Identifier: GPL-2.0-or-later
"""MMX, SSE to SSE4.2, SSE4A, AES and PCLMULQDQ (APM vol. 3, tables A-3 to A-13; vol. 4 and 5).

A scalar instruction that keeps the upper part of its destination reads it, hence `+`.
"""

ROWS = """
# -- moves
np.0f10     movups      =Vx,Wx
66.0f10     movupd      =Vx,Wx
f3.0f10     movss       +Vx,Wd
f2.0f10     movsd       +Vx,Wq
np.0f11     movups      =Wx,Vx
66.0f11     movupd      =Wx,Vx
f3.0f11     movss       =Wd,Vd
f2.0f11     movsd       =Wq,Vq
np.0f12     movlps      +Vx,Mq
np.0f12     movhlps     +Vx,Ux
66.0f12     movlpd      +Vx,Mq
f3.0f12     movsldup    =Vx,Wx
f2.0f12     movddup     =Vx,Wq
np.0f13     movlps      =Mq,Vq
66.0f13     movlpd      =Mq,Vq
np.0f16     movhps      +Vx,Mq
np.0f16     movlhps     +Vx,Ux
66.0f16     movhpd      +Vx,Mq
f3.0f16     movshdup    =Vx,Wx
np.0f17     movhps      =Mq,Vx
66.0f17     movhpd      =Mq,Vx
np.0f28     movaps      =Vx,Wx
66.0f28     movapd      =Vx,Wx
np.0f29     movaps      =Wx,Vx
66.0f29     movapd      =Wx,Vx
np.0f2b     movntps     =Mx,Vx
66.0f2b     movntpd     =Mx,Vx
f3.0f2b     movntss     =Md,Vd
f2.0f2b     movntsd     =Mq,Vq
np.0f50     movmskps    =Gd,Ux
66.0f50     movmskpd    =Gd,Ux
mm.0f6e     movd        =Pq,Ed
mm.0f7e     movd        =Ed,Pq
np.0f6f     movq        =Pq,Qq
66.0f6f     movdqa      =Vx,Wx
f3.0f6f     movdqu      =Vx,Wx
np.0f7f     movq        =Qq,Pq
66.0f7f     movdqa      =Wx,Vx
f3.0f7f     movdqu      =Wx,Vx
f3.0f7e     movq        =Vx,Wq
66.0fd6     movq        =Wq,Vq
f3.0fd6     movq2dq     =Vx,Nq
f2.0fd6     movdq2q     =Pq,Ux
mm.0fd7     pmovmskb    =Gd,Nq
np.0fe7     movntq      =Mq,Pq
66.0fe7     movntdq     =Mx,Vx
66.0f382a   movntdqa    =Vx,Mx
f2.0ff0     lddqu       =Vx,Mx
np.0ff7     maskmovq    Pq,Nq       maskmov
66.0ff7     maskmovdqu  Vx,Ux       maskmov
np.0fae/2   ldmxcsr     Md          sse
np.0fae/3   stmxcsr     =Md         sse
np.0fae/0   fxsave      =My         fx fpu_env
np.0fae/1   fxrstor     My          fx fpu_env
np.0f77     emms        -           mmx

# -- shuffles, insertions, extractions
np.0f14     unpcklps    +Vx,Wx
66.0f14     unpcklpd    +Vx,Wx
np.0f15     unpckhps    +Vx,Wx
66.0f15     unpckhpd    +Vx,Wx
mm.0f60     punpcklbw   +Pq,Qd
mm.0f61     punpcklwd   +Pq,Qd
mm.0f62     punpckldq   +Pq,Qd
mm.0f63     packsswb    +Pq,Qq
mm.0f67     packuswb    +Pq,Qq
mm.0f68     punpckhbw   +Pq,Qq
mm.0f69     punpckhwd   +Pq,Qq
mm.0f6a     punpckhdq   +Pq,Qq
mm.0f6b     packssdw    +Pq,Qq
66.0f6c     punpcklqdq  +Vx,Wx
66.0f6d     punpckhqdq  +Vx,Wx
np.0f70     pshufw      =Pq,Qq,Ib
66.0f70     pshufd      =Vx,Wx,Ib
f3.0f70     pshufhw     =Vx,Wx,Ib
f2.0f70     pshuflw     =Vx,Wx,Ib
66.0f78/0   extrq       +Ux,Ib,Ib
f2.0f78     insertq     +Vx,Ux,Ib,Ib
66.0f79     extrq       +Vx,Ux
f2.0f79     insertq     +Vx,Ux
mm.0fc4     pinsrw      +Pq,Ek,Ib
mm.0fc5     pextrw      =Gd,Nq,Ib
np.0fc6     shufps      +Vx,Wx,Ib
66.0fc6     shufpd      +Vx,Wx,Ib
mm.0f3800   pshufb      +Pq,Qq
66.0f3810   pblendvb    +Vx,Wx
66.0f3814   blendvps    +Vx,Wx
66.0f3815   blendvpd    +Vx,Wx
66.0f382b   packusdw    +Vx,Wx
66.0f3a0c   blendps     +Vx,Wx,Ib
66.0f3a0d   blendpd     +Vx,Wx,Ib
66.0f3a0e   pblendw     +Vx,Wx,Ib
mm.0f3a0f   palignr     +Pq,Qq,Ib
66.0f3a14   pextrb      =Eb,Vx,Ib
66.0f3a15   pextrw      =Ek,Vx,Ib
66.0f3a16   pextrd      =Ed,Vx,Ib
66.0f3a17   extractps   =Ed,Vx,Ib
66.0f3a20   pinsrb      +Vx,Eb,Ib
66.0f3a21   insertps    +Vx,Wd,Ib
66.0f3a22   pinsrd      +Vx,Ed,Ib

# -- floating point
np.0f51     sqrtps      =Vx,Wx
66.0f51     sqrtpd      =Vx,Wx
f3.0f51     sqrtss      +Vx,Wd
f2.0f51     sqrtsd      +Vx,Wq
np.0f52     rsqrtps     =Vx,Wx
f3.0f52     rsqrtss     +Vx,Wd
np.0f53     rcpps       =Vx,Wx
f3.0f53     rcpss       +Vx,Wd
np.0f54     andps       +Vx,Wx
66.0f54     andpd       +Vx,Wx
np.0f55     andnps      +Vx,Wx
66.0f55     andnpd      +Vx,Wx
np.0f56     orps        +Vx,Wx
66.0f56     orpd        +Vx,Wx
np.0f57     xorps       +Vx,Wx
66.0f57     xorpd       +Vx,Wx
np.0f58     addps       +Vx,Wx
66.0f58     addpd       +Vx,Wx
f3.0f58     addss       +Vx,Wd
f2.0f58     addsd       +Vx,Wq
np.0f59     mulps       +Vx,Wx
66.0f59     mulpd       +Vx,Wx
f3.0f59     mulss       +Vx,Wd
f2.0f59     mulsd       +Vx,Wq
np.0f5c     subps       +Vx,Wx
66.0f5c     subpd       +Vx,Wx
f3.0f5c     subss       +Vx,Wd
f2.0f5c     subsd       +Vx,Wq
np.0f5d     minps       +Vx,Wx
66.0f5d     minpd       +Vx,Wx
f3.0f5d     minss       +Vx,Wd
f2.0f5d     minsd       +Vx,Wq
np.0f5e     divps       +Vx,Wx
66.0f5e     divpd       +Vx,Wx
f3.0f5e     divss       +Vx,Wd
f2.0f5e     divsd       +Vx,Wq
np.0f5f     maxps       +Vx,Wx
66.0f5f     maxpd       +Vx,Wx
f3.0f5f     maxss       +Vx,Wd
f2.0f5f     maxsd       +Vx,Wq
66.0f7c     haddpd      +Vx,Wx
f2.0f7c     haddps      +Vx,Wx
66.0f7d     hsubpd      +Vx,Wx
f2.0f7d     hsubps      +Vx,Wx
66.0fd0     addsubpd    +Vx,Wx
f2.0fd0     addsubps    +Vx,Wx
np.0fc2     cmpps       +Vx,Wx,Ib
66.0fc2     cmppd       +Vx,Wx,Ib
f3.0fc2     cmpss       +Vx,Wd,Ib
f2.0fc2     cmpsd       +Vx,Wq,Ib
np.0f2e     ucomiss     Vd,Wd       w:oszapc
66.0f2e     ucomisd     Vq,Wq       w:oszapc
np.0f2f     comiss      Vd,Wd       w:oszapc
66.0f2f     comisd      Vq,Wq       w:oszapc
66.0f3a08   roundps     =Vx,Wx,Ib
66.0f3a09   roundpd     =Vx,Wx,Ib
66.0f3a0a   roundss     +Vx,Wd,Ib
66.0f3a0b   roundsd     +Vx,Wq,Ib
66.0f3a40   dpps        +Vx,Wx,Ib
66.0f3a41   dppd        +Vx,Wx,Ib

# -- conversions
np.0f2a     cvtpi2ps    +Vx,Qq
66.0f2a     cvtpi2pd    =Vx,Qq
f3.0f2a     cvtsi2ss    +Vx,Ed
f2.0f2a     cvtsi2sd    +Vx,Ed
np.0f2c     cvttps2pi   =Pq,Wq
66.0f2c     cvttpd2pi   =Pq,Wx
f3.0f2c     cvttss2si   =Gd,Wd
f2.0f2c     cvttsd2si   =Gd,Wq
np.0f2d     cvtps2pi    =Pq,Wq
66.0f2d     cvtpd2pi    =Pq,Wx
f3.0f2d     cvtss2si    =Gd,Wd
f2.0f2d     cvtsd2si    =Gd,Wq
np.0f5a     cvtps2pd    =Vx,Wq
66.0f5a     cvtpd2ps    =Vx,Wx
f3.0f5a     cvtss2sd    +Vx,Wd
f2.0f5a     cvtsd2ss    +Vx,Wq
np.0f5b     cvtdq2ps    =Vx,Wx
66.0f5b     cvtps2dq    =Vx,Wx
f3.0f5b     cvttps2dq   =Vx,Wx
66.0fe6     cvttpd2dq   =Vx,Wx
f3.0fe6     cvtdq2pd    =Vx,Wq
f2.0fe6     cvtpd2dq    =Vx,Wx
66.0f3820   pmovsxbw    =Vx,Wq
66.0f3821   pmovsxbd    =Vx,Wd
66.0f3822   pmovsxbq    =Vx,Ww
66.0f3823   pmovsxwd    =Vx,Wq
66.0f3824   pmovsxwq    =Vx,Wd
66.0f3825   pmovsxdq    =Vx,Wq
66.0f3830   pmovzxbw    =Vx,Wq
66.0f3831   pmovzxbd    =Vx,Wd
66.0f3832   pmovzxbq    =Vx,Ww
66.0f3833   pmovzxwd    =Vx,Wq
66.0f3834   pmovzxwq    =Vx,Wd
66.0f3835   pmovzxdq    =Vx,Wq

# -- packed integers
mm.0f64     pcmpgtb     +Pq,Qq
mm.0f65     pcmpgtw     +Pq,Qq
mm.0f66     pcmpgtd     +Pq,Qq
mm.0f74     pcmpeqb     +Pq,Qq
mm.0f75     pcmpeqw     +Pq,Qq
mm.0f76     pcmpeqd     +Pq,Qq
mm.0f71/2   psrlw       +Nq,Ib
mm.0f71/4   psraw       +Nq,Ib
mm.0f71/6   psllw       +Nq,Ib
mm.0f72/2   psrld       +Nq,Ib
mm.0f72/4   psrad       +Nq,Ib
mm.0f72/6   pslld       +Nq,Ib
mm.0f73/2   psrlq       +Nq,Ib
66.0f73/3   psrldq      +Ux,Ib
mm.0f73/6   psllq       +Nq,Ib
66.0f73/7   pslldq      +Ux,Ib
mm.0fd1     psrlw       +Pq,Qq
mm.0fd2     psrld       +Pq,Qq
mm.0fd3     psrlq       +Pq,Qq
mm.0fd4     paddq       +Pq,Qq
mm.0fd5     pmullw      +Pq,Qq
mm.0fd8     psubusb     +Pq,Qq
mm.0fd9     psubusw     +Pq,Qq
mm.0fda     pminub      +Pq,Qq
mm.0fdb     pand        +Pq,Qq
mm.0fdc     paddusb     +Pq,Qq
mm.0fdd     paddusw     +Pq,Qq
mm.0fde     pmaxub      +Pq,Qq
mm.0fdf     pandn       +Pq,Qq
mm.0fe0     pavgb       +Pq,Qq
mm.0fe1     psraw       +Pq,Qq
mm.0fe2     psrad       +Pq,Qq
mm.0fe3     pavgw       +Pq,Qq
mm.0fe4     pmulhuw     +Pq,Qq
mm.0fe5     pmulhw      +Pq,Qq
mm.0fe8     psubsb      +Pq,Qq
mm.0fe9     psubsw      +Pq,Qq
mm.0fea     pminsw      +Pq,Qq
mm.0feb     por         +Pq,Qq
mm.0fec     paddsb      +Pq,Qq
mm.0fed     paddsw      +Pq,Qq
mm.0fee     pmaxsw      +Pq,Qq
mm.0fef     pxor        +Pq,Qq
mm.0ff1     psllw       +Pq,Qq
mm.0ff2     pslld       +Pq,Qq
mm.0ff3     psllq       +Pq,Qq
mm.0ff4     pmuludq     +Pq,Qq
mm.0ff5     pmaddwd     +Pq,Qq
mm.0ff6     psadbw      +Pq,Qq
mm.0ff8     psubb       +Pq,Qq
mm.0ff9     psubw       +Pq,Qq
mm.0ffa     psubd       +Pq,Qq
mm.0ffb     psubq       +Pq,Qq
mm.0ffc     paddb       +Pq,Qq
mm.0ffd     paddw       +Pq,Qq
mm.0ffe     paddd       +Pq,Qq
mm.0f3801   phaddw      +Pq,Qq
mm.0f3802   phaddd      +Pq,Qq
mm.0f3803   phaddsw     +Pq,Qq
mm.0f3804   pmaddubsw   +Pq,Qq
mm.0f3805   phsubw      +Pq,Qq
mm.0f3806   phsubd      +Pq,Qq
mm.0f3807   phsubsw     +Pq,Qq
mm.0f3808   psignb      +Pq,Qq
mm.0f3809   psignw      +Pq,Qq
mm.0f380a   psignd      +Pq,Qq
mm.0f380b   pmulhrsw    +Pq,Qq
mm.0f381c   pabsb       =Pq,Qq
mm.0f381d   pabsw       =Pq,Qq
mm.0f381e   pabsd       =Pq,Qq
66.0f3817   ptest       Vx,Wx       w:oszapc
66.0f3828   pmuldq      +Vx,Wx
66.0f3829   pcmpeqq     +Vx,Wx
66.0f3837   pcmpgtq     +Vx,Wx
66.0f3838   pminsb      +Vx,Wx
66.0f3839   pminsd      +Vx,Wx
66.0f383a   pminuw      +Vx,Wx
66.0f383b   pminud      +Vx,Wx
66.0f383c   pmaxsb      +Vx,Wx
66.0f383d   pmaxsd      +Vx,Wx
66.0f383e   pmaxuw      +Vx,Wx
66.0f383f   pmaxud      +Vx,Wx
66.0f3840   pmulld      +Vx,Wx
66.0f3841   phminposuw  =Vx,Wx
66.0f3a42   mpsadbw     +Vx,Wx,Ib
66.0f3a60   pcmpestrm   Vx,Wx,Ib    w:oszapc
66.0f3a61   pcmpestri   Vx,Wx,Ib    w:oszapc
66.0f3a62   pcmpistrm   Vx,Wx,Ib    w:oszapc
66.0f3a63   pcmpistri   Vx,Wx,Ib    w:oszapc

# -- cryptography
66.0f3a44   pclmulqdq   +Vx,Wx,Ib
66.0f38db   aesimc      =Vx,Wx
66.0f38dc   aesenc      +Vx,Wx
66.0f38dd   aesenclast  +Vx,Wx
66.0f38de   aesdec      +Vx,Wx
66.0f38df   aesdeclast  +Vx,Wx
66.0f3adf   aeskeygenassist =Vx,Wx,Ib
"""
