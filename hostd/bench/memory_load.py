# SPDX-License-Identifier: GPL-2.0-or-later
"""What guests do that need memory: a rotating set of files in a tmpfs, checked by their sums.

In each round a guest writes one of its files anew, with random bytes, and verifies another one.  Sums are
taken from what goes into a file, not from what is read back: a page that is lost, old, or somebody else's
shows when its file is verified.  Random bytes cannot be shared or compressed: all of it needs real memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from hostd.bench.soak_work import COMPLAINTS

#: what a guest says whose files are all written once
FULL = "LOAD-FULL"
_PATH = "/tmp/load"

# $1: the guest's number; $2: how many files; $3: their size in KiB.  Clones go on with the same random
# numbers until their kernels stir in what they are told here, within a minute (random(4)).  The kernel's
# errors and warnings are to be seen on the console: of a process it had to kill it says so at level 3.
_SCRIPT = f"""\
me=$1 files=$2 kib=$3 round=0
echo $me >/dev/urandom
dmesg -n 5
mkdir -p /load
mount -t tmpfs -o size=90% none /load
while :; do
    round=$((round + 1)) new=$((round % files)) old=$(((round * 7 + me) % files))
    head -c ${{kib}}k /dev/urandom | tee /load/$new | md5sum >/load/$new.sum
    if [ -s /load/$old.sum ]; then
        read -r sum _ </load/$old.sum
        set -- $(md5sum </load/$old)
        [ "$1" = "$sum" ] || echo "LOAD $me $round BAD $old: $1 instead of $sum"
    fi
    echo "LOAD $me $round ok"
    [ $round != $files ] || echo "{FULL} $me"
done
"""


def command(number: int, files: int, kib: int) -> str:
    """What is typed at a guest's shell to set it to work for ever."""
    body = _SCRIPT.replace("'", "'\\''")
    return f"echo '{body}' >{_PATH}; sh {_PATH} {number} {files} {kib}\n"


_LINE = re.compile(r"LOAD (\d+) (\d+) (ok|BAD .*)")
_KILLED = re.compile(r"[Oo]ut of memory|invoked oom-killer|Killed process|oom-kill")
_COMPLAINT = re.compile(COMPLAINTS)


@dataclass
class Witness:
    """Reads the console of one guest."""

    number: int
    rounds: int = 0
    #: all files are written
    full: bool = False
    #: files that are not what was written
    bad: list[str] = field(default_factory=list)
    #: what the kernel said of processes it killed because it had no memory left
    killed: list[str] = field(default_factory=list)
    #: what else it complained of
    complaints: list[str] = field(default_factory=list)
    _rest: str = ""

    def read(self, data: bytes) -> None:
        """More of the console's output."""
        *lines, self._rest = (self._rest + data.decode(errors="replace")).split("\n")
        for line in map(str.strip, lines):
            match = _LINE.search(line)
            if match is not None and match[3] == "ok":
                self.rounds = int(match[2])
            elif match is not None:
                self.bad.append(line)
            elif f"{FULL} {self.number}" in line:
                self.full = True
            elif _KILLED.search(line):
                self.killed.append(line)
            elif _COMPLAINT.search(line):
                self.complaints.append(line)
