# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests' memory as the daemon fills it: whatever comes in between, no frame is lost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import trio

from hostd.loader import BootFiles, fill, lay_out
from hostd.memory import MachineMemory
from hostd.migration import memory_in
from hostd.migration.memory_in import IncomingMemory
from hostd.migration.pages import BatchEncoder
from vmm import guests
from vmm.boot.image import BootImage
from vmm.memory.errors import BadAddress
from vmm.memory.pool import PAGE

MEMORY = 2 << 20


@pytest.fixture
def memory() -> MachineMemory:
    return MachineMemory(16 << 20)


@pytest.fixture(scope="module")
def image() -> BootImage:
    return lay_out(BootFiles(guests.read("idle"), None, ""), MEMORY)


async def test_a_fill_that_is_called_off_before_its_thread_begins(memory: MachineMemory,
                                                                  image: BootImage) -> None:
    free = memory.books.free_frames()
    block = memory.books.new(MEMORY)
    with trio.CancelScope() as scope:
        scope.cancel()
        await fill(memory, block, image, "hw")
    assert scope.cancelled_caught
    memory.books.free(block)
    assert memory.books.free_frames() == free


async def test_a_fill_that_fails_half_way(memory: MachineMemory, image: BootImage) -> None:
    free = memory.books.free_frames()
    block = memory.books.new(MEMORY)
    with pytest.raises(BadAddress):
        await fill(memory, block, replace(image, writes=(*image.writes, (MEMORY, b"beyond"))), "hw")
    memory.books.free(block)
    assert memory.books.free_frames() == free


async def test_a_batch_that_cannot_be_written_leaves_the_guest_as_it_was(
        memory: MachineMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    free = memory.books.free_frames()
    block = memory.books.new(MEMORY)
    incoming, encoder = IncomingMemory(memory, block, share=False), BatchEncoder(block.pages)
    pages, contents = np.arange(4), np.full((4, PAGE), 7, dtype=np.uint8)
    await incoming.install(encoder.encode(pages, contents).payload)
    before = block.leaf().copy()

    def full(*_: object) -> None:
        raise OSError("no memory")

    monkeypatch.setattr(memory_in, "write", full)
    encoder.new_round()
    contents[:2] = 0
    with pytest.raises(OSError, match="no memory"):
        await incoming.install(encoder.encode(np.arange(2, 6), contents).payload)
    assert (block.leaf() == before).all()
    incoming.close()
    memory.books.free(block)
    assert memory.books.free_frames() == free
