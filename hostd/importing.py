# SPDX-License-Identifier: GPL-2.0-or-later
"""Modules that are imported while the daemon serves already, so that its first answer need not wait for them.

Invariant: one thread imports at a time.  Two that want a package and a module of it in different orders lock
each other out, which the interpreter notices and makes an error of one of them.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import trio

_turn = trio.Lock()


async def load_module(name: str) -> ModuleType:
    """Import a module in a thread."""
    async with _turn:
        return await trio.to_thread.run_sync(import_module, name)
