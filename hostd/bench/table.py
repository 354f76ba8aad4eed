# SPDX-License-Identifier: GPL-2.0-or-later
"""All benchmarks, in the order in which they are run and shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from hostd.bench import boot, exits, fleet, shares, silicon, switches, translated, translation, wakeups
from hostd.bench.measures import Benchmark, Measure, Result, Settings, result

BENCHMARKS: tuple[Benchmark, ...] = (
    boot.BENCHMARK, exits.BENCHMARK, switches.BENCHMARK, silicon.BENCHMARK, fleet.START, fleet.FLEET,
    shares.BENCHMARK, wakeups.BENCHMARK, translation.BENCHMARK, translated.COSTS, translated.BOOTS,
)  # fmt: skip

MEASURES: dict[str, Measure] = {
    measure.name: measure for benchmark in BENCHMARKS for measure in benchmark.measures
}


def matching(patterns: Iterable[str]) -> frozenset[str]:
    """The measures that these names or patterns stand for.  Raises KeyError for one that stands for none."""
    found: set[str] = set()
    for pattern in patterns:
        names = [name for name in MEASURES if fnmatchcase(name, pattern)]
        if not names:
            raise KeyError(pattern)
        found.update(names)
    return frozenset(found)


def run(settings: Settings, wanted: frozenset[str]) -> Iterator[Result]:
    """Take the wanted measures; each is given out when it is there."""
    for benchmark in BENCHMARKS:
        names = wanted.intersection(measure.name for measure in benchmark.measures)
        if names:
            settings.say(f"measuring {', '.join(m.name for m in benchmark.measures if m.name in names)}")
            samples = benchmark.run(settings, names)
            yield from (result(measure, samples[measure.name])
                        for measure in benchmark.measures if measure.name in names)
