# SPDX-License-Identifier: GPL-2.0-or-later
"""The firmware tables, read the way a kernel finds them."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from tests.tools import needs
from vmm.devices.acpi_tables import build

MEMORY = 128 << 20
TABLES = build(MEMORY)


@pytest.fixture(scope="module")
def image() -> bytes:
    """The BIOS area, from 0xE0000."""
    area = bytearray(0x20000)
    for address, data in TABLES:
        area[address - 0xE0000:address - 0xE0000 + len(data)] = data
    return bytes(area)


def table(image: bytes, address: int) -> bytes:
    offset = address - 0xE0000
    return image[offset:offset + struct.unpack_from("<I", image, offset + 4)[0]]


def root(image: bytes) -> bytes:
    offset = next(place for place in range(0, len(image), 16) if image[place:place + 8] == b"RSD PTR ")
    return image[offset:offset + 36]


def tables(image: bytes) -> dict[bytes, bytes]:
    """Everything reachable from the XSDT, by signature."""
    xsdt = table(image, struct.unpack_from("<Q", root(image), 24)[0])
    found = {xsdt[:4]: xsdt}
    for (address,) in struct.iter_unpack("<Q", xsdt[36:]):
        entry = table(image, address)
        found[entry[:4]] = entry
    found[b"DSDT"] = table(image, struct.unpack_from("<Q", found[b"FACP"], 140)[0])
    return found


def test_pieces_lie_apart_in_the_reserved_area() -> None:
    end = 0xE0000
    for address, data in sorted(TABLES):
        assert address >= end
        end = address + len(data)
    assert end <= 0x100000


def test_too_little_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 MiB"):
        build(0xFFFFF)


def test_root_pointer_checksums(image: bytes) -> None:
    pointer = root(image)
    assert pointer[15] == 2
    assert sum(pointer[:20]) & 0xFF == sum(pointer) & 0xFF == 0


def test_table_checksums_and_both_roots_agree(image: bytes) -> None:
    found = tables(image)
    assert set(found) == {b"XSDT", b"FACP", b"APIC", b"DSDT"}
    assert all(sum(data) & 0xFF == 0 for data in found.values())
    rsdt = table(image, struct.unpack_from("<I", root(image), 16)[0])
    assert sum(rsdt) & 0xFF == 0
    assert list(struct.unpack("<II", rsdt[36:])) == list(struct.unpack("<QQ", found[b"XSDT"][36:]))


def test_fixed_description(image: bytes) -> None:
    fadt = tables(image)[b"FACP"]
    assert len(fadt) == 276
    assert struct.unpack_from("<H", fadt, 46) == (9,)
    # no SMI command port: always in ACPI mode
    assert struct.unpack_from("<I", fadt, 48) == (0,)
    assert struct.unpack_from("<IIIIII", fadt, 56) == (0x600, 0, 0x604, 0, 0, 0x608)
    assert tuple(fadt[88:92]) == (4, 2, 0, 4)
    assert fadt[108] == 0x32
    assert struct.unpack_from("<BBBBQB", fadt, 116) == (1, 8, 0, 1, 0xCF9, 6)
    assert struct.unpack_from("<BBBBQ", fadt, 148) == (1, 32, 0, 2, 0x600)
    assert struct.unpack_from("<BBBBQ", fadt, 172) == (1, 16, 0, 2, 0x604)
    assert struct.unpack_from("<BBBBQ", fadt, 208) == (1, 32, 0, 3, 0x608)
    facs = table(image, struct.unpack_from("<I", fadt, 36)[0])
    assert (facs[:4], len(facs)) == (b"FACS", 64)


def test_apics(image: bytes) -> None:
    madt = tables(image)[b"APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE0_0000, 1)
    entries, offset = [], 44
    while offset < len(madt):
        entries.append(madt[offset:offset + madt[offset + 1]])
        offset += madt[offset + 1]
    assert offset == len(madt)
    assert [entry[0] for entry in entries] == [0, 1, 2, 2, 4]
    assert struct.unpack("<BBBBII", entries[1]) == (1, 12, 1, 0, 0xFEC0_0000, 0)
    assert struct.unpack("<BBBBIH", entries[2]) == (2, 10, 0, 0, 2, 0)
    assert struct.unpack("<BBBBIH", entries[3]) == (2, 10, 0, 9, 9, 0b1101)


def test_multiprocessor_table(image: bytes) -> None:
    offset = image.index(b"_MP_", 0x10000)
    assert offset % 16 == 0
    pointer = image[offset:offset + 16]
    assert sum(pointer) & 0xFF == 0
    address, length, revision = struct.unpack_from("<IBB", pointer, 4)
    assert (length, revision) == (1, 4)
    header = image[address - 0xE0000:][:44]
    signature, size, revision = struct.unpack_from("<4sHB", header)
    assert (signature, revision) == (b"PCMP", 4)
    configuration = image[address - 0xE0000:address - 0xE0000 + size]
    assert sum(configuration) & 0xFF == 0
    count, apic = struct.unpack_from("<HI", header, 34)
    assert apic == 0xFEE0_0000
    kinds, place = [], 44
    while place < size:
        kinds.append(configuration[place])
        if configuration[place] == 3 and configuration[place + 5] == 0:
            assert configuration[place + 7] == 2
        place += 20 if configuration[place] == 0 else 8
    assert (place, len(kinds)) == (size, count)
    assert kinds == [0, 1, 2] + [3] * 15 + [4] * 2


@needs("iasl")
def test_the_disassembler_understands_every_table(image: bytes, tmp_path: Path) -> None:
    for name, data in tables(image).items():
        file = tmp_path / f"{name.decode().lower()}.aml"
        file.write_bytes(data)
        done = subprocess.run(["iasl", "-d", file.name], cwd=tmp_path, capture_output=True, text=True,
                              check=True)
        assert "Error" not in done.stderr, done.stderr
    dsdt = (tmp_path / "dsdt.dsl").read_text()
    for piece in ("Name (_S5", 'EisaId ("PNP0501")', "0x03F8", "{4}", 'EisaId ("PNP0B00")', "{8}",
                  '"LNRO0005"', "0xFEB00000", "0xFEB01000", "Level, ActiveHigh, Exclusive", "0x0000000A"):
        assert piece in dsdt
    assert "Warning" not in (tmp_path / "facp.dsl").read_text()


@needs("iasl")
def test_the_compiler_makes_the_same_dsdt(image: bytes, tmp_path: Path) -> None:
    """Disassembled and compiled again, the hand-made AML comes out byte for byte."""
    data = tables(image)[b"DSDT"]
    (tmp_path / "dsdt.aml").write_bytes(data)
    subprocess.run(["iasl", "-d", "dsdt.aml"], cwd=tmp_path, capture_output=True, check=True)
    source = (tmp_path / "dsdt.dsl").read_text()
    (tmp_path / "again.dsl").write_text(source.replace('"dsdt.aml"', '""'))
    iasl = shutil.which("iasl")
    assert iasl
    subprocess.run([iasl, "-oa", "-p", "again", "again.dsl"], cwd=tmp_path, capture_output=True, check=True)
    again = (tmp_path / "again.aml").read_bytes()
    assert again[36:] == data[36:]
