# SPDX-License-Identifier: GPL-2.0-or-later
"""Instructions the software monitor refuses by itself: the emulated silicon must never see them."""

from __future__ import annotations

import pytest

from tests.hw_rig import Rig, halted, vector_of
from tests.test_monitor_instructions import legacy
from vmm.x86.faults import Vector

MONITORS = ("bt",)


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("code", ["f00fbbfe", "f00fabc8", "f00fb3c1", "f00fbac001"])
def test_lock_of_a_register_operand(rig: Rig, code: str, cpl: int) -> None:
    """LOCK BTx of a register is #UD (APM vol. 3, LOCK prefix); trying it, the emulator aborts its process."""
    assert vector_of(halted(rig, legacy(bytes.fromhex(code), cpl))) == Vector.UD
