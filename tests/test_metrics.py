# SPDX-License-Identifier: GPL-2.0-or-later
"""The metrics: names, values, what disappears, and what Prometheus' own linter says."""

from __future__ import annotations

import subprocess

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from hostd.lifecycle import State
from hostd.metrics import OTHER_REASON, REASONS, make_metrics_app, reason_of
from hostd.model import PRESSURES, MemoryUsage, TranslatorView
from hostd.scheduler import LATENCY_BOUNDS_NS
from tests.fleet import MIB, Fleet
from tests.tools import needs
from vmm.exitcodes import ExitCode

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scrape(fleet: Fleet, accept: str = "") -> httpx.Response:
    transport = httpx.ASGITransport(make_metrics_app(fleet.as_host()))
    async with httpx.AsyncClient(transport=transport, base_url="http://hostd") as client:
        return await client.get("/metrics", headers={"Accept": accept})


def parse(text: str) -> Samples:
    return {(sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples}


def value(samples: Samples, metric: str, /, **labels: str) -> float:
    return samples[metric, frozenset(labels.items())]


@pytest.fixture
def fleet() -> Fleet:
    fleet = Fleet("web", "db")
    fleet.live(10)
    return fleet


async def test_a_vm_is_described_in_base_units(fleet: Fleet) -> None:
    samples = parse((await scrape(fleet)).text)
    assert value(samples, "hostd_vm_info", name="web", vmm="hw", image="debian") == 1
    assert value(samples, "hostd_vm_cpu_seconds_total", name="web", mode="run") == 2.5
    assert value(samples, "hostd_vm_cpu_seconds_total", name="web", mode="wait") == 2.5
    assert value(samples, "hostd_vm_cpu_seconds_total", name="web", mode="sleep") == 5
    assert value(samples, "hostd_vm_exits_total", name="db", reason="io") == 10_000
    assert value(samples, "hostd_vm_exit_handling_seconds_total", name="db", reason="io") == 0.01
    assert value(samples, "hostd_vm_interrupts_injected_total", name="web") == 2500
    assert value(samples, "hostd_vm_world_switches_total", name="web") == 5000
    assert value(samples, "hostd_vm_memory_bytes", name="web", kind="assigned") == 128 * MIB
    assert value(samples, "hostd_vm_memory_bytes", name="web", kind="private") == 4 * MIB
    assert value(samples, "hostd_vm_boots_total", name="web") == 2
    assert value(samples, "hostd_vm_crashes_total", name="web") == 1
    assert value(samples, "hostd_vm_uptime_seconds", name="web") == 10
    assert value(samples, "hostd_vm_weight", name="web") == 100
    assert value(samples, "hostd_vm_worker", name="web") == 0


async def test_the_host_is_described(fleet: Fleet) -> None:
    samples = parse((await scrape(fleet)).text)
    assert value(samples, "hostd_build_info", version="1.2.3") == 1
    assert value(samples, "hostd_start_time_seconds") > 1.7e9
    assert value(samples, "hostd_pool_bytes") == 1024 * MIB
    states = ("free", "granted", "private", "shared", "overhead")
    assert sum(value(samples, "hostd_pool_frames", state=state) for state in states) == 262_144
    assert value(samples, "hostd_workers", state="ready") == 1
    assert value(samples, "hostd_workers", state="starting") == 1
    assert value(samples, "hostd_worker_restarts_total") == 2
    assert value(samples, "hostd_worker_vms", worker="0") == 2
    assert value(samples, "hostd_vms", state="running") == 2
    assert value(samples, "hostd_vms", state="crashed") == 0
    assert value(samples, "process_resident_memory_bytes") > 0


async def test_memory_of_a_vm_is_described(fleet: Fleet) -> None:
    usage = MemoryUsage(
        assigned=128 * MIB, resident=9 * MIB, private=8 * MIB, shared=MIB, ballooned=2 * MIB, swapped=3 * MIB,
        working_set=4 * MIB, target=5 * MIB, guest_free=6 * MIB, guest_available=7 * MIB,
        guest_total=120 * MIB)
    fleet.change("web", memory_usage=usage, memory_waiting=True)
    samples = parse((await scrape(fleet)).text)
    for kind in ("assigned", "resident", "private", "shared", "ballooned", "swapped", "working_set",
                 "target"):
        assert value(samples, "hostd_vm_memory_bytes", name="web", kind=kind) == getattr(usage, kind)
    for kind in ("free", "available", "total"):
        assert value(samples, "hostd_vm_memory_guest_bytes", name="web", kind=kind) == getattr(
            usage, f"guest_{kind}")
    assert value(samples, "hostd_vm_memory_reservation_bytes", name="web") == 16 * MIB
    assert value(samples, "hostd_vm_memory_limit_bytes", name="web") == 128 * MIB
    assert value(samples, "hostd_vm_memory_shares", name="web") == 1280
    assert [value(samples, "hostd_vm_memory_waiting", name=name) for name in ("web", "db")] == [1, 0]
    expected = {"merged": 100, "broken": 10, "zeroed": 20, "swapped_out": 40, "swapped_in": 30,
                "inflated": 50, "deflated": 60, "reported": 70}
    assert {event: value(samples, "hostd_vm_memory_pages_total", name="web", event=event)
            for event in expected} == expected


async def test_what_a_guest_does_not_say_is_absent(fleet: Fleet) -> None:
    samples = parse((await scrape(fleet)).text)
    kinds = {dict(labels)["kind"] for name, labels in samples if name.startswith("hostd_vm_memory")
             and "kind" in dict(labels)}
    assert kinds == {"assigned", "resident", "private", "shared", "ballooned", "swapped"}


async def test_memory_of_the_host_is_described(fleet: Fleet) -> None:
    samples = parse((await scrape(fleet)).text)
    assert value(samples, "hostd_memory_saved_bytes") == 200 * MIB
    assert value(samples, "hostd_memory_swap_bytes", kind="used") == 30 * MIB
    assert value(samples, "hostd_memory_swap_bytes", kind="compressed") == 10 * MIB
    assert value(samples, "hostd_memory_swap_limit_bytes") == 100 * MIB
    assert value(samples, "hostd_memory_scanned_pages_total") == 1_000_000
    assert value(samples, "hostd_memory_waiting_workers") == 3
    assert [state for state in PRESSURES if value(samples, "hostd_memory_state", state=state)] == ["soft"]


async def test_latency_is_a_cumulative_histogram(fleet: Fleet) -> None:
    samples = parse((await scrape(fleet)).text)
    name = "hostd_scheduler_wakeup_latency_seconds"
    assert value(samples, f"{name}_bucket", le="2e-05") == 1
    assert value(samples, f"{name}_bucket", le="1.0") == len(LATENCY_BOUNDS_NS)
    assert value(samples, f"{name}_bucket", le="+Inf") == len(LATENCY_BOUNDS_NS) + 1
    assert value(samples, f"{name}_count") == len(LATENCY_BOUNDS_NS) + 1
    assert value(samples, f"{name}_sum") == pytest.approx(0.016)


async def test_translators_are_described_whether_they_work_or_not(fleet: Fleet) -> None:
    fleet.translators[0] = TranslatorView(units=1, instructions=2, chained=3, evicted=4, rejected=5, shared=6,
                                          pages=7, used_bytes=8, invalidated=9)
    samples = parse((await scrape(fleet)).text)
    for number, name in enumerate(("units_total", "instructions_total", "chained_jumps_total",
                                   "units_evicted_total", "units_rejected_total", "units_shared_total",
                                   "code_pages", "used_bytes", "units_invalidated_total"), 1):
        assert value(samples, f"hostd_tc_{name}", worker="0") == number
        assert value(samples, f"hostd_tc_{name}", worker="1") == 0


@pytest.mark.parametrize("state", list(State))
async def test_exactly_one_state_is_on(state: State) -> None:
    fleet = Fleet()
    fleet.add("web", state)
    samples = parse((await scrape(fleet)).text)
    on = {other for other in State if value(samples, "hostd_vm_state", name="web", state=other.value)}
    assert on == {state}


async def test_what_a_vm_does_not_have_is_absent(fleet: Fleet) -> None:
    fleet.add("idle", State.DEFINED)
    fleet.change("idle", image=None)
    samples = parse((await scrape(fleet)).text)
    assert ("hostd_vm_worker", frozenset({("name", "idle")})) not in samples
    assert value(samples, "hostd_vm_info", name="idle", vmm="hw", image="") == 1


@pytest.mark.parametrize(("cap", "ratio"), [(0, 1.0), (25, 0.25), (100, 1.0)])
async def test_no_cap_is_a_whole_cpu(cap: int, ratio: float) -> None:
    fleet = Fleet()
    fleet.add("web", cap=cap)
    assert value(parse((await scrape(fleet)).text), "hostd_vm_cap_ratio", name="web") == ratio


async def test_a_vm_that_is_gone_disappears(fleet: Fleet) -> None:
    app = make_metrics_app(fleet.as_host())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://hostd") as client:
        assert 'name="db"' in (await client.get("/metrics")).text
        fleet.remove("db")
        after = (await client.get("/metrics")).text
    assert 'name="db"' not in after
    assert 'name="web"' in after


async def test_the_number_of_series_of_a_vm_is_bounded() -> None:
    """Whatever exits a guest provokes."""
    fleet = Fleet("web")
    fleet.exit_counts["web"] = dict.fromkeys([*ExitCode, *range(5000), -1, 1 << 63], 1)
    samples = parse((await scrape(fleet)).text)
    of_vm = [name for name, labels in samples if ("name", "web") in labels]
    reasons = len({*REASONS.values(), OTHER_REASON})
    assert of_vm.count("hostd_vm_exits_total") == reasons
    assert len(of_vm) <= 2 * reasons + 50


@given(st.integers(-(1 << 63), (1 << 64) - 1))
def test_every_exit_code_has_a_reason(code: int) -> None:
    assert reason_of(code) in {*REASONS.values(), OTHER_REASON}


def test_exit_codes_have_the_expected_reasons() -> None:
    expected = {
        ExitCode.NPF: "nested_page_fault", ExitCode.EXCP_PF: "page_fault", ExitCode.EXCP_GP: "exception",
        ExitCode.CR0_READ: "control_register", ExitCode.CR15_WRITE: "control_register",
        ExitCode.DR7_WRITE: "debug_register", ExitCode.SWINT: "software_interrupt",
        ExitCode.WBINVD: "cache_control", ExitCode.VMMCALL: "hypercall", -1: "invalid", 0x999: "other",
    }
    assert {code: reason_of(code) for code in expected} == expected


async def test_openmetrics_is_spoken_to_those_who_ask(fleet: Fleet) -> None:
    plain = await scrape(fleet)
    assert plain.headers["content-type"].startswith("text/plain; version=")
    modern = await scrape(fleet, "application/openmetrics-text; version=1.0.0")
    assert modern.headers["content-type"].startswith("application/openmetrics-text")
    assert modern.text.endswith("# EOF\n")


async def test_the_root_says_where_the_metrics_are(fleet: Fleet) -> None:
    transport = httpx.ASGITransport(make_metrics_app(fleet.as_host()))
    async with httpx.AsyncClient(transport=transport, base_url="http://hostd") as client:
        assert "/metrics" in (await client.get("/")).text
        assert (await client.get("/nothing")).status_code == 404
        assert (await client.post("/metrics")).status_code == 405


@needs("promtool")
async def test_prometheus_linter_is_content(fleet: Fleet) -> None:
    """`promtool check metrics`: names, units, suffixes, help texts."""
    text = (await scrape(fleet)).text
    result = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "")
