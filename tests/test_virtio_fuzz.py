# SPDX-License-Identifier: GPL-2.0-or-later
"""The virtio devices under drivers gone mad: any register, any ring, any order."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.virtio_rig import BUFFERS, PAGE, READY, ROUNDS, Bench, balloon_bench, rng_bench
from vmm.devices.virtio.mmio import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, USED_BUFFER, Register
from vmm.memory.errors import OutOfFrames

BENCHES = [balloon_bench, rng_bench]

QUEUE = st.integers(0, 5)
WRITTEN = itemgetter(2)
SOMEWHERE = st.one_of(st.integers(0x1_0000, 0x1_5FFF), st.integers(BUFFERS, BUFFERS + PAGE),
                      st.integers(0, 2**32 - 1))
VALUE = st.one_of(st.integers(0, 40), st.sampled_from([READY, ACKNOWLEDGE | DRIVER | FEATURES_OK, DRIVER_OK]),
                  SOMEWHERE)
STEP = st.one_of(
    st.tuples(st.just("write"), st.one_of(st.integers(0, 0x40).map(lambda n: 4 * n), st.integers(0, 0x1FF)),
              VALUE, st.sampled_from([1, 2, 4, 4])),
    st.tuples(st.just("read"), st.integers(0, 0x1FF), st.just(0), st.sampled_from([1, 2, 4])),
    st.tuples(st.just("start"), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("offer"), QUEUE, st.integers(0, 9), st.just(0)),
    st.tuples(st.just("index"), QUEUE, st.integers(0, 0xFFFF), st.just(0)),
    st.tuples(st.just("refuse"), st.integers(1, 9), st.just(0), st.just(0)),
    st.tuples(st.just("serve"), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("time"), st.integers(0, 2_000_000_000), st.just(0), st.just(0)))
DESCRIPTOR = st.tuples(QUEUE, st.integers(0, 7), st.one_of(SOMEWHERE, st.just(BUFFERS)),
                       st.one_of(st.integers(0, 4096), st.sampled_from([16, 64, 0xFFFF_FFFF, 1 << 27])),
                       st.integers(0, 7), st.integers(0, 8))
#: requests that are nearly always good ones, served at once
SEGMENT = st.tuples(st.sampled_from([BUFFERS, BUFFERS + 8, BUFFERS + PAGE, 1 << 24]),
                    st.integers(0, 3 * PAGE), st.sampled_from([False, True, True]))
SEGMENTS = st.lists(SEGMENT, min_size=1, max_size=4).map(lambda some: sorted(some, key=WRITTEN))
REQUEST = st.tuples(QUEUE, SEGMENTS, st.booleans())
STEPS = st.lists(st.one_of(STEP, REQUEST, REQUEST, DESCRIPTOR), max_size=40)


def do(bench: Bench, step: tuple[Any, ...]) -> Any:
    """One step of a driver gone mad; what there is to be seen of it."""
    driver, queues = bench.driver, bench.device.QUEUES
    if len(step) == 3:
        queue, segments, indirect = step
        driver.send(queue % queues, segments, indirect)
        return do(bench, ("serve", 0, 0, 0))
    if len(step) == 6:
        queue, index, address, length, flags, following = step
        driver.descriptor(queue % queues, index, address, length, flags, following)
        return None
    what, where, value, size = step
    if what == "write":
        bench.device.write(where, size, value & (1 << 8 * size) - 1)
    elif what == "read":
        return bench.device.read(where, size)
    elif what == "start":
        driver.start()
    elif what == "offer":
        driver.offer(where % queues, value)
        driver.put(Register.QUEUE_NOTIFY, where % queues)
    elif what == "index":
        driver.set_index(where % queues, value)
        driver.put(Register.QUEUE_NOTIFY, where % queues)
    elif what == "refuse":
        bench.ram.refuse = where
    elif what == "time":
        bench.now += where
        bench.timers.run(bench.now)
    else:
        bench.ram.accesses = 0
        try:
            bench.serve_once()
        except OutOfFrames:
            return "again"
        assert bench.ram.accesses <= queues * ROUNDS * 20
    return bench.level, bench.device.notified, bench.timers.next


@pytest.mark.parametrize("make", BENCHES)
@given(steps=STEPS)
@settings(max_examples=250, deadline=None)
def test_whatever_a_driver_does(make: Any, steps: list[Any]) -> None:
    """No exception comes out, no pass is long, and in the end a good driver finds a working device."""
    bench = make()
    bench.driver.start()
    for step in steps:
        do(bench, step)
        if bench.device.notified:
            assert bench.device.live
        assert bench.level == bool(bench.device.interrupt)
    bench.ram.refuse = 0
    assert bench.driver.start() == READY
    bench.serve()
    bench.interrupted()
    bench.now += 1_000_000_000
    bench.driver.send(0, [(BUFFERS, 4, bench.device.IDENTITY == 4)])
    bench.ram.data[BUFFERS:BUFFERS + 4] = bytes(4)
    bench.serve()
    assert len(bench.driver.used(0)) == 1
    assert bench.interrupted() == USED_BUFFER


@pytest.mark.parametrize("make", BENCHES)
@given(before=STEPS, after=STEPS)
@settings(max_examples=100, deadline=None)
def test_a_loaded_device_goes_on(make: Any, before: list[Any], after: list[Any]) -> None:
    one = make()
    one.driver.start()
    for step in before:
        do(one, step)
    other = make()
    other.now, other.level = one.now, one.level
    other.device.load(msgspec.msgpack.decode(msgspec.msgpack.encode(one.device.save())))
    other.ram.data[:] = one.ram.data
    other.ram.refuse = one.ram.refuse
    other.driver.given[:] = one.driver.given
    other.driver.taken[:] = one.driver.taken
    for step in after:
        assert do(one, step) == do(other, step), step
    assert one.device.save() == other.device.save()
    assert one.ram.data == other.ram.data
