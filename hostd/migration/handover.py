# SPDX-License-Identifier: GPL-2.0-or-later
"""Whose a guest is that changes hosts: the durable records of it, and what follows from them.

Each end keeps a record of its own, in a file named after the token of the migration: the source that it does
not run the guest any more (*fenced*), before it stops it; the target that the guest is its own (*committed*),
before it runs it.  The moment the target's record is on the disk, ownership changes (docs/MIGRATION.md).

What follows from a record and a word of the other end is in two tables.  tests/test_migration_handover.py
tries every order of messages, lost connections, full disks and crashes against them.

Invariant: a source's record is removed after the definition, and the target is told to forget after that: a
source that can still ask is never told "aborted" of a guest that the target has, or had.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import msgspec

from hostd import storage
from hostd.definition import Definition
from hostd.errors import Conflict, Failed
from hostd.migration.messages import Outcome, Token
from hostd.migration.views import Peer
from hostd.model import VmName

#: with so many records no guest comes any more.  Each stays until the source says Forget: it may still ask
MAX_RECORDS = 4096

#: where a source is: Commit was not said; it was; it may have been, and the daemon was started again since
Leaving = Literal["fenced", "committing", "restarted"]
#: what it hears: the target's word; nothing, for the connection ended; a user's, who takes the guest back
Word = Outcome | Literal["lost", "reclaimed"]
#: what it does: runs the guest on, and removes the record; asks the target; lets go of the guest: definition,
#: memory, record; has the VM as one that is off, and removes the record
Next = Literal["go on", "ask", "depart", "halt"]

FOLLOWS: Mapping[tuple[Leaving, Word], Next] = {
    ("fenced", "aborted"): "go on",
    ("fenced", "lost"): "go on",
    ("committing", "committed"): "depart",
    ("committing", "aborted"): "go on",
    ("committing", "running"): "ask",
    ("committing", "lost"): "ask",
    ("committing", "reclaimed"): "go on",
    ("restarted", "committed"): "depart",
    ("restarted", "aborted"): "halt",
    ("restarted", "running"): "ask",
    ("restarted", "lost"): "ask",
    ("restarted", "reclaimed"): "halt",
}

#: where a target is with a token: it has no session by it, or one; it writes its record; the record is there
Arriving = Literal["unknown", "expected", "committing", "committed"]
Step = Literal["expect", "commit", "written", "not written", "resolve", "lost", "forget"]

#: what it answers a source that asks
OUTCOMES: Mapping[Arriving, Outcome] = {
    "unknown": "aborted", "expected": "aborted", "committing": "running", "committed": "committed"}
#: and where each step leads; one that is not here changes nothing, or if it is in `REFUSED` must not be.
#: Once "aborted" was said, Commit is refused, even if it was on its way already
MOVES: Mapping[tuple[Arriving, Step], Arriving] = {
    ("unknown", "expect"): "expected",
    ("expected", "commit"): "committing",
    ("expected", "resolve"): "unknown",
    ("expected", "lost"): "unknown",
    ("committing", "written"): "committed",
    ("committing", "not written"): "unknown",
    ("committed", "forget"): "unknown",
}
REFUSED: Mapping[Step, str] = {
    "expect": "this hand-over is under way or over already",
    "commit": "this hand-over was broken off",
}


def moved(arriving: Arriving, step: Step) -> Arriving:
    """Where a target is after a step.  Raises Conflict for one that must not be."""
    if (arriving, step) in MOVES:
        return MOVES[arriving, step]
    if step in REFUSED:
        raise Conflict(REFUSED[step])
    return arriving


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one end has on its disk of a hand-over.  "fenced" is a source's, "committed" a target's."""

    version: Literal[1] = 1
    token: Token
    phase: Literal["fenced", "committed"]
    vm: VmName
    #: the other end; for a source HOST:PORT where it listens
    peer: Peer
    #: None: it is in the inventory of a target, which may change it, or destroy the VM
    definition: Definition | None
    #: seconds since 1970
    time: float


class Handovers:
    """The state directory's `migrations/`.

    Methods that write take as long as the disk does (a few milliseconds), so they are for threads; all others
    are at once.  A malformed record is set aside and told in the log.

    Invariant: a token is fenced, arriving or committed here, no two of them, and each change from one to
    another is made under the lock.
    """

    def __init__(self, state_dir: Path) -> None:
        self._directory = state_dir / "migrations"
        storage.make_directory(self._directory)
        self._lock = threading.Lock()
        #: held by who changes or removes a record that is there
        self._writing = threading.Lock()
        self._records = {record.token: record for record in storage.load_all(self._directory, Record, _check)}
        #: those that an earlier daemon wrote
        self._found = frozenset(self._records)
        #: tokens that are expected or committing, and records that are ready for them
        self._arriving: dict[str, Arriving] = {}
        self._prepared: dict[str, tuple[Record, storage.Prepared]] = {}

    def knows(self, token: str) -> bool:
        """Whether there is a record or a session by this token."""
        return token in self._records or token in self._arriving

    # --- source

    def fence(self, token: str, definition: Definition, peer: str) -> None:
        """This host does not run the VM any more, until `forget`.  Raises Failed: then it does.  Writes."""
        record = Record(token=token, phase="fenced", vm=definition.name, peer=peer, definition=definition,
                        time=time.time())
        self._write_first(record)
        self._records[token] = record

    def fenced(self) -> list[Record]:
        """The hand-overs of which this host is the source, and that are not over."""
        return [record for record in list(self._records.values()) if record.phase == "fenced"]

    def fence_of(self, vm: str) -> Record | None:
        """The one that keeps this host from running a VM."""
        return next((record for record in self.fenced() if record.vm == vm), None)

    def doubt_sentence(self, token: str) -> str:
        """What a user is told of a VM of which the other host has not said whether it has it."""
        record = self._records[token]
        vm, peer = record.vm, record.peer
        since = " when this hostd ended" if token in self._found else ""
        return (f"VM {vm} was being handed over to {peer} ({token}){since}: {peer} is asked whether it has "
                f"it; if that is gone for good: hostctl recover {vm}")

    # --- target

    @contextmanager
    def expected(self, token: str) -> Iterator[None]:
        """While a guest arrives by this token: only then `commit` can be.  Raises Conflict."""
        self._move(token, "expect")
        try:
            yield
        finally:
            self._move(token, "lost")
            _, prepared = self._prepared.pop(token, (None, None))
            if prepared is not None:
                prepared.discard()

    def prepare(self, token: str, definition: Definition, peer: str) -> None:
        """Have the record for `commit` ready: the guest stands still while that writes.  Raises Failed.
        Writes."""
        record = _committed(token, definition, peer)
        self._prepared[token] = record, storage.Prepared(self._path(token), _encode(record))

    def commit(self, token: str, definition: Definition, peer: str) -> None:
        """The guest is this host's.  Raises Conflict (broken off) or Failed: then it never is.  Writes."""
        self._move(token, "commit")
        try:
            if len(self._records) >= MAX_RECORDS:
                raise Failed(f"{MAX_RECORDS} hand-overs are not over: if the hosts in question are gone for "
                             f"good, remove their records from {self._directory}")
            record, prepared = self._prepared.pop(token, (None, None))
            if record is not None and prepared is not None:
                prepared.commit()
            else:
                record = _committed(token, definition, peer)
                self._write_first(record)
        except BaseException:
            self._move(token, "not written")
            raise
        self._records[token] = record
        self._move(token, "written")

    def kept(self, token: str) -> None:
        """The definition is in the inventory: whatever becomes of it there, a restart does not bring it back.
        Nothing happens where the record has been removed meanwhile.  Raises Failed.  Writes."""
        with self._writing:
            if token not in self._records:
                return
            record = msgspec.structs.replace(self._records[token], definition=None)
            storage.write(self._path(token), _encode(record))
            self._records[token] = record

    def answer(self, token: str) -> Outcome:
        """What a source is told that asks; once "aborted" was said, `commit` is refused."""
        return OUTCOMES[self._move(token, "resolve")]

    def unkept(self) -> list[Record]:
        """Guests that are this host's, and whose definitions may not be in the inventory."""
        return [record for record in list(self._records.values())
                if record.phase == "committed" and record.definition is not None]

    # --- both

    def forget(self, token: str) -> None:
        """Remove the record, if there is one.  Raises Failed, and then it is there.  Writes."""
        with self._writing:
            storage.remove(self._path(token))
            self._records.pop(token, None)

    def _move(self, token: str, step: Step) -> Arriving:
        """Make the step; where it was made from."""
        with self._lock:
            before = self._standing(token)
            after = moved(before, step)
            self._arriving.pop(token, None)
            if after in ("expected", "committing"):
                self._arriving[token] = after
            return before

    def _standing(self, token: str) -> Arriving:
        record = self._records.get(token)
        if record is None:
            return self._arriving.get(token, "unknown")
        if record.phase == "fenced":
            raise Conflict("this host is the source of this hand-over")
        return "committed"

    def _path(self, token: str) -> Path:
        return self._directory / f"{token}.json"

    def _write_first(self, record: Record) -> None:
        """Write a record where there was none.  If that fails there is none, even if it failed so late that
        the file had its name already."""
        path = self._path(record.token)
        try:
            storage.write(path, _encode(record))
        except BaseException:
            with suppress(Failed):
                storage.remove(path)
            raise


def _committed(token: str, definition: Definition, peer: str) -> Record:
    return Record(token=token, phase="committed", vm=definition.name, peer=peer, definition=definition,
                  time=time.time())


def _encode(record: Record) -> bytes:
    return msgspec.json.format(msgspec.json.encode(record)) + b"\n"


def _check(record: Record, stem: str) -> None:
    if record.token != stem:
        raise ValueError(f"it is about the token {record.token}")
    if record.definition is None and record.phase == "fenced":
        raise ValueError("it lacks the definition")
    if record.definition is not None and record.definition.name != record.vm:
        raise ValueError(f"it defines a VM named {record.definition.name}")
