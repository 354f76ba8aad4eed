# SPDX-License-Identifier: GPL-2.0-or-later
"""The translator: a run of guest instructions becomes the host code of a unit (the paper's section 3.1).

    draft = Translator(mode).translate(code, at, eip)

A unit is at most 12 instructions, or up to the one that transfers control or that the monitor has to
execute, or up to the end of the page: what follows it there, only the guest's page tables say.  What the
draft leaves open is where its direct jumps go, and so it can be put anywhere.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from vmm.bt import control, emit, jumps, shape
from vmm.bt.decode import LONGEST, Instruction, Truncated, decode
from vmm.bt.exits import Exit
from vmm.bt.mode import Mode
from vmm.bt.template import Ending, Template
from vmm.bt.unit import Mark, Piece

#: instructions of a unit
LONGEST_UNIT = 12
#: and bytes
_MOST_BYTES = LONGEST_UNIT * LONGEST
#: entries of the trie, and steps; what a guest can make us keep is bounded
_ENTRIES = 20_000


class Draft(NamedTuple):
    """A unit not placed yet: its instructions, and the jumps to be given their targets."""

    eip: int
    #: its host code, as in `vmm.bt.template`
    parts: list[bytes]
    #: its pieces (`vmm.bt.shape`)
    shape: bytes
    #: its direct jumps
    exits: tuple[Exit, ...]

    @property
    def host(self) -> bytes:
        """Its host code, whose jumps lead nowhere yet."""
        return b"".join(self.parts)

    @property
    def guest_bytes(self) -> int:
        """Length of its guest instructions."""
        return shape.guest_bytes(self.shape)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Its guest instructions."""
        return shape.pieces(self.shape)


class _Step(NamedTuple):
    """What to do about a form: `head` and the guest's last `tail` bytes; or what `special` says."""

    length: int
    head: bytes
    tail: int
    piece: bytes
    special: Template | Ending | None


class Translator:
    """Translates code for one mode."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        #: a trie by the bytes before a displacement or immediate; its inner nodes are dicts
        self._steps: dict[int, Any] = {}
        self._entries = 0

    def translate(self, code: bytes, at: int, eip: int, simulated: Collection[int] = (),
                  longest: int = LONGEST_UNIT) -> Draft:
        """The unit that begins at `code[at]`, whose guest address is `eip`.

        It ends early where `code` does; Truncated if that is within its first instruction.  Instructions at
        the offsets `simulated` are left to the monitor, whatever they are.
        """
        steps, start = self._steps, at
        code = code[at:at + _MOST_BYTES]
        at, size = 0, len(code)
        parts: list[bytes] = []
        pieces: list[bytes] = []
        ending: Ending | None = None
        for _ in range(longest):
            try:
                step, here = steps[code[at]], at
                while type(step) is dict:
                    here += 1
                    step = step[code[here]]
            except (KeyError, IndexError):
                try:
                    step = self._learn(code, at)
                except Truncated:
                    if not at:
                        raise
                    break
            length, head, tail, piece, special = step
            if simulated and start + at in simulated:
                special, piece = control.SIMULATED, shape.pack(Mark.SIMULATED, length, 0)
            at += length
            if special is None:
                parts.append(head)
                parts.append(code[at - tail:at] if tail else b"")
                pieces.append(piece)
                continue
            if at > size:
                at -= length
                if not at:
                    raise Truncated
                break
            if isinstance(special, Ending):
                ending = special
                break
            assert isinstance(special, Template) and special.emit is not None
            made = special.emit(code, at - length)
            if made is None:
                ending, piece = control.CALLOUT, shape.pack(Mark.CALLOUT, length, 0)
                break
            parts += made
            pieces.append(piece[:1] + bytes((sum(map(len, made)),)))
        if ending is not None:
            pieces.append(piece)
            at -= length
            leaving, exits = ending.emit(code, at, eip + at & 0xFFFF_FFFF)
        else:
            if at > size:
                # the last instruction is not all there
                at -= length
                if not at:
                    raise Truncated
                del parts[-2:], pieces[-1:]
            leaving, exits = jumps.go(eip, eip + at & 0xFFFF_FFFF)
        parts += leaving
        return tuple.__new__(Draft, (eip, parts, b"".join(pieces), exits))

    def _learn(self, code: bytes, at: int) -> _Step:
        """What to do about the form of an instruction.  Raises Truncated."""
        form = decode(code, at, self.mode.code32)
        if self._entries >= _ENTRIES:
            self._steps.clear()
            self._entries = 0
        step = self._work_out(form)
        # up to its displacement or immediate, whatever is there
        path = code[at:at + min(where for where in (form.disp_at, form.imm_at, form.length) if where >= 0)]
        node = self._steps
        for byte in path[:-1]:
            node = node.setdefault(byte, {})
        node[path[-1]] = step
        self._entries += len(path)
        return step

    def _work_out(self, form: Instruction) -> _Step:
        found: Template | Ending | None = None
        if self.mode.translated:
            found = emit.build(form, self.mode) or control.build(form, self.mode)
        if isinstance(found, Template) and found.emit is None:
            mark, head, tail_at, _ = found
            tail = form.length - tail_at
            return _Step(form.length, head, tail, shape.pack(mark, form.length, len(head) + tail), None)
        found = found or control.CALLOUT
        return _Step(form.length, b"", 0, shape.pack(found.mark, form.length, 0), found)


def callout(eip: int, guest_bytes: int) -> Draft:
    """A unit that leaves its one instruction to the monitor."""
    parts, leaving = jumps.callout(eip)
    return Draft(eip, list(parts), shape.pack(Mark.CALLOUT, guest_bytes, 0), leaving)


def bridge(eip: int) -> Draft:
    """A jump to `eip` through the table, of no instruction's."""
    return Draft(eip, list(jumps.far(eip)), shape.pack(Mark.JMP, 0, 0), ())
