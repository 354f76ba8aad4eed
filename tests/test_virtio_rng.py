# SPDX-License-Identifier: GPL-2.0-or-later
"""The entropy device, and its quota."""

from __future__ import annotations

import pytest

from tests.virtio_rig import BUFFERS, PAGE, READY, Bench, rng_bench
from vmm.devices.timers import NEVER
from vmm.devices.virtio.mmio import NEEDS_RESET, Register
from vmm.devices.virtio.rng import MOST_BYTES, NS, QUOTA


@pytest.fixture
def bench() -> Bench:
    bench = rng_bench()
    assert bench.driver.start() == READY
    bench.serve()
    return bench


def spend(bench: Bench) -> int:
    """Take all that can be had now."""
    taken = 0
    while bench.timers.next == NEVER:
        bench.driver.send(0, [(BUFFERS, MOST_BYTES, True)])
        bench.serve()
        taken += sum(length for _, length in bench.driver.used(0))
    return taken


@pytest.mark.parametrize("indirect", [False, True])
def test_buffers_are_filled(bench: Bench, indirect: bool) -> None:
    bench.driver.send(0, [(BUFFERS, 3, True), (BUFFERS + PAGE, 5, True)], indirect)
    bench.serve()
    assert bench.driver.used(0) == [(0, 8)]
    assert bench.ram.data[BUFFERS:BUFFERS + 4] == b"\xA5" * 3 + b"\0"
    assert bench.ram.data[BUFFERS + PAGE:BUFFERS + PAGE + 6] == b"\xA5" * 5 + b"\0"


def test_a_large_buffer_is_filled_in_part(bench: Bench) -> None:
    bench.driver.send(0, [(BUFFERS, 0xFFFF_FFFF, True)])
    bench.serve()
    assert bench.driver.used(0) == [(0, MOST_BYTES)]


@pytest.mark.parametrize("segments", [[(BUFFERS, 16, False)], [(BUFFERS, 0, True)], [(1 << 40, 16, True)]])
def test_a_request_that_cannot_be_served(bench: Bench, segments: list[tuple[int, int, bool]]) -> None:
    bench.driver.send(0, segments)
    bench.serve()
    assert bench.driver.get(Register.STATUS) & NEEDS_RESET


def test_a_request_beyond_the_quota_waits_for_the_next_second(bench: Bench) -> None:
    assert bench.timers.next == NEVER
    assert spend(bench) == QUOTA
    assert bench.timers.next == 6 * NS
    assert not bench.device.notified
    bench.now = 6 * NS
    bench.timers.run(bench.now)
    assert bench.timers.next == NEVER
    bench.serve()
    assert bench.driver.used(0) == [(0, MOST_BYTES)]


def test_the_wait_goes_on_elsewhere(bench: Bench) -> None:
    spend(bench)
    other = rng_bench()
    other.device.load(bench.device.save())
    assert other.timers.next == 6 * NS
    other.ram.data[:] = bench.ram.data
    other.now = 6 * NS
    other.timers.run(other.now)
    other.serve()
    other.driver.taken[:] = bench.driver.taken
    assert other.driver.used(0) == [(0, MOST_BYTES)]


def test_a_reset_does_not_refill(bench: Bench) -> None:
    spend(bench)
    bench.driver.start()
    assert bench.timers.next == NEVER
    assert spend(bench) == 0
