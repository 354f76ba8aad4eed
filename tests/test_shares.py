# SPDX-License-Identifier: GPL-2.0-or-later
"""Live scheduling: real guests that compete for real workers, and some that sleep beside them.

The bounds are generous, for the machine that runs the tests has other work; hostd/bench/shares.py measures.
Guests are compared with what all of them got together, not with what an idle machine would have given.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from hostd.bench.wakeups import ECHO_IMAGE
from hostd.ctl.usage import CpuMeter
from hostd.scheduler.entitlement import CPU, Claim, fill, limit_of
from tests.private_daemon import PrivateDaemon
from vmm import guests

pytestmark = pytest.mark.slow

#: for the balancer to find its placement, and to watch what comes of it
SETTLE_S, WATCH_S = 1, 3.5


@pytest.fixture(autouse=True)
def clean(daemon: PrivateDaemon) -> Iterator[None]:
    yield
    for vm in daemon.get("/vms"):
        operation = daemon.client.delete(f"/vms/{vm['name']}", params={"force": "true"}).json()
        assert daemon.get(f"/operations/{operation['id']}", wait=30)["status"] == "done"


def start_busy(daemon: PrivateDaemon, name: str, **share: int) -> None:
    daemon.create(name, guests.read("primes"), append="loop", start=True, **share)


def start_echo(daemon: PrivateDaemon) -> None:
    daemon.create("echo", ECHO_IMAGE, start=True)
    daemon.wait("echo", console="!")


def watched(daemon: PrivateDaemon) -> tuple[dict[str, float], float]:
    """CPU seconds of every guest in some seconds, and how many these were."""
    began, before = time.monotonic(), run_seconds(daemon)
    time.sleep(WATCH_S)
    elapsed, after = time.monotonic() - began, run_seconds(daemon)
    return {name: after[name] - before[name] for name in after}, elapsed


def run_seconds(daemon: PrivateDaemon) -> dict[str, float]:
    return {vm["name"]: vm["cpu"]["run"] for vm in daemon.get("/vms")}


def test_the_cpus_are_shared_by_weight(daemon: PrivateDaemon) -> None:
    weights = (1, 2, 4, 8)
    for twin in "ab":
        for weight in weights:
            start_busy(daemon, f"{weight}{twin}", weight=100 * weight)
    time.sleep(SETTLE_S)
    got, _ = watched(daemon)
    total = sum(got.values())
    for weight in weights:
        pair = got[f"{weight}a"] + got[f"{weight}b"]
        assert pair / total == pytest.approx(weight / sum(weights), rel=0.15), got
    for light, heavy in pairwise(weights):
        assert max(got[f"{light}a"], got[f"{light}b"]) < min(got[f"{heavy}a"], got[f"{heavy}b"]), got


def test_caps_hold_beside_guests_without(daemon: PrivateDaemon) -> None:
    caps = {"ten": 10, "quarter": 25, "half": 50, "free": 0, "freer": 0}
    for name, cap in caps.items():
        start_busy(daemon, name, cap=cap, weight=100 if cap == 0 else 400)
    time.sleep(SETTLE_S)
    got, elapsed = watched(daemon)
    for name, cap in caps.items():
        assert not cap or got[name] <= elapsed * cap / 100 * 1.10, got
    claims = [Claim(100 if cap == 0 else 400, limit_of(cap)) for cap in caps.values()]
    dues = fill(claims, int(sum(got.values()) / elapsed * CPU))
    # what else the machine does takes more from one worker than from the other; without regard to weights the
    # one with half a CPU would have less than half of its due
    for name, due in zip(caps, dues, strict=True):
        assert got[name] >= due * elapsed / CPU * 0.55, got


def test_keys_are_answered_beside_busy_guests(daemon: PrivateDaemon) -> None:
    start_echo(daemon)
    for number in range(8):
        start_busy(daemon, f"busy{number}")
        daemon.wait(f"busy{number}", console="primes: below")
    for typed in range(1, 31):
        daemon.send("echo", "x")
        daemon.wait("echo", console="x" * typed)
    # most of its wake-ups end a busy guest's turn, which would have lasted milliseconds
    view = daemon.get("/vms/echo")
    assert view["cpu"]["wait"] < view["cpu"]["sleep"]
    buckets = latency_buckets(daemon)
    assert buckets["+Inf"] >= 30
    assert buckets["0.002"] > buckets["+Inf"] / 2, buckets


def latency_buckets(daemon: PrivateDaemon) -> dict[str, float]:
    """Wake-ups by the bound of their latency, cumulative, once the workers have told of all."""
    name = "hostd_scheduler_wakeup_latency_seconds"
    while True:
        families = text_string_to_metric_families(httpx.get(daemon.get("/host")["metrics"]).text)
        (family,) = (family for family in families if family.name == name)
        buckets = {sample.labels["le"]: sample.value for sample in family.samples if "le" in sample.labels}
        if buckets["+Inf"] >= 30:
            return buckets
        time.sleep(0.1)


def test_a_halted_guest_burns_nothing(daemon: PrivateDaemon) -> None:
    start_echo(daemon)
    daemon.send("echo", "x")
    daemon.wait("echo", console="x")
    before = daemon.get("/vms/echo")
    meter = CpuMeter(daemon.worker_pids())
    time.sleep(1)
    after = daemon.get("/vms/echo")
    assert (after["cpu"]["run"], after["world_switches"], after["exits"]) == (
        before["cpu"]["run"], before["world_switches"], before["exits"])
    assert meter.share() < 0.1
