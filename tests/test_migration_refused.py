# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that do not go to another host: they are told why before any memory is sent, and run on."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import msgspec
import pytest

from hostd.definition import Definition
from hostd.lifecycle import Policy
from hostd.migration.capabilities import CAPABILITIES, shown
from hostd.migration.conversation import Declined, call
from hostd.migration.links import dial, parse_peer
from hostd.migration.messages import Accept, Offer
from hostd.migration.wire import Spoken, preamble
from tests.migration_guests import MEMORY, witness
from tests.two_hosts import LOOPBACK, TwoHosts, free_port, two_hosts
from vmm.state import STATE_VERSION

pytestmark = pytest.mark.slow

MIB = 1 << 20
KERNEL = witness()
#: each is typed once
KEYS = iter("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """`a` has a guest `vm`, which is to stay there."""
    with two_hosts(tmp_path_factory.mktemp("hosts"), memory="256M") as hosts:
        hosts.a.create("vm", KERNEL, memory=64 * MIB, reservation=32 * MIB, start=True)
        hosts.a.wait("vm", console="\n")
        yield hosts
        hosts.clear()


@contextmanager
def peer(says: bytes) -> Iterator[str]:
    """The address of somebody who says that to whoever calls, and no more."""
    with socket.create_server((LOOPBACK, 0)) as listener:
        def answer() -> None:
            caller, _ = listener.accept()
            with caller:
                caller.sendall(says)
                while caller.recv(4096):
                    pass

        Thread(target=answer, daemon=True).start()
        yield f"{LOOPBACK}:{listener.getsockname()[1]}"


def stays(hosts: TwoHosts, to: str, **wish: Any) -> str:
    """Why `vm` does not go there, for good or by way of trial.  Nothing else has changed."""
    before = hosts.b.get("/host")["frames"]
    sentence = hosts.a.refused("vm", to, **wish)
    view = hosts.a.get("/migrations")[-1]
    assert (view["phase"], view["reason"], view["pages"], view["bytes"]) == ("failed", sentence, {}, {})
    assert hosts.a.records() == hosts.b.records() == []
    assert hosts.b.get("/host")["frames"] == before
    assert hosts.a.get("/vms/vm")["state"] == "running" and "vm" not in hosts.b.names()
    key = next(KEYS)
    hosts.a.send("vm", key)
    hosts.a.wait("vm", console=f"<{key}>")
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_name_that_is_taken(hosts: TwoHosts, dry_run: bool) -> None:
    hosts.b.create("vm", KERNEL)
    sentence = hosts.a.refused("vm", hosts.b.address, dry_run=dry_run)
    hosts.b.clear()
    assert sentence == "VM vm exists already"
    assert hosts.a.get("/vms/vm")["state"] == "running"


@pytest.mark.parametrize("dry_run", [False, True])
def test_memory_that_is_promised_to_others(hosts: TwoHosts, dry_run: bool) -> None:
    hosts.b.create("big", KERNEL, memory=230 * MIB, reservation=230 * MIB, start=True)
    hosts.b.do("big", "pause")
    try:
        sentence = stays(hosts, hosts.b.address, dry_run=dry_run)
    finally:
        hosts.b.clear()
    assert sentence.startswith("VM vm is not admitted: a reservation of 32 MiB "), sentence


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(("says", "sentence"), [
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "the other end does not speak the migration protocol"),
    (preamble(Spoken(9, 8)), "the other host speaks versions 8 to 9 of the migration protocol, and this one "
                             "version 1: update the older of them"),
    (preamble(Spoken(1, 1)) + b"\xff\xff\xff\xff\0", "a frame of kind 0 came, which was not due"),
])
def test_a_peer_that_is_none(hosts: TwoHosts, says: bytes, sentence: str, dry_run: bool) -> None:
    with peer(says) as address:
        assert stays(hosts, address, dry_run=dry_run).startswith(sentence)


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_host_that_is_down(hosts: TwoHosts, dry_run: bool) -> None:
    address = f"{LOOPBACK}:{free_port()}"
    assert stays(hosts, address, dry_run=dry_run) == f"cannot connect to {address}: Connection refused"


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("machine", ["192.0.2.1", "own"])
def test_another_machine_without_tls(hosts: TwoHosts, machine: str, dry_run: bool) -> None:
    """Its own address on the network may be another's tomorrow."""
    host = own_address() if machine == "own" else machine
    assert stays(hosts, f"{host}:9178", dry_run=dry_run).startswith(
        f"{host} is another machine, and this host has no certificate: set [migration.tls]")


def own_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))         # sends nothing
        except OSError:
            pytest.skip("this machine is on no network")
        address: str = probe.getsockname()[0]
        return address


def test_a_name_that_nobody_has(hosts: TwoHosts) -> None:
    assert stays(hosts, "no-such-host.invalid").startswith("cannot find no-such-host.invalid: ")


def test_a_trial_that_is_fine_leaves_nothing(hosts: TwoHosts) -> None:
    before = hosts.b.get("/host")["frames"]
    view = hosts.there("vm", dry_run=True)
    assert (view["phase"], view["pages"], view["bytes"]) == ("done", {}, {})
    assert hosts.b.names() == [] and hosts.b.get("/host")["frames"] == before
    assert hosts.a.records() == hosts.b.records() == []
    assert [view["direction"] for view in hosts.b.get("/migrations") if view["vm"] == "vm"] == []
    assert hosts.where("vm") is hosts.a


# --- guests of hosts that are not as this one ---------------------------------------------------------------

def offer(hosts: TwoHosts, **differs: Any) -> Offer:
    sha256 = hosts.b.upload(KERNEL)
    definition = Definition(name="alien", memory=MEMORY, weight=100, cap=0, on_crash=Policy.STOP,
                            on_poweroff=Policy.STOP, kernel=sha256)
    good = Offer(
        token="0123456789abcdef" * 2, name="alien", definition=msgspec.json.encode(definition),
        memory_bytes=MEMORY, monitor="hw", state_version=STATE_VERSION, cpu=shown("hw"),
        tsc_khz=hosts.b.get("/host")["workers"][0]["tsc_khz"], resident_pages=1,
        blobs=[(sha256, len(KERNEL))])
    return msgspec.structs.replace(good, **differs)


async def answer(hosts: TwoHosts, offered: Offer) -> str:
    """Why `b` does not take it; "" if it does."""
    async with await dial(*parse_peer(hosts.b.address), None) as link:
        talk = await call(link, "migrate", CAPABILITIES)
        await talk.send(offered)
        try:
            await talk.expect(Accept)
        except Declined as error:
            return str(error)
    return ""


def more_features() -> list[tuple[int, int, int, int, int, int]]:
    """A processor with two features more: one that has a name, and one that has none."""
    leaf, subleaf, eax, ebx, ecx, edx = shown("hw")[0]
    assert (leaf, subleaf) == (1, 0) and not ecx & 1 << 5
    return [(leaf, subleaf, eax, ebx, ecx | 1 << 5, edx), *shown("hw")[1:]]


@pytest.mark.parametrize("dry_run", [False, True])
async def test_guests_that_would_not_feel_at_home(hosts: TwoHosts, dry_run: bool) -> None:
    before = hosts.b.get("/host")["frames"]
    good = offer(hosts, dry_run=dry_run)
    assert await answer(hosts, good) == ""
    refused = {
        "the guest's machine state has version 99, and the target reads version": {"state_version": 99},
        "the guest was shown a processor with CPUID 0x1.ecx[5], which the target does not have": {
            "cpu": more_features()},
        "the time stamp counter runs at": {"tsc_khz": good.tsc_khz * 1001 // 1000},
    }
    for sentence, differs in refused.items():
        found = await answer(hosts, msgspec.structs.replace(good, **differs))
        assert found.startswith(sentence), found
    assert await answer(hosts, msgspec.structs.replace(good, tsc_khz=good.tsc_khz * 10004 // 10000)) == ""
    assert hosts.b.names() == [] and hosts.b.records() == []
    assert hosts.b.get("/host")["frames"] == before
