# SPDX-License-Identifier: GPL-2.0-or-later
"""Opcodes behind 0F on general registers and the processor (APM vol. 3, tables A-3 to A-6, and VEX).

Left out, and so #UD, is what CPUID does not offer: RDTSCP, MONITOR, XSAVE, RDRAND, CLFLUSHOPT, 3DNow!,
INVPCID, SVM, AVX; what is 64-bit only: SWAPGS, RDFSBASE and its like; and what is no AMD instruction: VMCALL,
GETSEC.
"""

ROWS = """
# -- system
0f00/0          sldt        =Ek         sensitive
0f00/1          str         =Ek         sensitive
0f00/2          lldt        Ew          privileged
0f00/3          ltr         Ew          privileged
0f00/4          verr        Ew          sensitive w:z
0f00/5          verw        Ew          sensitive w:z
0f01/0          sgdt        =Ms         sensitive
0f01/1          sidt        =Ms         sensitive
0f01/2          lgdt        Ms          privileged
0f01/3          lidt        Ms          privileged
0f01/4          smsw        =Ek         sensitive
0f01/6          lmsw        Ew          privileged
0f01/7          invlpg      Mn          privileged
0f01:ca         clac        -           sensitive       # #UD outside CPL 0 and without SMAP in CPUID
0f01:cb         stac        -           sensitive       # the same
0f01:d9         vmmcall     -           sensitive
0f02            lar         +Gv,Ew      sensitive w:z
0f03            lsl         +Gv,Ew      sensitive w:z
0f05            syscall     -           far w:oszapcd
0f06            clts        -           privileged
0f07            sysret      -           far w:oszapcd
0f08            invd        -           privileged
0f09            wbinvd      -           privileged
0f0b            ud2         -           ud
0f20/0          mov         =Rd,Cd      privileged lock     # LOCK MOV CR0 is MOV CR8 (APM vol. 3, CR8)
0f20/2          mov         =Rd,Cd      privileged
0f20/3          mov         =Rd,Cd      privileged
0f20/4          mov         =Rd,Cd      privileged
0f21            mov         =Rd,Dd      privileged
0f22/0          mov         =Cd,Rd      privileged lock
0f22/2          mov         =Cd,Rd      privileged
0f22/3          mov         =Cd,Rd      privileged
0f22/4          mov         =Cd,Rd      privileged
0f23            mov         =Dd,Rd      privileged
0f30            wrmsr       -           privileged
0f31            rdtsc       -           sensitive
0f32            rdmsr       -           privileged
0f33            rdpmc       -           sensitive
0f34            sysenter    -           far
0f35            sysexit     -           far
0fa2            cpuid       -           sensitive
0fa0            push        FS          segment
0fa1            pop         =FS         segment
0fa8            push        GS          segment
0fa9            pop         =GS         segment
0fb2            lss         =Gv,Mp      segment
0fb4            lfs         =Gv,Mp      segment
0fb5            lgs         =Gv,Mp      segment

# -- hints, caches and fences
0f0d            prefetch    Mn
0f18-1f         nop         En
np.0fae:e8-ef   lfence      -
np.0fae:f0-f7   mfence      -
np.0fae:f8-ff   sfence      -
np.0fae/7       clflush     Mb
np.0fc3         movnti      =Md,Gd

# -- conditions
0f40+{cc}       cmov{cc}    +Gv,Ev
0f80+{cc}       j{cc}       Jv          jcc
0f90+{cc}       set{cc}     =Eb

# -- bits
0fa3            bt          Ev,Gv       bit_string w:c u:osap
0fab            bts         +Ev,Gv      bit_string lock w:c u:osap
0fb3            btr         +Ev,Gv      bit_string lock w:c u:osap
0fbb            btc         +Ev,Gv      bit_string lock w:c u:osap
0fba/4          bt          Ev,Ib       w:c u:osap
0fba/5          bts         +Ev,Ib      lock w:c u:osap
0fba/6          btr         +Ev,Ib      lock w:c u:osap
0fba/7          btc         +Ev,Ib      lock w:c u:osap
0fbc            bsf         +Gv,Ev      w:z u:osapc
0fbd            bsr         +Gv,Ev      w:z u:osapc
f3.0fbc         tzcnt       =Gv,Ev      w:zc u:osap
f3.0fbd         lzcnt       =Gv,Ev      w:zc u:osap
f3.0fb8         popcnt      =Gv,Ev      w:oszapc
0fa4            shld        +Ev,Gv,Ib   w:szpc u:oa maybe
0fa5            shld        +Ev,Gv,CL   w:szpc u:oa maybe
0fac            shrd        +Ev,Gv,Ib   w:szpc u:oa maybe
0fad            shrd        +Ev,Gv,CL   w:szpc u:oa maybe

# -- moves and arithmetic
0faf            imul        +Gv,Ev      w:oc u:szap
0fb0            cmpxchg     +Eb,Gb      lock w:oszapc
0fb1            cmpxchg     +Ev,Gv      lock w:oszapc
0fb6            movzx       =Gv,Eb
0fb7            movzx       =Gv,Ew
0fbe            movsx       =Gv,Eb
0fbf            movsx       =Gv,Ew
0fb9            ud1         Gv,En       ud
0fc0            xadd        +Eb,+Gb     lock w:oszapc
0fc1            xadd        +Ev,+Gv     lock w:oszapc
0fc7/1          cmpxchg8b   +Mq         lock w:z
0fc8+{r}        bswap       +Zv
np.0f38f0       movbe       =Gv,Mv
66.0f38f0       movbe       =Gv,Mv
np.0f38f1       movbe       =Mv,Gv
66.0f38f1       movbe       =Mv,Gv
f2.0f38f0       crc32       +Gd,Eb
f2.0f38f1       crc32       +Gd,Ev
66.0f38f6       adcx        +Gd,Ed      r:c w:c
f3.0f38f6       adox        +Gd,Ed      r:o w:o

# -- BMI1 and BMI2
vex.np.0f38f2   andn        =Gd,Bd,Ed   w:oszc u:ap
vex.np.0f38f3/1 blsr        =Bd,Ed      w:oszc u:ap
vex.np.0f38f3/2 blsmsk      =Bd,Ed      w:oszc u:ap
vex.np.0f38f3/3 blsi        =Bd,Ed      w:oszc u:ap
vex.np.0f38f5   bzhi        =Gd,Ed,Bd   w:oszc u:ap
vex.f3.0f38f5   pext        =Gd,Bd,Ed
vex.f2.0f38f5   pdep        =Gd,Bd,Ed
vex.f2.0f38f6   mulx        =Gd,=Bd,Ed
vex.np.0f38f7   bextr       =Gd,Ed,Bd   w:ozc u:sap
vex.66.0f38f7   shlx        =Gd,Ed,Bd
vex.f3.0f38f7   sarx        =Gd,Ed,Bd
vex.f2.0f38f7   shrx        =Gd,Ed,Bd
vex.f2.0f3af0   rorx        =Gd,Ed,Ib
"""
