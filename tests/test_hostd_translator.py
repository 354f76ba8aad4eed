# SPDX-License-Identifier: GPL-2.0-or-later
"""A process's binary translator: made when needed, not before; and how much of a listing is shown."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import ClassVar, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostd.model import TranslatorView
from hostd.translator import MAX_CHARACTERS, MAX_UNITS, NoTranslator, Translator, excerpt
from vmm.memory.pool import Pool
from vmm.silicon.kick import Kicker

KICKER = object()


class Engine:
    """An engine that was made with these arguments and counted up to seven."""

    made: ClassVar[list[Engine]] = []

    def __init__(self, *arguments: object, **options: object) -> None:
        self.arguments, self.options = arguments, options
        self.counters = SimpleNamespace(units=1, instructions=2, chained=3, evicted=4, rejected=5, shared=6,
                                        pages=7, invalidated=9)
        self.used_bytes = 8
        self.closed = False
        self.made.append(self)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def translator(monkeypatch: pytest.MonkeyPatch) -> Translator:
    monkeypatch.setattr(Engine, "made", [])
    monkeypatch.setitem(sys.modules, "vmm.bt.engine", SimpleNamespace(TranslationEngine=Engine))
    return Translator(Pool(1 << 20), cast(Kicker, KICKER), "unicorn", 4096)


def test_without_a_guest_there_is_no_engine_and_nothing_is_counted(translator: Translator) -> None:
    assert translator.view() == TranslatorView()
    translator.close()
    assert Engine.made == []


def test_the_engine_is_one_for_all_guests(translator: Translator) -> None:
    assert translator.engine() is translator.engine()
    (engine,) = Engine.made
    assert isinstance(engine.arguments[0], Pool)
    assert engine.options == {"cpu": "unicorn", "cache_bytes": 4096, "kicker": KICKER}
    assert translator.view() == TranslatorView(units=1, instructions=2, chained=3, evicted=4, rejected=5,
                                               invalidated=9, shared=6, pages=7, used_bytes=8)
    translator.close()
    assert engine.closed


def test_an_engine_that_cannot_be_made_is_told_in_a_sentence_each_time(
        translator: Translator, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(sys.modules["vmm.bt.engine"], "TranslationEngine", fail)
    for _ in range(2):
        with pytest.raises(NoTranslator, match=r"^binary translation is not possible here: .*Cannot"):
            translator.engine()
    assert translator.view() == TranslatorView()
    translator.close()


def unit(lines: int) -> str:
    return "".join(f"{line:08x}  nop\n" for line in range(lines))


@given(st.lists(st.integers(1, 20), min_size=1, max_size=2 * MAX_UNITS))
def test_a_short_listing_is_shown_whole_and_a_long_one_to_a_unit_s_end(sizes: list[int]) -> None:
    text, complete = excerpt("\n".join(map(unit, sizes)))
    assert text == "\n".join(map(unit, sizes[:MAX_UNITS]))
    assert complete == (len(sizes) <= MAX_UNITS)


def test_nothing_is_all_there_is() -> None:
    assert excerpt("") == ("", True)


@pytest.mark.parametrize("units", [1, 5])
def test_a_listing_of_large_units_has_a_limit(units: int) -> None:
    whole = "\n".join([unit(10_000)] * units)
    text, complete = excerpt(whole)
    assert len(text) <= MAX_CHARACTERS + 1 < len(whole) or units == 1
    assert complete == (len(whole) <= MAX_CHARACTERS)
    assert text.endswith("nop\n") and whole.startswith(text)


def test_one_unit_beyond_the_limit_is_cut_at_a_line() -> None:
    whole = unit(MAX_CHARACTERS // 10)
    text, complete = excerpt(whole)
    assert not complete and text.endswith("nop\n") and whole.startswith(text)
    assert len(text) <= MAX_CHARACTERS + 1
