# SPDX-License-Identifier: GPL-2.0-or-later
"""Random bytes as guests: the process survives them, and nobody else's frames change (tests/bt_fuzz.py)."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_guests_that_execute_random_bytes_break_only_themselves() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.bt_fuzz", "--seconds", "15"], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " guests, " in done.stdout
