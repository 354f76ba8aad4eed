# SPDX-License-Identifier: GPL-2.0-or-later
"""Content-based page sharing across all guests (C. Waldspurger, OSDI 2002, section 4; Linux mm/ksm.c).

`Scanner` walks the private pages of all guests and keeps a hash of each.  A hash is read while the guest
runs and without a lock, so it is only a hint: whoever runs the guest compares the pages in full before one is
merged.  A page is offered when something says that it will stay as it is:

    a shared frame has its contents       it is merged at once; a page of zeros gives its frame up at once
    another guest booted from the same    both become one frame at once: what two guests have in the same
    image has the same in the same place  place is code and data of their image
    it has the same hash in two passes    it is matched with all other such pages

A page that was offered and is private again was written meanwhile: from then on it must be unchanged for two
passes, whatever else speaks for it.  Frames that clones share are looked at once, so that others may join.

`Table` knows the shared frames by their contents, and holds a pin on each, so that none is used for something
else; a frame that nobody but the table has is given up, and while memory is short one that a single page has,
too.  `Sharing` is the task in the daemon: it sets the pace.
"""

from hostd.sharing.hashing import PageHash
from hostd.sharing.scanner import Candidates, ScanGuest, Scanner
from hostd.sharing.task import Pins, Reclaimer, Sharing, SharingView

__all__ = ["Candidates", "PageHash", "Pins", "Reclaimer", "ScanGuest", "Scanner", "Sharing", "SharingView"]
