# SPDX-License-Identifier: GPL-2.0-or-later
"""An example that fails, for somebody to look at: as little of it as still fails, and what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import capstone

from tests.bt_example import CODE, DATA, Bases, Example, Outcome

_NOP = b"\x90"
_NAMES = ("eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi")
_MOST_LINES = 40


def shrunk(example: Example, fails: Callable[[Example], bool]) -> Example:
    """An example that fails like the given one, with less to it."""
    for simplify in _simplifications(example):
        candidate = simplify(example)
        if candidate != example and fails(candidate):
            example = candidate
    return example


def _simplifications(example: Example) -> Iterator[Callable[[Example], Example]]:
    """To be tried one after the other."""
    def without(start: int, end: int) -> Callable[[Example], Example]:
        return lambda one: one._replace(code=one.code[:start] + _NOP * (end - start) + one.code[end:])

    def cleared(number: int) -> Callable[[Example], Example]:
        def simplify(one: Example) -> Example:
            registers = list(one.state.registers)
            registers[number] = 0
            return one._replace(state=one.state._replace(registers=tuple(registers)))
        return simplify

    for start, end in zip(example.starts, example.starts[1:]):
        yield without(start, end)
    for number in range(8):
        yield cleared(number)
    yield lambda one: one._replace(bases=Bases())
    yield lambda one: one._replace(eip=CODE)
    yield lambda one: one._replace(state=one.state._replace(flags=0))


def report(example: Example, got: Outcome, wanted: Outcome) -> str:
    """The example, and how what it should have come to differs from what it came to."""
    state = example.state
    fcw, fsw, mxcsr = (int.from_bytes(state.fx[at:end], "little") for at, end in ((0, 2), (2, 4), (24, 28)))
    registers = " ".join(f"{name}={value:08x}" for name, value in zip(_NAMES, state.registers))
    return "\n".join((
        *listing(example), "",
        f"begun with {registers}", f"flags={state.flags:#x} {example.bases}",
        f"fcw={fcw:04x} fsw={fsw:04x} tags={state.fx[4]:02x} mxcsr={mxcsr:04x}", "",
        f"ended with vector {got.vector} at {got.eip:#x}; differences, and how they should be:",
        *list(_differences(got, wanted))[:_MOST_LINES]))


def listing(example: Example) -> list[str]:
    """The code, an instruction a line."""
    machine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_32)
    lines = []
    for start, end in zip(example.starts, (*example.starts[1:], len(example.code))):
        code = example.code[start:end]
        text = next((f"{mnemonic} {operands}" for _, _, mnemonic, operands
                     in machine.disasm_lite(code, example.eip + start)), "?")
        lines.append(f"{example.eip + start:08x}  {code.hex():32} {text}")
    return lines


def _differences(got: Outcome, wanted: Outcome) -> Iterator[str]:
    yield from _differing(("eip", "vector", "address"), got, wanted)
    if got.access != wanted.access:
        yield f"access: {got.access or 'none'}, {wanted.access or 'none'}"
    yield from _differing(_NAMES, got.state.registers, wanted.state.registers)
    yield from _differing(["flags"], [got.state.flags], [wanted.state.flags])
    yield from _differing([f"fxsave+{at}" for at in range(288)], got.state.fx, wanted.state.fx)
    yield from _differing([f"[{DATA + at:#x}]" for at in range(len(got.memory))], got.memory, wanted.memory)


def _differing(names: Iterable[str], got: Iterable[object], wanted: Iterable[object]) -> Iterator[str]:
    return (f"{name}: {one:#x}, {other:#x}" for name, one, other in zip(names, got, wanted) if one != other)
