# SPDX-License-Identifier: GPL-2.0-or-later
"""The one-byte opcode map without x87 (APM vol. 3, table A-1); `vmm.bt.table` says how to read a row."""

ROWS = """
# -- arithmetic and logic
00+8{alu}   {alu}   +Eb,Gb      lock
01+8{alu}   {alu}   +Ev,Gv      lock
02+8{alu}   {alu}   +Gb,Eb
03+8{alu}   {alu}   +Gv,Ev
04+8{alu}   {alu}   +AL,Ib
05+8{alu}   {alu}   +eAX,Iv
38          cmp     Eb,Gb       w:oszapc
39          cmp     Ev,Gv       w:oszapc
3a          cmp     Gb,Eb       w:oszapc
3b          cmp     Gv,Ev       w:oszapc
3c          cmp     AL,Ib       w:oszapc
3d          cmp     eAX,Iv      w:oszapc
80/{alu}    {alu}   +Eb,Ib      lock
81/{alu}    {alu}   +Ev,Iv      lock
82/{alu}    {alu}   +Eb,Ib      lock
83/{alu}    {alu}   +Ev,Ib      lock
80/7        cmp     Eb,Ib       w:oszapc
81/7        cmp     Ev,Iv       w:oszapc
82/7        cmp     Eb,Ib       w:oszapc
83/7        cmp     Ev,Ib       w:oszapc
84          test    Eb,Gb       w:oszpc u:a
85          test    Ev,Gv       w:oszpc u:a
a8          test    AL,Ib       w:oszpc u:a
a9          test    eAX,Iv      w:oszpc u:a
f6/0        test    Eb,Ib       w:oszpc u:a
f6/1        test    Eb,Ib       w:oszpc u:a
f7/0        test    Ev,Iv       w:oszpc u:a
f7/1        test    Ev,Iv       w:oszpc u:a
40+{r}      inc     +Zv         inc_dec w:oszap
48+{r}      dec     +Zv         inc_dec w:oszap
fe/0        inc     +Eb         lock w:oszap
fe/1        dec     +Eb         lock w:oszap
ff/0        inc     +Ev         lock w:oszap
ff/1        dec     +Ev         lock w:oszap
f6/2        not     +Eb         lock
f7/2        not     +Ev         lock
f6/3        neg     +Eb         lock w:oszapc
f7/3        neg     +Ev         lock w:oszapc
69          imul    =Gv,Ev,Iv   w:oc u:szap
6b          imul    =Gv,Ev,Ib   w:oc u:szap
f6/4        mul     Eb          w:oc u:szap
f7/4        mul     Ev          w:oc u:szap
f6/5        imul    Eb          w:oc u:szap
f7/5        imul    Ev          w:oc u:szap
f6/6        div     Eb          u:oszapc
f7/6        div     Ev          u:oszapc
f6/7        idiv    Eb          u:oszapc
f7/7        idiv    Ev          u:oszapc
98          cwde    -
99          cdq     -
27          daa     -           legacy r:ac w:szapc u:o
2f          das     -           legacy r:ac w:szapc u:o
37          aaa     -           legacy r:a w:ac u:oszp
3f          aas     -           legacy r:a w:ac u:oszp
d4          aam     Ib          legacy w:szp u:oac
d5          aad     Ib          legacy w:szp u:oac
d6          salc    -           legacy r:c

# -- shifts by 1 always set the flags; OF is defined for them only
d0/{shift}  {shift} +Eb,1
d1/{shift}  {shift} +Ev,1
c0/{shift}  {shift} +Eb,Ib      u:o maybe
c1/{shift}  {shift} +Ev,Ib      u:o maybe
d2/{shift}  {shift} +Eb,CL      u:o maybe
d3/{shift}  {shift} +Ev,CL      u:o maybe

# -- moves
88          mov     =Eb,Gb
89          mov     =Ev,Gv
8a          mov     =Gb,Eb
8b          mov     =Gv,Ev
8d          lea     =Gv,Mn
a0          mov     =AL,Ob      moffs
a1          mov     =eAX,Ov     moffs
a2          mov     =Ob,AL      moffs
a3          mov     =Ov,eAX     moffs
b0+{r}      mov     =Zb,Ib
b8+{r}      mov     =Zv,Iv
c6/0        mov     =Eb,Ib
c7/0        mov     =Ev,Iv
86          xchg    +Eb,+Gb     lock
87          xchg    +Ev,+Gv     lock
90          nop     -
f3.90       pause   -
91-97       xchg    +Zv,+eAX
d7          xlatb   -           xlat

# -- flags
9c          pushfd  -           sensitive r:oszapcd
9d          popfd   -           sensitive w:oszapcd
9e          sahf    -           w:szapc
9f          lahf    -           r:szapc
f5          cmc     -           r:c w:c
f8          clc     -           w:c
f9          stc     -           w:c
fa          cli     -           sensitive
fb          sti     -           sensitive
fc          cld     -           w:d
fd          std     -           w:d

# -- the stack
50+{r}      push    Zv          push
58+{r}      pop     =Zv         pop
68          push    Iv          push
6a          push    Ib          push
ff/6        push    Ev          push
8f/0        pop     =Ev         pop
60          pushad  -           pusha
61          popad   -           popa
c8          enter   Iw,Ib       enter
c9          leave   -           leave

# -- strings; a repeated comparison of nothing leaves the flags alone
a4          movsb   =Yb,Xb      string r:d
a5          movsd   =Yv,Xv      string r:d
a6          cmpsb   Xb,Yb       string r:d w:oszapc maybe
a7          cmpsd   Xv,Yv       string r:d w:oszapc maybe
aa          stosb   =Yb,AL      string r:d
ab          stosd   =Yv,eAX     string r:d
ac          lodsb   =AL,Xb      string r:d
ad          lodsd   =eAX,Xv     string r:d
ae          scasb   AL,Yb       string r:d w:oszapc maybe
af          scasd   eAX,Yv      string r:d w:oszapc maybe

# -- control flow
70+{cc}     j{cc}   Jb          jcc
e0          loopne  Jb          loop r:z
e1          loope   Jb          loop r:z
e2          loop    Jb          loop
e3          jecxz   Jb          loop
e8          call    Jv          call
e9          jmp     Jv          jmp
eb          jmp     Jb          jmp
c2          ret     Iw          ret
c3          ret     -           ret
ff/2        call    Ev          call_indirect
ff/4        jmp     Ev          jmp_indirect
9a          call    Ap          far
ea          jmp     Ap          far
ff/3        call    Mp          far
ff/5        jmp     Mp          far
ca          retf    Iw          far
cb          retf    -           far
cf          iretd   -           far w:oszapcd
cc          int3    -           int
cd          int     Ib          int
ce          into    -           int r:o
f1          int1    -           int

# -- segments
06          push    ES          segment
0e          push    CS          segment
16          push    SS          segment
1e          push    DS          segment
07          pop     =ES         segment
17          pop     =SS         segment
1f          pop     =DS         segment
8c/0        mov     =Ek,Sw      segment
8c/1        mov     =Ek,Sw      segment
8c/2        mov     =Ek,Sw      segment
8c/3        mov     =Ek,Sw      segment
8c/4        mov     =Ek,Sw      segment
8c/5        mov     =Ek,Sw      segment
8e/0        mov     =Sw,Ew      segment     # not /1: CS is loaded by far transfers only
8e/2        mov     =Sw,Ew      segment
8e/3        mov     =Sw,Ew      segment
8e/4        mov     =Sw,Ew      segment
8e/5        mov     =Sw,Ew      segment
c4          les     =Gv,Mp      segment     # with a register operand: VEX, seen by the decoder before
c5          lds     =Gv,Mp      segment
62          bound   Gv,Ma       legacy
63          arpl    +Ew,Gw      legacy w:z

# -- ports and the processor
6c          insb    =Yb,DX      io r:d
6d          insd    =Yv,DX      io r:d
6e          outsb   DX,Xb       io r:d
6f          outsd   DX,Xv       io r:d
e4          in      =AL,Ib      io
e5          in      =eAX,Ib     io
e6          out     Ib,AL       io
e7          out     Ib,eAX      io
ec          in      =AL,DX      io
ed          in      =eAX,DX     io
ee          out     DX,AL       io
ef          out     DX,eAX      io
f4          hlt     -           privileged
"""
