# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads the console of a guest that is migrated: what its load says of memory, clock and standing still.

A guest's clock goes on while it stands still, or it stops; only the host's clock tells which.  Each line of
the load carries the guest's, and is read a moment after it was written: the smallest of the differences in a
while is that of the clocks, and what it changes by over a migration is time the guest has lost.
"""

from __future__ import annotations

import os
import re
import select
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from subprocess import Popen
from typing import NamedTuple

from hostd.bench.migrate_program import LINES_PER_SECOND
from hostd.bench.soak_work import COMPLAINTS
from hostd.ctl.errors import CtlError

#: what is typed is echoed in letters, which may come before a line or after it
_COUNTER = re.compile(r"c (\d+) (\d+) (\d+) (\d+)(?!\d)")
_BAD = re.compile(r"b (\d+ \d+ \d+ \d+ \d+)(?!\d)")
#: a line of the kernel's, which may be a dump of bytes
_KERNEL = re.compile(r"\[ *\d+\.\d+\]")
_COMPLAINT = re.compile(COMPLAINTS)
_CLOCK = 1 << 32
#: lines from which a difference of clocks is told
WINDOW = 3 * LINES_PER_SECOND
#: what a guest's idea of the frequency of its clock may be off by
_SKEW = 500e-6
#: what a reading may be late beyond what was seen, on a host with other things to do
_READING_S = 0.005


class Line(NamedTuple):
    """A line of the load; seconds, each on its own clock."""

    arrived: float
    number: int
    steps: int
    gap: float
    clock: float


class Hop(NamedTuple):
    """What was seen of one migration from inside; seconds."""

    #: the longest time between two rounds of the load, as the host's clock has it
    still: float
    #: the same before anybody migrated
    usual: float
    #: how much its clock fell behind the host's
    lost: float


@dataclass
class Witness:
    """What the console of one guest says."""

    lines: list[Line] = field(default_factory=list)
    #: what is wrong, a sentence each
    findings: list[str] = field(default_factory=list)
    #: all that was said so far
    said: bytearray = field(default_factory=bytearray)
    _begin: int = 0

    def read(self, data: bytes, now: float) -> None:
        """More of the console's output, which came at `now`, seconds of the host's monotonic clock."""
        self.said += data
        while (end := self.said.find(b"\n", self._begin)) >= 0:
            self._line(self.said[self._begin:end].decode(errors="replace").strip(), now)
            self._begin = end + 1

    def _line(self, text: str, now: float) -> None:
        if _COMPLAINT.search(text):
            self.findings.append(f"its kernel complained: {text}")
        elif _KERNEL.match(text):
            return
        elif (match := _COUNTER.search(text)) is not None:
            self._count(now, *map(int, match.groups()))
        elif (match := _BAD.search(text)) is not None:
            self.findings.append(f"a page is not what was written (sum, number, generation, generation "
                                 f"wanted, place): {match[1]}")

    def _count(self, now: float, number: int, steps: int, gap: int, clock: int) -> None:
        last = self.lines[-1] if self.lines else Line(now, number - 1, steps, 0, clock / 1e6)
        if number != last.number + 1:
            self.findings.append(f"its counter goes from {last.number} to {number}")
        passed = (clock - round(last.clock * 1e6)) % _CLOCK
        if passed >= _CLOCK // 2:
            self.findings.append(f"its clock goes back by {(_CLOCK - passed) / 1e6} s")
            passed -= _CLOCK
        self.lines.append(Line(now, number, steps, gap / 1e6, last.clock + passed / 1e6))


def behind(lines: Sequence[Line]) -> float:
    """The host's clock less the guest's, as these lines tell it best."""
    return min(line.arrived - line.clock for line in lines)


def hop(lines: Sequence[Line], began: float, ended: float) -> Hop:
    """What a migration looked like that was under way from `began` to `ended`; lines go on for a while."""
    before = [line for line in lines if line.arrived < began][-WINDOW:]
    after = [line for line in lines if line.arrived > ended][:WINDOW]
    lost = behind(after) - behind(before)
    gaps = [line.gap for line in lines if line.arrived > began]
    return Hop(still=max(gaps) + max(lost, 0.0), usual=max(line.gap for line in before), lost=lost)


def drift(lines: Sequence[Line], hops: int) -> tuple[float, float]:
    """What the guest's clock fell behind in all, and the most that readings, each as far off as those
    before any migration were, and a clock of its own, explain."""
    first, last = lines[:WINDOW], lines[-WINDOW:]
    half = len(first) // 2
    reading = max(abs(behind(first[half:]) - behind(first[:half])), _READING_S)
    return behind(last) - behind(first), (hops + 1) * reading + _SKEW * (last[-1].arrived - first[0].arrived)


class Watch:
    """Follows a guest from process to process, whose output is its console, and types at it."""

    def __init__(self) -> None:
        self.witness = Witness()
        self._changed = threading.Condition()
        #: those whose output is not read to its end yet, oldest first
        self._processes: list[Popen[bytes]] = []
        self._keyboard: Popen[bytes] | None = None
        self._wake, self._woken = os.pipe()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def follow(self, process: Popen[bytes]) -> None:
        """The guest's console is the output of this one from now on.  Those before are read to their end."""
        with self._changed:
            self._processes.append(process)
            self._keyboard = process
        os.write(self._woken, b"\0")

    def type(self, text: str) -> None:
        """Type at the process that was followed last."""
        assert self._keyboard is not None and self._keyboard.stdin is not None
        try:
            self._keyboard.stdin.write(text.encode())
            self._keyboard.stdin.flush()
        except OSError:
            raise CtlError("the session with the guest's console is lost") from None

    def wait(self, until: Callable[[Witness], bool], timeout: float, what: str) -> None:
        """Wait until the witness has seen it.  Raises CtlError if that takes too long."""
        with self._changed:
            if not self._changed.wait_for(lambda: until(self.witness), timeout):
                said = self.witness.said[-200:].decode(errors="replace")
                raise CtlError(f"the guest {what} within {timeout:.0f} seconds; it said last: {said!r}")

    def lines(self) -> list[Line]:
        """Those that came so far."""
        with self._changed:
            return list(self.witness.lines)

    def findings(self) -> list[str]:
        """What was found wrong since the last call."""
        with self._changed:
            found, self.witness.findings = self.witness.findings, []
            return found

    def close(self) -> None:
        """Read no more."""
        os.close(self._woken)
        self._thread.join()
        os.close(self._wake)

    def _read(self) -> None:
        """Read all of them, until closed.

        Invariant: what an older process wrote before a younger one wrote anything is read first: whenever the
        younger one's output is there to be read, so is the older one's, which goes first.
        """
        while True:
            with self._changed:
                outputs = {process.stdout.fileno(): process for process in self._processes
                           if process.stdout is not None}
            ready, _, _ = select.select([self._wake, *outputs], [], [])
            if self._wake in ready and not os.read(self._wake, 64):
                return
            for output in (one for one in outputs if one in ready):
                data = os.read(output, 65536)
                with self._changed:
                    if data:
                        self.witness.read(data, time.monotonic())
                    else:
                        self._processes.remove(outputs[output])
                    self._changed.notify_all()


def await_lines(watch: Watch, count: int, timeout: float) -> None:
    """Wait for more lines of the load."""
    goal = len(watch.lines()) + count
    watch.wait(lambda witness: len(witness.lines) >= goal, timeout, f"did not count {count} lines further")


def await_steps(watch: Watch, pages: int, timeout: float) -> None:
    """Wait until so many pages more were verified and written."""
    lines = watch.lines()
    goal = (lines[-1].steps if lines else 0) + pages
    watch.wait(lambda witness: bool(witness.lines) and witness.lines[-1].steps >= goal, timeout,
               f"did not write {pages} pages further")


def answer(watch: Watch, word: str, timeout: float) -> None:
    """Have the guest's shell say a word, of letters, that is not what is typed."""
    start = len(watch.witness.said)
    watch.type(f"echo '{word[:1]}'{word[1:]}\n")
    watch.wait(lambda witness: word.encode() in witness.said[start:], timeout, "did not answer")
