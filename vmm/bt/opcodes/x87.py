# SPDX-License-Identifier: GPL-2.0-or-later
"""The x87 escapes D8 to DF (APM vol. 3, table A-15), and WAIT.

Marked "alias" are encodings no manual lists but every processor executes as the instruction named.
"""

ROWS = """
9b              wait        -           x87

# -- arithmetic
d8/{x87}        f{x87}      Md          x87
da/{x87}        fi{x87}     Md          x87
dc/{x87}        f{x87}      Mq          x87
de/{x87}        fi{x87}     Mw          x87
d8:c0+8{x87}    f{x87}      +st,sti     x87
dc:c0-c7        fadd        +sti,st     x87
dc:c8-cf        fmul        +sti,st     x87
dc:d0-d7        fcom        st,sti      x87     # alias
dc:d8-df        fcomp       st,sti      x87     # alias
dc:e0-e7        fsubr       +sti,st     x87
dc:e8-ef        fsub        +sti,st     x87
dc:f0-f7        fdivr       +sti,st     x87
dc:f8-ff        fdiv        +sti,st     x87
de:c0-c7        faddp       +sti,st     x87
de:c8-cf        fmulp       +sti,st     x87
de:d0-d7        fcomp       st,sti      x87     # alias
de:d9           fcompp      -           x87
de:e0-e7        fsubrp      +sti,st     x87
de:e8-ef        fsubp       +sti,st     x87
de:f0-f7        fdivrp      +sti,st     x87
de:f8-ff        fdivp       +sti,st     x87

# -- loads and stores
d9/0            fld         Md          x87
d9/2            fst         =Md         x87
d9/3            fstp        =Md         x87
db/0            fild        Md          x87
db/1            fisttp      =Md         x87
db/2            fist        =Md         x87
db/3            fistp       =Md         x87
db/5            fld         Mt          x87
db/7            fstp        =Mt         x87
dd/0            fld         Mq          x87
dd/1            fisttp      =Mq         x87
dd/2            fst         =Mq         x87
dd/3            fstp        =Mq         x87
df/0            fild        Mw          x87
df/1            fisttp      =Mw         x87
df/2            fist        =Mw         x87
df/3            fistp       =Mw         x87
df/4            fbld        Mt          x87
df/5            fild        Mq          x87
df/6            fbstp       =Mt         x87
df/7            fistp       =Mq         x87
d9:c0-c7        fld         sti         x87
d9:c8-cf        fxch        +sti        x87
d9:d8-df        fstp        =sti        x87     # alias
dd:c8-cf        fxch        +sti        x87     # alias
dd:d0-d7        fst         =sti        x87
dd:d8-df        fstp        =sti        x87
df:c8-cf        fxch        +sti        x87     # alias
df:d0-d7        fstp        =sti        x87     # alias
df:d8-df        fstp        =sti        x87     # alias
da:c0-c7        fcmovb      sti         x87 r:c
da:c8-cf        fcmove      sti         x87 r:z
da:d0-d7        fcmovbe     sti         x87 r:cz
da:d8-df        fcmovu      sti         x87 r:p
db:c0-c7        fcmovnb     sti         x87 r:c
db:c8-cf        fcmovne     sti         x87 r:z
db:d0-d7        fcmovnbe    sti         x87 r:cz
db:d8-df        fcmovnu     sti         x87 r:p

# -- comparison
d9:e4           ftst        -           x87
d9:e5           fxam        -           x87
da:e9           fucompp     -           x87
dd:e0-e7        fucom       sti         x87
dd:e8-ef        fucomp      sti         x87
db:e8-ef        fucomi      sti         x87 w:oszapc
db:f0-f7        fcomi       sti         x87 w:oszapc
df:e8-ef        fucompi     sti         x87 w:oszapc
df:f0-f7        fcompi      sti         x87 w:oszapc

# -- constants and functions
d9:e0           fchs        -           x87
d9:e1           fabs        -           x87
d9:e8           fld1        -           x87
d9:e9           fldl2t      -           x87
d9:ea           fldl2e      -           x87
d9:eb           fldpi       -           x87
d9:ec           fldlg2      -           x87
d9:ed           fldln2      -           x87
d9:ee           fldz        -           x87
d9:f0           f2xm1       -           x87
d9:f1           fyl2x       -           x87
d9:f2           fptan       -           x87
d9:f3           fpatan      -           x87
d9:f4           fxtract     -           x87
d9:f5           fprem1      -           x87
d9:f6           fdecstp     -           x87
d9:f7           fincstp     -           x87
d9:f8           fprem       -           x87
d9:f9           fyl2xp1     -           x87
d9:fa           fsqrt       -           x87
d9:fb           fsincos     -           x87
d9:fc           frndint     -           x87
d9:fd           fscale      -           x87
d9:fe           fsin        -           x87
d9:ff           fcos        -           x87

# -- control
d9:d0           fnop        -           x87
d9/4            fldenv      Me          x87 fpu_env
d9/5            fldcw       Mw          x87
d9/6            fnstenv     =Me         x87 fpu_env
d9/7            fnstcw      =Mw         x87
db:e0           feni        -           x87     # of the 8087; nothing since
db:e1           fdisi       -           x87     # the same
db:e2           fnclex      -           x87
db:e3           fninit      -           x87
db:e4           fsetpm      -           x87     # of the 80287; nothing since
dd/4            frstor      Mf          x87 fpu_env
dd/6            fnsave      =Mf         x87 fpu_env
dd/7            fnstsw      =Mw         x87
df:e0           fnstsw      =AX         x87
dd:c0-c7        ffree       sti         x87
df:c0-c7        ffreep      sti         x87     # alias
"""
