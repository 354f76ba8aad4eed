# SPDX-License-Identifier: GPL-2.0-or-later
"""The dashboard and the alerts, asked of a real Prometheus that scrapes a daemon with guests at work: no
answer may be empty."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import yaml

from hostd.metrics import VM_METRICS
from tests.balloon_guests import talkative_kernel
from tests.private_daemon import PrivateDaemon
from tests.tools import needs
from vmm import guests

ETC = Path(__file__).parent.parent / "etc"
PROMETHEUS = ETC / "prometheus" / "prometheus.yml"
ALERTS = ETC / "prometheus" / "alerts.yml"
DASHBOARD = json.loads((ETC / "grafana" / "dashboards" / "hostd.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES: list[dict[str, Any]] = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"]
                               for rule in group["rules"]]

#: what Grafana puts in the place of variables before it asks
VARIABLES = {"$__rate_interval": "1m", "$__interval": "5s", "$instance": ".*", "$name": ".*"}
#: the threshold that ends every alert's expression
THRESHOLD = re.compile(r"\s*(==|!=|<=?|>=?)\s*[0-9.]+\s*\Z")


@asynccontextmanager
async def prometheus(target: str, directory: Path) -> AsyncIterator[str]:
    """A real Prometheus with the project's configuration, hastily scraping `target`; the value is its URL."""
    text = PROMETHEUS.read_text().replace("127.0.0.1:9177", target)
    text = re.sub(r"(?<=_interval: )\d+s", "200ms", text)
    (directory / "prometheus.yml").write_text(text)
    (directory / "alerts.yml").write_text(ALERTS.read_text())
    command = ["prometheus", f"--config.file={directory}/prometheus.yml",
               f"--storage.tsdb.path={directory}/data", "--web.listen-address=127.0.0.1:0"]
    async with trio.open_nursery() as nursery:
        process: trio.Process = await nursery.start(partial(trio.run_process, command, check=False,
                                                            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE))
        assert process.stderr is not None
        log = ""
        async for chunk in process.stderr:
            log += chunk.decode()
            address = re.search(r"Listening on\W.*?address=(\S+:\d+)", log)
            if address and "Server is ready" in log:
                break
        else:
            pytest.fail(f"prometheus did not start:\n{log}")
        nursery.start_soon(_drain, process.stderr)
        yield f"http://{address[1]}"
        nursery.cancel_scope.cancel()


async def _drain(stream: trio.abc.ReceiveStream) -> None:
    async for _ in stream:
        pass


async def query(client: httpx.AsyncClient, expression: str) -> list[Any]:
    """The result of an instant query; an error fails the test."""
    answer = (await client.get("/api/v1/query", params={"query": expression})).json()
    assert answer["status"] == "success", f"{expression}: {answer.get('error')}"
    result: list[Any] = answer["data"]["result"]
    return result


def substituted(expression: str) -> str:
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    return expression


def start_guests(daemon: PrivateDaemon) -> None:
    """Guests that compute, that sleep, that switch tasks, that are translated, that share memory, that say
    how their memory is doing, and one that crashed."""
    for name, kernel, append in (("busy", "primes", "loop"), ("busier", "primes", "loop"),
                                 ("idle", "idle", ""), ("mixed", "mix", "rounds=0"),
                                 ("broken", "triple", "")):
        daemon.create(name, guests.read(kernel), append=append, start=True)
    daemon.create("talkative", talkative_kernel(), start=True)
    daemon.create("soft", guests.read("mix"), append="rounds=0", vmm="bt", start=True)
    daemon.wait("idle", console="idle: tick")
    daemon.do("idle", "clone", names=["twin"], start=True)
    daemon.wait("broken", state="crashed")


@contextmanager
def migrations(daemon: PrivateDaemon, directory: Path) -> Iterator[None]:
    """One guest goes to another host; one is on its way for ever, to a host that says nothing."""
    directory.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with (PrivateDaemon(directory, config=f'[migration]\naddress = "{address}"\n'),
          socket.create_server(("127.0.0.1", 0)) as silent):
        daemon.post("/vms/busier/migrate", to=f"127.0.0.1:{silent.getsockname()[1]}")
        daemon.do("soft", "migrate", to=address)
        yield


@pytest.mark.slow
@needs("prometheus")
async def test_every_panel_and_every_alert_has_data(start_daemon: Callable[..., PrivateDaemon],
                                                    tmp_path: Path) -> None:
    daemon = start_daemon()
    target = httpx.URL(daemon.get("/host")["metrics"]).netloc.decode()
    async with prometheus(target, tmp_path) as url, httpx.AsyncClient(base_url=url) as client:
        with trio.fail_after(20):
            while not await query(client, "hostd_migrations_total"):
                await trio.sleep(0.1)               # what has happened before the first scrape has no rate
        start_guests(daemon)
        lacking = ["all"]
        with migrations(daemon, tmp_path / "other"), trio.move_on_after(20):
            while lacking:                          # a rate wants two scrapes, and something between them
                lacking = [what async for what in _lacking(client)]
        assert lacking == []
        targets = (await client.get("/api/v1/targets")).json()["data"]["activeTargets"]
        assert [(one["labels"]["job"], one["health"]) for one in targets] == [("hostd", "up")]
        other = await query(client, 'hostd_vm_exits_total{reason="other"}')
        assert other == [], "guests exit for reasons that have no name"
        assert daemon.client.delete("/vms/mixed", params={"force": "true"}).is_success
        with trio.fail_after(20):
            while await query(client, 'hostd_vm_info{name="mixed"}'):
                await trio.sleep(0.1)


async def _lacking(client: httpx.AsyncClient) -> AsyncIterator[str]:
    """What has no data yet: panels, alerts, variables."""
    for panel in PANELS:
        for sought in panel["targets"]:
            result = await query(client, substituted(sought["expr"]))
            if all(one["value"][1] == "NaN" for one in result):
                yield f"panel {panel['title']!r} shows nothing for {sought['expr']}"
            for label in re.findall(r"{{(\w+)}}", sought.get("legendFormat", "")):
                assert all(label in one["metric"] for one in result), f"panel {panel['title']!r}: no {label}"
    for rule in RULES:
        measured, found = THRESHOLD.subn("", rule["expr"])
        assert found == 1, f"{rule['alert']} does not end with a threshold"
        if not await query(client, measured):
            yield f"alert {rule['alert']} measures nothing"
        await query(client, rule["expr"])
    loaded = (await client.get("/api/v1/rules")).json()["data"]["groups"]
    health = {rule["name"]: rule["health"] for group in loaded for rule in group["rules"]}
    for rule in RULES:
        if health[rule["alert"]] != "ok":
            yield f"Prometheus finds the alert {rule['alert']} {health[rule['alert']]}"
    for variable in DASHBOARD["templating"]["list"]:
        values = re.fullmatch(r"label_values\((.*), (\w+)\)", variable.get("definition", ""))
        if values:
            series = await query(client, substituted(values[1]))
            if not any(values[2] in one["metric"] for one in series):
                yield f"variable {variable['name']} has no values"


@needs("promtool")
def test_prometheus_accepts_its_configuration() -> None:
    assert _promtool("check", "config", str(PROMETHEUS)) == 0
    assert _promtool("check", "rules", str(ALERTS)) == 0


@needs("promtool")
def test_alerts_fire_when_they_should() -> None:
    assert _promtool("test", "rules", str(Path(__file__).parent / "alerts.test.yml")) == 0


def _promtool(*arguments: str) -> int:
    result = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    assert "FAILED" not in result.stdout + result.stderr, result.stdout + result.stderr
    return result.returncode


def test_alerts_say_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert set(rule["annotations"]) == {"summary", "description"}


# -- the dashboard as a document

def test_panels_are_described_and_find_their_data_source() -> None:
    identifiers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(identifiers)) == len(identifiers)
    for panel in PANELS:
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert panel["type"] in {"stat", "gauge", "table", "timeseries"}
        assert [sought["refId"] for sought in panel["targets"]] == [
            chr(ord("A") + i) for i in range(len(panel["targets"]))]
        for holder in (panel, *panel["targets"]):
            assert holder["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_panels_fill_the_grid_without_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    assert len(taken) == 24 * (1 + max(y for _, y in taken))


def test_variables_of_the_queries_are_defined() -> None:
    defined = {"$" + variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = {name for panel in PANELS for sought in panel["targets"]
            for name in re.findall(r"\$\w+", sought["expr"])}
    assert used - {"$__rate_interval", "$__interval"} <= defined


def test_all_that_is_known_of_the_memory_of_guests_is_shown() -> None:
    shown = " ".join(sought["expr"] for panel in PANELS for sought in panel["targets"])
    names = {row.name for row in VM_METRICS if row.name.startswith("hostd_vm_memory")}
    assert len(names) > 5
    assert {name for name in (*names, "working_set", "target") if name not in shown} == set()


def test_columns_of_the_fleet_table_come_from_its_queries() -> None:
    (table,) = (panel for panel in PANELS if panel["type"] == "table")
    references = {sought["refId"] for sought in table["targets"]}
    (organize,) = (step["options"] for step in table["transformations"] if step["id"] == "organize")
    columns = {*organize["renameByName"], *organize["excludeByName"]}
    assert {name.removeprefix("Value #") for name in columns if name.startswith("Value #")} == references
    for override in table["fieldConfig"]["overrides"]:
        assert override["matcher"]["options"] in organize["renameByName"].values()


def test_provisioning_points_at_what_is_here() -> None:
    provisioning = ETC / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "hostd.yml").read_text())["datasources"]
    interval = yaml.safe_load(PROMETHEUS.read_text())["global"]["scrape_interval"]
    assert (source["type"], source["jsonData"]["timeInterval"]) == ("prometheus", interval)
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "hostd.yml").read_text())["providers"]
    assert (provider["type"], provider["options"]["path"]) == ("file", "/var/lib/grafana/dashboards")
