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

from vmm.bt import control, emit, exits, jumps, shape
from vmm.bt.decode import Instruction, Truncated, decode
from vmm.bt.mode import Mode
from vmm.bt.template import Ending, Template
from vmm.bt.unit import Mark, Piece

#: instructions of a unit
LONGEST_UNIT = 12
#: entries of the trie, and steps; what a guest can make us keep is bounded
_ENTRIES = 20_000


class Draft(NamedTuple):
    """A unit not placed yet: its instructions, and the jumps to be given their targets."""

    eip: int
    host: bytearray
    #: its pieces (`vmm.bt.shape`)
    shape: bytes
    #: how the host code is cut (`vmm.bt.template.Leaving`), from its beginning on: a hint for the verifier
    cuts: bytes
    #: its direct jumps (`vmm.bt.exits`)
    packed_exits: int

    @property
    def guest_bytes(self) -> int:
        """Length of its guest instructions."""
        return shape.guest_bytes(self.shape)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Its guest instructions."""
        return shape.pieces(self.shape)

    @property
    def exits(self) -> tuple[exits.Exit, ...]:
        """Its direct jumps."""
        return exits.unpack(self.packed_exits, self.eip)


class _Step(NamedTuple):
    """What to do about a form: `head` and the guest's last `tail` bytes; or what `special` says."""

    length: int
    head: bytes
    tail: int
    #: its piece; of a special one, the first byte of that
    piece: bytes
    cut: bytes
    special: Template | Ending | None


class Translator:
    """Translates code for one mode.

    What to do about an instruction is found by its first two bytes at once, which are all that most have
    before a displacement or immediate; where more of them matter, there is a dict by the next one instead.
    """

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self._steps: dict[bytes, Any] = {}
        self._known: dict[Instruction, _Step] = {}
        self._entries = 0

    def translate(self, code: bytes, at: int, eip: int, simulated: Collection[int] = (),
                  longest: int = LONGEST_UNIT) -> Draft:
        """The unit that begins at `code[at]`, whose guest address is `eip`.

        It ends early where `code` does; Truncated if that is within its first instruction.  Instructions at
        the offsets `simulated` are left to the monitor, whatever they are.
        """
        steps, start, size = self._steps, at, len(code)
        host, pieces, cuts = b"", b"", b""
        ending: Ending | None = None
        length = 0
        for _ in range(longest):
            try:
                step = steps[code[at:at + 2]]
                if step.__class__ is dict:
                    here = at + 2
                    while step.__class__ is dict:
                        step = step[code[here]]
                        here += 1
            except (KeyError, IndexError):
                try:
                    step = self._learn(code, at)
                except Truncated:
                    if at == start:
                        raise
                    break
            length, head, tail, piece, cut, special = step
            if simulated and at in simulated:
                special, piece = control.SIMULATED, shape.pack(Mark.SIMULATED, length, 0)[:1]
            if special is not None:
                if special.__class__ is Ending:
                    ending = special
                    break
                made = special.emit(code, at)
                if made is None:
                    ending, piece = control.CALLOUT, shape.pack(Mark.CALLOUT, length, 0)[:1]
                    break
                host += made
                pieces += piece + bytes((len(made),))
                at += length
                continue
            at += length
            host += head + code[at - tail:at] if tail else head
            pieces += piece
            cuts += cut
        if ending is not None and at + length > size:
            ending = None
            if at == start:
                raise Truncated
        elif at > size:
            # the last instruction is not all there
            at -= length
            if at == start:
                raise Truncated
            pieces, cuts = pieces[:-2], b""
            host = host[:sum(pieces[1::2])]
        here = eip + at - start & 0xFFFF_FFFF
        if ending is None:
            jump, leaving, cut = jumps.go(eip, here, len(host))
        else:
            jump, leaving, cut = ending.emit(code, at, here, len(host))
            pieces += piece + bytes((len(jump),))
        return tuple.__new__(Draft, (eip, bytearray(host + jump), pieces, cuts + cut, leaving))

    def _learn(self, code: bytes, at: int) -> _Step:
        """What to do about the form of an instruction.  Raises Truncated."""
        form = decode(code, at, self.mode.code32)
        step = self._known.get(form)
        if self._entries >= _ENTRIES:
            self._steps.clear()
            self._known.clear()
            self._entries = 0
        if step is None:
            step = self._known[form] = self._work_out(form)
        # up to its displacement or immediate, whatever is there
        path = code[at:at + min(where for where in (form.disp_at, form.imm_at, form.length) if where >= 0)]
        node: dict[Any, Any] = self._steps
        key: Any = code[at:at + 2]
        for byte in path[2:]:
            node = node.setdefault(key, {})
            key = byte
        node[key] = step
        self._entries += len(path)
        return step

    def _work_out(self, form: Instruction) -> _Step:
        found: Template | Ending | None = None
        if self.mode.translated:
            found = emit.build(form, self.mode) or control.build(form, self.mode)
        if isinstance(found, Template) and found.emit is None:
            mark, head, tail_at, _ = found
            tail = form.length - tail_at
            host_bytes = len(head) + tail
            return _Step(form.length, head, tail, shape.pack(mark, form.length, host_bytes),
                         bytes((len(head),)), None)
        found = found or control.CALLOUT
        return _Step(form.length, b"", 0, shape.pack(found.mark, form.length, 0)[:1], b"", found)


def callout(eip: int, guest_bytes: int) -> Draft:
    """A unit that leaves its one instruction to the monitor."""
    host, leaving, cuts = jumps.callout(eip, 0)
    return Draft(eip, bytearray(host), shape.pack(Mark.CALLOUT, guest_bytes, len(host)), cuts, leaving)


def bridge(eip: int) -> Draft:
    """A jump to `eip` through the table, of no instruction's."""
    host = jumps.far(eip)
    return Draft(eip, bytearray(host), shape.pack(Mark.JMP, 0, len(host)), b"", 0)
