# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever guests do, and whenever they are scanned: no contents change, and no frame is lost."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.sharing_rig import Guest, SharingHost

PAGES = st.integers(0, 30)
GUESTS = st.integers(0, 5)


class Comings(RuleBasedStateMachine):
    """Guests come, write what others write too, give pages back, and go, some while they are worked on."""

    def __init__(self) -> None:
        super().__init__()
        self.host = SharingHost(frames=1500)

    @initialize(bits=st.sampled_from([0, 1, 3, 64]))
    def hash(self, bits: int) -> None:
        """The real one, or so few bits of it that most of what it says is wrong."""
        real, mask = self.host.scanner._hash, np.uint64((1 << bits) - 1)
        self.host.use(lambda frames: real(frames) & mask)

    def guest(self, number: int) -> Guest | None:
        return self.host.guests[number % len(self.host.guests)] if self.host.guests else None

    @rule(image=st.sampled_from("ab"), pages=st.sampled_from([256, 300]))
    def come(self, image: str, pages: int) -> None:
        if len(self.host.guests) < 6:
            self.host.guest(image, pages)

    @rule(number=GUESTS, pages=st.lists(PAGES, max_size=8), content=st.integers(0, 3), spread=st.booleans())
    def write(self, number: int, pages: list[int], content: int, spread: bool) -> None:
        guest = self.guest(number)
        for page in pages if guest else ():
            if guest and len(self.host.magazine):
                guest.fill(page, bytes([content * (page + 1) % 256]) if spread else bytes([content]))

    @rule(number=GUESTS, page=PAGES)
    def discard(self, number: int, page: int) -> None:
        guest = self.guest(number)
        if guest:
            guest.discard(page)

    @rule(number=GUESTS)
    def clone(self, number: int) -> None:
        guest = self.guest(number)
        if guest and len(self.host.guests) < 6:
            self.host.clone(guest)

    @rule(number=GUESTS)
    def go(self, number: int) -> None:
        guest = self.guest(number)
        if guest:
            guest.end()

    @rule(number=GUESTS)
    def go_when_asked(self, number: int) -> None:
        """It ends just when something is to be done to it."""
        guest = self.guest(number)
        if guest and guest not in self.host.reclaimer.interfere:
            self.host.reclaimer.interfere.append(guest)

    @rule(rate=st.sampled_from([0, 5, 40, 1 << 20]), times=st.integers(1, 3))
    def scan(self, rate: int, times: int) -> None:
        self.host.rate = rate
        before = self.host.sharing.scanned
        self.host.scan(times)
        assert self.host.sharing.scanned - before <= rate * times

    @invariant()
    def nobody_can_tell(self) -> None:
        self.host.reclaimer.interfere = [guest for guest in self.host.reclaimer.interfere if guest.block]
        self.host.check()

    def teardown(self) -> None:
        self.host.reclaimer.interfere.clear()
        self.host.end()


TestComings = Comings.TestCase
TestComings.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
