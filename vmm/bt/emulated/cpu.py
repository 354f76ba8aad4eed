# SPDX-License-Identifier: GPL-2.0-or-later
"""An emulated processor as a CPU for translated code: units run at its CPL 3, contained by page tables.

The reference for `vmm.bt.native`, and the way where the host's processor is not to be had.  Within reach of
translated code are the arena (to execute and read), a copy of the state block, and the window and the jump
table of the block it was entered with.

What a monitor may rely on after `enter` is what `vmm.bt.native.cpu` says.  This processor differs from the
host's in that it

    does not mind unaligned 16-byte operands, and never raises #XM
    leaves the last instruction and operand of the x87 out of its FXSAVE image
    may do half of a 16-byte store that faults on its second page
    has the flags of the last step when a repeated cmps or scas faults
    loses CF when rcl or rcr faults on storing, and all flags but ZF when cmpxchg8b is executed
"""

from __future__ import annotations

import time
from collections.abc import Callable

from vmm.bt.emulated import faults, jumptable, trampolines, window
from vmm.bt.emulated.arena import Arena
from vmm.bt.emulated.engine import EXECUTE, INTERRUPTED, INVALID_INSTRUCTION, READ, WRITE, Engine
from vmm.bt.emulated.jumptable import JumpTable
from vmm.bt.emulated.pagetables import DATA, ENTRIES, LEAF, WRITABLE, OwnMemory, Root, Space
from vmm.bt.emulated.window import Window
from vmm.bt.native.arena import STUB_BYTES
from vmm.bt.native.block import JUMP_TABLE, OFFSETS, RIP, TF, WINDOW, Block
from vmm.bt.native.cpu import DEFAULT_ARENA, DEFAULT_STUBS
from vmm.bt.native.jumptable import TABLE_BYTES
from vmm.bt.native.trampolines import FAULT, MISS, PREEMPTED
from vmm.bt.native.windows import MappingBudget
from vmm.memory.pool import PAGE_SHIFT, Pool
from vmm.silicon import layout as at
from vmm.silicon.guest import EngineFault
from vmm.silicon.kick import Kicker
from vmm.silicon.layout import SiliconError
from vmm.x86.faults import Vector
from vmm.x86.flags import RFLAGS_IF, RFLAGS_ONE

#: virtual addresses; what lies below the state block belongs to nobody, so that address 0 is a miss
_BLOCK, _ARENA = 1 << 30, 1 << 32
#: physical address of the arena, behind all page tables
_ARENA_PHYSICAL = 3 << 38

_FAULT_VECTOR, _FAULT_ERROR, _FAULT_ADDRESS = (
    OFFSETS[name] // 8 for name in ("fault_vector", "fault_error", "fault_address"))
#: of the block, besides the FPU, what translated code is given, and what is taken back from it
_GIVEN = slice(0, OFFSETS["single_step"])
_TAKEN = slice(OFFSETS["system_flags"], OFFSETS["rip"])
_FX = slice(OFFSETS["fx"], OFFSETS["fx"] + 512)
_R13 = 13
_NO_EXCEPTION = 0xFFFF_FFFF
#: error codes of #PF: CPL 3 read where there is no page; the bit for writes
_READ_ABSENT, _WRITE = 4, 2

#: the TLB is flushed at intervals that double from the first to the second: only then it is resized
_TLB_FIRST_NS, _TLB_LONGEST_NS = 5_000_000, 1_000_000_000


class EmulatedCpu:
    """An arena, the processor that runs what is in it, and the timer that makes guests leave.

    Raises SiliconError where Unicorn is not the one whose inside we know.
    """

    def __init__(self, arena_bytes: int = DEFAULT_ARENA, stubs: int = DEFAULT_STUBS) -> None:
        self._engine = engine = Engine(self._on_exception)
        self._q, self._d = engine.q, engine.d
        #: kicks; see vmm.silicon.kick
        self.timer = engine.kicker
        self._root = Root(OwnMemory(lambda physical, length, address: engine.provide(
            physical, length, address, READ | WRITE)))
        code = trampolines.build(_BLOCK)
        self.arena = Arena(arena_bytes, stubs, code.code, _ARENA)
        self._registers, self._leave, self._pause, self._left = (
            _ARENA + code.labels[name] for name in ("registers", "leave", "pause", "left"))
        self._marks = {why: self.arena.origin + why * STUB_BYTES for why in (FAULT, MISS, PREEMPTED)}
        self._shared = self._own_space()
        self._window_places, self._table_places = window.places(), jumptable.places()
        self._pool: Pool | None = None
        #: the guest on the CPU, and its last exception
        self._block: Block | None = None
        self._vector = -1
        self._failure: EngineFault | None = None
        #: the image of what the FPU holds, where that is known
        self._fx = b""
        #: a kick met the guest on its way out: the next entry gives up
        self._kicked = False
        self._tlb_due, self._tlb_interval = 0, _TLB_FIRST_NS
        engine.go_to_user_mode(self._root.physical)
        self._verify()

    def _own_space(self) -> memoryview:
        """Map the arena and the page of the state block; the bytes of the latter."""
        arena = self.arena
        self._engine.provide(_ARENA_PHYSICAL, arena.size, arena.address, READ | EXECUTE)
        space = Space(self._root, 0)
        for page in range(arena.size >> PAGE_SHIFT):
            number = (_ARENA >> PAGE_SHIFT) + page
            space.leaf(number)[number & ENTRIES - 1] = _ARENA_PHYSICAL + (page << PAGE_SHIFT) | LEAF
        block = self._root.memory.take()
        number = _BLOCK >> PAGE_SHIFT
        space.leaf(number)[number & ENTRIES - 1] = block.physical | DATA | WRITABLE
        self._root.pin(space)
        return block.q.cast("B")

    def _verify(self) -> None:
        """The engine keeps what the last exception was where we reset it, and heeds kicks."""
        block = self.new_block()
        seen = []
        for previous in (Vector.PF, _NO_EXCEPTION):
            self._d[self._engine.place.old_exception] = previous
            seen.append((self.enter(block, 0), self._vector))
        self.kick()
        seen.append((self.enter(block, 0), self._vector))
        block.close()
        if seen != [(MISS, Vector.DF), (MISS, Vector.PF), (PREEMPTED, Vector.GP)]:
            raise SiliconError(f"the emulated processor does not stop as it should: {seen}")

    def new_block(self) -> Block:
        """A state block for guests whose units are in this CPU's arena."""
        block = Block()
        block.set("exit", self._leave)
        return block

    def new_window(self, pool: Pool, budget: MappingBudget,
                   evicted: Callable[[list[int]], None] = lambda pages: None) -> Window:
        """An empty window over frames of `pool`; `evicted` hears of pages unmapped for the budget's sake.

        All windows of a CPU show the same pool: ValueError otherwise.
        """
        if self._pool is None:
            self._engine.provide(0, pool.size, pool.base, READ | WRITE)
            self._pool = pool
        if pool is not self._pool:
            raise ValueError("the windows of an emulated CPU show one pool")
        return Window(self._root, self._window_places, budget, evicted)

    def new_table(self, limit: int = 1024) -> JumpTable:
        """An empty jump table of at most `limit` pages."""
        return JumpTable(self._root, self._table_places, limit)

    def prepare(self) -> None:
        """Before a slice: now and then, let the TLB grow to what the guest uses."""
        now = time.monotonic_ns()
        if now >= self._tlb_due:
            self._root.stale = True
            self._tlb_due = now + self._tlb_interval
            self._tlb_interval = min(2 * self._tlb_interval, _TLB_LONGEST_NS)

    # -- entering and leaving ----------------------------------------------------------------------

    def enter(self, block: Block, address: int) -> int:
        """Run the guest from `address`; the number of the stub it left by, or FAULT, MISS, PREEMPTED."""
        if not self._load(block, address):
            return PREEMPTED
        return self._taken(block)

    def step(self, block: Block, address: int) -> int:
        """Run one host instruction of the guest, then FAULT with vector 1 (#DB); or as `enter`.

        A jump to a stub leaves by it.  So a preempted guest is brought to the end of its instruction.
        """
        loaded = self._load(block, self._pause)
        block.q[RIP] = address
        if not loaded:
            return PREEMPTED
        self._q[at.RFLAGS] |= TF
        self._run(block, address)
        return self._taken(block)

    def _load(self, block: Block, address: int) -> bool:
        """Bring the guest in and run it from `address` until it is out; False if it was not even entered."""
        q, root = block.q, self._root
        q[RIP] = address
        if self._kicked:
            self._kicked = False
            return False
        if (q[WINDOW], q[JUMP_TABLE]) != root.shown:
            root.show(q[WINDOW], q[JUMP_TABLE])
            self._q[at.GS + 1] = q[WINDOW]
        if self.arena.changed:
            self._forget_changed()
        if root.stale:
            root.stale = False
            self._engine.flush_tlb()
        # the engine's cmpxchg8b can leave an operand where the flags are: with IF clear no kick would come
        self._q[at.RFLAGS] = RFLAGS_IF | RFLAGS_ONE
        self._block = block
        self._shared[_GIVEN] = block.view[_GIVEN]
        fx = bytes(block.fx)
        if fx == self._fx:
            return self._run(block, self._registers)
        self._fx = b""
        self._shared[_FX] = fx
        return self._run(block, _ARENA)

    def _taken(self, block: Block) -> int:
        """Give the guest, which is out, back to its block; why it left."""
        block.view[_TAKEN] = self._shared[_TAKEN]
        self._fx = bytes(self._shared[_FX])
        block.fx[:] = self._fx
        return self._q[_R13] - self.arena.origin >> 4

    def _forget_changed(self) -> None:
        for start, end in self.arena.changed:
            self._engine.forget(start, end)
        self.arena.changed.clear()

    def _run(self, block: Block, address: int) -> bool:
        """Run from `address` until the guest is out; False if it was kicked before it was in."""
        q = self._q
        error = self._engine.run(address)
        if q[at.RIP] == self._left and not error:
            return True
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if error == INVALID_INSTRUCTION and 0 <= q[at.RIP] - self.arena.units < self.arena.units_bytes:
            self._note(block, Vector.UD, 0, 0)
            return self._run(block, self._leave)
        if error or not _ARENA <= q[at.RIP] < self._leave:
            raise EngineFault(f"stopped at rip {q[at.RIP]:#x}, Unicorn's error {error}")
        return False

    def _leave_with(self, why: int) -> None:
        """Let the guest leave, r13 saying why."""
        q = self._q
        q[at.RFLAGS] &= ~TF
        q[_R13] = self._marks[why]
        q[at.RIP] = self._leave

    def _note(self, block: Block, vector: int, error: int, address: int) -> None:
        """The guest leaves because of a fault at rip."""
        q = block.q
        q[RIP] = self._q[at.RIP]
        q[_FAULT_VECTOR], q[_FAULT_ERROR], q[_FAULT_ADDRESS] = vector, error, address
        self._leave_with(FAULT)

    def _on_exception(self, vector: int) -> None:
        """The registers are live, RIP where the exception struck; what is in it then is where to go on."""
        q, place, arena, block = self._q, self._engine.place, self.arena, self._block
        self._d[place.old_exception] = _NO_EXCEPTION
        self._d[place.is_int] = 0
        self._vector = vector
        rip, error = q[at.RIP], self._d[place.error_code]
        if vector == Vector.GP and error & INTERRUPTED:
            self._interrupted(rip)
        elif 0 <= rip - arena.units < arena.units_bytes and block is not None:
            address = q[at.CR + 2]
            if (vector == Vector.PF and error == _READ_ABSENT
                    and 0 <= address - self._root.shown[1] < TABLE_BYTES):
                self._leave_with(MISS)
                return
            if vector == Vector.PF:
                error = self._page_fault(arena.read(rip, 16), error)
            self._note(block, vector, error, address)
        elif rip == 0:
            self._leave_with(MISS)
        elif vector == Vector.DB:
            q[at.RFLAGS] &= ~TF     # a step to a stub: go on, and leave by it
        else:
            self._failure = EngineFault(f"exception {vector} outside the units, at rip {rip:#x}")
            self._engine.stop()

    def _page_fault(self, code: bytes, error: int) -> int:
        """The error code as a processor has it; flags are put right, too."""
        form = faults.translated(code)
        if faults.has_computed_flags(form, self._d[at.CC_OP]):
            self._d[at.CC_OP] = faults.CC_OP_EFLAGS
        return error | _WRITE if faults.writes(form) else error

    def _interrupted(self, rip: int) -> None:
        """A kick."""
        block = self._block
        if 0 <= rip - self.arena.units < self.arena.units_bytes and block is not None:
            block.q[RIP] = rip
            self._leave_with(PREEMPTED)
        elif _ARENA <= rip < self._leave:
            self._engine.stop()
        else:
            self._kicked = True

    def kick(self) -> None:
        """Make the next entry give up (for signal handlers of Python's, and tests)."""
        self._engine.kick()

    def forget_kick(self) -> None:
        """A kick that came while no guest ran has been seen to."""
        self._kicked = False
        self._engine.forget_kick()

    def join(self, kicker: Kicker) -> None:
        """What stops the silicon of the monitor is a kick for this processor, too."""
        kicker.precede(self._engine.kicker.handler, self.forget_kick)

    def close(self) -> None:
        """Give the timer back; the arena goes with the processor."""
        self._engine.close()
        self.arena.close()
