# SPDX-License-Identifier: GPL-2.0-or-later
"""Two hosts and the line between them, as far as the commit protocol goes: every state they can get into.

A host does one thing at a time: what is on its list of *effects*, one by one, and between any two of them it
may crash.  Then all is lost but what is on its disk (`record`, `definition`).  A connection may break at any
time, and loses any number of the last messages in either direction.  What to do is looked up in the tables of
hostd.migration.handover; the rest of this file is only what source.py and target.py do with the answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hostd.errors import Conflict
from hostd.migration import handover

Faults = tuple[int, int, int, int, int]

#: the end of a connection, as the last thing that is received from it
END = "end"


@dataclass(frozen=True)
class Tables:
    """The tables under test, so that broken ones can be tried, too."""

    follows: Mapping[tuple[str, str], str] = field(default_factory=lambda: dict(handover.FOLLOWS))
    moved: Callable[[Any, Any], Any] = handover.moved
    outcomes: Mapping[str, str] = field(default_factory=lambda: dict(handover.OUTCOMES))
    leaving: tuple[str, ...] = ("fence", "stop", "say final")
    arrival: tuple[str, ...] = ("write", "save definition", "run", "say committed")
    departure: tuple[str, ...] = ("remove definition", "drop guest", "remove record", "say forget")


@dataclass(frozen=True)
class Line:
    """A connection: what is under way in it to the source and to the target.  None: that end is closed."""

    to_source: tuple[str, ...] | None = None
    to_target: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Host:
    """One end.  `record` and `definition` are on its disk."""

    up: bool = True
    runs: bool = False
    memory: bool = False
    record: bool = False
    definition: bool = False
    #: Leaving, or "home" and "departed"; Arriving
    standing: str = "home"
    effects: tuple[str, ...] = ()


@dataclass(frozen=True)
class World:
    source: Host
    target: Host
    #: the migration's own connection, and the one to ask on
    main: Line
    asking: Line
    #: how many crashes of the source, crashes of the target, broken lines, failed writes and targets that are
    #: gone for good there may still be
    faults: Faults


def beginning(tables: Tables, faults: Faults) -> World:
    """A guest runs at the source; its offer has been accepted."""
    return World(Host(runs=True, memory=True, definition=True, effects=tables.leaving),
                 Host(standing="expected", memory=True), Line((), ()), Line(), faults)


class Model:
    """The steps that can follow a state of the world."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables

    def steps(self, world: World) -> Iterator[tuple[str, World]]:
        """What goes on by itself: whatever happens, this does in the end."""
        for name, host in ("source", world.source), ("target", world.target):
            if not host.up and host.standing != "gone":
                yield f"{name} is started", self._start(world, name)
            elif host.up and host.effects:
                yield f"{name}: {host.effects[0]}", self._effect(world, name)
        yield from self._received(world)
        source = world.source
        if source.up and not source.effects and source.standing in ("committing", "restarted"):
            if world.target.standing == "gone":
                yield "a user takes it back", self._hear(world, "reclaimed")
            if world.main.to_source is None and world.asking.to_source is None and world.target.up:
                yield "source asks", replace(world, asking=Line((), ("resolve",)))
            elif world.main.to_source is not None and source.standing == "committing":
                # it need not be broken: the answer took too long
                yield "source gives the line up", replace(world, main=self._closed(world.main, "source"))

    def faults(self, world: World) -> Iterator[tuple[str, World]]:
        """What may happen besides."""
        for index, name in enumerate(("source", "target")):
            if world.faults[index] and getattr(world, name).up:
                yield f"{name} crashes", self._crash(self._spent(world, index), name)
        if world.faults[2]:
            for name in "main", "asking":
                for line in _broken(getattr(world, name)):
                    yield f"line {name} breaks", replace(self._spent(world, 2), **{name: line})
        if world.faults[3]:
            for name, effect in ("source", "fence"), ("target", "write"):
                host = getattr(world, name)
                if host.up and host.effects[:1] == (effect,):
                    yield f"{name}: disk full", self._effect(self._spent(world, 3), name, full=True)
        if world.faults[4]:
            gone = self._crash(self._spent(world, 4), "target")
            yield "target is gone for good", replace(gone, target=Host(up=False, standing="gone"))
        source = world.source
        if source.up and source.standing == "fenced":
            yield "a user calls it off", self._hear(world, "lost")

    def _spent(self, world: World, index: int) -> World:
        left = list(world.faults)
        left[index] -= 1
        return replace(world, faults=tuple(left))

    # --- crashes and starts

    def _crash(self, world: World, name: str) -> World:
        host = getattr(world, name)
        dead = Host(up=False, record=host.record, definition=host.definition, standing="down")
        return replace(world, **{name: dead}, main=self._closed(world.main, name),
                       asking=self._closed(world.asking, name))

    def _closed(self, line: Line, by: str) -> Line:
        """One end has closed it; the other will see the end, after all that was sent."""
        own, other = ("to_source", "to_target") if by == "source" else ("to_target", "to_source")
        under_way = getattr(line, other)
        ended = under_way if under_way is None or under_way[-1:] == (END,) else (*under_way, END)
        return replace(line, **{own: None, other: ended if getattr(line, own) is not None else under_way})

    def _start(self, world: World, name: str) -> World:
        host = getattr(world, name)
        if name == "source":
            host = replace(host, up=True, standing="restarted" if host.record else
                           "home" if host.definition else "departed")
        else:
            host = replace(host, up=True, standing="committed" if host.record else "unknown",
                           effects=("save definition",) if host.record else ())
        return replace(world, **{name: host})

    # --- effects

    def _effect(self, world: World, name: str, full: bool = False) -> World:
        host = getattr(world, name)
        effect, host = host.effects[0], replace(host, effects=host.effects[1:])
        world = replace(world, **{name: host})
        if effect.startswith("say "):
            return self._say(world, name, effect.removeprefix("say "))
        if full and effect == "fence":
            return replace(world, source=replace(host, effects=()), main=self._closed(world.main, "source"))
        if full:
            host = replace(host, standing=self.tables.moved(host.standing, "not written"), memory=False,
                           effects=("say aborted",))
            return replace(world, target=host)
        changes: dict[str, Any] = {
            "fence": {"record": True, "standing": "fenced"}, "stop": {"runs": False},
            "commit": {"standing": "committing"},
            "go on": {"runs": True, "standing": "home"}, "halt": {"standing": "home", "definition": True},
            "remove record": {"record": False}, "remove definition": {"definition": False},
            "drop guest": {"memory": False, "standing": "departed"},
            "write": {"record": True, "standing": "committed"}, "save definition": {"definition": True},
            "run": {"runs": True},
        }[effect]
        return replace(world, **{name: replace(host, **changes)})

    def _say(self, world: World, name: str, message: str) -> World:
        """On the main line, if that still stands; else nobody hears it."""
        queue = "to_target" if name == "source" else "to_source"
        under_way = getattr(world.main, queue)
        own = getattr(world.main, "to_source" if name == "source" else "to_target")
        if under_way is None or own is None or END in under_way:
            return world
        return replace(world, main=replace(world.main, **{queue: (*under_way, message)}))

    # --- messages

    def _received(self, world: World) -> Iterator[tuple[str, World]]:
        for name in "main", "asking":
            line: Line = getattr(world, name)
            if line.to_source and world.source.up and not world.source.effects:
                message, rest = line.to_source[0], line.to_source[1:]
                after = replace(world, **{name: replace(line, to_source=rest)})
                yield f"source hears {message}", self._source_hears(after, name, message)
            # the target has a task for each connection: only the one that carries the guest waits for effects
            if line.to_target and world.target.up and (name == "asking" or not world.target.effects):
                message, rest = line.to_target[0], line.to_target[1:]
                after = replace(world, **{name: replace(line, to_target=rest)})
                yield f"target hears {message}", self._target_hears(after, name, message)

    def _source_hears(self, world: World, name: str, message: str) -> World:
        if message == "ready":
            source = replace(world.source, effects=("commit", "say commit"))
            return replace(world, source=source)
        line = self._closed(getattr(world, name), "source")
        word = "lost" if message == END else message
        if (world.source.standing in ("home", "departed")
                or (name == "main" and word == "lost" and world.source.standing == "restarted")):
            return replace(world, **{name: line})
        heard = self._hear(world, word)
        if "say forget" in heard.source.effects:                # it is said where the answer came from
            return heard
        return replace(heard, **{name: self._closed(getattr(heard, name), "source")})

    def _hear(self, world: World, word: str) -> World:
        source = world.source
        effects = {"go on": ("go on", "remove record"), "halt": ("halt", "remove record"), "ask": (),
                   "depart": self.tables.departure}[self.tables.follows[source.standing, word]]
        world = replace(world, source=replace(source, effects=effects))
        return replace(world, main=self._closed(world.main, "source")) if word == "lost" else world

    def _target_hears(self, world: World, name: str, message: str) -> World:
        target = world.target
        moved = self.tables.moved
        if message == "final":
            return self._say(world, "target", "ready") if target.standing == "expected" else world
        if message == "commit":
            try:
                target = replace(target, standing=moved(target.standing, "commit"),
                                 effects=self.tables.arrival)
            except Conflict:
                target = replace(target, effects=("say aborted",))
            return replace(world, target=target)
        if message == "resolve":
            answer = self.tables.outcomes[target.standing]
            after = moved(target.standing, "resolve")
            dropped = {"memory": False} if (target.standing, after) == ("expected", "unknown") else {}
            line = getattr(world, name)
            if line.to_source is not None:
                line = replace(line, to_source=(*line.to_source, answer))
            return replace(world, target=replace(target, standing=after, **dropped), **{name: line})
        if message == "forget":
            after = moved(target.standing, "forget")
            return replace(world, target=replace(target, standing=after, record=False))
        assert message == END
        if name == "main":
            after = moved(target.standing, "lost")
            dropped = {"memory": False} if (target.standing, after) == ("expected", "unknown") else {}
            world = replace(world, target=replace(target, standing=after, **dropped))
        return replace(world, **{name: self._closed(getattr(world, name), "target")})


def _broken(line: Line) -> Iterator[Line]:
    """What may be left under way when the line breaks: any first part of it, in either direction."""
    if line == Line():
        return
    for to_source in _cut(line.to_source):
        for to_target in _cut(line.to_target):
            broken = Line(to_source, to_target)
            if broken != line:
                yield broken


def _cut(under_way: tuple[str, ...] | None) -> list[tuple[str, ...] | None]:
    if under_way is None:
        return [None]
    sent = [message for message in under_way if message != END]
    return [(*sent[:kept], END) for kept in range(len(sent) + 1)]


@dataclass
class Explored:
    """All states that can be reached, how many they are, and what is wrong with some."""

    states: int
    wrong: list[str]
    #: how often each end was come to
    ends: dict[str, int]


def explore(tables: Tables, faults: Faults, at_most: int = 5) -> Explored:
    """Go everywhere.  Stops at so many mistakes."""
    model, first = Model(tables), beginning(tables, faults)
    came_from: dict[World, tuple[World, str] | None] = {first: None}
    queue, wrong, ends = deque([first]), [], {}
    before: dict[World, list[World]] = {}
    quiet: list[World] = []

    def tell(what: str, world: World) -> None:
        path, at = [], came_from[world]
        while at is not None:
            path.append(at[1])
            at = came_from[at[0]]
        wrong.append(f"{what}: {' / '.join(reversed(path))}")

    while queue and len(wrong) < at_most:
        world = queue.popleft()
        mistake = _mistake(world)
        if mistake:
            tell(mistake, world)
            continue
        own = list(model.steps(world))
        if not own:
            quiet.append(world)
            end = _end(world)
            ends[end] = ends.get(end, 0) + 1
            if end not in ("source", "target"):
                tell(end, world)
        for _, after in own:
            before.setdefault(after, []).append(world)
        for name, after in [*own, *model.faults(world)]:
            if after not in came_from:
                came_from[after] = world, name
                queue.append(after)
    if not wrong:
        # from everywhere, without further faults, the end can be reached
        reached, queue = set(quiet), deque(quiet)
        while queue:
            for world in before.get(queue.popleft(), ()):
                if world not in reached:
                    reached.add(world)
                    queue.append(world)
        for world in came_from:
            if world not in reached and len(wrong) < at_most:
                tell("no end", world)
    return Explored(len(came_from), wrong, ends)


def _mistake(world: World) -> str:
    """What must never be, in whatever state."""
    source, target = world.source, world.target
    may_start = source.definition and not source.record
    if any(host.runs and not host.memory for host in (source, target)):
        return "it runs without memory"
    if source.runs and target.runs:
        return "it runs twice"
    if may_start and (target.record or target.definition):
        return "both own it"
    if source.runs and (target.record or target.definition):
        return "the source runs what is the target's"
    if not (source.definition or source.record or target.record or target.definition
            or target.standing == "gone"):
        return "nobody owns it"
    return ""


def _end(world: World) -> Literal["source", "target"] | str:
    """Who owns the guest when nothing goes on any more."""
    source, target = world.source, world.target
    if source.record:
        return "a record stays with the source"
    if target.standing not in ("unknown", "committed", "gone"):
        return f"the target stays {target.standing}"
    if target.memory and not target.definition:
        return "the target keeps memory"
    return "source" if source.definition else "target"
