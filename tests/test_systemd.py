# SPDX-License-Identifier: GPL-2.0-or-later
"""The units: systemd's own verifier and auditor, and the directives the daemon relies on."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from hostd.config import Config, parse
from tests.tools import needs

UNITS = Path(__file__).parent.parent / "systemd"
SERVICE = UNITS / "hostd.service"
SOCKET = UNITS / "hostd.socket"
#: Type=notify-reload came with this version of systemd; the service has a line for earlier ones
NOTIFY_RELOAD_SINCE = 253
#: systemd-analyze's exposure of the service, in tenths; 100 is a service without any protection
EXPOSURE = 20


def directives(unit: Path) -> dict[str, list[str]]:
    """Directive -> its values in order, the sections put together."""
    found = defaultdict(list)
    for line in unit.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            found[name].append(value)
    return dict(found)


def last(unit: Path) -> dict[str, str]:
    return {name: values[-1] for name, values in directives(unit).items()}


@pytest.fixture
def known_to_systemd(tmp_path: Path) -> Path:
    """The units as the installed systemd understands them: one before 253 would ignore a line, and say so."""
    told = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True).stdout
    version = re.match(r"systemd (\d+)", told)
    assert version is not None
    text = SERVICE.read_text()
    if int(version[1]) < NOTIFY_RELOAD_SINCE:
        text = text.replace("Type=notify-reload\n", "")
    (tmp_path / SERVICE.name).write_text(text)
    shutil.copy(SOCKET, tmp_path)
    return tmp_path


@needs("systemd-analyze")
def test_the_units_verify_without_a_word(known_to_systemd: Path) -> None:
    units = [str(known_to_systemd / unit.name) for unit in (SERVICE, SOCKET)]
    result = subprocess.run(["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@needs("systemd-analyze")
def test_the_service_is_well_hardened(known_to_systemd: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE}", "--json=short",
               str(known_to_systemd / SERVICE.name)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    exposed = {row["json_field"] for row in json.loads(result.stdout) if row["exposure"]}
    assert "MemoryDenyWriteExecute" in exposed      # what the emulated silicon cannot do without


def test_the_service_is_supervised() -> None:
    service = last(SERVICE)
    assert directives(SERVICE)["Type"] == ["notify", "notify-reload"]
    assert int(service["WatchdogSec"]) > 0
    assert service["NotifyAccess"] == "main"
    assert service["Restart"] == "on-failure"
    assert (service["StateDirectory"], service["RuntimeDirectory"]) == ("hostd", "hostd")
    assert service["ExecStart"].split() == ["/usr/bin/env", "hostd"]


def test_the_daemon_stops_its_guests_before_anyone_is_killed() -> None:
    service = last(SERVICE)
    assert service["KillMode"] == "mixed"           # the workers must not get the daemon's SIGTERM
    assert int(service["TimeoutStopSec"]) > parse("").host.shutdown_timeout


def test_the_silicon_may_write_what_it_executes() -> None:
    assert last(SERVICE)["MemoryDenyWriteExecute"] == "no"
    before, _, _ = SERVICE.read_text().partition("MemoryDenyWriteExecute=no")
    assert "machine code" in before.rpartition("\n\n")[2]       # the reason is told


@pytest.mark.parametrize("directive", [
    "NoNewPrivileges", "ProtectHome", "PrivateTmp", "PrivateDevices", "PrivateUsers", "ProtectClock",
    "ProtectHostname", "ProtectKernelLogs", "ProtectKernelModules", "ProtectKernelTunables",
    "ProtectControlGroups", "RestrictNamespaces", "RestrictRealtime", "RestrictSUIDSGID", "LockPersonality"])
def test_protections_are_on(directive: str) -> None:
    assert last(SERVICE)[directive] == "yes"


def test_the_service_has_no_privilege_and_no_more_than_it_needs() -> None:
    service = last(SERVICE)
    assert service["User"] not in ("", "root")
    assert service["CapabilityBoundingSet"] == service["AmbientCapabilities"] == ""
    assert service["ProtectSystem"] == "strict"
    assert service["ReadOnlyPaths"].split() == ["/tmp", "/var/tmp"]     # the private ones of PrivateTmp
    assert service["RestrictAddressFamilies"].split() == ["AF_UNIX", "AF_INET", "AF_INET6"]
    assert directives(SERVICE)["SystemCallFilter"] == ["@system-service", "~@privileged"]
    assert int(service["TasksMax"]) > 256           # one task at least for each of the workers allowed
    assert service["LimitCORE"] == "0"


def test_the_socket_is_where_the_clients_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    socket = last(SOCKET)
    assert socket["ListenStream"] == str(Config().socket)
    assert socket["SocketMode"] == "0660"
    # systemd removes the directory with the service otherwise, and the socket in it
    assert last(SERVICE)["RuntimeDirectoryPreserve"] == "yes"


def test_the_user_and_the_group_are_created() -> None:
    (line,) = (line for line in (UNITS / "hostd.sysusers").read_text().splitlines() if line[:1] not in "#")
    kind, name, *_ = line.split()
    assert (kind, name) == ("u", last(SERVICE)["User"])
    assert name == last(SERVICE)["Group"] == last(SOCKET)["SocketGroup"]
