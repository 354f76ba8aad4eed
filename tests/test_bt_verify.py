# SPDX-License-Identifier: GPL-2.0-or-later
"""The verifier: what it accepts, one escape per rule that it rejects, patches and neighbours."""

from __future__ import annotations

import capstone
import pytest
from capstone import x86_const as x86

from tests.bt_units import LAYOUT, STRINGS, all_forms, jump, unit, verdict
from vmm.bt.native.arena import STUB_BYTES, Arena
from vmm.bt.native.block import FIELDS
from vmm.bt.verify import Rejected, Verifier
from vmm.bt.verify_scan import scan
from vmm.bt.verify_table import BLOCK_FIELDS

UNITS = LAYOUT.units

ACCEPTED = {
    "mov eax, gs:[ebx+4]": "65678B4304",
    "push: store below, then lea": "6567894424FC 8D6424FC",
    "pop": "65678B0424 8D642404",
    "segment base": "448D4304 458B4E1C 478D0408 6567418B00",
    "scratch from memory": "6567448B042500000080",
    "store to the window by r12": "4189F8 43880404",
    "load from the window by r12": "438B0404",
    "flags through lahf": "9F 0F90C0 9E",
    "interrupt flag": "41C7460C00000000",
    "interrupt pending": "41837E1000",
    "spill": "4589464C 458B4E4C 458B8E4C000000",
    "selector": "458B4630",
    "fxsave, stmxcsr": "65670FAE03 65670FAE5B04",
    "x87": "6567D94304 D8C1 DEC9 6567DD1C24 9B",
    "mmx": "65670F6F03 0FFEC1 65670F7F4304 0F77",
    "sse": "65670F1003 0F58C1 65670F2903",
    "sse2": "6567660F6F03 660FFEC1 6567F20F1003 6567660FE703",
    "lock cmpxchg8b": "6567F00FC70B",
    "lock xadd word": "656766F00FC103",
    "bit strings": "65670FA303 6567F00FAB03",
    "pause, lfence": "F390 0FAEE8",
    "maskmovdqu": "6567660FF7C1",
    "xlat": "6567D7",
    "absolute": "6567A110000000 6567A310000000",
    **{f"string {code}": code for code in STRINGS},
    "local jumps": "7502 89C0 EBFA",
    "count down": "67E2FD",
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_the_conventions_produce_is_accepted(name: str) -> None:
    assert verdict(unit(bytes.fromhex(ACCEPTED[name]))) == ""


@pytest.mark.parametrize("ending", ["43FF24C7", "0F0B", "EBFE"])
def test_other_endings(ending: str) -> None:
    assert verdict(bytes.fromhex("4189C0" + ending)) == ""


_FORBIDDEN = {x86.X86_GRP_PRIVILEGE, x86.X86_GRP_CALL, x86.X86_GRP_INT, x86.X86_GRP_RET}
MEMORY, PREFIX, REGISTER = "outside the window", "prefix", "not the guest's"
REJECTED = {
    "memory without gs and 67": ("8B03", MEMORY),
    "gs without 67": ("658B03", "must come together"),
    "67 without gs": ("678B03", "must come together"),
    "fs": ("64678B03", "not allowed"),
    "another segment prefix": ("3E65678B03", "not allowed"),
    "relative to rip": ("65678B0500000000", "relative to rip"),
    "relative to rip, no prefixes": ("8B0500000000", MEMORY),
    "base r12": ("6567418B0424", REGISTER),
    "base r13": ("6567418B4500", REGISTER),
    "base r14": ("6567418B06", REGISTER),
    "base r15": ("6567418B07", REGISTER),
    "index r12": ("6567428B0420", REGISTER),
    "r12 scaled index": ("438B0444", MEMORY),
    "r12 with displacement": ("438B440404", MEMORY),
    "r12 alone": ("418B0424", "index missing"),
    "r15 and r8": ("438B04C7", MEMORY),
    "64-bit operand": ("488B03", "not allowed"),
    "64-bit register": ("4889C3", "not allowed"),
    "64-bit lea": ("488D03", "not allowed"),
    "64-bit lea, the beginning of a string sequence": ("4A8D3C27", "string sequence"),
    "write r12": ("4189C4", REGISTER),
    "write r13": ("4189C5", REGISTER),
    "write r14": ("4189C6", REGISTER),
    "write r15": ("4189C7", REGISTER),
    "load r15": ("6567448B3B", REGISTER),
    "read r14": ("4489F0", REGISTER),
    "mov r14d, imm": ("41BE00000000", REGISTER),
    "xchg r12": ("4194", REGISTER),
    "bswap r15": ("410FCF", REGISTER),
    "lea r12d": ("448D20", REGISTER),
    "lea of r14": ("418D4600", REGISTER),
    "lea of rip": ("8D0500000000", "relative to rip"),
    "xmm8": ("440F58C1", "REX.R"),
    "write segment base": ("45894618", "may not be written"),
    "write exit": ("45894600", "may not be written"),
    "read beyond the spill": ("458B867D000000", "may not be read"),
    "read across a field": ("458B460E", "may not be read"),
    "read host rsp": ("458B8608010000", "may not be read"),
    "read below the block": ("458B46FC", "may not be read"),
    "block without displacement": ("458B06", "not allowed here"),
    "block by sse": ("410F104648", "not allowed here"),
    "locked block": ("F041014648", "locked"),
    "push": ("50", "not allowed"),
    "pop": ("58", "not allowed"),
    "pushfq": ("9C", "not allowed"),
    "popfq": ("9D", "not allowed"),
    "call": ("E800000000", "not allowed"),
    "ret": ("C3", "not allowed"),
    "enter": ("C8000000", "not allowed"),
    "leave": ("C9", "not allowed"),
    "pop to memory": ("65678F00", "not allowed"),
    "call indirect": ("FFD0", "form not allowed"),
    "jump to register": ("FFE0", "form not allowed"),
    "jump through memory": ("6567FF23", "form not allowed"),
    "jump through the table by rax": ("41FF24C7", "form not allowed"),
    "jump through the table by r9": ("43FF24CF", "not through the table"),
    "jump through [r14]": ("41FF6600", "form not allowed"),
    "far jump": ("6567FF2B", "form not allowed"),
    "syscall": ("0F05", "not allowed"),
    "sysenter": ("0F34", "not allowed"),
    "int": ("CD80", "not allowed"),
    "int3": ("CC", "not allowed"),
    "int1": ("F1", "not allowed"),
    "hlt": ("F4", "not allowed"),
    "cli": ("FA", "not allowed"),
    "in": ("EC", "not allowed"),
    "outs": ("656E", "not allowed"),
    "mov ds": ("8ED8", "not allowed"),
    "mov from segment": ("8CD8", "not allowed"),
    "pop fs": ("0FA1", "not allowed"),
    "lss": ("65670FB203", "not allowed"),
    "cpuid": ("0FA2", "not allowed"),
    "rdtsc": ("0F31", "not allowed"),
    "rdrand": ("0FC7F0", "form not allowed"),
    "rdmsr": ("0F32", "not allowed"),
    "mov cr3": ("0F22D8", "not allowed"),
    "lgdt": ("65670F0113", "not allowed"),
    "wrpkru": ("0F01EF", "not allowed"),
    "wrgsbase": ("F30FAED8", "not allowed"),
    "wrgsbase 64": ("F3480FAED8", "not allowed"),
    "xrstor": ("65670FAE2B", "form not allowed"),
    "xsave": ("65670FAE23", "form not allowed"),
    "xbegin": ("C7F800000000", "form not allowed"),
    "vex": ("C5F877", "not allowed"),
    "vex 3": ("C4E17877", "not allowed"),
    "evex": ("62F17C4858C1", "not allowed"),
    "xop": ("8FE97812C0", "not allowed"),
    "movs without its sequence": ("A4", "not allowed"),
    "movs with 67": ("67A4", "not allowed"),
    "stos with 67": ("67AA", "not allowed"),
    "string sequence without source gs": ("4A8D3C27 A4 89FF89F6", "string sequence"),
    "string sequence without its end": ("4A8D3C27 F3AB 90", "string sequence"),
    "movs sequence leaving rsi wide": ("4A8D3C27 65F3A5 89FF 90", "string sequence"),
    "string sequence with 64-bit elements": ("4A8D3C27 F348AB 89FF", "string sequence"),
    "lods without 67": ("65AC", PREFIX),
    "xlat without gs": ("67D7", PREFIX),
    "maskmov without gs": ("660FF7C1", PREFIX),
    "loop by rcx": ("E2FD", PREFIX),
    "prefix twice": ("666689C0", "twice"),
    "gs twice": ("6565678B03", "twice"),
    "REX before a prefix": ("4066 89C0", "not allowed"),
    "REX twice": ("404089C0", "not allowed"),
    "lock on a register": ("F001C0", PREFIX),
    "gs on a register": ("656789C0", PREFIX),
    "rep on mov": ("F389C0", "not allowed"),
    "short jump with 66": ("66EB00", "not allowed"),
    "movsxd": ("63C0", "not allowed"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_an_escape_is_rejected(name: str) -> None:
    code, why = REJECTED[name]
    reason = verdict(unit(bytes.fromhex(code)))
    assert reason and why in reason


def test_jumps_go_where_instructions_begin() -> None:
    known = Verifier(LAYOUT)
    known.accept([unit(b"\x90" * 4, UNITS)], UNITS)
    here = UNITS + 0x100
    for target, good in [(UNITS, True), (UNITS + 1, False), (LAYOUT.stubs, True), (LAYOUT.stubs + 8, False),
                         (LAYOUT.stubs + 16 * 1024, False), (LAYOUT.stubs - 16, False), (here, True),
                         (0, False), (here + 5, False)]:
        code = jump(here, target)
        verifier = Verifier(LAYOUT)
        verifier.accept([unit(b"\x90" * 4, UNITS)], UNITS)
        assert (verdict(code, here, verifier) == "") == good, hex(target)
    # into an instruction, into a string sequence, behind the end
    assert verdict(unit(bytes.fromhex("EB01 B800000000")))
    assert verdict(unit(bytes.fromhex("EB04 4A8D3C27 F3AB 89FF")))
    assert verdict(unit(bytes.fromhex("EB05")))


def test_units_end() -> None:
    assert "runs over" in verdict(b"\x90")
    assert "runs over" in verdict(b"\x75\xFE")
    assert verdict(b"") != ""
    assert "cut short" in verdict(b"\xE9\0\0\0")
    assert "cut short" in verdict(bytes.fromhex("6567"))
    assert "cut short" in verdict(bytes.fromhex("B80000"))


def test_a_unit_falls_through_only_into_an_entry() -> None:
    verifier = Verifier(LAYOUT)
    assert verdict(unit(b"\x90", UNITS + 1), UNITS + 1, verifier) == ""
    assert verdict(b"\x90", UNITS, verifier) == ""


def test_units_stay_among_the_units() -> None:
    for address in (UNITS - 1, UNITS + LAYOUT.units_bytes - 4, 0):
        assert "outside" in verdict(unit(b"", address), address)


def test_a_unit_may_replace_only_a_trailing_jump() -> None:
    first = unit(b"\x90\x90")
    following = UNITS + 2
    verifier = Verifier(LAYOUT)
    verifier.accept([first], UNITS)
    for address in (UNITS, UNITS + 1, UNITS + 3, UNITS - 2):
        assert verdict(unit(b"\x90" * 3, address), address, verifier)
    verifier.accept([unit(b"\x40\x90", following)], following)
    assert verifier.sites == {following + 3}
    assert verdict(unit(b"", following), following, verifier)      # once


def test_a_conditional_jump_at_the_end_is_no_trailing_jump() -> None:
    verifier = Verifier(LAYOUT)
    verifier.accept([unit(b"", UNITS + 6)], UNITS + 6)
    verifier.accept([b"\x0F\x84" + (LAYOUT.stubs - UNITS - 6).to_bytes(4, "little", signed=True)], UNITS)
    verifier.retract(UNITS + 6, 5)
    assert "over another" in verdict(unit(b"", UNITS + 1), UNITS + 1, verifier)


def test_jumps_are_patched_to_entries_and_stubs_only() -> None:
    verifier = Verifier(LAYOUT)
    verifier.accept([unit(b"\x90")], UNITS)
    other = UNITS + 64
    verifier.accept([unit(b"", other)], other)
    site = UNITS + 2
    assert verifier.patch(site, other) == jump(site - 1, other)[1:]
    assert verifier.patch(site, LAYOUT.stubs) == jump(site - 1, LAYOUT.stubs)[1:]
    for bad_site, target in [(site + 1, other), (site, other + 1), (UNITS, other)]:
        with pytest.raises(Rejected):
            verifier.patch(bad_site, target)
    verifier.retract(other, 64)
    with pytest.raises(Rejected):
        verifier.patch(site, other)
    verifier.accept([unit(b"\x90", other)], other)      # the place is free again


def test_every_form_has_the_length_the_disassembler_finds_and_stays_in_the_window() -> None:
    disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    disassembler.detail = True
    known = checked = 0
    for code, memory in all_forms():
        whole = unit(code)
        assert scan(whole).starts == {0, len(code)}, code.hex()
        assert len(code) <= 15
        checked += 1
        insn = next(disassembler.disasm(code, 0), None)
        if insn is None:
            continue       # #UD, or newer than the disassembler
        known += 1
        assert insn.size == len(code), code.hex()
        assert not set(insn.groups) & _FORBIDDEN
        operands = [operand for operand in insn.operands if operand.type == x86.X86_OP_MEM]
        assert memory or not operands, code.hex()
        for operand in operands:
            assert insn.addr_size == 4 and operand.mem.segment == x86.X86_REG_GS, code.hex()
    assert known > 0.9 * checked > 5000


def test_the_verifiers_numbers_are_those_of_the_state_block_and_the_arena() -> None:
    names = {0x08: "system_flags", 0x0C: "interrupt_flag", 0x10: "interrupt_pending", 0x18: "segment_base",
             0x30: "selector", 0x48: "spill", 0x7C: "direction"}
    assert [(FIELDS[names[offset]].offset, FIELDS[names[offset]].size * FIELDS[names[offset]].length)
            for offset, _, _ in BLOCK_FIELDS] == [(offset, length) for offset, length, _ in BLOCK_FIELDS]
    arena = Arena(1 << 20, 16, b"")
    assert LAYOUT.stub_bytes == STUB_BYTES == arena.stub(1) - arena.stub(0)
    arena.close()
