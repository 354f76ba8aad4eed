# SPDX-License-Identifier: GPL-2.0-or-later
"""What is particular to translated code in this process: Python's own state, and faults only hosts know."""

from __future__ import annotations

import ctypes
import signal
import struct
from collections.abc import Iterator

import pytest

from tests.bt_cpu_rig import ARENA_BYTES, STUBS, Rig
from tests.bt_native_rig import function
from vmm.bt.native.cpu import NativeCpu
from vmm.bt.native.trampolines import FAULT


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    rig = Rig.of("native")
    yield rig
    rig.close()


# push the callee-saved registers; fill them; call rsi; eax = what changed of them, or DF; pop
_CALLEE_SAVED = ("53 55 41544155 41564157 BB11111111 BD22222222 41BC33333333 41BD44444444"
                 "41BE55555555 41BF66666666 FFD6 81EB11111111 81ED22222222 4181EC33333333 4181ED44444444"
                 "4181EE55555555 4181EF66666666"
                 "09EB 4409E3 4409EB 4409F3 4409FB 9C 59 81E100040000 09CB 89D8 415F415E 415D415C 5D 5B C3")
# stmxcsr [rdi]; fnstcw [rdi+4]; fnstenv [rdi+8]; fldenv [rdi+8]; ret
_CONTROL_WORDS = "0FAE1F D97F04 D97708 D96708 C3"


def _control_words() -> tuple[int, int, int]:
    buffer = ctypes.create_string_buffer(64)
    function(_CONTROL_WORDS)(ctypes.addressof(buffer), None)
    mxcsr, control = struct.unpack_from("<IH", buffer)
    tag = struct.unpack_from("<H", buffer, 16)[0]
    return mxcsr & 0xFFC0, control, tag


def test_python_gets_its_machine_back(rig: Rig) -> None:
    before = _control_words(), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    rig.window.map(0, 0, writable=True)
    rig.pool.view[0:4] = struct.pack("<I", 0x7F80)
    rig.pool.view[4:6] = struct.pack("<H", 0x0C7F)
    # std; ldmxcsr gs:[0]; fldcw gs:[4]; fld1; and every register different
    unit = "FD 6567 0FAE142500000000 6567 D92C2504000000 D9E8 BBFFFFFFFF BDFFFFFFFF BCFFFFFFFF"
    for ending in ("", "6567 8B042500000080"):       # a stub, a fault
        rig.block.set("rip", rig.put(unit + ending))
        wrapped = function(_CALLEE_SAVED)
        assert wrapped(rig.block.address, rig.cpu.arena.base) == 0
        assert (_control_words(), signal.pthread_sigmask(signal.SIG_BLOCK, [])) == before
        assert rig.block.get("flags") & 0x400


@pytest.mark.parametrize(("code", "vector"), [
    ("65670F28042501000000", 13),                     # movaps gs:[1]
    ("65670FAE142500000000 0F57C0 0F5EC0", 19),       # 0/0 unmasked
], ids=["alignment", "sse"])
def test_faults_the_emulated_processor_does_not_know(rig: Rig, code: str, vector: int) -> None:
    rig.window.map(0, 0)
    rig.pool.view[0:4] = bytes(4)
    assert rig.run(code) == FAULT
    assert (rig.block.fault().vector, rig.block.fault().error) == (vector, 0)
    rig.block.load_fx(struct.pack("<H22xI484x", 0x37F, 0x1F80))


def test_hosts_without_fsgsbase() -> None:
    rig = Rig(NativeCpu(ARENA_BYTES, STUBS, fsgsbase=False))
    rig.window.map(0, 5)
    rig.pool.page(5)[0] = 42
    assert rig.run("6567 8B0425 00000000") == 0
    assert rig.block.get("rax") == 42
    rig.close()
