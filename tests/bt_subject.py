# SPDX-License-Identifier: GPL-2.0-or-later
"""Examples translated and run, on either CPU for translated code: what is judged."""

from __future__ import annotations

import time

from tests.bt_example import (
    CODE,
    CODE_BYTES,
    CODE_SELECTOR,
    DATA,
    DATA_BYTES,
    DS_SELECTOR,
    FLAT_SELECTOR,
    FS_SELECTOR,
    GS_SELECTOR,
    INT3,
    WRITABLE_BYTES,
    Bases,
    Example,
    Outcome,
    State,
)
from tests.bt_guest import Guest, PageFault, Stop
from vmm.bt.cache import TranslationCache
from vmm.bt.codepage import CodePage
from vmm.bt.decode import CS, DS, ES, FS, GS, SS, Instruction, decode
from vmm.bt.engine import CPUS, CpuKind
from vmm.bt.mode import ALL_SEGMENTS, Mode
from vmm.bt.native.block import LIVE_FLAGS
from vmm.bt.native.windows import MappingBudget
from vmm.memory.pool import PAGE, PAGE_SHIFT, Pool
from vmm.x86.faults import Vector
from vmm.x86.flags import RFLAGS_DF, RFLAGS_IF

#: an example that goes round in circles is given up
_PATIENCE_NS = 3_000_000
_LIMIT = 30
_ARENA_BYTES, _STUBS = 2 << 20, 16384
_CODE_PAGES = range(CODE >> PAGE_SHIFT, CODE + CODE_BYTES >> PAGE_SHIFT)
_SELECTORS = ((CS, CODE_SELECTOR), (SS, FLAT_SELECTOR), (ES, FLAT_SELECTOR), (FS, FS_SELECTOR),
              (GS, GS_SELECTOR))


def _mode(bases: Bases) -> Mode:
    based = sum(1 << segment for segment, base in zip((FS, GS, DS), bases) if base)
    return Mode(flat=ALL_SEGMENTS & ~based, based=based, user=True)


class Subject(Guest):
    """A guest at CPL 3, on a CPU of our choice, whose memory is that of the examples."""

    def __init__(self, kind: CpuKind = "native") -> None:
        self.cpu = CPUS[kind](_ARENA_BYTES, _STUBS)
        self.pool = Pool(DATA + DATA_BYTES)
        self.window = self.cpu.new_window(self.pool, MappingBudget())
        self.table = self.cpu.new_table()
        self.cache = TranslationCache(self.cpu.arena)
        self.cache.tables.append(self.table)
        self.code: dict[tuple[Mode, int], CodePage] = {}
        self.block = self.cpu.new_block()
        self.block.set("window", self.window.base)
        self.block.set("jump_table", self.table.base)
        for segment, selector in _SELECTORS:
            self.block.set("selector", selector, segment)
        self.block.set("interrupt_flag", RFLAGS_IF)
        self.memory = self.pool.view
        self.memory[CODE:CODE + CODE_BYTES] = bytes([INT3]) * CODE_BYTES
        for address, size, writable in ((CODE, CODE_BYTES, False), (DATA, WRITABLE_BYTES, True),
                                        (DATA + WRITABLE_BYTES, DATA_BYTES - WRITABLE_BYTES, False)):
            page = address >> PAGE_SHIFT
            self.window.map(page, page, size >> PAGE_SHIFT, writable)
        self.cpu.prepare()
        self._modes: dict[Bases, Mode] = {}
        self._soil = b""
        self._missing = 0

    def fetch(self, page: int) -> bytes:
        if page not in _CODE_PAGES:
            self._missing = page << PAGE_SHIFT
            raise PageFault
        return bytes(self.memory[page << PAGE_SHIFT:(page << PAGE_SHIFT) + PAGE])

    def sow(self, soil: bytes) -> None:
        """What the data of the examples to come are taken from."""
        self._soil = soil

    def execute(self, example: Example) -> Outcome | None:
        """What becomes of an example; None if it does not end."""
        stop = self._run(example)
        self._forget(example)
        return self._outcome(stop)

    def translated(self, example: Example) -> list[Instruction]:
        """The instructions of an example that are translated: those executed, and more."""
        self._run(example)
        found = [decode(unit.guest, piece.guest_at, True)
                 for unit in self.cache.units() if unit.guest for piece in unit.pieces]
        self._forget(example)
        return found

    def _run(self, example: Example) -> Stop:
        memory, block, state = self.memory, self.block, example.state
        memory[DATA:DATA + DATA_BYTES] = self._soil[example.data_from:example.data_from + DATA_BYTES]
        memory[example.eip:example.eip + len(example.code)] = example.code
        self.registers = list(state.registers)
        block.set("flags", state.flags)
        block.set("direction", state.flags & RFLAGS_DF)
        block.load_fx(state.fx)
        for segment, base in zip((FS, GS, DS), example.bases):
            block.set("segment_base", base, segment)
        block.set("selector", DS_SELECTOR if example.bases.ds else FLAT_SELECTOR, DS)
        self.cpu.timer.at(time.monotonic_ns() + _PATIENCE_NS)
        return self.run(example.eip, self._mode(example.bases), _LIMIT)

    def _forget(self, example: Example) -> None:
        self.memory[example.eip:example.eip + len(example.code)] = bytes([INT3]) * len(example.code)
        for number in _CODE_PAGES:
            self.table.drop_page(number)
        for page in self.code.values():
            self.cache.forget(page)
        self.code.clear()

    def _mode(self, bases: Bases) -> Mode:
        mode = self._modes.get(bases)
        if mode is None:
            mode = self._modes[bases] = _mode(bases)
        return mode

    def _outcome(self, stop: Stop) -> Outcome | None:
        vector, address, access = stop.vector, 0, ""
        match stop.why:
            case "limit":
                return None
            case "callout":
                vector = Vector.BP
            case "fetch":
                vector, address, access = Vector.PF, max(self._missing, stop.eip), "fetch"
            case "fault" if vector == Vector.PF:
                address, access = stop.address, "write" if stop.error & 2 else "read"
        block = self.block
        return Outcome(stop.eip, vector, address, access,
                       State(tuple(self.registers), block.get("flags") & LIVE_FLAGS, bytes(block.fx)),
                       bytes(self.memory[DATA:DATA + WRITABLE_BYTES]))
