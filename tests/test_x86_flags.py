# SPDX-License-Identifier: GPL-2.0-or-later
"""Canonical addresses and the PAT."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.x86.flags import PAT_RESET, is_canonical, is_valid_pat


@pytest.mark.parametrize(("address", "canonical"), [
    (0, True), (0x7FFF_FFFFFFFF, True), (0x8000_00000000, False), (0xFFFF7FFF_FFFFFFFF, False),
    (0xFFFF8000_00000000, True), (0xFFFFFFFF_FFFFFFFF, True),
])
def test_canonical(address: int, canonical: bool) -> None:
    assert is_canonical(address) == canonical


@given(st.lists(st.integers(0, 255) | st.integers(0, 7), min_size=8, max_size=8))
def test_pat_fields(fields: list[int]) -> None:
    value = int.from_bytes(bytes(fields), "little")
    assert is_valid_pat(value) == all(field in (0, 1, 4, 5, 6, 7) for field in fields)


def test_pat_at_reset() -> None:
    assert is_valid_pat(PAT_RESET)
