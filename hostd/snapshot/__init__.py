# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests in files: the snapshot format (docs/SNAPSHOT.md), its writer and its reader.

A file holds a guest's state, its definition, and the contents of its pages as records that can be read one by
one; pages of zeroes take no space.  A page may also be a record of another file, a *base*: so a snapshot on a
base holds what has changed since, and guests that are saved together share one file of common pages.
"""

from hostd.snapshot.layout import Base, Unusable
from hostd.snapshot.reader import Folder, Resolver, Snapshot
from hostd.snapshot.writer import SnapshotWriter

__all__ = ["Base", "Folder", "Resolver", "Snapshot", "SnapshotWriter", "Unusable"]
