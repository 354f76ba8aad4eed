# SPDX-License-Identifier: GPL-2.0-or-later
"""The software walk of a guest's page tables against the silicon's: same address, same fault, same marks."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unicorn import UC_ARCH_X86, UC_CTL_TLB_FLUSH, UC_HOOK_INTR, UC_MODE_32, UC_MODE_64, Uc
from unicorn.x86_const import (
    UC_CPU_X86_EPYC,
    UC_X86_REG_CR0,
    UC_X86_REG_CR2,
    UC_X86_REG_CR3,
    UC_X86_REG_CR4,
    UC_X86_REG_DR0,
    UC_X86_REG_EAX,
    UC_X86_REG_EBX,
    UC_X86_REG_EFLAGS,
    UC_X86_REG_ESP,
    UC_X86_REG_GDTR,
    UC_X86_REG_RAX,
    UC_X86_REG_RBX,
    UC_X86_REG_RSP,
)

from tests.plain_memory import PlainMemory
from vmm.x86 import flags
from vmm.x86.faults import GuestFault
from vmm.x86.paging import Access, Paging, translate

P, W, U, A, D, PS = 1, 2, 4, 0x20, 0x40, 0x80
NX = 1 << 63
PROTECTED = flags.CR0_PE | flags.CR0_PG


class Mode(NamedTuple):
    """A paging mode, and where in it the walk under test lies."""

    uc_mode: int
    wide: bool
    #: addresses of the tables on the way, and index in each
    path: tuple[tuple[int, int], ...]
    cr4: int
    efer: int
    linear: int
    #: accumulator, base and stack pointer, as wide as the mode
    registers: tuple[int, int, int]


WIDE = (UC_X86_REG_RAX, UC_X86_REG_RBX, UC_X86_REG_RSP)
NARROW = (UC_X86_REG_EAX, UC_X86_REG_EBX, UC_X86_REG_ESP)
MODES = {
    "long": Mode(UC_MODE_64, True, ((0x10000, 1), (0x11000, 2), (0x12000, 0), (0x13000, 0x20)),
                 flags.CR4_PAE, flags.EFER_LME | flags.EFER_LMA, 1 << 39 | 2 << 30 | 0x20128, WIDE),
    "pae": Mode(UC_MODE_32, True, ((0x10000, 1), (0x11000, 0), (0x12000, 0x20)), flags.CR4_PAE, 0,
                1 << 30 | 0x20128, NARROW),
    "32-bit": Mode(UC_MODE_32, False, ((0x10000, 256), (0x11000, 0x20)), flags.CR4_PSE, 0,
                   1 << 30 | 0x20128, NARROW),
}
RAM = 0x40000
LOW = 0x14000  # the tables that map the first pages one to one for the code of the test
SUPERVISOR_CODE, USER_CODE, STACK, GDT = 0x1000, 0x2000, 0x9000, 0xA000
PLACES = {0x20128: 0x2222_22CC, 0x30128: 0x3333_33CC}  # what may be found: INT3 and a mark
MAGIC = 0x5AA5_4321


class Silicon:
    """A Unicorn CPU in one paging mode, that makes one access at the linear address of the mode."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.uc = uc = Uc(UC_ARCH_X86, mode.uc_mode)
        uc.ctl_set_cpu_model(UC_CPU_X86_EPYC)
        uc.mem_map(0, RAM)
        self.seen: list[int] = []
        uc.hook_add(UC_HOOK_INTR, self._exception)
        uc.ctl_exits_enabled(True)
        for at, value in PLACES.items():
            uc.mem_write(at, value.to_bytes(4, "little"))
        self._low_tables()
        code, data = (0x00AFFB000000FFFF, 0x00CFF3000000FFFF)
        if mode.uc_mode == UC_MODE_32:
            code = 0x00CFFB000000FFFF
        uc.mem_write(GDT, b"".join(x.to_bytes(8, "little") for x in (0, code, data)))
        uc.reg_write(UC_X86_REG_GDTR, (0, GDT, 0x17, 0))
        uc.reg_write(UC_X86_REG_DR0, MAGIC)
        self.error_code_at = self._registers().index(MAGIC.to_bytes(4, "little")) - 16
        self.start = uc.context_save()

    def _low_tables(self) -> None:
        """Identity-map the first 16 pages; those of `USER_CODE` for the user, the others not."""
        uc, mode = self.uc, self.mode
        size = 8 if mode.wide else 4
        at = LOW
        for table, _ in mode.path[:-1]:
            # the first entry of each level leads on by way of LOW; the walk under test has its own tables
            directory_pointer = mode.uc_mode == UC_MODE_32 and mode.wide and table == mode.path[0][0]
            here = table if table == mode.path[0][0] else at - 0x1000
            uc.mem_write(here, (at | (P if directory_pointer else P | W | U)).to_bytes(size, "little"))
            at += 0x1000
        for page in range(16):
            rights = U if page == USER_CODE >> 12 else W
            uc.mem_write(at - 0x1000 + page * size, (page << 12 | P | rights).to_bytes(size, "little"))

    def _registers(self) -> bytes:
        context = self.uc.context_save()
        return ctypes.string_at(context.context, context.size)

    def _exception(self, uc: Uc, vector: int, data: Any) -> None:
        self.seen.append(vector)
        uc.emu_stop()

    def access(self, paging: Paging, entries: list[int], access: Access) -> tuple[int, int] | int:
        """(error code, CR2) of the page fault, or the mark found there."""
        uc, mode = self.uc, self.mode
        uc.context_restore(self.start)
        size = 8 if mode.wide else 4
        for (table, index), entry in zip(mode.path, entries):
            uc.mem_write(table + index * size, entry.to_bytes(size, "little"))
        body = bytes.fromhex("ffe3" if access.fetch else "8803 90 cc" if access.write else "8b03 cc")
        uc.mem_write(USER_CODE, body)
        # IRET to ring 3 pops RIP, CS, RFLAGS, RSP, SS
        width = 8 if mode.uc_mode == UC_MODE_64 else 4
        frame = (USER_CODE, 8 | 3, 2, 0, 16 | 3)
        uc.mem_write(STACK, b"".join(x.to_bytes(width, "little") for x in frame))
        uc.mem_write(SUPERVISOR_CODE, (b"\x48\xcf" if width == 8 else b"\xcf") if access.user else body)
        accumulator, base, stack = mode.registers
        for register, value in (
                (stack, STACK), (base, mode.linear), (accumulator, 0xCC),
                (UC_X86_REG_EFLAGS, 2 | (flags.RFLAGS_AC if access.ac else 0)),
                (UC_X86_REG_CR3, paging.cr3), (UC_X86_REG_CR4, paging.cr4)):
            uc.reg_write(register, value)
        uc.msr_write(0xC0000080, paging.efer)
        uc.reg_write(UC_X86_REG_CR0, paging.cr0)
        uc.ctl(UC_CTL_TLB_FLUSH, 1)
        uc.ctl_flush_tb()
        self.seen.clear()
        uc.emu_start(SUPERVISOR_CODE, 0)
        if self.seen == [14]:
            code = int.from_bytes(self._registers()[self.error_code_at:][:4], "little")
            return code, int(uc.reg_read(UC_X86_REG_CR2))
        assert self.seen == [3], f"unexpected exception {self.seen}"
        return int(uc.reg_read(accumulator)) & 0xFFFFFFFF

    def tables(self) -> list[int]:
        size = 8 if self.mode.wide else 4
        return [int.from_bytes(self.uc.mem_read(table + index * size, size), "little")
                for table, index in self.mode.path]


def entries(mode: Mode) -> st.SearchStrategy[list[int]]:
    """Entries for the walk: mostly present, with every flag that matters now and then."""
    def entry(level: int, marks: int) -> st.SearchStrategy[int]:
        last = level == len(mode.path) - 1
        frame = 0x30000 if last else mode.path[level + 1][0]
        pointer = mode.uc_mode == UC_MODE_32 and mode.wide and level == 0
        often = st.sampled_from([P, P, P, P, P, P, P, 0])
        if pointer:
            rights, odd = st.just(0), [NX, 1 << 45, 1 << 55]
        else:
            rights = st.sampled_from([W | U, W | U, W | U, W, U, 0])
            odd = [A, D, A | D, PS] if last else [A, PS, PS, PS | 1 << (13 if mode.wide else 21)]
            if mode.wide:
                odd += [NX, NX, 1 << 45, 1 << 52]
        extra = st.sampled_from([0] * 8 + odd)

        def build(present: int, right: int, bits: int) -> int:
            # a large page starts at 0 and not where the next table is
            base = 0 if bits & PS and not last else frame
            return base | present | right | bits | (0 if pointer else marks)
        return st.builds(build, often, rights, extra)
    return st.sampled_from([0, A, A | D]).flatmap(
        lambda marks: st.tuples(*(entry(level, marks) for level in range(len(mode.path)))).map(list))


@pytest.fixture(scope="module")
def silicons() -> dict[str, Silicon]:
    return {name: Silicon(mode) for name, mode in MODES.items()}


@settings(max_examples=200, deadline=None)
@given(data=st.data(), name=st.sampled_from(sorted(MODES)), wp=st.booleans(), nxe=st.booleans(),
       smep=st.booleans(), smap=st.booleans(), access=st.builds(
           Access, write=st.booleans(), user=st.booleans(), fetch=st.booleans(), ac=st.booleans()))
def test_the_silicon_walks_likewise(silicons: dict[str, Silicon], data: st.DataObject, name: str, wp: bool,
                                    nxe: bool, smep: bool, smap: bool, access: Access) -> None:
    if access.fetch:
        access = access._replace(write=False)
    mode = MODES[name]
    path = data.draw(entries(mode))
    paging = Paging(
        PROTECTED | (flags.CR0_WP if wp else 0), 0x10000,
        mode.cr4 | (flags.CR4_SMEP if smep else 0) | (flags.CR4_SMAP if smap else 0),
        mode.efer | (flags.EFER_NXE if nxe and mode.wide else 0))
    silicon = silicons[name]
    found = silicon.access(paging, path, access)

    memory = PlainMemory(RAM)
    size = 8 if mode.wide else 4
    for (table, index), value in zip(mode.path, path):
        memory.write(table + index * size, value.to_bytes(size, "little"))
    try:
        gpa = translate(memory, paging, mode.linear, access)
    except GuestFault as caught:
        assert found == (caught.error_code, caught.address)
        return
    if not access.fetch and not access.write:
        assert found == PLACES[gpa]
    assert isinstance(found, int)
    marked = [int.from_bytes(memory.read(table + index * size, size), "little") for table, index in mode.path]
    assert marked == silicon.tables()
