# SPDX-License-Identifier: GPL-2.0-or-later
"""The 8259 pair, alone and as the guest of a machine without APICs sees it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.devices_rig import Rig
from vmm.devices.pic8259 import Elcr, PicPair


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.setup_pics()
    return rig


def pulse(line: Callable[[bool], None]) -> None:
    line(True)
    line(False)


def test_power_on_masks_everything() -> None:
    rig = Rig()
    pulse(rig.interrupts.isa_line(4))
    assert rig.inb(0x21) == 0xFF
    assert not rig.interrupts.output
    assert rig.interrupts.acknowledge() is None


def test_linux_finds_the_chip_by_its_mask_register() -> None:
    """probe_8259A writes a mask and expects it back."""
    rig = Rig()
    rig.outb(0xA1, 0xFF)
    rig.outb(0x21, 0xFB)
    assert rig.inb(0x21) == 0xFB


def test_vectors_of_master_and_slave(rig: Rig) -> None:
    pulse(rig.interrupts.isa_line(4))
    assert rig.interrupts.output
    assert rig.interrupts.acknowledge() == 0x34
    assert not rig.interrupts.output
    rig.outb(0x20, 0x20)
    pulse(rig.interrupts.isa_line(9))
    assert rig.interrupts.acknowledge() == 0x39


def test_lower_priority_waits_for_eoi(rig: Rig) -> None:
    pulse(rig.interrupts.isa_line(4))
    assert rig.interrupts.acknowledge() == 0x34
    pulse(rig.interrupts.isa_line(6))
    assert not rig.interrupts.output
    pulse(rig.interrupts.isa_line(1))
    assert rig.interrupts.acknowledge() == 0x31
    rig.outb(0x20, 0x61)
    assert not rig.interrupts.output
    rig.outb(0x20, 0x64)
    assert rig.interrupts.acknowledge() == 0x36


def test_the_mask_holds_a_request_back(rig: Rig) -> None:
    rig.outb(0x21, 0x10)
    pulse(rig.interrupts.isa_line(4))
    assert not rig.interrupts.output
    rig.outb(0x21, 0x00)
    assert rig.interrupts.acknowledge() == 0x34


def test_on_output_is_called_when_it_rises(rig: Rig) -> None:
    calls: list[bool] = []
    rig.interrupts.on_output = lambda: calls.append(rig.interrupts.output)
    pulse(rig.interrupts.isa_line(4))
    pulse(rig.interrupts.isa_line(4))
    assert calls == [True]


def test_slave_requests_keep_coming(rig: Rig) -> None:
    """Each request of the slave is a new edge at the master's input 2."""
    for irq in (9, 10, 11):
        pulse(rig.interrupts.isa_line(irq))
    taken = []
    while (vector := rig.interrupts.acknowledge()) is not None:
        taken.append(vector)
        rig.outb(0xA0, 0x20)
        rig.outb(0x20, 0x20)
    assert taken == [0x39, 0x3A, 0x3B]


def test_slave_requests_keep_coming_with_automatic_eoi(rig: Rig) -> None:
    for port, value in ((0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 3),
                        (0xA0, 0x11), (0xA1, 0x38), (0xA1, 2), (0xA1, 3)):
        rig.outb(port, value)
    for irq in (9, 10):
        pulse(rig.interrupts.isa_line(irq))
    assert [rig.interrupts.acknowledge() for _ in range(3)] == [0x39, 0x3A, None]


def test_spurious_interrupts() -> None:
    """A request that goes between INTR and INTA gives vector 7, and nothing is in service."""
    pair = PicPair(lambda level: None)
    pair.master.vector_base, pair.slave.vector_base = 0x30, 0x38
    pair.master.imr = pair.slave.imr = 0
    elcr = Elcr(pair)
    elcr.write(0, 1, 0x20)
    pair.set_line(5, True)
    pair.set_line(5, False)
    assert pair.acknowledge() == 0x37
    assert pair.master.isr == 0


def test_level_triggered_inputs_ask_again(rig: Rig) -> None:
    rig.outb(0x4D1, 0xFF)
    assert rig.inb(0x4D1) == 0xDE
    line = rig.interrupts.isa_line(9)
    line(True)
    for _ in range(2):
        assert rig.interrupts.acknowledge() == 0x39
        rig.outb(0xA0, 0x61)
        rig.outb(0x20, 0x62)
    line(False)
    assert not rig.interrupts.output


def test_rotation(rig: Rig) -> None:
    rig.outb(0x20, 0xC4)  # input 4 is now the lowest, 5 the highest
    for irq in (1, 4, 6):
        pulse(rig.interrupts.isa_line(irq))
    taken = []
    while (vector := rig.interrupts.acknowledge()) is not None:
        taken.append(vector)
        rig.outb(0x20, 0x20)
    assert taken == [0x36, 0x31, 0x34]


def test_rotating_eoi_puts_the_served_last(rig: Rig) -> None:
    pulse(rig.interrupts.isa_line(3))
    assert rig.interrupts.acknowledge() == 0x33
    rig.outb(0x20, 0xA0)
    pulse(rig.interrupts.isa_line(3))
    pulse(rig.interrupts.isa_line(7))
    assert rig.interrupts.acknowledge() == 0x37


def test_poll_mode(rig: Rig) -> None:
    rig.outb(0x20, 0x0C)
    assert rig.inb(0x20) == 0
    pulse(rig.interrupts.isa_line(5))
    rig.outb(0x20, 0x0C)
    assert rig.inb(0x20) == 0x85
    rig.outb(0x20, 0x0B)
    assert rig.inb(0x20) == 0x20
    assert not rig.interrupts.output


def test_special_mask_mode_lets_lower_requests_through(rig: Rig) -> None:
    pulse(rig.interrupts.isa_line(3))
    assert rig.interrupts.acknowledge() == 0x33
    pulse(rig.interrupts.isa_line(6))
    assert not rig.interrupts.output
    rig.outb(0x21, 0x08)
    rig.outb(0x20, 0x68)
    assert rig.interrupts.acknowledge() == 0x36


def test_requests_and_service_can_be_read(rig: Rig) -> None:
    pulse(rig.interrupts.isa_line(4))
    rig.outb(0x20, 0x0A)
    assert rig.inb(0x20) == 0x10
    rig.interrupts.acknowledge()
    rig.outb(0x20, 0x0B)
    assert rig.inb(0x20) == 0x10
    rig.outb(0x20, 0x64)
    assert rig.inb(0x20) == 0


def test_there_is_no_interrupt_2(rig: Rig) -> None:
    with pytest.raises(ValueError, match="no interrupt line 2"):
        rig.interrupts.isa_line(2)


COMMANDS = st.lists(st.one_of(
    st.tuples(st.sampled_from([0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1]), st.integers(0, 255)),
    st.tuples(st.just("line"), st.tuples(st.integers(0, 15), st.booleans())),
    st.tuples(st.just("read"), st.sampled_from([0x20, 0x21, 0xA0, 0xA1])),
    st.tuples(st.just("acknowledge"), st.none())), max_size=60)


@given(COMMANDS)
def test_output_says_what_acknowledge_will_do(commands: list[tuple[int | str, object]]) -> None:
    """Whatever is programmed: INTR is up exactly when an INTA cycle finds a request."""
    rig = Rig()
    for what, argument in commands:
        if what == "line":
            irq, level = argument
            if irq != 2:
                rig.interrupts.isa_line(irq)(level)
        elif what == "read":
            rig.inb(argument)
        elif what == "acknowledge":
            ready = rig.interrupts.output
            assert (rig.interrupts.acknowledge() is not None) == ready
        else:
            rig.outb(what, argument)
        master = rig.interrupts.pic.master
        assert master.output == (master._request() is not None) == rig.interrupts.output
