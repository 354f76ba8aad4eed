# SPDX-License-Identifier: GPL-2.0-or-later
"""The private daemon and the demo: they run for real, and leave nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd.ctl import demo
from hostd.ctl.errors import CtlError
from hostd.ctl.private import PrivateDaemon, private_daemon
from hostd.ctl.pull import PulledImage, Recipe
from hostd.ctl.usage import CpuMeter, cpu_seconds, processes, proportional_bytes
from hostd.model import HostView, MonitorName
from vmm import guests


@pytest.fixture(autouse=True)
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Temporary files of the daemon go here (short: a socket's path has a limit), and must be gone after."""
    with tempfile.TemporaryDirectory() as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        monkeypatch.setenv("TMPDIR", directory)
        yield Path(directory)
        assert not list(Path(directory).iterdir())


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def settled(daemon: PrivateDaemon) -> HostView:
    """The host once its workers are ready."""
    while not all(worker.ready for worker in daemon.client.host().workers):
        pass
    return daemon.client.host()


def test_a_private_daemon_lives_as_long_as_its_block() -> None:
    with private_daemon(workers=1) as daemon:
        host = settled(daemon)
        pids = processes(host)
        assert host.pid == daemon.pid
        assert len(pids) == 2
        assert proportional_bytes(pids) > 1 << 20
        assert CpuMeter(pids).share() >= 0
        assert cpu_seconds(pids) > 0
    assert not any(alive(pid) for pid in pids)


def test_a_private_daemon_goes_with_the_error_of_its_user() -> None:
    pids = []
    with pytest.raises(ZeroDivisionError), private_daemon(workers=1) as daemon:
        pids = processes(settled(daemon))
        raise ZeroDivisionError
    assert pids
    assert not any(alive(pid) for pid in pids)


def test_a_private_daemon_that_cannot_start_says_why() -> None:
    expected = pytest.raises(CtlError, match=r"ended at once: .*metrics\.address")
    with expected, private_daemon(metrics="nowhere"):
        pass


def test_the_demo_measures_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    template = demo.Template(guests.path("idle"), None, "ms=50", 8 << 20, "idle: tick")
    with private_daemon() as daemon:
        figures = demo.run(daemon, template, 3, 1.0)
        names = {vm.name: vm.template for vm in daemon.client.vms()}
    assert names == {"template": None, "guest-01": "template", "guest-02": "template", "guest-03": "template"}
    assert figures.exits["hlt"] > 0
    assert 0 < figures.bytes_per_guest < 200 << 20
    demo.summarize(figures, 3)
    shown = capsys.readouterr().out
    assert "3 running guests from it" in shown
    assert "guest-03" in shown


def test_without_apt_the_demo_takes_a_kernel_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(progress: object, recipe: object) -> None:
        raise demo.PullError("no apt here")

    monkeypatch.setattr(demo, "build_debian", fail)
    assert demo.choose_template().kernel == guests.path("idle")


@pytest.mark.parametrize(("vmm", "image"), [("hw", "debian"), ("bt", "debian-i386")])
def test_the_demo_takes_a_debian_that_its_monitor_is_for(monkeypatch: pytest.MonkeyPatch, vmm: MonitorName,
                                                         image: str) -> None:
    def pull(progress: object, recipe: Recipe) -> PulledImage:
        return PulledImage(Path(recipe.name), Path("initrd"), "", "6.1")

    monkeypatch.setattr(demo, "build_debian", pull)
    template = demo.choose_template(vmm)
    assert (template.kernel.name, template.vmm) == (image, vmm)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_cleans_up(number: signal.Signals) -> None:
    program = (
        "from hostd.ctl import demo, pull\n"
        "def fail(progress, recipe): raise pull.PullError('not now')\n"
        "demo.build_debian = fail\n"
        "demo.demo_command(['--seconds', '60', '--guests', '2'])"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "guests running" in line:
            break
    process.send_signal(number)
    process.stderr.read()
    assert process.wait(30) != 0
