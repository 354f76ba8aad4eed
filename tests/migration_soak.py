# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that goes to and fro between two daemons, with something going wrong each time, for as long as one
likes.

    python -m tests.migration_soak --seconds 600
    python -m tests.migration_soak --seed 1234 --cases 40   # those of one seed once more
    python -m tests.migration_soak --every                  # all faults at all words, before any random ones
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random, SystemRandom
from typing import get_args

from tests.migration_faults import FAULTS, WORDS, Case, When, cases, run
from tests.migration_proxy import Direction
from tests.migration_world import KINDS, Unsound, World

#: cases until everything must be gone, and another guest comes
_LIVES = 12
#: how much more often a fault comes after which no daemon has to be started again
_QUICK = 6
#: bytes of a short migration, in either direction
_BYTES: dict[Direction, int] = {"to target": 150_000, "to source": 600}


def random_case(random: Random) -> Case:
    """Any fault, at any word or byte, of any kind of migration."""
    names = list(FAULTS)
    weights = [1 if fault.restarts else _QUICK for fault in FAULTS.values()]
    fault = random.choices(names, weights)[0]
    flow = random.choice(list(WORDS))
    mode = random.choice(("auto", "precopy")) if flow == "auto" else flow
    connections = random.choice((1, 1, 1, 3))
    if random.random() < 0.4:
        direction = random.choice(get_args(Direction))
        byte = int(_BYTES[direction] ** random.random())
        return Case(fault, direction, mode=mode, byte=byte, connections=connections)
    return Case(fault, random.choice(WORDS[flow]), random.choice(get_args(When)),
                random.choice((1, 1, 1, 2, 3)), mode, connections=connections)


class Soak:
    """In a directory of its own; `report` counts how cases ended, `wrong` tells of those that did not."""

    def __init__(self, directory: Path, seed: int) -> None:
        self.report: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._random = Random(seed)
        self._directories = (directory / str(number) for number in itertools.count())
        self._world = self._new_world()
        self._cases = 0
        #: a daemon was ended, and the other one may have had something to say to it
        self._ended = False

    def _new_world(self) -> World:
        directory = next(self._directories)
        directory.mkdir()
        suspend = self._random.random() < 0.5
        return World(directory, 'on_shutdown = "suspend"\n' if suspend else "")

    def close(self) -> None:
        self._world.close()

    def random_cases(self) -> Iterator[Case]:
        """Without end."""
        while True:
            yield random_case(self._random)

    def go(self, case: Case) -> None:
        """One case.  After one that went wrong the world is another one."""
        world = self._world
        self._cases += 1
        self._ended |= FAULTS[case.fault].restarts
        what = f"{world.kind} under {world.vmm}, {case}"
        try:
            self.report[run(world, case)] += 1
            if self._cases % _LIVES == 0:
                what = "clearing up"
                world.clear(forgotten=not self._ended)
                world.kind = self._random.choice(list(KINDS))
                world.vmm = self._random.choice(("hw", "bt"))
        except Exception as error:
            told = error if isinstance(error, Unsound) else repr(error)
            self.wrong.append(f"case {self._cases}, {what}: {told}")
            for side in world.a, world.b:
                self.wrong += [f"  {line}" for line in side.daemon.said().splitlines()[-15:]]
            world.close()
            self._world, self._ended = self._new_world(), False


def main() -> int:
    """1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--cases", type=int, help="so many at most")
    parser.add_argument("--seed", type=int, default=SystemRandom().getrandbits(32),
                        help="a random one if not given")
    parser.add_argument("--every", action="store_true")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        soak = Soak(Path(directory), arguments.seed)
        try:
            every = cases(FAULTS) if arguments.every else ()
            chosen = itertools.islice(itertools.chain(every, soak.random_cases()), arguments.cases)
            for number, case in enumerate(chosen, 1):
                before = len(soak.wrong)
                soak.go(case)
                for line in soak.wrong[before:]:
                    print(line, flush=True)
                if number % 25 == 0:
                    print(f"{number} cases in {time.monotonic() - began:.0f} s", flush=True)
                if time.monotonic() - began > arguments.seconds:
                    break
        finally:
            soak.close()
    for end, count in soak.report.most_common():
        print(f"{count:8} {end}")
    return int(bool(soak.wrong))


if __name__ == "__main__":
    sys.exit(main())
