# SPDX-License-Identifier: GPL-2.0-or-later
"""Hand-assembled code says what it is: every line is disassembled and compared with its comment."""

from __future__ import annotations

import re
from itertools import pairwise

import capstone
import pytest

from vmm.bt.emulated import trampolines as emulated_trampolines
from vmm.bt.native import signals, trampolines
from vmm.bt.native.arena import STUB_BYTES, Arena
from vmm.bt.native.assembly import assemble, lines
from vmm.bt.native.block import FIELDS, OFFSETS

_LISTINGS = {
    "wrgsbase": trampolines.listing(True),
    "arch_prctl": trampolines.listing(False),
    "handlers": signals.HANDLERS,
    "emulated": emulated_trampolines.LISTING,
}


def _names(listing: str) -> dict[str, int]:
    """A number of its own for every name, too large for a short displacement."""
    return {name: 0x1000 + 8 * index
            for index, name in enumerate(sorted(set(re.findall(r"[@=](\w+)", listing))))}


@pytest.mark.parametrize("name", _LISTINGS)
def test_every_line_is_what_its_comment_says(name: str) -> None:
    listing = _LISTINGS[name]
    names = _names(listing)
    code, labels = assemble(listing, names)
    known = {**names, **labels}
    disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    instructions = list(disassembler.disasm(code, 0))
    expected = lines(listing)[0]
    assert [insn.address for insn in instructions] == [line.offset for line in expected]
    for insn, line in zip(instructions, expected):
        wanted = line.comment
        for token in line.tokens:
            name_of = token.lstrip("@=>")
            if name_of != token:
                wanted = re.sub(rf"\b{name_of}\b", hex(known[name_of]), wanted)
        found = f"{insn.mnemonic} {insn.op_str}".strip()
        assert found == wanted, line


def test_fields_of_the_block_do_not_overlap() -> None:
    taken = sorted((field.offset, field.offset + field.size * field.length) for field in FIELDS.values())
    assert all(end <= begin for (_, end), (begin, _) in pairwise(taken))
    assert taken[-1][1] <= 4096
    assert OFFSETS["fx"] % 16 == 0


def test_the_arena_is_never_writable_and_executable() -> None:
    arena = Arena(1 << 20, 64, b"\xC3")
    with open("/proc/self/maps") as maps:
        rights = {int(line.split("-")[0], 16): line.split()[1] for line in maps}
    assert rights[arena.base] == "--xs"
    assert not any("w" in right and "x" in right for address, right in rights.items()
                   if address in (arena.base, arena._writable))
    arena.write(arena.units, b"\x90\xC3")
    assert arena.read(arena.units, 2) == b"\x90\xC3"
    for address in (arena.base, arena.stub(0), arena.base + arena.size - 1):
        with pytest.raises(ValueError, match="not among the units"):
            arena.write(address, b"\x90\x90")
    arena.close()


def test_stubs_are_alike_and_lead_to_the_exit() -> None:
    arena = Arena(1 << 20, 64, b"")
    stub = arena.read(arena.stub(0), STUB_BYTES)
    found = [f"{insn.mnemonic} {insn.op_str}".strip() for insn in
             capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64).disasm(stub, 0)]
    assert found[:2] == ["lea r13, [rip]", "jmp qword ptr [r14]"]
    assert all(arena.read(arena.stub(number), STUB_BYTES) == stub for number in range(64))
    arena.close()


def test_an_arena_needs_room_for_units() -> None:
    with pytest.raises(ValueError, match="no room"):
        Arena(8192, 256, b"")
