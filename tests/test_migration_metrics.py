# SPDX-License-Identifier: GPL-2.0-or-later
"""What the metrics tell of migrations: those that are over, and those under way."""

from __future__ import annotations

import subprocess
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.migration.totals import BYTES, DIRECTIONS, DOWNTIME_BOUNDS, OUTCOMES, UNDER_WAY, Histogram, Totals
from hostd.migration.views import KINDS, PHASES, MigrationView
from tests.fleet import Fleet
from tests.test_metrics import parse, scrape, value
from tests.tools import needs

COPYING = MigrationView(
    token="t", vm="web", direction="out", peer="b", mode="auto", phase="copying", round=2,
    pages={"full": 10, "zero": 90}, bytes={"full": 40960, "other": 100}, remaining_pages=5,
    dirty_rate=2000.0, throughput=1e8)


def over(phase: str = "done", **fields: Any) -> MigrationView:
    fields = {"phase": phase, "downtime": 0.03, "elapsed": 1.5, **fields}
    return msgspec.structs.replace(COPYING, **fields)


@pytest.fixture
def fleet() -> Fleet:
    return Fleet("web", "db")


async def test_everything_is_there_before_the_first_migration(fleet: Fleet) -> None:
    samples = parse((await scrape(fleet)).text)
    for direction in DIRECTIONS:
        for outcome in OUTCOMES:
            assert value(samples, "hostd_migrations_total", direction=direction, outcome=outcome) == 0
        for kind in BYTES:
            assert value(samples, "hostd_migration_bytes_total", direction=direction, kind=kind) == 0
        for kind in KINDS:
            assert value(samples, "hostd_migration_pages_total", direction=direction, kind=kind) == 0
        assert value(samples, "hostd_migration_downtime_seconds_count", direction=direction) == 0
        assert value(samples, "hostd_migration_duration_seconds_count", direction=direction) == 0
    assert {phase: value(samples, "hostd_migrations_under_way", phase=phase) for phase in UNDER_WAY} == (
        dict.fromkeys(UNDER_WAY, 0))
    assert not any(name.startswith("hostd_vm_migration") for name, _ in samples)


async def test_those_that_are_over_are_counted(fleet: Fleet) -> None:
    totals = fleet.migrations.totals
    totals.finished(over())
    totals.finished(over("failed", downtime=None))
    totals.finished(over(direction="in", downtime=0.3))
    samples = parse((await scrape(fleet)).text)
    assert value(samples, "hostd_migrations_total", direction="out", outcome="done") == 1
    assert value(samples, "hostd_migrations_total", direction="out", outcome="failed") == 1
    assert value(samples, "hostd_migrations_total", direction="in", outcome="done") == 1
    assert value(samples, "hostd_migration_bytes_total", direction="out", kind="full") == 2 * 40960
    assert value(samples, "hostd_migration_bytes_total", direction="out", kind="other") == 200
    assert value(samples, "hostd_migration_pages_total", direction="in", kind="zero") == 90
    downtime = "hostd_migration_downtime_seconds"
    assert value(samples, f"{downtime}_bucket", direction="out", le="0.02") == 0
    assert value(samples, f"{downtime}_bucket", direction="out", le="0.05") == 1
    assert value(samples, f"{downtime}_bucket", direction="in", le="+Inf") == 1
    assert value(samples, f"{downtime}_sum", direction="in") == 0.3
    assert value(samples, "hostd_migration_duration_seconds_sum", direction="out") == 1.5


async def test_one_under_way_is_described_and_then_gone(fleet: Fleet) -> None:
    fleet.migrations.views = [over(vm="db"), COPYING]
    samples = parse((await scrape(fleet)).text)
    assert [phase for phase in UNDER_WAY
            if value(samples, "hostd_vm_migration_phase", name="web", phase=phase)] == ["copying"]
    assert value(samples, "hostd_vm_migration_round", name="web") == 2
    assert value(samples, "hostd_vm_migration_remaining_bytes", name="web") == 5 * 4096
    assert value(samples, "hostd_vm_migration_dirty_pages_per_second", name="web") == 2000
    assert value(samples, "hostd_vm_migration_throughput_bytes_per_second", name="web") == 1e8
    assert value(samples, "hostd_migrations_under_way", phase="copying") == 1
    fleet.migrations.views = [over(vm="db"), over()]
    samples = parse((await scrape(fleet)).text)
    assert not any(name.startswith("hostd_vm_migration") for name, _ in samples)


async def test_what_a_peer_names_makes_no_label(fleet: Fleet) -> None:
    """Kinds may come from another version's count; and a VM that is listed twice is told of once."""
    odd = over(bytes={"odd": 7, "full": 1}, pages={"odd": 7})
    fleet.migrations.totals.finished(odd)
    fleet.migrations.views = [COPYING, msgspec.structs.replace(COPYING, round=3)]
    text = (await scrape(fleet)).text
    assert "odd" not in text
    assert value(parse(text), "hostd_vm_migration_round", name="web") == 3
    assert text.count("hostd_vm_migration_round{") == 1


def test_every_phase_is_under_way_or_over() -> None:
    assert {*UNDER_WAY, *OUTCOMES} == set(PHASES)
    assert len(UNDER_WAY) + len(OUTCOMES) == len(PHASES)
    totals = Totals()
    for outcome in OUTCOMES:
        totals.finished(over(outcome))
    assert sum(totals.migrations.values()) == len(OUTCOMES)
    assert sum(totals.duration["out"].counts) == 1


@given(st.lists(st.floats(0, 1e6)))
def test_a_histogram_puts_each_value_under_its_bound(values: list[float]) -> None:
    histogram = Histogram(DOWNTIME_BOUNDS)
    for number in values:
        histogram.add(number)
    for bucket, bound in enumerate(DOWNTIME_BOUNDS):
        assert sum(histogram.counts[:bucket + 1]) == sum(number <= bound for number in values)
    assert sum(histogram.counts) == len(values)


@needs("promtool")
async def test_prometheus_linter_is_content(fleet: Fleet) -> None:
    fleet.migrations.totals.finished(over())
    fleet.migrations.views = [COPYING]
    text = (await scrape(fleet)).text
    result = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "")
