# SPDX-License-Identifier: GPL-2.0-or-later
"""Hand-assembled machine code written down as a listing: the bytes on the left, what they mean on the right.

    48 8B 82 @uc_rip        ; mov rax, [rdx + uc_rip]

`@name` is a 32-bit displacement, `=name` a 64-bit constant, `>label` and `>>label` the distance to a label
in 8 and 32 bits, `label:` a line of its own.  Nothing here chooses an encoding; the tests disassemble every
line and compare it with its comment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Assembled(NamedTuple):
    """Machine code, and where its labels are in it."""

    code: bytes
    labels: dict[str, int]


class Line(NamedTuple):
    """One instruction of a listing."""

    offset: int
    tokens: list[str]
    comment: str


_WIDTHS = {"@": 4, "=": 8, ">": 1, ">>": 4}


def _split(token: str) -> tuple[str, str]:
    """The mark of a token (empty for a plain byte) and what follows it."""
    mark = token[:len(token) - len(token.lstrip("@=>"))]
    return mark, token[len(mark):]


def lines(listing: str) -> tuple[list[Line], dict[str, int]]:
    """The instructions of `listing` with their offsets, and its labels."""
    found: list[Line] = []
    labels: dict[str, int] = {}
    offset = 0
    for text in listing.strip().splitlines():
        code, _, comment = text.partition(";")
        tokens = code.split()
        if len(tokens) == 1 and tokens[0].endswith(":"):
            labels[tokens[0][:-1]] = offset
        elif tokens:
            found.append(Line(offset, tokens, comment.strip()))
            offset += sum(_WIDTHS.get(_split(token)[0], 1) for token in tokens)
    return found, labels


def assemble(listing: str, names: Mapping[str, int]) -> Assembled:
    """The bytes of `listing`; `names` gives the displacements and constants it mentions."""
    found, labels = lines(listing)
    return Assembled(b"".join(_bytes(line, names, labels) for line in found), labels)


def _bytes(line: Line, names: Mapping[str, int], labels: Mapping[str, int]) -> bytes:
    return b"".join(_pieces(line, names, labels))


def _pieces(line: Line, names: Mapping[str, int], labels: Mapping[str, int]) -> Iterator[bytes]:
    at = line.offset
    for token in line.tokens:
        mark, name = _split(token)
        width = _WIDTHS.get(mark, 1)
        at += width
        if not mark:
            value = int(name, 16)
        elif mark in "@=":
            value = names[name]
        else:
            value = labels[name] - at        # a distance counts from the end of its instruction
        yield value.to_bytes(width, "little", signed=mark != "" and mark != "=")
