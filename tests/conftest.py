# SPDX-License-Identifier: GPL-2.0-or-later
"""Hosts and daemons of one's own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from hostd.config import Config, parse
from hostd.host import Host
from tests.hw_rig import Rig
from tests.private_daemon import PrivateDaemon
from tests.told_host import FAKE_WORKER, ToldHost
from vmm import guests


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module that names `MONITORS` has its guests run under each of them."""
    monitors = getattr(metafunc.module, "MONITORS", ())
    for fixture, scope in ("rig", "function"), ("daemon", "module"):
        own = any(fixture in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
        if monitors and fixture in metafunc.fixturenames and not own:
            metafunc.parametrize(fixture, monitors, indirect=True, scope=scope)


@pytest.fixture
def host_config(tmp_path: Path) -> Config:
    """What the host of the `told` fixture runs with; tests may take another one."""
    return parse(f'[host]\nstate_dir = "{tmp_path}/state"\nmemory = "64M"\nworkers = 2\nshutdown_timeout = 5')


@pytest.fixture
async def told(host_config: Config) -> AsyncIterator[ToldHost]:
    """A real host in this process, whose workers are processes with guests that do what they are told."""
    async with trio.open_nursery() as nursery:
        host = Host(host_config, nursery, FAKE_WORKER)
        nursery.start_soon(host.run)
        yield ToldHost(host)
        host.close()
        nursery.cancel_scope.cancel()
    assert host.overview.check_memory() == []


@pytest.fixture
def kernel() -> bytes:
    """A kernel of our own that waits for timer interrupts for ever."""
    return guests.read("idle")


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[Callable[..., PrivateDaemon]]:
    """Starts a real daemon, with its state in this test's directory, as often as one likes."""
    with ExitStack() as stack:
        def start(**options: Any) -> PrivateDaemon:
            return stack.enter_context(PrivateDaemon(tmp_path, **options))

        yield start


@pytest.fixture(scope="module")
def daemon(request: pytest.FixtureRequest,
           tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateDaemon]:
    """One real daemon for all tests of a module; it takes the monitor named as parameter for all guests."""
    config = f'[defaults]\nvmm = "{getattr(request, "param", "hw")}"\n'
    with PrivateDaemon(tmp_path_factory.mktemp("daemon"), config=config) as daemon:
        yield daemon


@pytest.fixture(scope="session")
def silicon() -> Iterator[Rig]:
    """The one CPU, with its machine memory, that all tests of monitors share."""
    rig = Rig()
    yield rig
    rig.cpu.close()


@pytest.fixture
def rig(silicon: Rig, request: pytest.FixtureRequest) -> Iterator[Rig]:
    """The CPU with no guest on it, and none afterwards; guests are under the monitor named as parameter."""
    silicon.monitor = getattr(request, "param", "hw")
    yield silicon
    silicon.monitor = "hw"
    silicon.clear()
