# SPDX-License-Identifier: GPL-2.0-or-later
"""Translations judged by the host's processor for as long as one likes.

    python -m tests.bt_soak --examples 10000000
    python -m tests.bt_soak --seed 1234 --examples 1        # those of one seed once more
    python -m tests.bt_soak --cpu unicorn                   # general registers only, on the emulated CPU
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.bt_generator import INTEGER
from tests.bt_judge import Judge, build
from tests.bt_subject import Subject
from tests.bt_trial import EXAMPLES, Trial
from tests.bt_undefined import agree_where_defined
from vmm.bt.engine import CPUS

_REPORT_EVERY = 100


def main() -> int:
    """Seed after seed; 1 if any had an example that failed."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32),
                        help="the first; a random one if not given")
    parser.add_argument("--cpu", choices=CPUS, default="native")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        judge = Judge(build(Path(directory)))
    subject = Subject(arguments.cpu)
    trial = Trial(subject, judge)
    if arguments.cpu != "native":
        trial = Trial(subject, judge, INTEGER, agree_where_defined)
    failures, start = 0, time.monotonic()
    seeds = -(-arguments.examples // EXAMPLES)
    print(f"{seeds} seeds of {EXAMPLES} examples from {arguments.seed}", flush=True)
    for number in range(seeds):
        report = trial.run(arguments.seed + number)
        if report:
            failures += 1
            print(report, flush=True)
        if number % _REPORT_EVERY == _REPORT_EVERY - 1:
            rate = (number + 1) * EXAMPLES / (time.monotonic() - start)
            print(f"{number + 1} seeds, {failures} failed, {rate:.0f} examples/s", flush=True)
    print(f"{failures} of {seeds} seeds failed; how examples ended:")
    for end, count in (trial.ends + trial.unjudged).most_common():
        print(f"  {count:10} {end}")
    subject.close()
    judge.close()
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
