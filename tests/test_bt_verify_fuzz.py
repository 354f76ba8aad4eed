# SPDX-License-Identifier: GPL-2.0-or-later
"""Mutated units: what the verifier still accepts is decoded by somebody else and executed in a sandbox."""

from __future__ import annotations

import random
from collections.abc import Iterator

import capstone
import pytest
from capstone import x86_const as x86
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.bt_sandbox import Sandbox
from tests.bt_units import LAYOUT, STRINGS, all_forms, cut, lengths, unit
from vmm.bt.verify import Rejected, Verifier
from vmm.bt.verify_scan import scan

_FORMS = [code for code, _ in all_forms()]
_SPECIAL = [bytes.fromhex(text) for text in (
    *STRINGS, "458B4618", "4589464C", "41C7460C00000000", "4189F8 43880404", "438B0404", "8D6424FC",
    "458D4104", "6567894424FC", "4189C0", "7500", "67E300", "0F8500000000")]
_FORBIDDEN = {x86.X86_GRP_PRIVILEGE, x86.X86_GRP_CALL, x86.X86_GRP_INT, x86.X86_GRP_RET}
_ENTRY = LAYOUT.units
#: prefixes, an escape, REX bytes
_TELLING = bytes.fromhex("656766F0F2F30F414445484A4C")


class Judge:
    """Verifies units and holds the accepted ones against two oracles."""

    def __init__(self) -> None:
        self.verifier = Verifier(LAYOUT)
        self.sandbox = Sandbox()
        self.disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
        self.disassembler.detail = True
        self.accepted = 0

    def judge(self, code: bytes, seed: int) -> None:
        randoms = random.Random(seed)
        try:
            # what it remembers, and how the code is cut, is put to the test, too
            self.verifier.accept(cut(code, *lengths(code, randoms)) if seed % 4 else [code], _ENTRY)
        except Rejected:
            return
        self.verifier.retract(_ENTRY, len(code))
        self.accepted += 1
        starts = scan(code).starts
        self._disassemble(code, starts)
        assert self.sandbox.run(code, starts, seed) == [], code.hex()

    def _disassemble(self, code: bytes, starts: set[int]) -> None:
        """What the disassembler knows begins where the verifier says, and none of it is forbidden."""
        for start in starts:
            insn = next(self.disassembler.disasm(code[start:], 0, 1), None)
            if insn is None or code[start:start + 4] == b"\x4A\x8D\x3C\x27":
                continue
            assert start + insn.size in starts or start + insn.size == len(code), code.hex()
            assert not set(insn.groups) & _FORBIDDEN, code.hex()


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    yield Judge()


def _body(randoms: random.Random) -> bytes:
    return b"".join(randoms.choice(_SPECIAL if randoms.random() < 0.3 else _FORMS)
                    for _ in range(randoms.randrange(1, 7)))


def _mutate(code: bytes, randoms: random.Random) -> bytes:
    """One to three bytes changed, dropped, doubled or put in; often by ones that mean something."""
    data = bytearray(code)
    for _ in range(randoms.randrange(1, 4)):
        at = randoms.randrange(len(data))
        byte = randoms.choice((*_TELLING, randoms.randrange(256), randoms.randrange(256),
                               data[at] ^ 1 << randoms.randrange(8)))
        what = randoms.random()
        if what < 0.7:
            data[at] = byte
        elif what < 0.85:
            data.insert(at, byte)
        elif len(data) > 1:
            del data[at]
    return bytes(data)


def test_valid_units_break_no_rule(judge: Judge) -> None:
    randoms = random.Random(1)
    before = judge.accepted
    for seed in range(1500):
        judge.judge(unit(_body(randoms)), seed)
    assert judge.accepted - before == 1500


def test_mutated_units_are_rejected_or_harmless(judge: Judge) -> None:
    randoms = random.Random(2)
    before = judge.accepted
    for seed in range(40_000):
        body = _body(randoms)
        # half of the mutations leave the ending alone, so that more units get as far as the sandbox
        code = unit(_mutate(body, randoms)) if seed % 2 else _mutate(unit(body), randoms)
        judge.judge(code, seed)
    assert judge.accepted - before > 3000


def test_random_bytes_are_rejected_or_harmless(judge: Judge) -> None:
    randoms = random.Random(3)
    for seed in range(10_000):
        judge.judge(unit(b"\x65\x67" * (seed & 1) + randoms.randbytes(randoms.randrange(1, 6))), seed)


@settings(max_examples=300, deadline=None)
@given(st.binary(min_size=1, max_size=24), st.integers(0, 1 << 32))
def test_any_bytes_are_rejected_or_harmless(code: bytes, seed: int) -> None:
    _ANY.judge(unit(code), seed)
    _ANY.judge(code, seed)


_ANY = Judge()


ESCAPES = {
    "8B042500300020": "memory",          # mov eax, [0x20003000]
    "438B04C7": "memory",                # mov eax, [r15 + r8*8]
    "41C7461801000000": "state block",
    "418B8608010000": "state block",
    "4989C6": "fixed register",
    "F3480FAED8": "fixed register",      # wrgsbase rax
    "48F7D0": "upper half",
    "4A8D3C27": "upper half",
    "CD80": "interrupt",
    "CC": "interrupt",
    "0F05": "forbidden",
    "EC": "port",
    "E900100000": "fetch",
    "50": "memory",                      # push: the guest's esp is a low address
}


@pytest.mark.parametrize("code", ESCAPES)
def test_the_sandbox_notices_escapes(code: str, judge: Judge) -> None:
    """The oracle is worth something: what the verifier rejects does break rules there."""
    data = bytes.fromhex(code)
    with pytest.raises(Rejected):
        judge.verifier.accept([unit(data)], _ENTRY)
    broken = judge.sandbox.run(unit(data), {0, len(data)}, 7)
    assert any(ESCAPES[code] in what for what in broken), broken
