# SPDX-License-Identifier: GPL-2.0-or-later
"""The table of a VM's states, and the patience of its restarts."""

from __future__ import annotations

import itertools

import pytest

from hostd.errors import Conflict
from hostd.lifecycle import AT_REST, RESIDENT, TRANSITIONS, Backoff, State, Trigger, follow


def test_every_state_can_be_reached() -> None:
    reached = {State.DEFINED}
    while more := {after for (before, _), after in TRANSITIONS.items() if before in reached} - reached:
        reached |= more
    assert reached == set(State)


def test_every_trigger_does_something() -> None:
    assert {trigger for _, trigger in TRANSITIONS} == set(Trigger)


def test_resting_states_can_only_be_started() -> None:
    for state, trigger in itertools.product(AT_REST, Trigger):
        assert ((state, trigger) in TRANSITIONS) == (trigger is Trigger.START)


def test_a_guest_with_memory_can_always_end() -> None:
    for state, trigger in itertools.product(RESIDENT, (Trigger.POWER_OFF, Trigger.CRASH)):
        assert TRANSITIONS[state, trigger] in AT_REST


def test_states_with_and_without_memory_are_all_there_is() -> None:
    assert set(State) == RESIDENT | AT_REST and not RESIDENT & AT_REST


def test_what_the_table_does_not_say_is_refused_in_a_sentence() -> None:
    with pytest.raises(Conflict, match="VM web is halted: pause is not possible now"):
        follow("web", State.HALTED, Trigger.PAUSE)


def test_the_first_restart_is_immediate_and_the_next_ones_wait_longer_and_longer() -> None:
    backoff = Backoff()
    delays = [backoff.delay(lived_s=0.1) for _ in range(12)]
    assert delays[:5] == [0, 1, 2, 4, 8]
    assert delays[-1] == backoff.limit_s == max(delays)


def test_a_guest_that_lived_long_is_restarted_at_once_again() -> None:
    backoff = Backoff()
    for _ in range(5):
        backoff.delay(lived_s=0.1)
    assert backoff.delay(lived_s=3600) == 0
    assert backoff.delay(lived_s=0.1) == 0
    assert backoff.delay(lived_s=0.1) == 1
