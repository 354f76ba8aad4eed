# SPDX-License-Identifier: GPL-2.0-or-later
"""Guest exceptions as values, and when two of them make a third."""

from __future__ import annotations

import itertools

import pytest

from vmm.x86.faults import (
    PUSHES_ERROR_CODE,
    GeneralProtection,
    GuestFault,
    Vector,
    becomes_double_fault,
    becomes_shutdown,
)


def test_general_protection_is_a_guest_fault() -> None:
    with pytest.raises(GuestFault) as caught:
        raise GeneralProtection
    assert (caught.value.vector, caught.value.error_code, caught.value.address) == (13, 0, None)
    assert GeneralProtection(0x1B).error_code == 0x1B


def test_faults_say_what_they_are() -> None:
    assert str(GuestFault(Vector.PF, 2, 0x1000)) == "#PF(0x2) at 0x1000"
    assert str(GuestFault(Vector.UD)) == "#UD"
    assert str(GuestFault(0x80)) == "vector 128"


def test_vectors_with_error_codes() -> None:
    assert sorted(PUSHES_ERROR_CODE) == [8, 10, 11, 12, 13, 14, 17, 21, 29, 30]


CONTRIBUTORY = (0, 10, 11, 12, 13)


def test_double_faults() -> None:
    """APM vol. 2, table 8-5, every pair."""
    for first, second in itertools.product(range(32), repeat=2):
        doubles = (first in CONTRIBUTORY and second in CONTRIBUTORY) or (
            first == 14 and second in (14, *CONTRIBUTORY))
        assert becomes_double_fault(first, second) == doubles
        assert becomes_shutdown(first, second) == (first == 8 and second in (14, *CONTRIBUTORY))
