# SPDX-License-Identifier: GPL-2.0-or-later
"""What may become a VM of the host, and what is refused without a trace."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from hostd.errors import Conflict, HostError, Invalid, NotFound
from hostd.model import MIN_MEMORY, ImageSpec, VmPatch
from tests.told_host import MEMORY, ToldHost


@pytest.mark.parametrize(("patch", "sentence"), [
    (VmPatch(reservation=MEMORY + 4096), r"the reservation of .* is more than the limit of 2 MiB"),
    (VmPatch(limit=2 * MEMORY), "the limit of 4 MiB is not above 0 and at most the VM's memory of 2 MiB"),
    (VmPatch(limit=MIN_MEMORY, reservation=MEMORY), "is more than the limit of 1 MiB"),
    (VmPatch(reservation=1000), "reservation of 1000 bytes is not a whole number of 4 KiB pages"),
    (VmPatch(memory=MEMORY + 1), "memory of 2097153 bytes is not a whole number of 4 KiB pages"),
    (VmPatch(memory=64 << 20), "memory of 64 MiB is more than the host's pool of 64 MiB holds"),
    (VmPatch(memory=MIN_MEMORY), r"the kernel needs memory .* and the machine has only 1 MiB"),
])
async def test_settings_that_cannot_be_change_nothing(told: ToldHost, patch: VmPatch, sentence: str) -> None:
    await told.create("web")
    before = told.host.get("web")
    with pytest.raises(Invalid, match=sentence):
        await told.host.update("web", patch)
    assert told.host.get("web") == before


async def test_the_host_promises_no_more_than_it_may(told: ToldHost) -> None:
    """A pool of 64 MiB, of which VMs may have twice as much between them."""
    await told.create("large", memory=60 << 20, reservation=50 << 20)
    with pytest.raises(Conflict, match="VM other is not admitted: a reservation of 20 MiB with"):
        await told.create("other", memory=60 << 20, reservation=20 << 20)
    await told.create("other", memory=60 << 20)
    with pytest.raises(Conflict, match="than the 128 MiB that an overcommit ratio of 2 allows"):
        await told.create("third", memory=9 << 20)
    await told.create("third", memory=2 << 20)
    with pytest.raises(Conflict, match="VM third is not admitted"):
        await told.host.update("third", VmPatch(memory=9 << 20))
    with pytest.raises(Conflict, match="VM other is not admitted"):
        await told.host.update("other", VmPatch(reservation=20 << 20))
    await told.host.update("large", VmPatch(reservation=0))
    await told.host.update("other", VmPatch(reservation=20 << 20))
    assert told.definitions() == {"large.json", "other.json", "third.json"}


async def test_what_workers_may_have_in_stock_is_promised_to_nobody(told: ToldHost) -> None:
    """Nor what is kept for overheads."""
    with pytest.raises(Conflict, match=r"a reservation of 62 MiB .* that are neither reserved nor kept"):
        await told.create("web", memory=62 << 20, reservation=62 << 20)
    await told.create("web", memory=62 << 20, reservation=60 << 20)


async def test_what_is_in_the_making_counts(told: ToldHost) -> None:
    """Of two requests at once that fit one at a time, one is refused."""
    kernel = await told.blob()
    outcomes: list[str] = []

    async def attempt(name: str) -> None:
        try:
            await told.create(name, kernel=kernel, memory=40 << 20, reservation=40 << 20)
            outcomes.append("made")
        except Conflict:
            outcomes.append("refused")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(attempt, "one")
        nursery.start_soon(attempt, "two")
    assert sorted(outcomes) == ["made", "refused"]
    assert len(told.definitions()) == 1


async def test_a_lower_ratio_leaves_what_there_is(told: ToldHost) -> None:
    await told.create("web", memory=60 << 20)
    memory = msgspec.structs.replace(told.host.config.memory, overcommit_ratio=0.5)
    told.host.reload(msgspec.structs.replace(told.host.config, memory=memory))
    assert (await told.host.update("web", VmPatch(weight=7, memory=40 << 20))).memory == 40 << 20
    with pytest.raises(Conflict, match=r"an overcommit ratio of 0\.5 allows"):
        await told.create("other")


async def test_clones_have_reservations_of_their_own(told: ToldHost) -> None:
    await told.running("web", memory=20 << 20, reservation=16 << 20)
    with pytest.raises(Conflict, match=r"VM four is not admitted: a reservation of 16 MiB"):
        await told.clone("web", "two", "three", "four")
    await told.clone("web", "two", "three")
    assert told.host.get("three").reservation == 16 << 20


async def test_bad_definitions_leave_nothing(told: ToldHost) -> None:
    await told.create("web")
    kernel = await told.blob()
    bad: list[tuple[dict[str, Any], type[HostError], str]] = [
        ({"name": "web"}, Conflict, "VM web exists already"),
        ({"kernel": None}, Invalid, "needs an image or a kernel"),
        ({"kernel": kernel, "image": "debian"}, Invalid, "and not both"),
        ({"image": "debian"}, NotFound, "no image debian"),
        ({"image": "debian", "initrd": kernel}, Invalid, "an image has its own"),
        ({"kernel": "0" * 64}, NotFound, "no blob 0000.* for the kernel: upload it first"),
        ({"kernel": kernel, "initrd": "0" * 64}, NotFound, "for the initrd"),
        ({"memory": 1 << 30}, Invalid, "memory of 1024 MiB is more than the host's pool of 64 MiB"),
        ({"memory": (1 << 20) + 1}, Invalid, "not a whole number of 4 KiB pages"),
        ({"kernel": kernel, "initrd": await told.blob(bytes(range(256)) * 8192)}, Invalid, "initrd"),
    ]
    for fields, kind, sentence in bad:
        with pytest.raises(kind, match=sentence) as failure:
            await told.create(**{"name": "new", **fields})
        assert "\n" not in str(failure.value)
    assert [view.name for view in told.host.views()] == ["web"]
    assert told.definitions() == {"web.json"}


async def test_a_kernel_that_is_none_is_not_kept(told: ToldHost) -> None:
    with pytest.raises(Invalid, match="no kind known here"):
        await told.create("web", kernel=await told.blob(b"not a kernel"))
    assert list((told.host.config.state_dir / "blobs").iterdir()) == []


async def test_an_image_in_use_stays(told: ToldHost) -> None:
    await told.host.add_image(ImageSpec(name="idle", kernel=await told.blob()))
    await told.running("web", image="idle")
    with pytest.raises(Conflict, match="image idle is used by VM web"):
        await told.host.remove_image("idle")
    await told.host.destroy("web", force=True).outcome()
    await told.host.remove_image("idle")
    assert told.host.list_images() == []
