# SPDX-License-Identifier: GPL-2.0-or-later
"""What is known about the translation of an instruction before its displacement and immediate are.

Forms of instructions are few (`vmm.bt.decode`), so the host code of each is worked out once and kept as a
template, which a translation fills in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from vmm.bt.decode import Instruction
from vmm.bt.exits import Exit
from vmm.bt.mode import Mode
from vmm.bt.unit import Mark

#: host code in parts: whole instructions but for the last one's displacement or immediate, if that may be
#: anything; that displacement or immediate, or nothing; and so on.  The verifier knows the former again
Parts: TypeAlias = tuple[bytes, ...]


class Template(NamedTuple):
    """Host code: `head`, then the guest's bytes from `tail_at` on; or what `emit` makes of the guest's.

    `emit` may find that the monitor has to execute the instruction, and yields None then.
    """

    mark: Mark
    head: bytes
    tail_at: int
    emit: Callable[[bytes, int], Parts | None] | None = None


#: host code, and its direct jumps
Leaving: TypeAlias = tuple[Parts, tuple[Exit, ...]]


class Ending(NamedTuple):
    """Host code of the instruction that ends a unit, from where it is and from its address."""

    mark: Mark
    emit: Callable[[bytes, int, int], Leaving]


#: makes the template of a form; None when the monitor has to execute the instruction
Builder: TypeAlias = Callable[[Instruction, Mode], Template | None]
EndingBuilder: TypeAlias = Callable[[Instruction, Mode], Ending | None]

#: jmp rel32
JMP = b"\xE9"
#: room for a displacement that the cache fills in
REL32 = bytes(4)


def fixed(mark: Mark, form: Instruction, code: bytes) -> Template:
    """Host code in which nothing of the guest's appears."""
    return Template(mark, code, form.length)


def spliced(mark: Mark, form: Instruction, before: bytes, middle: bytes = b"", after: bytes = b"",
            immediate: bool = True) -> Template:
    """`before`, the displacement, `middle`, the immediate (if wanted), `after`."""
    disp, disp_end = (form.disp_at, form.disp_at + form.disp_size) if form.disp_size else (0, 0)
    imm, imm_end = (form.imm_at, form.imm_at + form.imm_size) if immediate and form.imm_size else (0, 0)
    if not middle and not after and (immediate or not form.imm_size):
        return Template(mark, before, form.length - form.disp_size - form.imm_size)

    def emit(code: bytes, at: int) -> Parts:
        first, second = code[at + disp:at + disp_end], code[at + imm:at + imm_end]
        if not middle:
            return before, first + second, after, b""
        return before, first, middle, second, after, b""
    return Template(mark, b"", 0, emit)
