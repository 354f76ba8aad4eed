# SPDX-License-Identifier: GPL-2.0-or-later
"""The serial port, driven as Linux's 8250 driver does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.devices_rig import Rig
from vmm.devices.uart16550 import CHUNK, MOST_BACKLOG

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCRATCH = (0x3F8 + n for n in (0, 1, 2, 2, 3, 4, 5, 6, 7))


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.setup_pics()
    rig.outb(FCR, 0x81)
    rig.outb(MCR, 0x0B)
    return rig


def serve(rig: Rig) -> int | None:
    vector = rig.interrupts.acknowledge()
    if vector is not None:
        rig.outb(0x20, 0x20)
    return vector


def test_the_driver_finds_a_16550a() -> None:
    """autoconfig: scratch IER, loopback modem lines, FIFO bits, and no later chip's features."""
    rig = Rig()
    rig.outb(IER, 0)
    assert rig.inb(IER) == 0
    rig.outb(IER, 0x0F)
    assert rig.inb(IER) & 0x0F == 0x0F
    rig.outb(MCR, 0x1A)
    assert rig.inb(MSR) & 0xF0 == 0x90
    rig.outb(MCR, 0)
    rig.outb(FCR, 0x01)
    assert rig.inb(IIR) & 0xC0 == 0xC0
    rig.outb(FCR, 0x21)
    assert rig.inb(IIR) & 0x20 == 0
    rig.outb(IER, 0x40)
    assert rig.inb(IER) == 0
    rig.outb(SCRATCH, 0x5A)
    assert rig.inb(SCRATCH) == 0x5A


def test_the_divisor_latch(rig: Rig) -> None:
    rig.outb(LCR, 0x83)
    rig.outb(DATA, 0x01)
    rig.outb(IER, 0x02)
    assert (rig.inb(DATA), rig.inb(IER)) == (0x01, 0x02)
    rig.outb(LCR, 0x03)
    assert rig.inb(LCR) == 0x03
    assert rig.inb(IER) == 0
    assert not rig.console


def test_polled_output_comes_in_lines(rig: Rig) -> None:
    for byte in b"first\nsec":
        assert rig.inb(LSR) & 0x60 == 0x60
        rig.outb(DATA, byte)
    assert rig.console == b"first\n"
    rig.board.uart.flush()
    assert rig.console == b"first\nsec"
    rig.board.uart.flush()
    assert rig.console == b"first\nsec"


def test_a_long_line_comes_in_pieces(rig: Rig) -> None:
    for _ in range(CHUNK + 1):
        rig.outb(DATA, 0x2E)
    assert rig.console == b"." * CHUNK


def test_transmit_interrupt(rig: Rig) -> None:
    """Linux's test for a broken THRE, then a burst of 16 bytes per interrupt."""
    rig.outb(IER, 2)
    assert rig.inb(IIR) & 0x0F == 2
    assert rig.inb(IIR) & 0x0F == 1
    rig.outb(IER, 0)
    rig.outb(IER, 2)
    assert rig.inb(IIR) & 0x0F == 2
    assert serve(rig) == 0x34
    for _ in range(16):
        rig.outb(DATA, 0x78)
    assert serve(rig) == 0x34
    assert rig.inb(IIR) & 0x0F == 2
    rig.outb(IER, 0)
    assert serve(rig) is None


def test_transmitting_without_asking_why_still_interrupts(rig: Rig) -> None:
    """The 8259 wants an edge each time."""
    rig.outb(IER, 2)
    for byte in b"abc":
        assert serve(rig) == 0x34
        rig.outb(DATA, byte)
    assert serve(rig) == 0x34
    rig.board.uart.flush()
    assert rig.console == b"abc"


def test_input_interrupts_until_read(rig: Rig) -> None:
    rig.outb(IER, 1)
    rig.board.uart.feed(b"ls\r")
    assert serve(rig) == 0x34
    assert rig.inb(IIR) & 0x0F == 0x0C
    received = bytearray()
    while rig.inb(LSR) & 1:
        received.append(rig.inb(DATA))
    assert received == b"ls\r"
    assert rig.inb(IIR) & 0x0F == 1
    assert serve(rig) is None
    assert rig.inb(DATA) == 0


def test_the_trigger_level_names_the_interrupt(rig: Rig) -> None:
    rig.outb(IER, 1)
    rig.board.uart.feed(b"x" * 7)
    assert rig.inb(IIR) & 0x0F == 0x0C
    rig.board.uart.feed(b"x")
    assert rig.inb(IIR) & 0x0F == 0x04


def test_a_lot_of_input_waits_in_order(rig: Rig) -> None:
    data = bytes(range(256)) * 8
    rig.board.uart.feed(data)
    received = bytearray()
    while rig.inb(LSR) & 1:
        received.append(rig.inb(DATA))
    assert received == data
    assert rig.board.uart.dropped == 0


def test_input_beyond_the_backlog_is_dropped_and_counted(rig: Rig) -> None:
    rig.board.uart.feed(b"x" * (MOST_BACKLOG + 100))
    rig.board.uart.feed(b"y" * 50)
    assert rig.board.uart.dropped == 100 + 50 - 16


def test_loopback(rig: Rig) -> None:
    rig.outb(MCR, 0x10)
    rig.board.uart.feed(b"host")
    for byte in b"loop":
        rig.outb(DATA, byte)
    assert bytes(rig.inb(DATA) for _ in range(4)) == b"loop"
    assert not rig.inb(LSR) & 1
    assert not rig.console
    rig.outb(MCR, 0x0B)
    assert bytes(rig.inb(DATA) for _ in range(4)) == b"host"


def test_overrun_in_loopback(rig: Rig) -> None:
    rig.outb(IER, 4)
    rig.outb(MCR, 0x10)
    for _ in range(17):
        rig.outb(DATA, 0x55)
    assert rig.inb(IIR) & 0x0F == 6
    assert rig.inb(LSR) & 0x02
    assert not rig.inb(LSR) & 0x02
    assert rig.inb(IIR) & 0x0F == 1


def test_modem_status_changes_interrupt(rig: Rig) -> None:
    rig.inb(MSR)
    rig.outb(IER, 8)
    rig.outb(MCR, 0x10)
    assert rig.inb(IIR) & 0x0F == 0
    assert rig.inb(MSR) == 0x0B
    assert rig.inb(IIR) & 0x0F == 1
    rig.outb(MCR, 0x14)
    assert rig.inb(MSR) == 0x40
    rig.outb(MCR, 0x10)
    assert rig.inb(MSR) == 0x04


def test_clearing_the_receiver(rig: Rig) -> None:
    rig.board.uart.feed(b"typed ahead")
    rig.outb(FCR, 0x83)
    assert not rig.inb(LSR) & 1


def test_without_fifos_one_byte_waits(rig: Rig) -> None:
    rig.outb(FCR, 0)
    rig.board.uart.feed(b"abc")
    assert len(rig.board.uart.fifo) == 1
    assert bytes(rig.inb(DATA) for _ in range(3)) == b"abc"


def test_a_handler_that_takes_one_byte_per_interrupt_gets_all(rig: Rig) -> None:
    rig.outb(FCR, 0)
    rig.outb(IER, 1)
    rig.board.uart.feed(b"abc")
    got = b""
    while serve(rig) is not None:
        got += bytes([rig.inb(DATA)])
    assert got == b"abc"


@given(st.lists(st.one_of(st.tuples(st.integers(0, 7), st.integers(0, 255)),
                          st.tuples(st.just(-1), st.integers(0, 3)),
                          st.tuples(st.just(-2), st.integers(0, 40)))))
def test_the_line_follows_the_identification(operations: list[tuple[int, int]]) -> None:
    """Whatever is written: the interrupt line is up exactly while IIR names an interrupt."""
    rig = Rig()
    uart = rig.board.uart
    for register, value in operations:
        if register >= 0:
            rig.outb(0x3F8 + register, value)
        elif register == -1:
            rig.inb(0x3F8 + value)
        else:
            uart.feed(b"z" * value)
        assert bool(rig.interrupts.pic.master.lines & 0x10) == (uart.iir != 1)
        assert bool(uart.lsr & 1) == bool(uart.fifo)
        assert len(uart.fifo) <= 16
