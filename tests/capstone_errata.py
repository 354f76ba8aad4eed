# SPDX-License-Identifier: GPL-2.0-or-later
"""Where capstone is no judge of the decoder: what it gets wrong or calls by another name, as data."""

from __future__ import annotations

#: our mnemonic -> capstone's, which is told by operand size, or is another one for the same thing
OTHER_NAMES: dict[str, frozenset[str]] = {name: frozenset(others.split()) for name, others in {
    "cwde": "cbw", "cdq": "cwd",
    "pushad": "pushal pushaw", "popad": "popal popaw", "pushfd": "pushf", "popfd": "popf", "iretd": "iret",
    "jecxz": "jcxz",
    "movsd": "movsw", "cmpsd": "cmpsw", "stosd": "stosw", "lodsd": "lodsw", "scasd": "scasw",
    "insd": "insw", "outsd": "outsw",
    "call": "lcall", "jmp": "ljmp", "shl": "sal",
    "fstp": "fstpnce", "feni": "feni8087_nop", "fdisi": "fdisi8087_nop",
    "prefetch": "prefetchw prefetchwt1",
    # hints that newer processors have given a meaning, which ours do not
    "nop": "prefetchnta prefetcht0 prefetcht1 prefetcht2 bndldx bndmov bndstx bndcl bndcu bndcn bndmk "
           "cldemote endbr32 endbr64 rdsspd",
    # a WRSS of the shadow stack extension taken for any 0F 38 F6, whatever the prefix
    "adcx": "wrssd",
}.items()}

#: entries with encodings capstone does not know at all, by their opcode
UNKNOWN: dict[str, str] = {
    "0f0d": "only the first three hints are known", "0f18-1f": "of 0F 18 the register forms are unknown",
    "0f20/0": "LOCK MOV CR0 is AMD's", "0f22/0": "LOCK MOV CR0 is AMD's",
    "0fbc": "F2 is taken for a mandatory prefix", "0fbd": "F2 is taken for a mandatory prefix",
    "dc:d0-d7": "alias", "dc:d8-df": "alias", "dd:c8-cf": "alias", "de:d0-d7": "alias", "df:c8-cf": "alias",
    "df:d0-d7": "alias", "df:d8-df": "alias",
    "f3.90": "in 16-bit code with an address-size prefix it is unknown",
    "np.0fae:e8-ef": "only rm 0 is known", "np.0fae:f0-f7": "only rm 0 is known",
    "np.0fae:f8-ff": "only rm 0 is known",
}

#: instructions whose memory operand capstone gives a wrong size
WRONG_SIZE: dict[str, str] = {
    **dict.fromkeys(("lea", "invlpg", "nop", "prefetch"), "nothing is accessed"),
    **dict.fromkeys(("call", "jmp", "les", "lds", "lss", "lfs", "lgs"), "far pointers without selector"),
    **dict.fromkeys(("fldenv", "fnstenv", "fnsave", "frstor", "fxsave", "fxrstor"), "size of a state area"),
    "comisd": "16 bytes for 8",
}

#: instructions of which capstone tells wrongly whether they read or write their memory operand
WRONG_ACCESS: dict[str, str] = {
    **dict.fromkeys((
        "movd", "movq", "movdqa", "movups", "movupd", "movhps", "movhpd", "movlps", "movlpd", "movntdq",
        "movnti", "movntpd", "movntps", "movntq", "movntsd", "movntss", "pextrb", "pextrw", "pextrd",
        "extractps", "stmxcsr", "fist", "fistp", "fisttp", "fst", "fstp", "fnstcw", "arpl", "cmpxchg",
        "cmpxchg8b", "rcl", "rcr", "rol", "ror", "seta", "setae", "setb", "setbe", "setg", "setge", "setl",
        "setle", "setno", "setnp", "setns", "seto", "setp", "sets"), "a store told as a load"),
    **dict.fromkeys(("test", "adcx", "roundss", "roundsd", "cmpsd", "insb", "insd", "outsb", "outsd"),
                    "no access told"),
    **dict.fromkeys(("nop", "prefetch"), "no access is one to us"),
    "frstor": "a load told as a store",
}

#: instructions whose branch target capstone truncates to 16 bits by the wrong prefix: it follows the size of
#: the displacement by 67 as well as 66
NEAR_TARGETS = frozenset({0xE9, *range(0x80, 0x90)})

#: what the silicon executes although it is undefined to the processor we describe
LENIENT_SILICON: dict[str, str] = {
    **dict.fromkeys(("clflushopt", "monitor", "mwait", "rdrand", "rdseed", "rdtscp", "xabort", "xbegin"),
                    "not offered, but there"),
    **dict.fromkeys(("incsspd", "tpause", "umonitor", "umwait"), "fences whatever their prefix"),
    **dict.fromkeys(("fxsave", "fxrstor", "ldmxcsr", "stmxcsr"), "the same without a prefix"),
    "nop": "takes LOCK",
}

#: what the silicon refuses although processors execute it
STRICT_SILICON = {"0f18-1f": "0F 18 with a register"}
