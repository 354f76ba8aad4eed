# SPDX-License-Identifier: GPL-2.0-or-later
"""What the guests of a soak do, and how their consoles are read.

Each guest repeats rounds of mixed work on numbers of its own, whose results are known beforehand: so a byte
that is lost, or that comes from another guest, shows as a wrong result.  The template gets the script, its
clones are told their numbers.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

#: where the script lies in every guest
PATH = "/tmp/soak"
#: what its arrival is announced by
ARRIVED = "SOAK-SCRIPT"

#: complaints of the kernel that no healthy guest makes, as `grep -E` and Python's re both read them
COMPLAINTS = (
    "BUG:|Oops|Kernel panic|Call Trace|WARNING: |general protection|segfault|rcu.*stall|soft lockup|"
    "blocked for more than|clocksource.*unstable|[Oo]ut of memory|Killed process|nobody cared"
)

# $1: the guest's number; $2, $3, $4: results of the loop, of the sums, of the processes.  A round takes some
# 0.1 s of CPU.  `dmesg` is asked because the console shows only the gravest messages.
_SCRIPT = f"""\
me=$1 round=0 last=0
expect() {{ [ "$2" = "$3" ] || echo "SOAK $me $round WRONG $1: $2 instead of $3"; }}
seq $me $((me + 1000)) >/tmp/kept
while :; do
    round=$((round + 1))
    i=0 value=$me
    while [ $i -lt 200 ]; do
        i=$((i + 1)) value=$(((value * 1103515245 + 12345) & 0x7fffffff))
    done
    expect loop $value $2
    expect sum "$(seq $me $((me + 1000)) | sha256sum)" "$3  -"
    cp /tmp/kept /tmp/copy
    expect file "$(sha256sum </tmp/copy)" "$3  -"
    expect fork "$( (for n in $(seq 1 8); do (echo $((n * me))) & done; wait) | sort -n | sha256sum)" "$4  -"
    now=$(date +%s)
    [ $now -ge $last ] || echo "SOAK $me $round WRONG clock: $now after $last"
    last=$now
    [ $((round % 16)) != 1 ] || dmesg | grep -E '{COMPLAINTS}'
    usleep $(((me * 37 + round * 101) % 500 * 1000))
    echo "SOAK $me $round ok"
done
"""


def script() -> str:
    """What is typed at the template's shell to leave the script in it."""
    body = _SCRIPT.replace("'", "'\\''")
    # the announcement is put together by the shell, so that the echo of what is typed does not match it
    return f"echo '{body}' >{PATH}; echo SOAK-$(echo SCRIPT)\n"


def command(number: int) -> str:
    """What is typed at a clone to set it to work, for ever."""
    counted, multiples = range(number, number + 1001), range(number, 9 * number, number)
    return f"sh {PATH} {number} {_loop(number)} {_sum(counted)} {_sum(multiples)}\n"


def _loop(value: int) -> int:
    for _ in range(200):
        value = value * 1103515245 + 12345 & 0x7FFF_FFFF
    return value


def _sum(numbers: range) -> str:
    return hashlib.sha256("".join(f"{number}\n" for number in numbers).encode()).hexdigest()


_LINE = re.compile(r"SOAK (\d+) (\d+) (ok|WRONG .*)")
_COMPLAINT = re.compile(COMPLAINTS)


@dataclass
class Witness:
    """Reads the console of one guest."""

    number: int
    rounds: int = 0
    #: results that differ from what they must be
    wrong: list[str] = field(default_factory=list)
    #: what its kernel complained of
    complaints: list[str] = field(default_factory=list)
    _rest: str = ""

    def read(self, data: bytes) -> None:
        """More of the console's output."""
        *lines, self._rest = (self._rest + data.decode(errors="replace")).split("\n")
        for line in map(str.strip, lines):
            match = _LINE.fullmatch(line)
            if match is None:
                if _COMPLAINT.search(line):
                    self.complaints.append(line)
            elif match[3] == "ok":
                self._next_round(int(match[1]), int(match[2]))
            else:
                self.wrong.append(line)

    def _next_round(self, number: int, round: int) -> None:
        if (number, round) != (self.number, self.rounds + 1):
            self.wrong.append(f"round {round} of guest {number} on the console of guest {self.number} "
                              f"after its round {self.rounds}")
        self.rounds = round
