# SPDX-License-Identifier: GPL-2.0-or-later
"""The peer: QEMU's emulation (TCG) of a PC, without the devices our machine does not have either."""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import time

from hostd.ctl.demo import Template
from hostd.ctl.errors import CtlError

PROGRAM = "qemu-system-x86_64"


def version() -> str:
    """What QEMU calls itself.  Raises CtlError where there is none."""
    if shutil.which(PROGRAM) is None:
        raise CtlError(f"{PROGRAM} is not installed (Debian package qemu-system-x86)")
    said = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=True).stdout
    return said.splitlines()[0]


def command(guest: Template, program: str = PROGRAM) -> list[str]:
    """A machine that boots the guest's files, its serial port on standard input and output."""
    initrd = ["-initrd", str(guest.initrd)] if guest.initrd else []
    return [program, "-accel", "tcg", "-M", "pc", "-nodefaults", "-no-reboot", "-display", "none",
            "-m", str(guest.memory >> 20), "-serial", "stdio",
            "-kernel", str(guest.kernel), *initrd, "-append", guest.append]


def await_output(process: subprocess.Popen[bytes], text: str, timeout: float) -> None:
    """Read what the process prints until `text` is in it.  Raises CtlError when that does not come."""
    assert process.stdout is not None
    output = process.stdout.fileno()
    deadline = time.monotonic() + timeout
    said = b""
    while text.encode() not in said:
        ready, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise CtlError(f"the guest did not print {text!r} in {timeout:.0f} seconds")
        data = os.read(output, 65536)
        if not data:
            raise CtlError(f"the guest ended before it printed {text!r}")
        said += data
