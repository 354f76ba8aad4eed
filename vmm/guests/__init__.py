# SPDX-License-Identifier: GPL-2.0-or-later
"""The project's own guest kernels: small multiboot images (and one flat), built from `src/` by `build.py`.

=======  ===================================================================  =======================
fuzz     a hostile guest: garbage to every port, to empty addresses, to MSRs   seed=1 rounds=20000 all
idle     sleeps in HLT on a one-shot timer; prints `idle: tick N`              ms=1000 ticks=0
long     switches itself to 64-bit mode; prints the sum of its module's bytes
mix      paging, ring-3 tasks, preemption, fork, copy-on-write; a checksum     rounds=4 tasks=8
nano     timed single operations; prints `nano NAME OPERATIONS CYCLES`         forkwait=40000 in=N ...
primes   processor-bound; prints `primes: COUNT below LIMIT`                   limit=20000 loop
real     flat: interrupts in real mode, 16-bit and 32-bit protected mode
rogue    abuses its machine as its first word says (`src/rogue.c`)             flood wild ... at=N
triple   triple-faults with its second instruction
=======  ===================================================================  =======================

All but `triple` print on COM1 and end with status 0 at the debug-exit port (0xf4).
"""

from __future__ import annotations

from pathlib import Path

_IMAGES = {image.stem: image for image in Path(__file__).parent.iterdir() if image.suffix in (".elf", ".bin")}


def names() -> list[str]:
    """The kernels there are, sorted."""
    return sorted(_IMAGES)


def path(name: str) -> Path:
    """Where the kernel `name` is.  Raises KeyError for an unknown one."""
    if name not in _IMAGES:
        raise KeyError(f"no guest kernel {name!r}; there are {', '.join(names())}")
    return _IMAGES[name]


def read(name: str) -> bytes:
    """The image of the kernel `name`."""
    return path(name).read_bytes()
