# SPDX-License-Identifier: GPL-2.0-or-later
"""What examples compute with: numbers that mean something to some instruction or other."""

from __future__ import annotations

import random
import struct

from tests.bt_example import CODE, CODE_BYTES, DATA, DATA_BYTES, SOIL_BYTES

_DOUBLES = (0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, 3.0, 1e10, -1e-10, 2.0**31, -2.0**31, 2.0**63, 1e308, 5e-324,
            2.2250738585072014e-308, float("inf"), float("-inf"), float("nan"), 3.14159265, 65504.0)
#: sign and exponent, and significand, of the extended format: zero, denormal, pseudo-denormal, one,
#: infinity, signalling and quiet NaN, unnormal, pseudo-infinity, largest, indefinite, pi
_EXTENDED = ((0, 0), (0x8000, 0), (0, 1), (0, 1 << 63), (0x3FFF, 1 << 63), (0xBFFF, 1 << 63),
             (0x7FFF, 1 << 63), (0xFFFF, 1 << 63), (0x7FFF, 0xA << 60), (0x7FFF, 0xC << 60),
             (0x4000, 1 << 62), (0x7FFF, 0), (0x7FFE, (1 << 64) - 1), (0xFFFF, 3 << 62),
             (0x4000, 0xC90F_DAA2_2168_C235))
_FCW_RESET, _MXCSR_RESET = 0x37F, 0x1F80
_CELL = 16


def _single(chance: random.Random) -> bytes:
    number = chance.choice(_DOUBLES) if chance.random() < 0.5 else chance.uniform(-1000, 1000)
    return struct.pack("<f", number if abs(number) < 3e38 or number != number else float("inf"))


def _double(chance: random.Random) -> bytes:
    return struct.pack("<d", chance.choice(_DOUBLES) if chance.random() < 0.5 else chance.gauss(0, 1e6))


def _extended(chance: random.Random) -> bytes:
    if chance.random() < 0.4:
        exponent, significand = chance.choice(_EXTENDED)
    else:
        exponent = chance.choice((0, 0x8000)) | chance.randrange(0x3FF0, 0x4020)
        significand = 1 << 63 | chance.getrandbits(63)
    if chance.random() < 0.05:
        exponent = chance.getrandbits(16)
    return significand.to_bytes(8, "little") + exponent.to_bytes(2, "little")


def _word(chance: random.Random) -> int:
    """An integer small or large, or an address."""
    what = chance.random()
    if what < 0.3:
        return chance.randrange(-130, 130) & 0xFFFF_FFFF
    if what < 0.5:
        return DATA + chance.randrange(DATA_BYTES)
    if what < 0.7:
        return CODE + chance.randrange(CODE_BYTES)
    return chance.getrandbits(32)


def _cell(chance: random.Random) -> bytes:
    """16 bytes of one kind."""
    what = chance.random()
    if what < 0.5:
        return struct.pack("<4I", *(_word(chance) for _ in range(4)))
    if what < 0.6:
        return chance.randbytes(_CELL)
    if what < 0.75:
        return b"".join(_single(chance) for _ in range(4))
    if what < 0.9:
        return _double(chance) + _double(chance)
    return _extended(chance) + chance.randbytes(6)


def soil(chance: random.Random) -> bytes:
    """What data are taken from: a mixture of everything, in cells put together at random."""
    cells = [_cell(chance) for _ in range(512)]
    return b"".join(chance.choices(cells, k=SOIL_BYTES // _CELL))


def fx_image(chance: random.Random) -> bytes:
    """x87, MMX and SSE state; in most, the control registers are as after a reset."""
    image = bytearray(512)
    fcw, fsw, tags, mxcsr = _FCW_RESET, chance.randrange(8) << 11, chance.getrandbits(8), _MXCSR_RESET
    if chance.random() < 0.5:
        tags = chance.choice((0, 0xFF))
    if chance.random() < 0.25:
        fcw = chance.getrandbits(16) & 0x1F3F | 0x40
    if chance.random() < 0.25:
        fsw |= chance.getrandbits(16) & 0x477F
    if chance.random() < 0.5:
        mxcsr = chance.getrandbits(16)
    struct.pack_into("<HHB", image, 0, fcw, fsw, tags)
    struct.pack_into("<I", image, 24, mxcsr)
    for at in range(32, 160, 16):
        image[at:at + 10] = _extended(chance) if chance.random() < 0.7 else chance.randbytes(8) + b"\xFF\xFF"
    for at in range(160, 288, 16):
        image[at:at + 16] = _cell(chance)
    return bytes(image)
