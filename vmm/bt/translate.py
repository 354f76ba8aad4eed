# SPDX-License-Identifier: GPL-2.0-or-later
"""The translator: a run of guest instructions becomes the host code of a unit (the paper's section 3.1).

    draft = Translator(mode).translate(code, at, eip)

A unit is at most 12 instructions, or up to the one that transfers control or that the monitor has to
execute, or up to the end of the page: what follows it there, only the guest's page tables say.  What the
draft leaves open is where its direct jumps go, and so it can be put anywhere.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from vmm.bt import control, emit, jumps
from vmm.bt.decode import Instruction, Truncated, decode
from vmm.bt.mode import Mode
from vmm.bt.template import Code, Ending, Exit, Template
from vmm.bt.unit import Mark, Piece

#: instructions of a unit
LONGEST_UNIT = 12
#: templates kept; what a guest can make us keep is bounded
_TEMPLATES = 20_000


class Draft(NamedTuple):
    """A unit not placed yet: its instructions, and the jumps to be given their targets."""

    eip: int
    guest_bytes: int
    host: bytearray
    pieces: tuple[Piece, ...]
    exits: tuple[Exit, ...]


class Translator:
    """Translates code for one mode."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self._templates: dict[Instruction, Template | Ending] = {}

    def translate(self, code: Code, at: int, eip: int, simulated: Collection[int] = (),
                  longest: int = LONGEST_UNIT) -> Draft:
        """The unit that begins at `code[at]`, whose guest address is `eip`.

        It ends early where `code` does; Truncated if that is within its first instruction.  Instructions at
        the offsets `simulated` are left to the monitor, whatever they are.
        """
        known, code32 = self._templates, self.mode.code32
        new = tuple.__new__         # twice as fast as calling Piece
        host = bytearray()
        pieces: list[Piece] = []
        add = pieces.append
        start = at
        exits: tuple[Exit, ...] | None = None
        for _ in range(longest):
            try:
                form = decode(code, at, code32)
            except Truncated:
                if at == start:
                    raise
                break
            template = known.get(form) or self._learn(form)
            if at in simulated:
                template = control.SIMULATED
            if isinstance(template, Template):
                mark, head, tail_at, build = template
                if build is None:
                    add(new(Piece, (at - start, len(host), mark)))
                    host += head
                    end = at + form.length
                    host += code[at + tail_at:end]
                    at = end
                    continue
                made = build(code, at)
                if made is not None:
                    add(new(Piece, (at - start, len(host), mark)))
                    host += made
                    at += form.length
                    continue
                template = control.CALLOUT
            add(Piece(at - start, len(host), template.mark))
            added, exits = template.emit(code, at, eip + at - start & 0xFFFF_FFFF, len(host))
            host += added
            at += form.length
            break
        if exits is None:
            jump, exits = jumps.go(eip, eip + at - start & 0xFFFF_FFFF, len(host))
            host += jump
        return Draft(eip, at - start, host, tuple(pieces), exits)

    def _learn(self, form: Instruction) -> Template | Ending:
        template: Template | Ending | None = None
        if self.mode.translated:
            template = emit.build(form, self.mode) or control.build(form, self.mode)
        if len(self._templates) >= _TEMPLATES:
            self._templates.clear()
        found = self._templates[form] = template or control.CALLOUT
        return found


def callout(eip: int, guest_bytes: int) -> Draft:
    """A unit that leaves its one instruction to the monitor."""
    host, exits = jumps.jump(eip, callout=True)
    return Draft(eip, guest_bytes, bytearray(host), (Piece(0, 0, Mark.CALLOUT),), exits)


def bridge(eip: int) -> Draft:
    """A jump to `eip` through the table, of no instruction's."""
    return Draft(eip, 0, bytearray(jumps.far(eip)), (Piece(0, 0, Mark.JMP),), ())
