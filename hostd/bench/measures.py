# SPDX-License-Identifier: GPL-2.0-or-later
"""What a benchmark measures, how it is asked to, and what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, NamedTuple

import msgspec

#: s and us: seconds, microseconds; B: bytes; core: CPUs in use; x: a ratio of two times
Unit = Literal["s", "us", "B", "core", "x"]


@dataclass(frozen=True)
class Measure:
    """One named figure.  `reach` bounds the value from above, or as the two switches say."""

    name: str
    about: str
    unit: Unit
    reach: float | None = None
    #: it is the ratio to the peer that is to be within `reach`
    reach_is_ratio: bool = False
    at_least: bool = False

    def reached(self, value: float, ratio: float | None) -> bool | None:
        """Whether the figure is what it is to be; None where nothing was promised or nothing compared."""
        figure = ratio if self.reach_is_ratio else value
        if self.reach is None or figure is None:
            return None
        return figure >= self.reach if self.at_least else figure <= self.reach


class Samples(NamedTuple):
    """The runs of one measure, in the order in which they were made; the peer's alternated with ours."""

    ours: Sequence[float]
    peer: Sequence[float] = ()


@dataclass(frozen=True)
class Settings:
    """How thoroughly to measure."""

    runs: int = 5
    guests: int = 50
    #: measure QEMU too, side by side
    qemu: bool = False
    #: operations timed at once, for what takes microseconds
    operations: int = 5000
    #: rounds of the processor-bound programs: a third of a second or so
    rounds: int = 100
    #: seconds for a fleet to come to rest, and to watch it then
    settle: float = 10.0
    watch: float = 20.0
    #: QEMU machines from which a fleet of them is extrapolated
    qemu_guests: int = 3
    say: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Benchmark:
    """Measures that are taken together.  `run` is told which of them are wanted."""

    measures: tuple[Measure, ...]
    run: Callable[[Settings, frozenset[str]], Mapping[str, Samples]]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A measure with its figures: medians, and the runs they are the medians of."""

    name: str
    about: str
    unit: Unit
    value: float
    runs: list[float]
    reach: float | None
    #: what `reach` bounds
    reach_of: Literal["value", "ratio"]
    at_least: bool
    reached: bool | None
    peer: float | None
    peer_runs: list[float]
    #: our value divided by the peer's
    ratio: float | None


def result(measure: Measure, samples: Samples) -> Result:
    """What the runs of a measure come to.  Runs made side by side are compared with each other."""
    value = median(samples.ours)
    peer = median(samples.peer) if samples.peer else None
    ratio: float | None = None
    if peer and len(samples.ours) == len(samples.peer):
        ratio = median(ours / theirs for ours, theirs in zip(*samples, strict=True))
    elif peer:
        ratio = value / peer
    return Result(
        name=measure.name, about=measure.about, unit=measure.unit, value=value, runs=list(samples.ours),
        reach=measure.reach, reach_of="ratio" if measure.reach_is_ratio else "value",
        at_least=measure.at_least, reached=measure.reached(value, ratio),
        peer=peer, peer_runs=list(samples.peer), ratio=ratio,
    )
