# SPDX-License-Identifier: GPL-2.0-or-later
"""Where Unicorn 2.1.4 keeps what its interface does not show: its CPU's registers and two switches.

A world switch reads and writes some sixty registers; through the public interface that costs more than a
hundred microseconds, in place it costs five.  So the register file (QEMU's CPUX86State, "env") is used
where it lies.  Nothing is taken on trust: each offset is found by the marks of values written through the
public interface, and a wheel in which a mark is missing or ambiguous is refused with `SiliconError`.

The offsets:

    env                 searched in the memory of the CPU object, for the whole image `uc_context_save` gives
    registers           at fixed places in env, verified by magic values in every group
    no_exit_request     the byte that keeps Unicorn from stopping in mid-instruction: an asynchronous stop
                        otherwise repeats a half-done read-modify-write (race, measured)
    interrupt_request   QEMU's pending-interrupt word, for the exact interrupt window (V_IRQ), and for stops
"""

from __future__ import annotations

import ctypes
import os
import random
import struct
from dataclasses import dataclass
from typing import Any

from unicorn import Uc, x86_const
from unicorn.unicorn_py3.unicorn import uclib

#: bytes before the register image in a saved context (struct uc_context)
CONTEXT_HEADER = 40
_UC_STRUCT_BYTES = 4096
_CPU_OBJECT_BYTES = 1 << 17

# indices in units of 8 bytes
GPR = 0
RIP = 16
RFLAGS = 17          # without the arithmetic flags and DF
CC_DST, CC_SRC = 18, 19
SEGMENTS = 23        # six, then LDTR, TR, GDTR, IDTR; three quadwords each: selector, base, limit|flags<<32
CR = 53              # CR0..CR4
EFER = 74
# indices in units of 4 bytes
CC_OP, DF, HFLAGS, HFLAGS2 = 42, 43, 44, 45

ES, CS, SS, DS, FS, GS, LDTR, TR, GDTR, IDTR = (SEGMENTS + 3 * i for i in range(10))

HF_GUEST = 1 << 21
HF_INHIBIT_IRQ = 1 << 3
HF2_GIF = 1 << 0
#: where QEMU's CPUState has `interrupt_request`, in bytes; verified by the self-test
INTERRUPT_REQUEST_AT = 28
#: QEMU's CPU_INTERRUPT_HARD, the physical interrupt line, and CPU_INTERRUPT_VIRQ
INTERRUPT_HARD = 0x2
INTERRUPT_VIRQ = 0x100


class SiliconError(RuntimeError):
    """This Unicorn is not the one whose inside we know."""


@dataclass(frozen=True)
class Layout:
    """Addresses in this process, and offsets found by their marks (quadword and doubleword indices)."""

    env: int
    env_bytes: int
    no_exit_request: int
    cpu_object: int
    interrupt_request: int
    dr: int              # quadword index of DR0
    error_code: int      # doubleword index
    is_int: int          # doubleword index of exception_is_int
    old_exception: int   # doubleword index of the exception being delivered, which makes the next one #DF
    nested_cr3: int      # quadword index
    star: int            # quadword index; LSTAR, CSTAR, SFMASK follow as found below
    lstar: int
    cstar: int
    fmask: int
    kernel_gs_base: int
    sysenter_cs: int     # doubleword index
    sysenter_esp: int
    sysenter_eip: int
    pat: int


def _fail(what: str) -> SiliconError:
    return SiliconError(f"the installed unicorn does not have the inside of 2.1.4: {what}; "
                        "install unicorn==2.1.4 from PyPI")


def _context_image(handle: ctypes.c_void_p, size: int) -> bytes:
    context = ctypes.c_void_p()
    if uclib.uc_context_alloc(handle, ctypes.byref(context)):
        raise _fail("a register context cannot be allocated")
    uclib.uc_context_save(handle, context)
    address = context.value or 0
    image = ctypes.string_at(address + CONTEXT_HEADER, size - CONTEXT_HEADER)
    uclib.uc_context_free(context)
    return image


def _find_env(uc: Uc, struct_address: int, image: bytes) -> tuple[int, int]:
    """(address of env, address of the CPU object), found through the pointers of uc_struct.

    Copies of the image lie about (saved contexts, our own buffers); the live one is that which follows a
    change made through the public interface.  The CPU object is the closest pointer below it.
    """
    pointers = struct.unpack(f"<{_UC_STRUCT_BYTES // 8}Q", ctypes.string_at(struct_address, _UC_STRUCT_BYTES))
    found: dict[int, int] = {}
    memory = os.open("/proc/self/mem", os.O_RDONLY)   # reads of wild addresses fail instead of faulting
    try:
        for pointer in pointers:
            if not 0x10000 <= pointer < 1 << 47:
                continue
            try:
                data = os.pread(memory, _CPU_OBJECT_BYTES, pointer)
            except OSError:
                continue
            at = data.find(image)
            while at >= 0:
                found[pointer + at] = max(found.get(pointer + at, 0), pointer)
                at = data.find(image, at + 8)
        live: dict[int, int] = {}
        old = uc.reg_read(x86_const.UC_X86_REG_R15)
        for value in (old ^ 0x5A5A5A5A, old):
            uc.reg_write(x86_const.UC_X86_REG_R15, value)
            live = {env: cpu for env, cpu in (live or found).items()
                    if _peek(memory, env + (GPR + 15) * 8) == value}
    finally:
        os.close(memory)
    if len(live) != 1:
        raise _fail(f"{len(live)} live copies of the register file instead of one")
    return next(iter(live.items()))


def _peek(memory: int, address: int) -> int:
    """The quadword at an address that need not exist any more; -1 then."""
    try:
        return int.from_bytes(os.pread(memory, 8, address), "little")
    except OSError:
        return -1


def _index(image: bytes, value: int, what: str, width: int = 8) -> int:
    pattern = value.to_bytes(width, "little")
    at = image.find(pattern)
    if at < 0 or at % width or image.find(pattern, at + 1) >= 0:
        raise _fail(f"the mark of {what} is missing or ambiguous")
    return at // width


#: registers marked through the public interface: name, register id
_MARKED = (("DR0", x86_const.UC_X86_REG_DR0), ("R15", x86_const.UC_X86_REG_R15),
           ("RBX", x86_const.UC_X86_REG_RBX), ("RIP", x86_const.UC_X86_REG_RIP))
_MARKED_MSRS = (("STAR", 0xC0000081), ("LSTAR", 0xC0000082), ("CSTAR", 0xC0000083), ("KERNEL_GS", 0xC0000102),
                ("SYSENTER_ESP", 0x175), ("SYSENTER_EIP", 0x176))
_MARKED_MSRS32 = (("SFMASK", 0xC0000084),)


def find(uc: Uc, handle: int) -> Layout:
    """The layout of this engine.  `uc` must be fresh: nothing translated yet.  Raises SiliconError."""
    pointer = ctypes.c_void_p(handle)
    uclib.uc_context_size.restype = ctypes.c_size_t
    size = uclib.uc_context_size(pointer)
    if not 4096 < size < 16384:
        raise _fail(f"a register context of {size} bytes")
    rng = random.Random()
    marks: dict[str, int] = {}

    def mark(name: str, bits: int) -> int:
        marks[name] = rng.getrandbits(bits) | 1 << (bits - 1)
        return marks[name]

    before: list[tuple[Any, int, int]] = []
    for name, register in _MARKED:
        before.append((uc.reg_write, register, uc.reg_read(register)))
        uc.reg_write(register, mark(name, 62))
    for name, msr in _MARKED_MSRS:
        before.append((uc.msr_write, msr, uc.msr_read(msr)))
        uc.msr_write(msr, mark(name, 46))
    for name, msr in _MARKED_MSRS32:
        before.append((uc.msr_write, msr, uc.msr_read(msr)))
        uc.msr_write(msr, mark(name, 31))
    image = _context_image(pointer, size)
    env, cpu_object = _find_env(uc, handle, image)
    dr0 = _index(image, marks["DR0"], "DR0")
    star = _index(image, marks["STAR"], "STAR")
    sysenter_esp = _index(image, marks["SYSENTER_ESP"], "SYSENTER_ESP")
    layout = Layout(
        env=env, env_bytes=size - CONTEXT_HEADER,
        no_exit_request=handle + _find_no_exit_request(handle, size - CONTEXT_HEADER),
        cpu_object=cpu_object, interrupt_request=cpu_object + INTERRUPT_REQUEST_AT, dr=dr0,
        error_code=dr0 * 2 - 4, is_int=dr0 * 2 - 3, old_exception=dr0 * 2 + 24, nested_cr3=dr0 + 18,
        star=star, lstar=_index(image, marks["LSTAR"], "LSTAR"), cstar=_index(image, marks["CSTAR"], "CSTAR"),
        fmask=_index(image, marks["SFMASK"], "SFMASK"),
        kernel_gs_base=_index(image, marks["KERNEL_GS"], "KERNEL_GS_BASE"),
        # a 16-bit value in a 32-bit field just before: too short a mark of its own
        sysenter_cs=sysenter_esp * 2 - 2, sysenter_esp=sysenter_esp,
        sysenter_eip=_index(image, marks["SYSENTER_EIP"], "SYSENTER_EIP"),
        pat=_find_pat(uc, pointer, size))
    for name, index in (("R15", GPR + 15), ("RBX", GPR + 3), ("RIP", RIP)):
        if _index(image, marks[name], name) != index:
            raise _fail(f"{name} is not where it was")
    for write, where, value in before:
        write(where, value)
    return layout


def _find_no_exit_request(handle: int, env_bytes: int) -> int:
    """Offset in uc_struct, found by the neighbours: the size of env 18 bytes before it."""
    image = ctypes.string_at(handle, _UC_STRUCT_BYTES)
    found = [at for at in range(1024, 3000, 4)
             if struct.unpack_from("<I", image, at)[0] == env_bytes and image[at + 19] == 1
             and image[at + 16] < 2 and image[at + 17] < 2 and image[at + 18] == 0]
    if len(found) != 1:
        raise _fail(f"{len(found)} places for the exit-request switch instead of one")
    return found[0] + 18


def _find_pat(uc: Uc, handle: ctypes.c_void_p, size: int) -> int:
    """PAT differs between two images in one place only."""
    old = uc.msr_read(0x277)
    images = []
    for value in (0x0606060606060606, 0x0706050401000706):
        uc.msr_write(0x277, value)
        images.append(_context_image(handle, size))
    uc.msr_write(0x277, old)
    return _index(images[1], 0x0706050401000706, "PAT")
