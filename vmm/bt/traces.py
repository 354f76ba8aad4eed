# SPDX-License-Identifier: GPL-2.0-or-later
"""Which guest-physical pages have code that is executed, and what to do with those that are written as well.

A page whose trace goes off is forgotten, and looked at again when it is executed again: so code that is
loaded or patched costs one trap.  A page for which that happens again and again holds data beside its code;
it becomes `mixed`: its code is private to the guest, stores to it are carried out one by one with the trace
in place, and only units whose own bytes change die.
"""

from __future__ import annotations

from vmm.bt.codepage import CodePage
from vmm.bt.mode import Mode
from vmm.bt.views import View
from vmm.memory.p2m import P2M

#: traces of a page that went off before it counts as mixed
_PATIENCE = 4
#: stores to a mixed page, one after the other, after which it is data
_PERSISTENCE = 512


class CodeTraces:
    """The pages of code of one guest."""

    def __init__(self, p2m: P2M) -> None:
        self._p2m = p2m
        #: guest-physical page -> where it is executed
        self._watched: dict[int, list[tuple[View, int]]] = {}
        self._went_off: dict[int, int] = {}
        #: mixed pages: page -> its private code by view, linear page and mode
        self._mixed: dict[int, dict[tuple[View, int, Mode], CodePage]] = {}
        self._stores: dict[int, int] = {}
        #: traces on code that went off
        self.count = 0

    def watch(self, view: View, number: int, source: int) -> None:
        """Code of a guest-physical page is executed at linear page `number`."""
        where = self._watched.setdefault(source, [])
        if (view, number) not in where:
            where.append((view, number))

    def watched(self, source: int) -> bool:
        """Whether code of the page is executed."""
        return source in self._watched

    def went_off(self, source: int) -> list[tuple[View, int]]:
        """The page is written; where its code was executed."""
        where = self._watched.pop(source, [])
        if where:
            self.count += 1
            self._went_off[source] = self._went_off.get(source, 0) + 1
        return where

    def mixes(self, source: int) -> bool:
        """Whether the page holds data beside its code."""
        return self._went_off.get(source, 0) >= _PATIENCE

    def private(self, view: View, number: int, mode: Mode, source: int) -> CodePage | None:
        """The code of a mixed page as it was executed before."""
        return self._mixed.get(source, {}).get((view, number, mode))

    def adopt(self, view: View, page: CodePage, source: int) -> CodePage:
        """A mixed page is executed for the first time."""
        self._mixed.setdefault(source, {})[view, page.number, page.mode] = page
        return page

    def store_in_place(self, source: int) -> bool:
        """Whether a store to the page is to be carried out with its trace in place."""
        if source not in self._mixed or source not in self._watched:
            return False
        self._stores[source] = self._stores.get(source, 0) + 1
        if self._stores[source] > _PERSISTENCE:
            self._stores[source] = 0
            return False
        return True

    def executed(self, source: int) -> None:
        """The page was entered from elsewhere: it is not data alone."""
        self._stores.pop(source, None)

    def private_pages(self, source: int) -> list[CodePage]:
        """The private code of a mixed page."""
        return list(self._mixed.get(source, {}).values())
