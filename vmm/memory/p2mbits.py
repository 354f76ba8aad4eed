# SPDX-License-Identifier: GPL-2.0-or-later
"""The bits of a P2M entry: a long-mode PTE (AMD64 APM vol. 2, 5.3.3) with our kinds in its available bits."""

from __future__ import annotations

from enum import IntEnum

PRESENT, WRITABLE, USER, ACCESSED, DIRTY = 1, 2, 4, 0x20, 0x40
FRAME_MASK = 0x000F_FFFF_FFFF_F000
#: available bits 9-10: the kind of page; bit 11: written since the dirty log last looked
KIND_SHIFT = 9
KIND_MASK = 3 << KIND_SHIFT
LOGGED = 1 << 11
#: of an entry that is not present: its frame field is the slot of a store in which the contents are
STORED = 1 << 52


class Kind(IntEnum):
    """What a P2M entry says of its page."""

    ABSENT = 0
    PRIVATE = 1
    SHARED = 2
    BALLOONED = 3


PRIVATE_BITS = PRESENT | WRITABLE | USER | ACCESSED | DIRTY | Kind.PRIVATE << KIND_SHIFT
SHARED_BITS = PRESENT | USER | ACCESSED | Kind.SHARED << KIND_SHIFT
TABLE_BITS = PRESENT | WRITABLE | USER | ACCESSED
