# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests go between real daemons that trust one CA; whoever is not of it gets nothing."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread

import pytest
import trustme

from hostd.migration.capabilities import CAPABILITIES, SPOKEN
from hostd.migration.conversation import call
from hostd.migration.links import LinkBroken, dial, parse_peer
from hostd.migration.wire import ProtocolError, preamble
from tests.migration_guests import Evidence, witness
from tests.private_daemon import DaemonFailed
from tests.two_hosts import LOOPBACK, MigratingDaemon, TwoHosts

pytestmark = pytest.mark.slow


class Authority:
    """Certificates of a CA, each with its files in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self._ca = trustme.CA()
        self.file = directory / "ca.pem"
        self._ca.cert_pem.write_to_path(self.file)

    def section(self, host: str = LOOPBACK, ca: Path | None = None) -> str:
        """A host's part of the configuration; `ca` is another one that it trusts."""
        leaf = self._ca.issue_cert(host)
        certificate = self._directory / f"{host}.pem"
        leaf.private_key_and_cert_chain_pem.write_to_path(certificate)
        return (f'[migration.tls]\ncertificate = "{certificate}"\nkey = "{certificate}"\n'
                f'ca = "{ca or self.file}"\n')


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates") / "ours")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates") / "theirs")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, ours: Authority) -> Iterator[TwoHosts]:
    directory = tmp_path_factory.mktemp("hosts")
    with ExitStack() as stack:
        a, b = (stack.enter_context(MigratingDaemon(directory / name, extra=ours.section()))
                for name in "ab")
        yield TwoHosts(a, b)


@pytest.fixture(autouse=True)
def clean(hosts: TwoHosts) -> Iterator[None]:
    yield
    hosts.clear()


def start(daemon: MigratingDaemon, *names: str) -> None:
    for name in names:
        daemon.create(name, witness(32, 100), start=True)
    for name in names:
        daemon.wait(name, console="\n")


def test_guests_go_both_ways(hosts: TwoHosts) -> None:
    start(hosts.a, "vm")
    for mode in "precopy", "postcopy":
        hosts.there("vm", mode=mode, connections=2)
    assert hosts.where("vm") is hosts.a
    Evidence(hosts.a.console("vm")).check()


def test_a_host_is_evacuated(hosts: TwoHosts) -> None:
    names = [f"vm{number}" for number in range(6)]
    start(hosts.a, *names)
    hosts.a.do("vm0", "pause")
    hosts.a.create("off", witness())
    hosts.b.create("vm1", witness())                # this one cannot go
    ended = hosts.a.ended(hosts.a.post("/evacuate", to=hosts.b.address, parallel=3))
    assert ended["status"] == "done"
    moved, failed = set(ended["result"]["moved"]), ended["result"]["failed"]
    assert moved == set(names) - {"vm1"} and failed == {"vm1": "VM vm1 exists already"}
    assert hosts.a.names() == ["off", "vm1"] and hosts.b.names() == names
    assert hosts.a.get("/vms/vm1")["state"] == "running"
    for name in sorted(moved - {"vm0"}):
        hosts.b.send(name, "k")
        hosts.b.wait(name, console="<k>")
        Evidence(hosts.b.console(name)).check()


def test_a_host_of_another_ca(hosts: TwoHosts, ours: Authority, theirs: Authority, tmp_path: Path) -> None:
    """Neither end accepts the other; and no name but its own is a host's."""
    start(hosts.a, "vm")
    with MigratingDaemon(tmp_path / "c", extra=theirs.section()) as stranger:
        start(stranger, "other")
        for daemon, name, to in (hosts.a, "vm", stranger), (stranger, "other", hosts.b):
            assert daemon.refused(name, to.address).startswith(
                f"no connection with {to.address}: its certificate is not accepted: ")
        stranger.clear()
    by_name = hosts.b.address.replace(LOOPBACK, "localhost")
    assert hosts.a.refused("vm", by_name).startswith(
        f"no connection with {by_name}: its certificate is not accepted: Hostname mismatch")
    assert hosts.a.get("/vms/vm")["state"] == "running" and hosts.b.names() == []


async def test_hosts_without_tls(hosts: TwoHosts) -> None:
    start(hosts.a, "vm")
    with socket.create_server((LOOPBACK, 0)) as plain:
        def greet() -> None:
            caller, _ = plain.accept()
            with caller:
                caller.sendall(preamble(SPOKEN))
                while caller.recv(4096):
                    pass

        Thread(target=greet, daemon=True).start()
        address = f"{LOOPBACK}:{plain.getsockname()[1]}"
        assert hosts.a.refused("vm", address) == f"no connection with {address}: it does not speak TLS"
    async with await dial(*parse_peer(hosts.b.address), None) as link:
        with pytest.raises((LinkBroken, ProtocolError)):
            await call(link, "migrate", CAPABILITIES)
    assert hosts.a.get("/vms/vm")["state"] == "running" and hosts.b.names() == []


def test_a_certificate_that_is_renewed_or_cannot_be_loaded(hosts: TwoHosts, ours: Authority,
                                                           tmp_path: Path) -> None:
    files = Authority(tmp_path / "files")
    section = files.section(ca=ours.file)
    file = tmp_path / "files" / f"{LOOPBACK}.pem"
    with MigratingDaemon(tmp_path / "c", extra=section) as daemon:
        start(daemon, "vm")
        file.write_text("nothing")
        assert daemon.refused("vm", hosts.b.address).startswith(
            "the certificate of this host cannot be used: migration.tls.certificate: no certificate in PEM")
        start(hosts.a, "other")
        assert hosts.a.refused("other", daemon.address)
        file.write_bytes((ours.file.parent / f"{LOOPBACK}.pem").read_bytes())
        daemon.migrate("vm", hosts.b.address)
        hosts.a.migrate("other", daemon.address)
        daemon.clear()
    file.unlink()
    with pytest.raises(DaemonFailed) as failed, MigratingDaemon(tmp_path / "d", extra=section):
        pass
    assert "migration.tls.certificate: cannot read" in failed.value.said
    assert hosts.b.names() == ["vm"]


def test_bytes_that_are_no_tls(hosts: TwoHosts) -> None:
    """They are answered with an alert at most, and not with a word of this protocol."""
    host, _, port = hosts.b.address.rpartition(":")
    for said in b"\x89HMIGR\r\n\1\0\1\0", b"GET / HTTP/1.0\r\n\r\n", bytes(100):
        with socket.create_connection((host, int(port)), timeout=20) as caller:
            caller.sendall(said)
            answer = b""
            while data := caller.recv(4096):
                answer += data
        assert len(answer) <= 7 and b"HMIGR" not in answer
