# SPDX-License-Identifier: GPL-2.0-or-later
"""The binary translator of a process, for all its guests of the monitor bt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hostd.model import DEFAULT_CACHE, BtCpu, TranslatorView
from vmm.memory.pool import Pool
from vmm.silicon.kick import Kicker

if TYPE_CHECKING:
    from vmm.bt.engine import TranslationEngine

#: the most that is shown of translated code at once
MAX_UNITS = 200
MAX_CHARACTERS = 256 << 10
#: what stands between two units of a listing
_GAP = "\n\n"

#: counters of the engine that are handed on by their names
_COUNTERS = ("units", "instructions", "chained", "evicted", "invalidated", "rejected", "shared", "pages")


class NoTranslator(Exception):
    """The engine cannot be made in this process; a sentence says why."""


class Translator:
    """Makes the engine when the first guest needs it: that reserves address space, and installs handlers for
    the signals of faults, neither of which a worker without such guests should have.

    What kicks the silicon by `kicker` is to stop translated code, too.
    """

    def __init__(self, pool: Pool, kicker: Kicker, cpu: BtCpu, cache_bytes: int = DEFAULT_CACHE) -> None:
        self._pool = pool
        self._kicker = kicker
        self._cpu = cpu
        self._cache_bytes = cache_bytes
        self._engine: TranslationEngine | None = None

    def engine(self) -> TranslationEngine:
        """The engine, the same one at every call.  Raises NoTranslator."""
        if self._engine is None:
            try:
                from vmm.bt.engine import TranslationEngine

                self._engine = TranslationEngine(self._pool, cpu=self._cpu, cache_bytes=self._cache_bytes,
                                                 kicker=self._kicker)
            except Exception as error:
                # hardware assistance works all the same: this must not cost other guests their worker
                raise NoTranslator(
                    f"binary translation is not possible here: {type(error).__name__}: {error}") from error
        return self._engine

    def view(self) -> TranslatorView:
        """What it did so far, and what it holds."""
        engine = self._engine
        if engine is None:
            return TranslatorView()
        counted = {name: getattr(engine.counters, name) for name in _COUNTERS}
        return TranslatorView(**counted, used_bytes=engine.used_bytes)

    def close(self) -> None:
        """Give back what the engine took, if there is one."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


def excerpt(listing: str) -> tuple[str, bool]:
    """The beginning of a listing, whole units, within the limits; and whether that is all."""
    units = listing.split(_GAP, MAX_UNITS)[:MAX_UNITS]
    text = _GAP.join(units)
    if len(text) > MAX_CHARACTERS:
        text = text[:MAX_CHARACTERS]
        text = text[:text.rfind(_GAP) if _GAP in text else text.rfind("\n")]
    if len(text) < len(listing):
        return text + "\n", False
    return listing, True
