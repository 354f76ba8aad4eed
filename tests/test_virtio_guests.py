# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's own modules on the virtio devices: balloon, statistics, free page reporting, randomness."""

from __future__ import annotations

import numpy as np
import pytest

from tests.hw_rig import Machine, Rig
from tests.test_boot_guests import MIB, Shell, boot, debian, go_while
from vmm.devices.virtio.rng import QUOTA
from vmm.memory.p2mbits import KIND_MASK, KIND_SHIFT, Kind

MONITORS = ("hw", "bt")
IMAGES = {"hw": "debian", "bt": "debian-i386-pae"}
GUEST = 96 * MIB
PAGE = 4096
#: what is moved: 16 MiB
PAGES = 4096


@pytest.fixture
def machine(rig: Rig) -> Machine:
    image = debian(IMAGES[rig.monitor])
    return boot(rig, image.kernel.read_bytes(), GUEST, image.append, image.initrd.read_bytes())


def free(shell: Shell) -> tuple[int, int]:
    """The guest's total and free memory, in pages."""
    total, unused = (int(line.split()[1]) // 4 for line in shell.ask("head -2 /proc/meminfo"))
    return total, unused


def ballooned(machine: Machine) -> int:
    kinds = machine.block.leaf() & np.uint64(KIND_MASK)
    return int(np.count_nonzero(kinds == np.uint64(Kind.BALLOONED << KIND_SHIFT)))


def set_target(machine: Machine, pages: int) -> None:
    machine.balloon.target_pages = pages
    go_while(machine, lambda: machine.balloon.actual_pages != pages)


def check_randomness(shell: Shell) -> None:
    """No word comes twice; and more than there is in a second comes, too, a second later."""
    assert shell.ask("cat /sys/class/misc/hw_random/rng_current") == ["virtio_rng.0"]
    words = shell.ask("dd if=/dev/hwrng bs=16 count=8 2>/dev/null | od -A n -v -t x4")
    assert len(words) == len(set(words)) == 8
    assert int(shell.ask(f"head -c {QUOTA + PAGE} /dev/hwrng | wc -c")[0]) == QUOTA + PAGE


@pytest.mark.slow
def test_debian_with_its_own_modules(machine: Machine) -> None:
    shell = Shell(machine)
    balloon, block = machine.balloon, machine.block
    go_while(machine, lambda: not balloon.driver_ok)
    assert shell.ask("cat /proc/modules | cut -d ' ' -f 1 | grep virtio | sort") == [
        "virtio", "virtio_balloon", "virtio_mmio", "virtio_ring", "virtio_rng"]
    assert shell.ask("dmesg -r | grep '^<[0-4]>' | grep -v ' PCI\\| MCE '") == []
    hashed = shell.ask("sha256sum /bin/busybox")
    check_randomness(shell)

    # inflate
    total, unused = free(shell)
    resident = block.memory_counts()["resident"]
    set_target(machine, PAGES)
    assert ballooned(machine) == balloon.counters["inflated"] == PAGES
    assert free(shell)[0] == total              # the guest may take it back before it runs out of memory
    # the guest itself may need some more meanwhile: its modules are only just loaded
    assert unused - 2 * PAGES < free(shell)[1] < unused - PAGES + 200
    assert block.memory_counts()["resident"] < resident + 200

    # statistics
    assert balloon.request_statistics()
    go_while(machine, lambda: balloon.wanted)
    assert balloon.asked_ns <= balloon.received_ns
    assert balloon.statistics["total"] // PAGE == total
    assert abs(balloon.statistics["free"] // PAGE - unused + PAGES) < 200
    # available: free pages without those below the watermarks, and cache that could be dropped
    assert balloon.statistics["free"] // 2 < balloon.statistics["available"] < balloon.statistics["total"]

    # deflate
    set_target(machine, 0)
    assert ballooned(machine) == 0
    assert balloon.counters["deflated"] == PAGES
    assert abs(free(shell)[1] - unused) < 200

    # free page reporting: what a file took is the host's again
    shell.ask(f"dd if=/dev/urandom of=/tmp/file bs=4096 count={PAGES} 2>/dev/null")
    reported, resident = balloon.counters["reported"], block.memory_counts()["resident"]
    shell.ask("rm /tmp/file")
    go_while(machine, lambda: block.memory_counts()["resident"] > resident - PAGES * 3 // 4)
    assert balloon.counters["reported"] >= reported + PAGES * 3 // 4

    # and nothing was lost
    assert shell.ask("sha256sum /bin/busybox") == hashed
    assert not balloon.interrupt
