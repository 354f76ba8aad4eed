# SPDX-License-Identifier: GPL-2.0-or-later
"""The pieces of a unit, packed: two bytes an instruction, since there are tens of thousands of units.

    +0   length of the guest instruction, 4 bits; number of its mark, 4 bits
    +1   length of the host code

That of the last one is as good as none, for it goes on to the end of the unit: the jump there, of a unit that
goes on to the next instruction, is of no piece.
"""

from __future__ import annotations

from functools import cache

from vmm.bt.unit import Mark, Piece

_MARKS = tuple(Mark)
_NUMBERS = {mark: number << 4 for number, mark in enumerate(_MARKS)}
_LENGTH = 15


@cache
def pack(mark: Mark, guest_bytes: int, host_bytes: int) -> bytes:
    """One piece; there are some hundreds of different ones."""
    return bytes((_NUMBERS[mark] | guest_bytes, host_bytes))


def pieces(shape: bytes) -> tuple[Piece, ...]:
    """The pieces, one by one."""
    found = []
    guest_at = host_at = 0
    for first, host_bytes in zip(shape[::2], shape[1::2]):
        found.append(Piece(guest_at, host_at, _MARKS[first >> 4]))
        guest_at += first & _LENGTH
        host_at += host_bytes
    return tuple(found)


def guest_bytes(shape: bytes) -> int:
    """Length of all guest instructions."""
    return sum(first & _LENGTH for first in shape[::2])


def find(shape: bytes, offset: int) -> tuple[int, int]:
    """Where the piece that has the host code at `offset` begins, in the guest's code and in the host's."""
    guest_at = host_at = guest_next = host_next = 0
    fields = iter(shape)
    for first, host_bytes in zip(fields, fields):
        if host_next > offset:
            break
        guest_at, host_at = guest_next, host_next
        guest_next += first & _LENGTH
        host_next += host_bytes
    return guest_at, host_at
