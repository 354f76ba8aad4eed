# SPDX-License-Identifier: GPL-2.0-or-later
"""What is migrated, how often, and what came of it.

A guest goes to and fro between two places.  In between it rests until its load has verified all it had
written before.  QEMU does the same with the same files, right after.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from statistics import median

import msgspec

from hostd.bench import migrate_hosts, migrate_qemu
from hostd.bench.migrate_hosts import Fleet, two_hosts
from hostd.bench.migrate_network import LOOPBACK, Network, slow_network
from hostd.bench.migrate_program import DIRTIER, DIRTY_2000, IDLE, Load
from hostd.bench.migrate_sides import Limits, Moved, NotMoved, Side
from hostd.bench.migrate_watch import WINDOW, Hop, answer, await_lines, await_steps, drift, hop
from hostd.ctl.demo import Template
from hostd.ctl.errors import CtlError

LIMIT = 32 << 20
_BOOT_S = 120.0
#: the longest that the load may be silent, and a guest may take to answer
_SILENCE_S = 30.0
#: QEMU machines from which a fleet is extrapolated
_QEMU_GUESTS = 3
_MOST_TOLD = 10

Say = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """A guest with a load, and how it is moved."""

    name: str
    load: Load
    memory: int = 128 << 20
    #: bytes a second
    bandwidth: int | None = None
    #: migrations for each run that is asked for
    times: int = 1
    #: lines of the load before the first migration and after each
    rest: int = WINDOW
    slow: bool = False


@dataclass(frozen=True)
class FleetCase:
    """Idle clones that all have to go."""

    name: str
    template_there: bool
    bandwidth: int | None = None


CASES: dict[str, tuple[Case | FleetCase, ...]] = {
    "idle": (
        Case("idle, 128 MB", IDLE),
        Case("idle, 256 MB", IDLE, memory=256 << 20),
        Case("idle, 128 MB, 32 MB/s", IDLE, bandwidth=LIMIT)),
    "dirty2000": (
        Case("2,000 pages/s", DIRTY_2000),
        Case("2,000 pages/s, 32 MB/s", DIRTY_2000, bandwidth=LIMIT)),
    "dirtier": (
        Case("full speed", DIRTIER),
        Case("full speed, 32 MB/s", DIRTIER, bandwidth=LIMIT)),
    "evacuate": (
        FleetCase("idle clones", False),
        FleetCase("idle clones, 32 MB/s", False, LIMIT),
        FleetCase("idle clones, template there", True),
        FleetCase("idle clones, template there, 32 MB/s", True, LIMIT)),
    "back-and-forth": (Case("to and fro", DIRTY_2000, times=10, rest=4),),
    "netem": (Case("2,000 pages/s, slow network", DIRTY_2000, slow=True),),
}


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """A case as one of the two does it: medians of `moved` migrations, None without any; seconds, bytes."""

    case: str
    by: str
    network: str
    moved: int
    #: as it is reported
    downtime: float | None
    total: float | None
    bytes: float | None
    #: the longest time between two rounds of the guest's load: while it migrates, and before
    still: float | None = None
    usual: float | None = None
    #: what its clock fell behind the host's each time; and in all, however it went, and what may be
    #: imprecision of that
    lost: float | None = None
    drift: float | None = None
    allowed: float | None = None
    #: pages a second that the load wrote
    rate: float | None = None
    #: guests, of which QEMU's are extrapolated
    guests: int = 1
    #: why the guest stayed where it was
    stayed: str = ""
    #: what came to harm, a sentence each
    findings: list[str] = msgspec.field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """How thoroughly to measure."""

    runs: int = 3
    guests: int = 50
    #: seconds after which a migration is given up
    timeout: float = 30.0
    qemu: bool = False
    say: Say = lambda text: None


Make = Callable[[Template, Network], AbstractContextManager[Side]]


@dataclass(frozen=True)
class _Way:
    """One of the two, held to something."""

    by: str
    limits: Limits


def measure(part: str, template: Template, settings: Settings) -> Iterator[Row]:
    """The rows of a part."""
    for case in CASES[part]:
        settings.say(case.name)
        if isinstance(case, FleetCase):
            yield _fleet(case, template, settings)
            if settings.qemu and not case.template_there:
                yield from _qemu_fleet(case, template, settings)
        else:
            yield from _case(case, replace(template, memory=case.memory), settings)


def _case(case: Case, template: Template, settings: Settings) -> Iterator[Row]:
    with ExitStack() as stack:
        network = stack.enter_context(slow_network()) if case.slow else LOOPBACK
        ours = _Way("hostd", Limits(bandwidth=case.bandwidth, timeout=settings.timeout))
        yield from hops(migrate_hosts.side, template, network, case, [ours], settings)
        if settings.qemu:
            yield from hops(migrate_qemu.side, template, network, case, qemu_ways(case.bandwidth, settings),
                            settings)


def qemu_ways(bandwidth: int | None, settings: Settings) -> list[_Way]:
    """QEMU as it is, with our downtime, and with no limit to its bandwidth, either."""
    as_it_is = Limits(bandwidth=bandwidth, timeout=settings.timeout)
    same_downtime = replace(as_it_is, downtime_ms=50.0)
    ways = [_Way("QEMU", as_it_is), _Way("QEMU, 50 ms", same_downtime)]
    if bandwidth is None:
        ways.append(_Way("QEMU, 50 ms, no limit", replace(same_downtime, bandwidth=migrate_qemu.UNLIMITED)))
    return ways


class _Tally:
    """What came of one way so far."""

    def __init__(self) -> None:
        self.moved: list[Moved] = []
        self.hops: list[Hop] = []
        self.stayed = ""
        self.findings: list[str] = []


def hops(make: Make, template: Template, network: Network, case: Case, ways: Sequence[_Way],
         settings: Settings) -> list[Row]:
    """Have a guest go to and fro, each time in the next of the ways."""
    tallies = {way.by: _Tally() for way in ways}
    drifted = allowed = rate = None
    with make(template, network) as side:
        watch = side.watch
        watch.wait(lambda witness: template.ready.encode() in witness.said, _BOOT_S, "did not boot")
        watch.type(case.load.command())
        await_lines(watch, case.rest + WINDOW, _BOOT_S)
        first, count = watch.lines(), 0
        for way in [way for _ in range(settings.runs * case.times) for way in ways]:
            tally = tallies[way.by]
            if tally.stayed:
                continue    # it would again
            try:
                _hop(side, case, way, tally)
                count += 1
            except CtlError as error:
                tally.findings.append(str(error))
                break
            finally:
                tally.findings += watch.findings()
        lines = watch.lines()
        if count and len(lines) > 2 * WINDOW:
            drifted, allowed = drift(lines, count)
        passed = first[-1].clock - first[0].clock
        rate = (first[-1].steps - first[0].steps) / passed
    return [_row(case.name, way.by, network, tallies[way.by], drifted, allowed, rate) for way in ways]


def _hop(side: Side, case: Case, way: _Way, tally: _Tally) -> None:
    """One migration, and what was seen of it."""
    began = time.monotonic()
    try:
        moved = side.hop(way.limits)
    except NotMoved as error:
        tally.stayed = str(error)
        return
    ended = time.monotonic()
    answer(side.watch, "Stillhere", _SILENCE_S)
    await_lines(side.watch, case.rest, _SILENCE_S)
    await_steps(side.watch, case.load.pages, _SILENCE_S)
    tally.moved.append(moved)
    tally.hops.append(hop(side.watch.lines(), began, ended))


def _row(case: str, by: str, network: Network, tally: _Tally, drifted: float | None, allowed: float | None,
         rate: float | None) -> Row:
    moved, seen = tally.moved, tally.hops
    return Row(
        case=case, by=by, network=network.about, moved=len(moved),
        downtime=_median([one.downtime for one in moved]), total=_median([one.total for one in moved]),
        bytes=_median([one.bytes for one in moved]), still=_median([one.still for one in seen]),
        usual=_median([one.usual for one in seen]), lost=_median([one.lost for one in seen]),
        drift=drifted, allowed=allowed, rate=rate, stayed=tally.stayed,
        findings=_told(tally.findings))


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _told(findings: list[str]) -> list[str]:
    more = len(findings) - _MOST_TOLD
    return findings[:_MOST_TOLD] + ([f"and {more} more"] if more > 0 else [])


def _fleet(case: FleetCase, template: Template, settings: Settings) -> Row:
    """All clones of a host go to the other one, and all of them answer there."""
    tally = _Tally()
    limits = Limits(bandwidth=case.bandwidth)
    with two_hosts(LOOPBACK) as hosts:
        fleet = Fleet(template, hosts, settings.guests, case.template_there)
        for run in range(settings.runs):
            try:
                tally.moved.append(fleet.evacuate(limits))
                fleet.answer(f"Stillhere{'abcdefghij'[run % 10]}")
            except CtlError as error:
                tally.findings.append(str(error))
                break
    return _fleet_row(case, "hostd", tally, settings)


def _qemu_fleet(case: FleetCase, template: Template, settings: Settings) -> Iterator[Row]:
    """A few machines go one after the other, as QEMU has no evacuation; time and bytes are scaled."""
    scale = settings.guests / _QEMU_GUESTS
    for way in qemu_ways(case.bandwidth, settings):
        tally = _Tally()
        with ExitStack() as machines:
            sides = [machines.enter_context(migrate_qemu.side(template, LOOPBACK))
                     for _ in range(_QEMU_GUESTS)]
            for side in sides:
                side.watch.wait(lambda witness: template.ready.encode() in witness.said, _BOOT_S,
                                "did not boot")
            for _ in range(settings.runs):
                moved = [side.hop(way.limits) for side in sides]
                tally.moved.append(Moved(median(one.downtime for one in moved),
                                         sum(one.total for one in moved) * scale,
                                         round(sum(one.bytes for one in moved) * scale)))
        yield _fleet_row(case, way.by, tally, settings)


def _fleet_row(case: FleetCase, by: str, tally: _Tally, settings: Settings) -> Row:
    row = _row(case.name, by, LOOPBACK, tally, None, None, None)
    return msgspec.structs.replace(row, guests=settings.guests, moved=row.moved * settings.guests)


def failures(rows: Sequence[Row]) -> list[str]:
    """What of ours went wrong; QEMU's troubles are its own."""
    found = []
    for row in rows:
        if row.by != "hostd":
            continue
        found += [f"{row.case}: {finding}" for finding in row.findings]
        if row.stayed:
            found.append(f"{row.case}: the guest stayed where it was: {row.stayed}")
        if row.drift is not None and row.allowed is not None and abs(row.drift) > row.allowed:
            found.append(f"{row.case}: the guest's clock drifted by {row.drift * 1e3:.1f} ms over "
                         f"{row.moved} migrations, where {row.allowed * 1e3:.1f} ms can be imprecision")
    return found
