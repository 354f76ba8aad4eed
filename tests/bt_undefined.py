# SPDX-License-Identifier: GPL-2.0-or-later
"""What two processors may differ in, and what the emulated one gets wrong: not held against its translations.

Which way an example took through its instructions is not known here: a flag that any of them leaves undefined
is not compared, and one that another of them reads ends the comparison.
"""

from __future__ import annotations

import functools
import operator

from tests import bt_latitude
from tests.bt_example import Example, Outcome
from vmm.bt.decode import LOCK, Instruction
from vmm.bt.native.block import LIVE_FLAGS
from vmm.x86 import flags

_SHIFTS = frozenset({"shl", "shr", "sar"})
#: a flag they read decides about more than the same flag
_CARRYING = frozenset({"rcl", "rcr", "adcx", "adox"})
#: flags the emulated processor loses: of rotations when one or what follows it faults, of others always
_LOST = {**dict.fromkeys(("rol", "ror", "rcl", "rcr"), flags.RFLAGS_CF | flags.RFLAGS_OF),
         **dict.fromkeys(("cmpsb", "cmpsd", "scasb", "scasd", "cmpxchg8b", "loope", "loopne"), LIVE_FLAGS)}
_SAME_PAGE_END = 16
_TWO_READS = frozenset({"cmpsb", "cmpsd"})


def agree_where_defined(example: Example, got: Outcome, wanted: Outcome, forms: list[Instruction]) -> bool:
    """Whether outcomes on two processors do, of an example with these instructions on general registers."""
    if bt_latitude.undefined(example, got, wanted, forms):
        return True
    undefined = [_undefined(form) for form in forms]
    for number, form in enumerate(forms):
        if _read(form) & _union(undefined[:number] + undefined[number + 1:]) or _has_no_result(form):
            return True
    got = bt_latitude.begun_again(example, got, wanted)
    # where neither of two operands can be read, processors differ in which of them they say so of
    either = any(form.entry.mnemonic in _TWO_READS for form in forms)
    mask = LIVE_FLAGS & ~_union(undefined)
    return (got[:2] == wanted[:2] and got.access == wanted.access
            # of an operand on two pages that is read and written, the emulated processor reads all first
            and (either or abs(got.address - wanted.address) < _SAME_PAGE_END)
            and got.state.registers == wanted.state.registers
            and got.state.flags & mask == wanted.state.flags & mask and got.memory == wanted.memory)


def _union(masks: list[int]) -> int:
    return functools.reduce(operator.or_, masks, 0)


def _undefined(form: Instruction) -> int:
    entry = form.entry
    found = entry.flags_undefined | _LOST.get(entry.mnemonic, 0)
    short = form.opsize == 2 or any(operand.size == "b" for operand in entry.operands)
    if entry.mnemonic in _SHIFTS and short:
        found |= flags.RFLAGS_CF        # for counts beyond the operand
    if entry.mnemonic == "neg" and form.prefixes & LOCK:
        found |= LIVE_FLAGS             # the emulated processor has those of something else
    return found


def _read(form: Instruction) -> int:
    entry = form.entry
    if entry.mnemonic in _CARRYING:
        return entry.flags_read & (flags.RFLAGS_CF | flags.RFLAGS_OF)
    stays = entry.flags_written and entry.flags_read & entry.flags_written == entry.flags_written
    return 0 if stays else entry.flags_read


def _has_no_result(form: Instruction) -> bool:
    """A double shift of a word, perhaps by more than 16; clflush, which never faults when it is emulated."""
    return (form.entry.mnemonic in ("shld", "shrd") and form.opsize == 2) or form.entry.mnemonic == "clflush"
