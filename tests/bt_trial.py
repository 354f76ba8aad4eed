# SPDX-License-Identifier: GPL-2.0-or-later
"""Batches of examples: translated and run by the subject, executed by the judge, and compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeAlias

from tests import bt_report
from tests.bt_example import INT3, Example, Outcome
from tests.bt_generator import EVERYTHING, Generator, Mixture
from tests.bt_judge import HELPER, HELPER_BYTES, SLOTS, Judge
from tests.bt_latitude import agree, undefined
from tests.bt_subject import Subject
from vmm.bt.decode import Instruction
from vmm.x86.faults import Vector

#: examples of one seed
EXAMPLES = 8 * SLOTS

#: whether outcomes that do not agree are no failure, from what instructions there were
Excuse: TypeAlias = Callable[[Example, Outcome, Outcome, list[Instruction]], bool]


class Trial:
    """Of one subject.  Counted are the ways examples ended, and the reasons why some could not be judged."""

    def __init__(self, subject: Subject, judge: Judge, mixture: Mixture = EVERYTHING,
                 excuse: Excuse = undefined) -> None:
        self._subject, self._judge, self._mixture, self._excuse = subject, judge, mixture, excuse
        self.ends: Counter[str] = Counter()
        self.unjudged: Counter[str] = Counter()

    def run(self, seed: int) -> str:
        """Try the EXAMPLES of a seed; a report on the first that fails, or nothing."""
        generator = Generator(seed, self._mixture)
        self.sow(generator.soil)
        for _ in range(EXAMPLES // SLOTS):
            failed = self._batch(generator)
            if failed is not None:
                return f"seed {seed}\n{self.report(bt_report.shrunk(failed, self.differs))}"
        return ""

    def sow(self, soil: bytes) -> None:
        """What the data of the examples to come are taken from."""
        self._subject.sow(soil)
        self._judge.sow(soil)

    def differs(self, example: Example) -> bool:
        """Whether an example fails."""
        pair = self._execute(example)
        return pair is not None and not self._fits(*pair, self._judge.run([pair[0]])[0])

    def report(self, example: Example) -> str:
        """What there is to know about an example that fails."""
        pair = self._execute(example)
        if pair is None:
            return "tried again, it could not be judged"
        return bt_report.report(*pair, self._judge.run([pair[0]])[0])

    def _batch(self, generator: Generator) -> Example | None:
        """An example that fails."""
        pairs = [pair for _ in range(SLOTS) if (pair := self._execute(generator.example())) is not None]
        judged = self._judge.run([example for example, _ in pairs])
        for (example, outcome), expected in zip(pairs, judged):
            if not self._fits(example, outcome, expected):
                return example
        return None

    def _fits(self, example: Example, outcome: Outcome, expected: Outcome) -> bool:
        if agree(example, outcome, expected):
            self.ends[expected.access or f"vector {expected.vector}"] += 1
            return True
        excused = self._excuse(example, outcome, expected, self._subject.translated(example))
        self.unjudged["undefined"] += excused
        return excused

    def _execute(self, example: Example) -> tuple[Example, Outcome] | None:
        """An example that can be judged, perhaps a shorter one, and what became of it."""
        outcome = self._subject.execute(example)
        if outcome is not None and outcome.vector == Vector.BP and example.at(outcome.eip) != INT3:
            # left to the monitor, which we have not got: it ends there
            example, end = example.ending_at(outcome.eip), outcome.eip
            outcome = self._subject.execute(example)
            if outcome is not None and outcome.eip != end:
                self.unjudged["left in the middle of an instruction executed before"] += 1
                return None
        if outcome is None:
            self.unjudged["endless"] += 1
            return None
        if any(HELPER - 64 <= where < HELPER + HELPER_BYTES + 64
               for where in (outcome.address, outcome.eip, outcome.state.registers[4])):
            self.unjudged["where the judge is"] += 1
            return None
        return example, outcome
