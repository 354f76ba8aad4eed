# SPDX-License-Identifier: GPL-2.0-or-later
"""How a device's registers are saved and loaded: one table per device, name -> kind of value.

A saved device is a dict of plain ints, bools, bytes and lists, fit for MessagePack.  It may come from a
migration stream or a file, so `load` trusts nothing: the names must be exactly those of the table and
every value must be of its kind and in its range, else `StateError`; nothing is changed before all is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

from vmm.state import StateError


class Kind(NamedTuple):
    """How one attribute is written out, and how it is read back (ValueError if it cannot be)."""

    dump: Callable[[Any], Any]
    load: Callable[[Any], Any]


def _same(value: Any) -> Any:
    return value


def between(low: int, high: int) -> Kind:
    """An int from `low` to `high`, both included."""

    def load(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise ValueError(f"{value!r} is not a number from {low} to {high}")
        return value

    return Kind(_same, load)


def bits(mask: int) -> Kind:
    """An int with no bit outside `mask`."""

    def load(value: Any) -> int:
        if type(value) is not int or value < 0 or value & ~mask:
            raise ValueError(f"{value!r} has bits outside {mask:#x}")
        return value

    return Kind(_same, load)


def one_of(*allowed: int) -> Kind:
    """One of a few ints."""

    def load(value: Any) -> int:
        if type(value) is not int or value not in allowed:
            raise ValueError(f"{value!r} is not one of {allowed}")
        return value

    return Kind(_same, load)


def wide(size: int) -> Kind:
    """An int of up to `size` bytes, kept as bytes because MessagePack ends at 64 bits."""

    def dump(value: int) -> bytes:
        return value.to_bytes(size, "little")

    def load(value: Any) -> int:
        if type(value) is not bytes or len(value) != size:
            raise ValueError(f"not {size} bytes")
        return int.from_bytes(value, "little")

    return Kind(dump, load)


def octets(high: int, low: int = 0) -> Kind:
    """A bytearray of `low` to `high` bytes."""

    def load(value: Any) -> bytearray:
        if type(value) is not bytes or not low <= len(value) <= high:
            raise ValueError(f"not bytes, {low} to {high} of them")
        return bytearray(value)

    return Kind(bytes, load)


def list_of(kind: Kind, count: int) -> Kind:
    """A list of exactly `count` values of one kind."""

    def dump(values: list[Any]) -> list[Any]:
        return [kind.dump(value) for value in values]

    def load(values: Any) -> list[Any]:
        if type(values) is not list or len(values) != count:
            raise ValueError(f"not a list of {count}")
        return [kind.load(value) for value in values]

    return Kind(dump, load)


def _load_flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError(f"{value!r} is not true or false")
    return value


#: the table of a device: attribute -> kind
Kinds = dict[str, Kind]

FLAG = Kind(_same, _load_flag)
BYTE = bits(0xFF)
WORD = bits(0xFFFF)
DWORD = bits(0xFFFF_FFFF)
QWORD = bits((1 << 64) - 1)
#: a guest time in ns; the bound leaves room to add any period without leaving 64 bits
TIME = bits((1 << 62) - 1)


def part(state: Any, owner: str, names: tuple[str, ...]) -> list[Any]:
    """The values of a composite's parts, in the order of `names`; StateError unless it has exactly these."""
    if type(state) is not dict or state.keys() != set(names):
        raise StateError(f"{owner}: expected {', '.join(names)}")
    return [state[name] for name in names]


class Stateful(Protocol):
    """What can be saved and loaded."""

    def save(self) -> dict[str, Any]:
        """The state as plain values."""

    def load(self, state: Any) -> None:
        """Take over what `save` returned.  Raises StateError on anything else."""


class Saved:
    """Base of a device whose whole state is the attributes named in `SAVED`."""

    __slots__ = ()
    SAVED: ClassVar[Kinds]

    def save(self) -> dict[str, Any]:
        """The state as plain values."""
        return {name: kind.dump(getattr(self, name)) for name, kind in self.SAVED.items()}

    def load(self, state: Any) -> None:
        """Take over what `save` returned.  Raises StateError on anything else."""
        owner = type(self).__name__
        values = part(state, owner, tuple(self.SAVED))
        loaded = {}
        for (name, kind), value in zip(self.SAVED.items(), values, strict=True):
            try:
                loaded[name] = kind.load(value)
            except ValueError as error:
                raise StateError(f"{owner} {name}: {error}") from None
        for name, value in loaded.items():
            setattr(self, name, value)
        self.restored()

    def restored(self) -> None:
        """Derive what is not saved and set the timers again.

        Interrupt lines are not driven: their levels are part of the saved interrupt controllers.
        """
