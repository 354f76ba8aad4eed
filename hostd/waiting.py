# SPDX-License-Identifier: GPL-2.0-or-later
"""Waiting for a VM to come to a state, or for something to appear on its console."""

from __future__ import annotations

import re

import trio

from hostd.errors import Conflict, Invalid, NotFound, TimedOut
from hostd.events import Events
from hostd.lifecycle import AT_REST, Policy, State
from hostd.model import VmView
from hostd.searching import is_in
from hostd.vm import Vm

#: a match may begin this many bytes before what is new on the console
OVERLAP = 4096
MAX_PATTERN = 1024


async def wait(vm: Vm, events: Events, state: str | None, console: str | None,
               timeout: float | None) -> VmView:
    """Until the console, since the present boot, matches the regular expression, and then until the VM is in
    `state`.  Raises TimedOut; Conflict when the VM ends so that it cannot happen any more."""
    pattern = compile_pattern(console) if console is not None else None
    wanted = parse_state(state) if state is not None else None
    with trio.move_on_after(float("inf") if timeout is None else timeout) as scope:
        if pattern is not None:
            await for_console(vm, pattern)
        if wanted is not None:
            await for_state(vm, wanted, events)
    if scope.cancelled_caught:
        what = f"did not become {state}" if state else "did not print what was waited for"
        raise TimedOut(f"VM {vm.name} {what} within {timeout:g} seconds; it is {vm.state}")
    return vm.view()


def compile_pattern(expression: str) -> re.Pattern[bytes]:
    """The regular expression over the console's bytes.  Raises Invalid."""
    if len(expression) > MAX_PATTERN:
        raise Invalid(f"console: a regular expression may have {MAX_PATTERN} characters")
    try:
        return re.compile(expression.encode(), re.MULTILINE)
    except (re.error, RecursionError, OverflowError) as error:
        raise Invalid(f"console: not a regular expression: {error}") from None


def parse_state(name: str) -> State:
    """Raises Invalid for a name that is none."""
    try:
        return State(name)
    except ValueError:
        raise Invalid(f"state: {name[:32]!r} is none of {', '.join(State)}") from None


async def for_console(vm: Vm, pattern: re.Pattern[bytes]) -> None:
    """Until the console, since the present boot, matches.  Raises Conflict if the guest ends before that,
    Invalid if it takes too long to see whether it does."""
    seen = vm.console.boot
    running = vm.state not in AT_REST
    while True:
        seen = max(seen, vm.console.boot)
        if is_in(pattern, vm.console.scrollback(max(vm.console.boot, seen - OVERLAP))):
            return
        seen = vm.console.written
        _check_exists(vm)
        if running and vm.state in AT_REST and vm.starting is None:
            raise Conflict(f"VM {vm.name} is {vm.state} ({vm.reason}): its console will not match any more")
        running = running or vm.state not in AT_REST
        await vm.activity.wait()


async def for_state(vm: Vm, state: State, events: Events) -> None:
    """Until the VM is, or for a moment was, in `state`.  Raises Conflict if it crashes for good instead."""
    with events.subscribe() as reader:
        now = vm.state
        while now != state:
            _check_exists(vm)
            if now == State.CRASHED and vm.definition.on_crash is Policy.STOP:
                raise Conflict(f"VM {vm.name} is crashed: {vm.reason}")
            event = await reader.receive()
            while event.vm != vm.name:
                event = await reader.receive()
            now = event.data.get("state", now)


def _check_exists(vm: Vm) -> None:
    if vm.destroyed:
        raise NotFound(f"VM {vm.name} was destroyed")
