# SPDX-License-Identifier: GPL-2.0-or-later
"""Linux guests on a host with too little memory for them: they wait, they give back, and nothing is lost."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from hostd.ctl.pull import RECIPES, PulledImage, PullError, build_debian
from tests.private_daemon import PrivateDaemon

#: each of the guests touches some 50 MB while it boots, and 8 MB afterwards
POOL = "120M"
GUESTS = ("a", "b", "c", "d")
#: fills memory with what cannot be compressed, and checks it over and over
LOAD = ("mount -t tmpfs t /tmp; cd /tmp; for i in 0 1 2 3; do head -c 2097152 /dev/urandom > f$i; done; "
        "md5sum f* > sums; for n in 1 2; do md5sum -cs sums && echo round $n good || echo BAD; done; "
        "echo load d''one\n")


@pytest.fixture(scope="module")
def debian() -> PulledImage:
    try:
        return build_debian(recipe=RECIPES["debian"])
    except PullError as error:
        pytest.fail(f"no Debian kernel to be had: {error}")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateDaemon]:
    config = ("[memory]\novercommit_ratio = 10.0\n[sharing]\npages_per_second = 20000\n")
    with PrivateDaemon(tmp_path_factory.mktemp("daemon"), config=config, memory=POOL) as daemon:
        daemon.client.timeout = 200
        yield daemon


@pytest.mark.slow
def test_guests_that_need_more_than_there_is(daemon: PrivateDaemon, debian: PulledImage) -> None:
    kernel, initrd = debian.kernel.read_bytes(), daemon.upload(debian.initrd.read_bytes())
    for name in GUESTS:
        daemon.create(name, kernel, initrd=initrd, append=debian.append, memory=96 << 20)
    for name in GUESTS:
        daemon.do(name, "start")
    for name in GUESTS:
        daemon.wait(name, console="/ # ", timeout=120)
    for name in GUESTS:
        daemon.send(name, LOAD)
    for name in GUESTS:
        daemon.wait(name, console="load done", timeout=180)
        said = daemon.console(name)
        assert len(re.findall(r"^round \d good", said, re.MULTILINE)) == 2, said[-2000:]
        assert not re.search(r"^BAD|Out of memory|Oops", said, re.MULTILINE)
    memory = daemon.get("/memory", check=1)
    assert memory["wrong"] == []
    views = [daemon.get(f"/vms/{name}") for name in GUESTS]
    assert all(view["state"] in ("running", "migrating") and not view["crashes"] for view in views)
    # in the order of the policy: given back by the guests, shared, swapped
    events = {kind: sum(view["memory_events"][kind] for view in views) for kind in views[0]["memory_events"]}
    assert events["merged"] > 1000 and events["swapped_out"] > 0
    assert daemon.get("/host")["frames"]["free"] > 0
