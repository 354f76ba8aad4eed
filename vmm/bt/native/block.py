# SPDX-License-Identifier: GPL-2.0-or-later
"""The state block: what translated code, trampolines and signal handlers find through r14.

One page a vCPU.  The fields below 0x80 are those translated code may touch, in reach of a one-byte
displacement; the verifier has numbers of its own for them.  The rest belongs to the trampolines.
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from vmm.bt.native import memory


class Field(NamedTuple):
    """One field: its offset, its size in bytes, how many of them there are."""

    offset: int
    size: int
    length: int = 1


FIELDS: dict[str, Field] = {
    # for translated code
    "exit": Field(0x000, 8),                 # where stubs jump: the way back to the monitor
    "system_flags": Field(0x008, 4),         # the guest's EFLAGS but for the arithmetic flags, DF and IF
    "interrupt_flag": Field(0x00C, 4),       # the guest's IF, apart, so that cli and sti are one mov
    "interrupt_pending": Field(0x010, 4),    # non-zero: the monitor wants sti and popf to leave
    "segment_base": Field(0x018, 4, 6),      # ES CS SS DS FS GS
    "selector": Field(0x030, 4, 6),          # the same order
    "spill": Field(0x048, 4, 13),            # for the translator's passing needs
    "direction": Field(0x07C, 4),            # the guest's DF once more, for pushf
    # the guest's registers while it does not run: the low half of each, the upper half is always zero
    "rax": Field(0x080, 8), "rcx": Field(0x088, 8), "rdx": Field(0x090, 8), "rbx": Field(0x098, 8),
    "rsp": Field(0x0A0, 8), "rbp": Field(0x0A8, 8), "rsi": Field(0x0B0, 8), "rdi": Field(0x0B8, 8),
    "r8": Field(0x0C0, 8), "r9": Field(0x0C8, 8), "r10": Field(0x0D0, 8), "r11": Field(0x0D8, 8),
    "flags": Field(0x0E0, 8),                # arithmetic flags and DF
    "rip": Field(0x0E8, 8),                  # host address to enter at, and where a fault or a kick struck
    "window": Field(0x0F0, 8),               # base of the guest's linear window
    "jump_table": Field(0x0F8, 8),           # base of its jump table
    "single_step": Field(0x100, 8),          # EFLAGS.TF to enter with, or 0
    # the monitor's own while the guest runs
    "host_rsp": Field(0x108, 8),
    "host_mxcsr": Field(0x110, 4),
    "host_fcw": Field(0x114, 4),
    # the arena, for the signal handlers: constant
    "stub_origin": Field(0x118, 8),          # first stub + length of its lea: r13 of stub number 0
    "units": Field(0x120, 8), "units_bytes": Field(0x128, 8),
    "monitor_code": Field(0x130, 8), "monitor_code_bytes": Field(0x138, 8),    # trampolines and stubs
    "entering": Field(0x140, 8), "entering_bytes": Field(0x148, 8),        # where a kick stops an entry
    "abandon": Field(0x150, 8),
    # what the fault handler noted
    "fault_vector": Field(0x158, 8), "fault_error": Field(0x160, 8), "fault_address": Field(0x168, 8),
    "fx": Field(0x200, 512),                 # FXSAVE image of x87, MMX and SSE
}
OFFSETS: dict[str, int] = {name: field.offset for name, field in FIELDS.items()}

#: the flags that live in the host's while the guest runs: CF PF AF ZF SF DF OF
LIVE_FLAGS = 0xCD5
TF = 0x100

#: offsets of the registers in the order of their encoding, as indices of `Block.q`
REGISTERS = tuple(OFFSETS[name] // 8 for name in ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"))
R8 = OFFSETS["r8"] // 8
RIP = OFFSETS["rip"] // 8
FLAGS = OFFSETS["flags"] // 8
_FAULT_VECTOR = OFFSETS["fault_vector"] // 8         # followed by error and address
SINGLE_STEP = OFFSETS["single_step"] // 8
WINDOW, JUMP_TABLE = OFFSETS["window"] // 8, OFFSETS["jump_table"] // 8

_FCW_RESET, _MXCSR_RESET = 0x037F, 0x1F80
_MXCSR_OFFSET, _MXCSR_MASK = 24, 0xFFFF


class Fault(NamedTuple):
    """A fault of translated code: exception vector, error code, the address of #PF, where it struck."""

    vector: int
    error: int
    address: int
    rip: int


class Block:
    """The state block of one vCPU; `q`, `d` and `view` show it as quad words, double words and bytes."""

    def __init__(self) -> None:
        self.address = memory.reserve(memory.PAGE, memory.READ | memory.WRITE)
        #: what the trampoline is called with
        self.argument = ctypes.c_void_p(self.address)
        self.view = memory.view(self.address, memory.PAGE)
        self.q = self.view.cast("Q")
        self.d = self.view.cast("I")
        at = OFFSETS["fx"]
        self.fx = self.view[at:at + 512]
        self.fx[0:2] = _FCW_RESET.to_bytes(2, "little")
        self.fx[_MXCSR_OFFSET:_MXCSR_OFFSET + 4] = _MXCSR_RESET.to_bytes(4, "little")

    def set(self, name: str, value: int, index: int = 0) -> None:
        """Write a field by its name."""
        field = FIELDS[name]
        at = field.offset + index * field.size
        self.view[at:at + field.size] = value.to_bytes(field.size, "little")

    def get(self, name: str, index: int = 0) -> int:
        """Read a field by its name."""
        field = FIELDS[name]
        at = field.offset + index * field.size
        return int.from_bytes(self.view[at:at + field.size], "little")

    def load_fx(self, image: bytes) -> None:
        """Take x87, MMX and SSE state from an FXSAVE image; reserved bits of MXCSR are dropped."""
        self.fx[:] = image
        at = _MXCSR_OFFSET
        self.fx[at:at + 4] = (int.from_bytes(image[at:at + 4], "little") & _MXCSR_MASK).to_bytes(4, "little")

    def fault(self) -> Fault:
        """What the last fault was."""
        q = self.q
        return Fault(q[_FAULT_VECTOR], q[_FAULT_VECTOR + 1], q[_FAULT_VECTOR + 2], q[RIP])

    def close(self) -> None:
        """Give the page back; the block may not be used any more."""
        self.view = self.q = self.d = self.fx = memoryview(b"")
        memory.unmap(self.address, memory.PAGE)
