# SPDX-License-Identifier: GPL-2.0-or-later
"""Simulation of moves that would trap again and again: the paper's adaptive binary translation.

A move to a traced page, or to and from a device's page, costs a fault and more each time it runs as it is.
One that does so often is left to the monitor from then on, which carries it out with the trace in place; when
it has stopped meeting such pages for a while it becomes itself again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from vmm.bt.cache import TranslationCache
from vmm.bt.codepage import CodePage
from vmm.bt.decode import Instruction
from vmm.bt.shadow import Device, Shadow
from vmm.bt.table import Map
from vmm.bt.views import View
from vmm.silicon import layout as at
from vmm.x86.flags import MASK32

if TYPE_CHECKING:
    from vmm.bt.processor import TranslatingProcessor

#: traps of one instruction after which it is simulated, and simulations in vain after which it no longer is
PROMOTE, DEMOTE = 16, 64
_MOST_COUNTED = 4096


class Move(NamedTuple):
    """A move the monitor can carry out."""

    store: bool
    #: bytes in memory; 0: the operand size
    size: int
    #: what is stored: a register, AL or eAX, an immediate
    source: str = "register"
    signed: bool = False
    #: a load fills the whole register
    extends: bool = False


_MOVES: dict[tuple[Map, int], Move] = {
    (Map.ONE_BYTE, 0x88): Move(True, 1),
    (Map.ONE_BYTE, 0x89): Move(True, 0),
    (Map.ONE_BYTE, 0xC6): Move(True, 1, "immediate"),
    (Map.ONE_BYTE, 0xC7): Move(True, 0, "immediate"),
    (Map.ONE_BYTE, 0xA2): Move(True, 1, "accumulator"),
    (Map.ONE_BYTE, 0xA3): Move(True, 0, "accumulator"),
    (Map.ONE_BYTE, 0x8A): Move(False, 1),
    (Map.ONE_BYTE, 0x8B): Move(False, 0),
    (Map.ONE_BYTE, 0xA0): Move(False, 1, "accumulator"),
    (Map.ONE_BYTE, 0xA1): Move(False, 0, "accumulator"),
    (Map.TWO_BYTE, 0xB6): Move(False, 1, extends=True),
    (Map.TWO_BYTE, 0xB7): Move(False, 2, extends=True),
    (Map.TWO_BYTE, 0xBE): Move(False, 1, signed=True, extends=True),
    (Map.TWO_BYTE, 0xBF): Move(False, 2, signed=True, extends=True),
}


def move_of(form: Instruction) -> Move | None:
    """What kind of move an instruction is; None if it is none that is simulated."""
    if form.memory is None or form.mod == 3 or form.addrsize != 4:
        return None
    return _MOVES.get((form.map, form.opcode))


def _read_register(q: memoryview, number: int, size: int) -> int:
    if size == 1 and number >= 4:
        return q[number - 4] >> 8 & 0xFF
    return q[number] & (1 << 8 * size) - 1


def _write_register(q: memoryview, number: int, size: int, value: int) -> None:
    if size == 1:
        shift = 8 if number >= 4 else 0
        number &= 3
        q[number] = q[number] & ~(0xFF << shift) & MASK32 | (value & 0xFF) << shift
    elif size == 2:
        q[number] = q[number] & 0xFFFF_0000 | value & 0xFFFF
    else:
        q[number] = value & MASK32


class Simulator:
    """Moves of one guest that are carried out by its monitor."""

    def __init__(self, vcpu: TranslatingProcessor, shadow: Shadow, cache: TranslationCache) -> None:
        self._vcpu = vcpu
        self._shadow = shadow
        self._cache = cache
        self._traps: dict[tuple[CodePage, int], int] = {}
        self._in_vain: dict[tuple[CodePage, int], int] = {}

    def trapped(self, page: CodePage, offset: int, form: Instruction) -> bool:
        """An instruction was trapped; whether it is retranslated as a simulation from now on."""
        key = page, offset
        if len(self._traps) >= _MOST_COUNTED:
            self._traps.clear()
        count = self._traps[key] = self._traps.get(key, 0) + 1
        if count < PROMOTE or move_of(form) is None:
            return False
        del self._traps[key]
        self._cache.simulate(page, offset, True)
        return True

    def settle(self, page: CodePage, offset: int, useful: bool) -> bool:
        """A simulation was carried out; whether the instruction is translated as itself from now on."""
        key = page, offset
        if useful:
            self._in_vain.pop(key, None)
            return False
        count = self._in_vain[key] = self._in_vain.get(key, 0) + 1
        if count < DEMOTE:
            return False
        del self._in_vain[key]
        self._cache.simulate(page, offset, False)
        return True

    def carry_out(self, form: Instruction, code: bytes, view: View, user: bool) -> bool | None:
        """Do the move at EIP, registers being in the register file: whether it met a trace or a device.

        None when it is not of the kind, nothing having happened.  Raises GuestFault, OutOfFrames.
        """
        move = move_of(form)
        vcpu = self._vcpu
        if move is None or not vcpu.modes.spans(form.segment):
            return None
        q = vcpu.q
        size = move.size or form.opsize
        address = form.displacement(code, 0)
        if form.base >= 0:
            address += q[form.base]
        if form.index >= 0:
            address += q[form.index] * form.scale
        address = address + q[at.SEGMENTS + 3 * form.segment + 1] & MASK32
        if address & 0xFFF > 0x1000 - size:
            return None
        if move.store:
            if move.source == "immediate":
                value = form.immediate(code, 0) & (1 << 8 * size) - 1
            else:
                value = _read_register(q, form.reg if move.source == "register" else 0, size)
            useful = self._store(view, user, address, size, value)
        else:
            value, useful = self._load(view, user, address, size)
            if move.signed and value >> 8 * size - 1:
                value -= 1 << 8 * size
            number = form.reg if move.source == "register" else 0
            _write_register(q, number, form.opsize if move.extends else size, value)
        q[at.RIP] = q[at.RIP] + form.length & MASK32
        return useful

    def _store(self, view: View, user: bool, address: int, size: int, value: int) -> bool:
        shown = view.window.pages.get(address >> 12)
        if shown is not None and shown & 1:
            place = shown >> 1 << 12 | address & 0xFFF
            self._vcpu.linear.view[place:place + size] = value.to_bytes(size, "little")
            return False
        try:
            source = self._shadow.locate(user, address, True)
            if self._shadow.store_traced(source, address & 0xFFF, value.to_bytes(size, "little")):
                return True
            self._vcpu.memory.write(source << 12 | address & 0xFFF, value.to_bytes(size, "little"))
            return False
        except Device as device:
            self._vcpu.mmio_write(device.gpa, size, value)
            return True

    def _load(self, view: View, user: bool, address: int, size: int) -> tuple[int, bool]:
        shown = view.window.pages.get(address >> 12)
        if shown is None:
            try:
                self._shadow.fill(user, address, False)
            except Device as device:
                return self._vcpu.mmio_read(device.gpa, size), True
            shown = view.window.pages[address >> 12]
        place = shown >> 1 << 12 | address & 0xFFF
        return int.from_bytes(self._vcpu.linear.view[place:place + size], "little"), False
