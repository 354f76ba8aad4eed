# SPDX-License-Identifier: GPL-2.0-or-later
"""Translations judged by the host's processor for as long as one likes.

    python -m tests.bt_soak --examples 10000000
    python -m tests.bt_soak --seed 1234 --examples 1        # those of one seed once more
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.bt_judge import Judge, build
from tests.bt_subject import Subject
from tests.bt_trial import EXAMPLES, Trial

_REPORT_EVERY = 100


def main() -> int:
    """Seed after seed; 1 if any had an example that failed."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32),
                        help="the first; a random one if not given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        judge = Judge(build(Path(directory)))
    subject = Subject()
    trial, failures, start = Trial(subject, judge), 0, time.monotonic()
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
