# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs that some tests call and that pip cannot install; CI has them all (see `.ci/`)."""

from __future__ import annotations

import shutil

import pytest

#: program -> the Debian package it comes in
PACKAGES = {"gcc": "gcc", "iasl": "acpica-tools", "prometheus": "prometheus", "promtool": "prometheus",
            "qemu-system-x86_64": "qemu-system-x86", "systemd-analyze": "systemd"}


def needs(program: str) -> pytest.MarkDecorator:
    """The test runs where the program is installed."""
    return pytest.mark.skipif(shutil.which(program) is None,
                              reason=f"{program} is not installed (Debian package {PACKAGES[program]})")
