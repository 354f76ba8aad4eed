# SPDX-License-Identifier: GPL-2.0-or-later
"""Runs accepted units on an emulated x86-64 CPU and says which rule their execution breaks, if any.

Everything lies where it would in a process: units, stubs, a window, the state block, the jump table.  Only
parts of it are mapped; an access to the rest ends the run, and is held against the same rules.
"""

from __future__ import annotations

import random
import struct
from contextlib import suppress

from unicorn import UC_ARCH_X86, UC_MODE_64, Uc, UcError
from unicorn import unicorn_const as uc_const
from unicorn import x86_const as x86

from tests.bt_units import LAYOUT

WINDOW, BLOCK, JUMP_TABLE = 0x7_0000_0000, 0x3000_0000, 0x10_0000_0000
GUARD = 512 << 20
_GENERAL = [x86.UC_X86_REG_RAX, x86.UC_X86_REG_RCX, x86.UC_X86_REG_RDX, x86.UC_X86_REG_RBX,
            x86.UC_X86_REG_RSP, x86.UC_X86_REG_RBP, x86.UC_X86_REG_RSI, x86.UC_X86_REG_RDI,
            x86.UC_X86_REG_R8, x86.UC_X86_REG_R9, x86.UC_X86_REG_R10, x86.UC_X86_REG_R11]
_FIXED = {x86.UC_X86_REG_R12: WINDOW, x86.UC_X86_REG_R13: 0x1313, x86.UC_X86_REG_R14: BLOCK,
          x86.UC_X86_REG_R15: JUMP_TABLE, x86.UC_X86_REG_GS_BASE: WINDOW, x86.UC_X86_REG_FS_BASE: 0x2222}
#: what units may read and write of the state block (offset, end), as its documentation says
_READABLE, _WRITABLE = ((0x08, 0x14), (0x18, 0x80)), ((0x08, 0x10), (0x48, 0x80))
_STEPS = 200
_EXCEPTIONS = frozenset(range(32)) - {1, 3, 4, 5}


class Sandbox:
    """One CPU, used for many units."""

    def __init__(self) -> None:
        self.uc = uc = Uc(UC_ARCH_X86, UC_MODE_64)
        uc.ctl_set_cpu_model(x86.UC_CPU_X86_EPYC)
        for address, length in ((LAYOUT.units, 0x1000), (LAYOUT.stubs, 0x4000), (BLOCK, 0x1000),
                                (WINDOW, 0x2_0000), (WINDOW + 0xFFFF_0000, 0x1_0000)):
            uc.mem_map(address, length)
        uc.mem_write(LAYOUT.stubs, b"\xEB\xFE" * 0x2000)      # a stub ends the run
        every = uc_const.UC_HOOK_MEM_READ | uc_const.UC_HOOK_MEM_WRITE
        uc.hook_add(every, self._access)
        uc.hook_add(uc_const.UC_HOOK_MEM_UNMAPPED, self._unmapped)
        uc.hook_add(uc_const.UC_HOOK_CODE, self._executed)
        uc.hook_add(uc_const.UC_HOOK_INTR, self._interrupt)
        for number in (x86.UC_X86_INS_SYSCALL, x86.UC_X86_INS_SYSENTER, x86.UC_X86_INS_CPUID):
            uc.hook_add(uc_const.UC_HOOK_INSN, self._forbidden, None, 1, 0, number)
        for hook in (self._port_in, self._port_out):
            number = x86.UC_X86_INS_IN if hook == self._port_in else x86.UC_X86_INS_OUT
            uc.hook_add(uc_const.UC_HOOK_INSN, hook, None, 1, 0, number)
        self._block = struct.pack("<128I", *range(1, 129))

    def run(self, code: bytes, starts: set[int], seed: int) -> list[str]:
        """Execute a unit at the beginning of the units with random registers; the rules it broke."""
        uc, randoms = self.uc, random.Random(seed)
        self.broken: list[str] = []
        self._end = LAYOUT.units + len(code)
        uc.mem_write(LAYOUT.units, code)
        uc.ctl_remove_cache(LAYOUT.units, LAYOUT.units + 0x1000)
        uc.mem_write(BLOCK, self._block)
        for register in _GENERAL:
            small = randoms.random() < 0.6
            value = randoms.randrange(0x1_0000) if small else randoms.randrange(1 << 32)
            uc.reg_write(register, value)
        for register, value in _FIXED.items():
            uc.reg_write(register, value)
        uc.reg_write(x86.UC_X86_REG_EFLAGS, randoms.choice((0x202, 0x602, 0xAD7)))
        with suppress(UcError):      # a fault, which would be the guest's
            uc.emu_start(LAYOUT.units, 0, count=_STEPS)
        for register, value in _FIXED.items():
            self._rule(uc.reg_read(register) == value, "a fixed register changed")
        values = [uc.reg_read(register) for register in _GENERAL]
        at = uc.reg_read(x86.UC_X86_REG_RIP) - LAYOUT.units
        if at in starts or not 0 <= at < len(code):      # else inside a string sequence
            self._rule(all(value < 1 << 32 for value in values), "an upper half is not zero")
        return self.broken

    def _rule(self, holds: bool, what: str) -> None:
        if not holds:
            self.broken.append(what)
            self.uc.emu_stop()

    def _access(self, uc: Uc, kind: int, address: int, size: int, value: int, _: object) -> bool:
        write = kind in (uc_const.UC_MEM_WRITE, uc_const.UC_MEM_WRITE_UNMAPPED)
        if WINDOW - GUARD <= address < WINDOW + (1 << 32) + GUARD:
            return False
        if BLOCK <= address < BLOCK + 0x1000:
            places = _WRITABLE if write else _READABLE
            offset = address - BLOCK
            self._rule(any(begin <= offset and offset + size <= end for begin, end in places),
                       f"state block at {offset:#x}")
            return False
        entry, rest = divmod(address - JUMP_TABLE, 8)
        self._rule(not write and size == 8 and not rest and 0 <= entry < 1 << 32, f"memory at {address:#x}")
        return False

    def _unmapped(self, uc: Uc, kind: int, address: int, size: int, value: int, data: object) -> bool:
        if kind == uc_const.UC_MEM_FETCH_UNMAPPED:
            self._rule(False, f"fetch from {address:#x}")
        else:
            self._access(uc, kind, address, size, value, data)
        return False

    def _executed(self, uc: Uc, address: int, size: int, _: object) -> None:
        if address in LAYOUT.all_stubs:
            uc.emu_stop()
            return
        self._rule(LAYOUT.units <= address < self._end, f"execution at {address:#x}")

    def _interrupt(self, uc: Uc, number: int, _: object) -> None:
        self._rule(number in _EXCEPTIONS, f"interrupt {number}")
        uc.emu_stop()

    def _forbidden(self, uc: Uc, _: object) -> int:
        self._rule(False, "forbidden instruction")
        return 1

    def _port_in(self, uc: Uc, port: int, size: int, _: object) -> int:
        self._rule(False, "port")
        return 0

    def _port_out(self, uc: Uc, port: int, size: int, value: int, _: object) -> None:
        self._rule(False, "port")
