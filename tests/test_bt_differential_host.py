# SPDX-License-Identifier: GPL-2.0-or-later
"""Translated code against the host's own processor, which executes the same 32-bit code as it stands."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.bt_example import CODE, DATA, DATA_BYTES, Bases, Example, State
from tests.bt_generator import INTEGER
from tests.bt_judge import Judge, build
from tests.bt_subject import Subject
from tests.bt_trial import EXAMPLES, Trial
from tests.bt_undefined import agree_where_defined
from tests.bt_values import fx_image, soil
from tests.tools import needs
from vmm.bt import emit

pytestmark = needs("gcc")
#: 100,352 examples, and 5,120 on the emulated CPU
SEEDS, EMULATED_SEEDS = range(196), range(20)
_NAMES = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Judge]:
    program = build(tmp_path_factory.mktemp("judge"))
    try:
        judge = Judge(program)
    except OSError as error:
        pytest.skip(f"this host does not run 32-bit programs: {error}")
    yield judge
    judge.close()


@pytest.fixture(scope="module")
def trial(judge: Judge) -> Iterator[Trial]:
    subject = Subject()
    yield Trial(subject, judge)
    subject.close()


def test_a_hundred_thousand_examples(trial: Trial) -> None:
    """The same ones every time."""
    for seed in SEEDS:
        assert not (report := trial.run(seed)), report
    judged, unjudged = sum(trial.ends.values()), sum(trial.unjudged.values())
    assert judged + unjudged == len(SEEDS) * EXAMPLES
    assert unjudged < 0.005 * judged, trial.unjudged
    # all the ways there are to end
    for way in ("vector 0", "vector 3", "vector 13", "vector 16", "vector 19", "read", "write", "fetch"):
        assert trial.ends[way] > len(SEEDS), trial.ends


def test_examples_nobody_has_seen(trial: Trial) -> None:
    """Others every time; the report begins with the seed."""
    report = trial.run(random.SystemRandom().getrandbits(32))
    assert not report, report


def test_on_the_emulated_cpu(judge: Judge) -> None:
    """General registers only, and what is defined: this CPU is not the judge's."""
    subject = Subject("unicorn")
    trial = Trial(subject, judge, INTEGER, agree_where_defined)
    for seed in EMULATED_SEEDS:
        assert not (report := trial.run(seed)), report
    subject.close()
    judged = sum(trial.ends.values())
    assert judged > 0.8 * len(EMULATED_SEEDS) * EXAMPLES
    for way in ("vector 0", "vector 3", "read", "write", "fetch"):
        assert trial.ends[way] > len(EMULATED_SEEDS), trial.ends


@pytest.mark.parametrize(("code", "registers", "bases"), [
    # the distance of the bit wraps at 64 KiB like the address it is added to
    ("67 0F B3 96 4B 2E", {"edx": 0x212FE7}, Bases(ds=DATA & ~0xFFFF)),
    # the code segment cannot be written
    ("2E D1 02", {"edx": DATA}, Bases()),
    ("2E 88 02", {"edx": DATA}, Bases()),
    # enter makes sure that what esp points to can be written
    ("C8 44 00 00", {"esp": DATA + 0xF}, Bases()),
    ("C8 44 00 00", {"esp": DATA + 0x2FFF}, Bases()),
    # popa reads what is in esp's place, too
    ("61", {"esp": DATA + DATA_BYTES - 12}, Bases()),
    # a segment's base and an address wrap at 4 GiB
    ("64 8B 83 00 10 00 00", {"ebx": DATA}, Bases(fs=-0x1000 & 0xFFFF_FFFF)),
])
def test_what_was_wrong_once(trial: Trial, code: str, registers: dict[str, int], bases: Bases) -> None:
    chance = random.Random(1)
    trial.sow(soil(chance))
    state = State(tuple(registers.get(name, 0) for name in _NAMES), 0, fx_image(chance))
    all_code = bytes.fromhex(code) + b"\xCC"
    example = Example(all_code, (0, len(all_code) - 1), CODE, state, 0, bases)
    assert not trial.differs(example), trial.report(example)


def test_the_judge_tells_what_is_wrong(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    """A translation with an error in it is found, and shown with little else."""
    monkeypatch.setitem(emit.BUILDERS, emit.Kind.INC_DEC,
                        lambda form, mode: emit.fixed(emit.Mark.IDENT, form, b"\xFF\xC0"))
    subject = Subject()
    report = next(filter(None, map(Trial(subject, judge).run, SEEDS)))
    subject.close()
    instructions = [line.split()[2] for line in report.splitlines() if line.startswith("00")]
    assert {"inc", "dec"} & set(instructions)
    assert len([name for name in instructions if name != "nop"]) <= 3, report
