# SPDX-License-Identifier: GPL-2.0-or-later
"""A user's regular expression, searched for no longer than the daemon can spare.

Python's matcher backtracks, for ever if an expression has it so, and nothing else of the process runs
meanwhile, not even other threads.  But now and then it looks for signals, and a handler that raises ends it.
"""

from __future__ import annotations

import re
import signal

from hostd.errors import Invalid

#: seconds of CPU time
PATIENCE_S = 0.25


class _OutOfTime(Exception):
    pass


class _Alarm:
    """Raises _OutOfTime out of what is inside the `with`, when its time is up, and out of nothing else."""

    def __init__(self) -> None:
        self._on = False

    def _ring(self, *_: object) -> None:
        # Invariant: a signal may come late, and must not raise in the midst of something else then
        if self._on:
            raise _OutOfTime

    def __enter__(self) -> None:
        signal.signal(signal.SIGVTALRM, self._ring)
        self._on = True
        signal.setitimer(signal.ITIMER_VIRTUAL, PATIENCE_S)

    def __exit__(self, *_: object) -> None:
        self._on = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


_alarm = _Alarm()


def is_in(pattern: re.Pattern[bytes], data: bytes) -> bool:
    """Whether there is a match in `data`.  To be called in the main thread.  Raises Invalid if it takes too
    long to say."""
    try:
        with _alarm:
            return pattern.search(data) is not None
    except _OutOfTime:
        raise Invalid("console: the regular expression takes too long to match: it must not repeat what is "
                      "itself repeated, as (a+)+ does") from None
