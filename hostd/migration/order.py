# SPDX-License-Identifier: GPL-2.0-or-later
"""Which message may come when, on one connection: a table of states, the same for both ends.

Every message is either the source's to say or the target's (Bye is anybody's), so a row of the table also
says who is to speak.  What is not in a state's row must not be said in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

from hostd.migration.messages import (
    Aborted,
    Accept,
    Attach,
    BlobPiece,
    Bye,
    Cancel,
    Commit,
    Committed,
    Complete,
    ConsoleData,
    ConsoleInput,
    Digests,
    Final,
    Forget,
    Hello,
    Join,
    Joined,
    Missing,
    Offer,
    Pages,
    Purpose,
    Ready,
    Refuse,
    Resolve,
    Resolved,
    Resume,
    Resumed,
    RoundDone,
    RoundEnd,
    Want,
    Welcome,
)

if TYPE_CHECKING:
    from hostd.migration.rules import Facts

End = Literal["source", "target"]
State = Literal[
    "preamble", "hello", "welcome",
    "offer", "offered", "copying", "round over", "round done", "final", "ready", "committing", "fetching",
    "moved",
    "join", "joining", "streaming", "stream over", "resume", "resuming", "resolve", "resolving", "resolved",
    "attach", "attached", "over"]

SOURCE_SAYS: frozenset[type] = frozenset({
    Hello, Offer, Join, Resume, Resolve, Attach, Pages, Digests, BlobPiece, RoundEnd, Final, Commit, Cancel,
    Forget, ConsoleInput, Bye})
TARGET_SAYS: frozenset[type] = frozenset({
    Welcome, Refuse, Accept, Joined, Missing, RoundDone, Ready, Committed, Aborted, Want, Complete, Resumed,
    Resolved, ConsoleData, Bye})
SAYS: Mapping[End, frozenset[type]] = {"source": SOURCE_SAYS, "target": TARGET_SAYS}

#: what a welcomed connection begins with, by what it is for
BEGINNINGS: Mapping[Purpose, State] = {
    "migrate": "offer", "join": "join", "resume": "resume", "resolve": "resolve", "console": "attach"}


def _welcomed(facts: Facts) -> State:
    return BEGINNINGS[facts.purpose]


def _accepted(facts: Facts) -> State:
    return "over" if facts.dry_run else "copying"


def _committed(facts: Facts) -> State:
    return "fetching" if facts.pages_left else "moved"


#: state -> message -> the state after it, or the function of what was agreed that gives it
ORDER: Mapping[State, Mapping[type, State | Callable[[Facts], State]]] = {
    "preamble": {},
    "hello": {Hello: "welcome"},
    "welcome": {Welcome: _welcomed, Refuse: "over"},

    "offer": {Offer: "offered", Cancel: "over"},
    "offered": {Accept: _accepted, Refuse: "over", Cancel: "over"},
    "copying": {Pages: "copying", Digests: "copying", Missing: "copying", BlobPiece: "copying",
                RoundEnd: "round over", Cancel: "over", Aborted: "over"},
    # nothing of the next round before this one is installed everywhere: connections overtake each other
    "round over": {RoundDone: "round done", Final: "final", Cancel: "over", Aborted: "over"},
    "round done": {Pages: "copying", Digests: "copying", BlobPiece: "round done", RoundEnd: "round over",
                   Final: "final", Cancel: "over", Aborted: "over"},
    # Final need not wait for RoundDone, since the guest stands still by then: the two may cross
    "final": {RoundDone: "final", Ready: "ready", Cancel: "over", Aborted: "over"},
    "ready": {Commit: "committing", Cancel: "over", Aborted: "over"},
    # Invariant: no Cancel from here on; only the target says whose the guest is
    "committing": {Committed: _committed, Aborted: "over"},
    "fetching": {Want: "fetching", Pages: "fetching", Complete: "moved"},
    "moved": {Forget: "over"},

    "join": {Join: "joining"},
    "joining": {Joined: "streaming", Refuse: "over"},
    "streaming": {Pages: "streaming", Digests: "streaming", Missing: "streaming", RoundEnd: "stream over"},
    "stream over": {RoundDone: "streaming"},

    "resume": {Resume: "resuming"},
    "resuming": {Resumed: "fetching", Refuse: "over"},

    "resolve": {Resolve: "resolving"},
    "resolving": {Resolved: "resolved"},
    "resolved": {Resolve: "resolving", Forget: "over"},

    "attach": {Attach: "attached", Bye: "over"},
    "attached": {ConsoleData: "attached", ConsoleInput: "attached", Bye: "over"},

    "over": {},
}
