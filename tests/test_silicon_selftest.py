# SPDX-License-Identifier: GPL-2.0-or-later
"""The self-test passes on the pinned silicon, and says in one sentence what is wrong with another."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest

from vmm.memory.pool import Pool
from vmm.silicon import layout, selftest
from vmm.silicon.cpu import Cpu
from vmm.silicon.layout import SiliconError


@pytest.fixture
def cpus() -> Iterator[list[Cpu]]:
    made: list[Cpu] = []
    yield made
    for cpu in made:
        cpu.resident = None
        cpu.close()


def make(cpus: list[Cpu]) -> Cpu:
    cpus.append(Cpu(Pool(1 << 20)))
    return cpus[-1]


def test_passes_and_leaves_the_machine_memory_alone(cpus: list[Cpu]) -> None:
    cpu = make(cpus)
    image = bytes(cpu.regs.image)
    selftest.run(cpu)
    selftest.run(cpu)
    assert cpu.resident is None
    assert bytes(cpu.regs.image) == image
    assert cpu.pool.resident_bytes() == 0


@pytest.mark.parametrize(("field", "distance", "promise"), [
    ("interrupt_request", 4, "keep a virtual interrupt (V_IRQ) in the pending-interrupt word"),
    ("interrupt_request", -4, "keep a virtual interrupt (V_IRQ) in the pending-interrupt word"),
    ("nested_cr3", 1, "keep nCR3 beside the debug registers"),
    ("error_code", 1, "report an exception at its instruction with its error code"),
    ("is_int", 1, "report INT n with RIP behind it"),
])
def test_falsified_layout(cpus: list[Cpu], monkeypatch: pytest.MonkeyPatch, field: str, distance: int,
                          promise: str) -> None:
    find = layout.find

    def falsified(*engine: Any) -> layout.Layout:
        place = find(*engine)
        return dataclasses.replace(place, **{field: getattr(place, field) + distance})

    monkeypatch.setattr(layout, "find", falsified)
    with pytest.raises(SiliconError) as error:
        selftest.run(make(cpus))
    assert str(error.value) == (f"the installed unicorn does not behave as 2.1.4: it was to {promise}; "
                                "install unicorn==2.1.4 from PyPI")


def test_word_that_is_not_the_one_is_never_written(cpus: list[Cpu], monkeypatch: pytest.MonkeyPatch) -> None:
    cell = ctypes.c_uint32(0xFFFF_FFFF)
    find = layout.find
    monkeypatch.setattr(layout, "find", lambda *engine: dataclasses.replace(
        find(*engine), interrupt_request=ctypes.addressof(cell)))
    with pytest.raises(SiliconError, match="pending-interrupt word"):
        selftest.run(make(cpus))
    assert cell.value == 0xFFFF_FFFF


def test_stops_that_come_in_the_middle_of_a_block(cpus: list[Cpu]) -> None:
    cpu = make(cpus)
    ctypes.c_ubyte.from_address(cpu.regs.place.no_exit_request).value = 0
    with pytest.raises(SiliconError, match="every instruction done exactly once"):
        selftest.run(cpu)


def test_marks_that_are_missing() -> None:
    image = bytes(64) + (0x1122334455667788).to_bytes(8, "little")
    with pytest.raises(SiliconError, match=r"mark of LSTAR is missing or ambiguous; install unicorn"):
        layout._index(image, 0x1122334455667789, "LSTAR")
    with pytest.raises(SiliconError, match="ambiguous"):
        layout._index(image * 2, 0x1122334455667788, "LSTAR")
