# SPDX-License-Identifier: GPL-2.0-or-later
"""Regular expressions of users: none of them keeps the daemon from its work."""

from __future__ import annotations

import re

import pytest

from hostd.errors import Invalid
from hostd.searching import is_in


def test_what_is_there_is_found() -> None:
    assert is_in(re.compile(rb"b+c"), b"aabbc")
    assert not is_in(re.compile(rb"b+c"), b"aabb")


@pytest.mark.parametrize("expression", [rb"(a+)+b", rb"(a|a)*b", rb"(?:.*a){20}c", rb"a*a*a*a*a*b"])
def test_an_expression_that_would_take_for_ever_is_given_up(expression: bytes) -> None:
    with pytest.raises(Invalid, match="takes too long to match"):
        is_in(re.compile(expression), b"a" * 60_000)
    assert is_in(re.compile(b"x"), b"xyz"), "the next is not the worse for it"
