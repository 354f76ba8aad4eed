# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon as a process: its command line, its sockets, signals, the service manager, and two at a time."""

from __future__ import annotations

import os
import select
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

import hostd
from tests.private_daemon import SOON, DaemonFailed, PrivateDaemon

Start = Callable[..., PrivateDaemon]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "hostd.daemon", *arguments], capture_output=True, text=True,
                          timeout=SOON, check=False)


# --- the command line ------------------------------------------------------------------------------------


def test_version() -> None:
    assert run("--version").stdout == f"hostd {hostd.__version__}\n"


def test_a_good_configuration() -> None:
    path = str(Path(__file__).parent.parent / "etc" / "hostd.toml")
    done = run("--check-config", path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}: good\n", "")


def test_a_bad_configuration_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "hostd.toml"
    path.write_text("[host]\nwrokers = 2\n")
    for option in "--check-config", "--config":
        done = run(option, str(path))
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"hostd: {path}: host.wrokers: unknown key\n"


@pytest.mark.parametrize("arguments", [["--nonsense"], ["extra"], ["--config"]])
def test_wrong_usage(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("usage: hostd")


# --- starting and stopping -------------------------------------------------------------------------------


def test_the_socket_is_for_its_owner_and_group_and_goes_with_the_daemon(start_daemon: Start) -> None:
    daemon = start_daemon()
    mode = daemon.socket.stat().st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o660
    assert daemon.stop() == 0
    assert not daemon.socket.exists()


def test_sigint_ends_it_too(start_daemon: Start) -> None:
    assert start_daemon().stop(signal.SIGINT) == 0


def test_no_process_is_left_behind(start_daemon: Start) -> None:
    daemon = start_daemon()
    pids = daemon.worker_pids()
    daemon.stop()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_workers_do_not_outlive_a_daemon_that_is_killed(start_daemon: Start) -> None:
    daemon = start_daemon()
    watched = [os.pidfd_open(pid) for pid in daemon.worker_pids()]
    daemon.kill()
    for pidfd in watched:
        assert select.select([pidfd], [], [], SOON)[0]
        os.close(pidfd)


def test_a_second_daemon_on_the_same_state_is_refused(start_daemon: Start, tmp_path: Path) -> None:
    first = start_daemon()
    done = run("--config", str(first.config), "--socket", str(tmp_path / "other.sock"))
    assert done.returncode == 1
    assert done.stderr == (f"hostd: another hostd (process {first.process.pid}) uses the state directory "
                           f"{tmp_path}/state\n")
    assert first.get("/version")


def test_a_second_daemon_on_the_same_socket_is_refused(start_daemon: Start, tmp_path: Path) -> None:
    first = start_daemon()
    done = run("--config", str(first.config), "--state-dir", str(tmp_path / "other"))
    assert (done.returncode, done.stderr) == (1, f"hostd: another daemon is listening on {first.socket}\n")
    assert first.get("/version")


def test_a_stale_socket_file_is_replaced(start_daemon: Start, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "hostd.sock"))
    assert start_daemon().get("/version")


def test_a_file_that_is_no_socket_is_not_touched(start_daemon: Start, tmp_path: Path) -> None:
    (tmp_path / "hostd.sock").write_text("precious")
    with pytest.raises(DaemonFailed) as failure:
        start_daemon()
    assert failure.value.said.endswith(f"cannot listen on {tmp_path}/hostd.sock: Address already in use")
    assert (tmp_path / "hostd.sock").read_text() == "precious"


def test_a_metrics_address_that_is_taken_is_told(start_daemon: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(DaemonFailed) as failure:
            start_daemon(metrics=address)
    assert failure.value.said.endswith(f"cannot listen on {address} for metrics: Address already in use")


def test_metrics_are_where_the_host_says(start_daemon: Start) -> None:
    url = start_daemon().get("/host")["metrics"]
    assert httpx.get(url).text.startswith("# HELP")


def test_definitions_survive_a_restart(start_daemon: Start, kernel: bytes) -> None:
    first = start_daemon()
    first.create("web", kernel, weight=7, on_crash="restart")
    assert first.stop() == 0
    second = start_daemon()
    view = second.get("/vms/web")
    assert (view["state"], view["weight"], view["on_crash"]) == ("defined", 7, "restart")
    second.do("web", "start")


def test_autostart(start_daemon: Start, kernel: bytes) -> None:
    first = start_daemon()
    first.create("web", kernel, autostart=True)
    first.kill()
    assert start_daemon().wait("web", state="running")["boots"] == 1


# --- the service manager ---------------------------------------------------------------------------------


class Manager:
    """The receiving end of sd_notify."""

    def __init__(self, directory: Path) -> None:
        self.path = str(directory / "notify")
        self.end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.end.bind(self.path)
        self.end.settimeout(SOON)

    def hear(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.end.recv(4096).decode().split("\n"))

    def hear_until(self, key: str) -> dict[str, str]:
        while key not in (heard := self.hear()):
            pass
        return heard


def test_the_manager_hears_ready_reloading_and_stopping(start_daemon: Start, tmp_path: Path) -> None:
    manager = Manager(tmp_path)
    daemon = start_daemon(env={"NOTIFY_SOCKET": manager.path})
    assert manager.hear_until("READY")["READY"] == "1"
    daemon.process.send_signal(signal.SIGHUP)
    assert int(manager.hear_until("RELOADING")["MONOTONIC_USEC"]) > 0
    assert manager.hear_until("READY")["READY"] == "1"
    daemon.stop()
    assert manager.hear_until("STOPPING")["STOPPING"] == "1"


def test_a_life_as_the_manager_sees_it(start_daemon: Start, tmp_path: Path) -> None:
    """Socket activation, the watchdog and all signals at once, and everything it says in order."""
    manager = Manager(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "hostd.sock"))
        listener.listen()
        daemon = start_daemon(activate=listener.fileno(),
                              env={"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "200000"})
        daemon.worker_pids()
        said = [manager.hear_until("READY")]
        for _ in range(2):
            said.append(manager.hear_until("WATCHDOG"))
        daemon.process.send_signal(signal.SIGHUP)
        said.append(manager.hear_until("RELOADING"))
        said.append(manager.hear_until("READY"))
        said.append(manager.hear_until("WATCHDOG"))
        assert daemon.get("/version")
        daemon.process.send_signal(signal.SIGTERM)
        said.append(manager.hear_until("STOPPING"))
        assert daemon.process.wait(SOON) == 0
    assert [next(iter(words)) for words in said] == [
        "READY", "WATCHDOG", "WATCHDOG", "RELOADING", "READY", "WATCHDOG", "STOPPING"]
    assert said[4]["STATUS"] == "0 of 0 guests running, 2 of 2 workers ready"
    assert said[6]["STATUS"] == "stopping guests"


def test_the_status_follows_the_guests(start_daemon: Start, tmp_path: Path, kernel: bytes) -> None:
    manager = Manager(tmp_path)
    daemon = start_daemon(env={"NOTIFY_SOCKET": manager.path})
    daemon.create("web", kernel, start=True)
    while "1 of 1 guests running" not in manager.hear_until("STATUS")["STATUS"]:
        pass


def test_a_host_that_is_being_suspended_asks_for_time(start_daemon: Start, tmp_path: Path,
                                                      kernel: bytes) -> None:
    manager = Manager(tmp_path)
    daemon = start_daemon(env={"NOTIFY_SOCKET": manager.path}, config='on_shutdown = "suspend"\n')
    daemon.create("vm", kernel, start=True)
    daemon.wait("vm", state="running")
    assert daemon.stop() == 0
    manager.hear_until("STOPPING")
    assert int(manager.hear_until("EXTEND_TIMEOUT_USEC")["EXTEND_TIMEOUT_USEC"]) > 0


def test_the_watchdog_is_fed(start_daemon: Start, tmp_path: Path) -> None:
    manager = Manager(tmp_path)
    start_daemon(env={"NOTIFY_SOCKET": manager.path, "WATCHDOG_USEC": "100000"})
    for _ in range(3):
        manager.hear_until("WATCHDOG")


def test_sighup_reloads_what_can_be_reloaded(start_daemon: Start, tmp_path: Path, kernel: bytes) -> None:
    manager = Manager(tmp_path)
    daemon = start_daemon(env={"NOTIFY_SOCKET": manager.path})
    manager.hear_until("READY")
    daemon.configure("[defaults]\nweight = 55\n")
    daemon.process.send_signal(signal.SIGHUP)
    manager.hear_until("READY")
    assert daemon.create("web", kernel)["weight"] == 55


def test_a_bad_configuration_does_not_replace_a_good_one(start_daemon: Start, tmp_path: Path) -> None:
    manager = Manager(tmp_path)
    daemon = start_daemon(env={"NOTIFY_SOCKET": manager.path})
    manager.hear_until("READY")
    daemon.configure("[defaults]\nweihgt = 55\n")
    daemon.process.send_signal(signal.SIGHUP)
    manager.hear_until("READY")
    assert "defaults.weihgt: unknown key" in daemon.said()
    assert daemon.get("/version")


def test_a_socket_of_the_manager_s_is_used_and_left_alone(start_daemon: Start, tmp_path: Path) -> None:
    path = tmp_path / "hostd.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        daemon = start_daemon(activate=listener.fileno())
        assert daemon.get("/version")
        assert daemon.stop() == 0
        assert path.exists()
