# SPDX-License-Identifier: GPL-2.0-or-later
"""Where the exit statistics count what makes translated code leave for its monitor."""

from __future__ import annotations

from vmm.exitcodes import ExitCode
from vmm.stats import slot_of

HIDDEN = slot_of(ExitCode.BT_HIDDEN_FAULT)
TRACE = slot_of(ExitCode.BT_TRACE)
ADAPTED = slot_of(ExitCode.BT_ADAPTED)
SIMULATED = slot_of(ExitCode.BT_SIMULATED)
MISS = slot_of(ExitCode.BT_MISS)
CHAIN = slot_of(ExitCode.BT_CHAIN)
SILICON = slot_of(ExitCode.BT_SILICON)
