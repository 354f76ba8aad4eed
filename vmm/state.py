# SPDX-License-Identifier: GPL-2.0-or-later
"""MachineState: everything a guest is, apart from its memory, in terms of no particular engine.

A snapshot, a clone, a move between workers, a migration and a change of monitor all carry this value.
It is versioned; an unknown version or a malformed value is refused with `StateError`, never half loaded.

A state may come from a file or another host, and so from anybody: what is decoded has every value in the
range of its register.  Whether they go together is for who loads it to say (vmm/loadable.py).
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

STATE_VERSION = 1

# what a register can hold, each with its reset value below; no number in MessagePack is wider than 64 bits
U12 = Annotated[int, msgspec.Meta(ge=0, le=0xFFF)]
U16 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF)]
U32 = Annotated[int, msgspec.Meta(ge=0, le=0xFFFF_FFFF)]
U64 = Annotated[int, msgspec.Meta(ge=0)]
#: guest time in ns; the bound leaves room to add to it without leaving 64 bits
Time = Annotated[int, msgspec.Meta(ge=0, le=(1 << 62) - 1)]
Registers16 = Annotated[list[U64], msgspec.Meta(min_length=16, max_length=16)]
Registers8 = Annotated[list[U64], msgspec.Meta(min_length=8, max_length=8)]

#: order of `CpuState.gpr`: the hardware's register numbers (AMD64 APM vol. 3, table 1-9)
GPR_NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
             "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15")
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)


class StateError(ValueError):
    """The bytes are not a machine state this version can load."""


class Segment(msgspec.Struct, forbid_unknown_fields=True):
    """A segment register with its hidden part.

    `attributes` is the VMCB's 12-bit form (APM vol. 2, 15.5.1): bits 0-3 type, 4 S, 5-6 DPL, 7 P,
    8 AVL, 9 L, 10 D/B, 11 G.  `limit` is in bytes, already scaled by G.
    """

    selector: U16 = 0
    attributes: U12 = 0
    limit: U32 = 0xFFFF
    base: U64 = 0


class Table(msgspec.Struct, forbid_unknown_fields=True):
    """GDTR or IDTR: limit in bytes, linear base."""

    limit: U32 = 0xFFFF
    base: U64 = 0


def _real_data() -> Segment:
    return Segment(0, 0x093)


class CpuState(msgspec.Struct, forbid_unknown_fields=True):
    """One vCPU at an instruction boundary.  Defaults are the reset state of APM vol. 2, table 14-1."""

    gpr: Registers16 = msgspec.field(default_factory=lambda: [0, 0, 0x830F10] + [0] * 13)
    rip: U64 = 0xFFF0
    rflags: U64 = 2
    cs: Segment = msgspec.field(default_factory=lambda: Segment(0xF000, 0x09B, 0xFFFF, 0xFFFF0000))
    ss: Segment = msgspec.field(default_factory=_real_data)
    ds: Segment = msgspec.field(default_factory=_real_data)
    es: Segment = msgspec.field(default_factory=_real_data)
    fs: Segment = msgspec.field(default_factory=_real_data)
    gs: Segment = msgspec.field(default_factory=_real_data)
    ldtr: Segment = msgspec.field(default_factory=lambda: Segment(0, 0x082))
    tr: Segment = msgspec.field(default_factory=lambda: Segment(0, 0x08B))
    gdtr: Table = msgspec.field(default_factory=Table)
    idtr: Table = msgspec.field(default_factory=Table)
    cr0: U64 = 0x60000010
    cr2: U64 = 0
    cr3: U64 = 0
    cr4: U64 = 0
    cr8: U64 = 0
    efer: U64 = 0
    dr: Registers8 = msgspec.field(default_factory=lambda: [0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400])
    #: MSRs by number; absent ones have their reset value (vmm/x86/msr.py)
    msrs: dict[U32, U64] = msgspec.field(default_factory=dict)
    #: x87/MMX/SSE state in the 512-byte FXSAVE64 layout (APM vol. 2, figure 11-9)
    fxsave: bytes = b""
    #: guest TSC minus host TSC at capture, modulo 2**64, and the guest TSC itself (a state that changes
    #: hosts is resumed from `tsc`)
    tsc_offset: U64 = 0
    tsc: U64 = 0
    #: one-instruction shadow after STI or MOV SS
    interrupt_shadow: bool = False
    #: an NMI is being served (until IRET)
    nmi_masked: bool = False
    #: waiting in HLT
    halted: bool = False
    #: an event accepted but not yet delivered, as an EVENTINJ value (APM vol. 2, 15.20); 0 = none
    pending_event: U64 = 0


class MachineState(msgspec.Struct, forbid_unknown_fields=True):
    """A guest without its memory."""

    memory_bytes: U64
    cpu: CpuState = msgspec.field(default_factory=CpuState)
    #: guest time in ns at capture (monotonic, starts at 0 at power-on, stands still while paused)
    time_ns: Time = 0
    #: state of every device by its name on the board: plain ints, strings, bytes, lists and dicts
    devices: dict[str, Any] = msgspec.field(default_factory=dict)
    monitor: str = "hw"
    version: int = STATE_VERSION


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(MachineState)


def encode(state: MachineState) -> bytes:
    """The state as bytes (MessagePack)."""
    return _encoder.encode(state)


def decode(data: bytes) -> MachineState:
    """The state `encode` wrote.  Raises StateError on anything else."""
    try:
        state = _decoder.decode(data)
    except (ValueError, RecursionError) as error:   # msgspec's errors are ValueErrors, as are those of UTF-8
        raise StateError(f"not a machine state: {error}") from None
    if state.version != STATE_VERSION:
        raise StateError(f"machine state version {state.version}, this hostd reads {STATE_VERSION}")
    if len(state.cpu.fxsave) not in (0, 512):
        raise StateError(f"machine state with an FPU of {len(state.cpu.fxsave)} bytes, and it has 512")
    return state
