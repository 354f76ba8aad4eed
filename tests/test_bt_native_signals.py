# SPDX-License-Identifier: GPL-2.0-or-later
"""Signals that are not the guest's: crashes are reported as ever, no handler runs on its stack."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

_GUEST = """
import ctypes, faulthandler, os, signal
from tests.bt_cpu_rig import Rig
from vmm.bt.native.trampolines import FAULT
rig = Rig.of("native")
def guest_fault():
    rig.cpu.prepare()
    assert rig.run("65678B03") == FAULT
guest_fault()
"""

_EARLY = "faulthandler.enable()\n" + _GUEST
CRASHES = {
    "before us": (_EARLY + "guest_fault()\nfaulthandler._sigsegv()", signal.SIGSEGV),
    "after us": (_GUEST + "faulthandler.enable()\nguest_fault()\nfaulthandler._sigsegv()", signal.SIGSEGV),
    "taken away": (_EARLY + "faulthandler.disable()\nguest_fault()\nfaulthandler.enable()\n"
                   "faulthandler._sigsegv()", signal.SIGSEGV),
    "null": (_EARLY + "ctypes.string_at(0)", signal.SIGSEGV),
    "by another": (_EARLY + "os.kill(os.getpid(), signal.SIGSEGV)", signal.SIGSEGV),
    "division": (_EARLY + "faulthandler._sigfpe()", signal.SIGFPE),
    # fxrstor of a reserved MXCSR bit, in the trampoline: our mistake, not the guest's
    "trampoline": (_EARLY + "rig.block.fx[27] = 0xFF\nrig.run('')", signal.SIGSEGV),
}


def _run(program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", "import faulthandler\n" + program],
                          capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", CRASHES)
def test_a_crash_of_the_process_is_reported_with_a_traceback(name: str) -> None:
    program, number = CRASHES[name]
    done = _run(program)
    assert "AssertionError" not in done.stderr
    assert done.returncode == -number
    assert "Fatal Python error" in done.stderr and 'File "<string>"' in done.stderr


def test_without_faulthandler_the_signal_kills() -> None:
    assert _run(_GUEST + "ctypes.string_at(0)").returncode == -signal.SIGSEGV
    assert _run(_GUEST + "os.kill(os.getpid(), signal.SIGTRAP)").returncode == -signal.SIGTRAP


_OTHERS = """
import signal, time
from vmm.silicon.cpu import Cpu
from vmm.memory.pool import Pool
from tests.bt_cpu_rig import Rig
pool = Pool(1 << 20)
silicon = Cpu(pool)                # its handlers were installed without the alternate stack
seen = []
signal.signal(signal.SIGALRM, lambda *about: seen.append(1))
rig = Rig.of("native")
rig.block.set("rsp", 0x400800)     # somewhere in the interpreter, perhaps
signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
silicon.kicker.at(1)
address = rig.put("83C001 83C0FF 83EB01 0F85F1FFFFFF")
for _ in range(3):
    rig.block.set("rbx", 3_000_000)
    assert rig.cpu.enter(rig.block, address) == 0
silicon.kicker.rest()
signal.setitimer(signal.ITIMER_REAL, 0)
assert seen and rig.block.get("rsp") == 0x400800
"""


def test_other_signals_arrive_while_a_guest_runs() -> None:
    done = _run(_OTHERS)
    assert (done.returncode, done.stderr) == (0, "")
