# SPDX-License-Identifier: GPL-2.0-or-later
"""Delivering events through the guest's IDT, in every mode (APM vol. 2, chapter 8).

The silicon intercepts every exception and leaves the delivery to us.  Order is everything: all that can
fault is read, checked and translated first; then the stack frame is written; registers change last.  So a
fault, or a lack of frames, finds the guest as it was before the event.

Task gates are refused (`Unsupported`): hardware task switching through the IDT is not virtualized.
"""

from __future__ import annotations

import struct

from vmm.hw.linear import Linear
from vmm.memory.errors import BadAddress
from vmm.silicon import layout as at
from vmm.silicon.registers import Registers
from vmm.state import Segment
from vmm.x86 import descriptors as ds
from vmm.x86.faults import (
    PUSHES_ERROR_CODE,
    SELECTOR_EXT,
    SELECTOR_IDT,
    GeneralProtection,
    GuestFault,
    Vector,
    becomes_double_fault,
    becomes_shutdown,
)
from vmm.x86.flags import (
    CR0_PE,
    EFER_LMA,
    MASK32,
    RFLAGS_IF,
    RFLAGS_NT,
    RFLAGS_RF,
    RFLAGS_TF,
    RFLAGS_VM,
    is_canonical,
)

_CLEARED = RFLAGS_TF | RFLAGS_NT | RFLAGS_RF | RFLAGS_VM
#: exceptions whose saved RFLAGS do not have RF set: traps, aborts and NMI
_NO_RESUME = frozenset({Vector.DB, Vector.NMI, Vector.BP, Vector.OF, Vector.DF, Vector.MC})
#: INT3 and INTO, which are not INT n
_ONE_BYTE: dict[int, int] = {Vector.BP: 0xCC, Vector.OF: 0xCE}
_FRAME5 = struct.Struct("<5Q")
_FRAME6 = struct.Struct("<6Q")
_INTERRUPT_GATE, _TRAP_GATE = 0xE, 0xF
_MOST_SEGMENTS = 64


class TripleFault(Exception):
    """The processor shuts down."""


class Unsupported(Exception):
    """The guest uses what this monitor does not provide."""


class Delivery:
    """Events for the guest whose registers are live in `regs`."""

    def __init__(self, regs: Registers, linear: Linear) -> None:
        self.regs = regs
        self.linear = linear
        self.q, self.d = regs.q, regs.d
        self._segments: dict[int, Segment] = {}

    def exception(self, vector: int, error_code: int | None = None, address: int | None = None) -> None:
        """Deliver an exception; what its delivery raises is delivered next, as table 8-5 of the manual says.

        Raises TripleFault, Unsupported, OutOfFrames (nothing happened, may be repeated).
        """
        while True:
            if address is not None:
                self.q[at.CR + 2] = address
            try:
                self._deliver(vector, error_code, False, False)
                return
            except GuestFault as second:
                fault = self._combine(vector, second)
            except BadAddress:
                fault = self._combine(vector, GeneralProtection())
            vector, error_code, address = fault.vector, fault.error_code, fault.address

    @staticmethod
    def _combine(first: int, second: GuestFault) -> GuestFault:
        if becomes_shutdown(first, second.vector):
            raise TripleFault(f"triple fault: {second} while delivering a double fault")
        if becomes_double_fault(first, second.vector):
            return GuestFault(Vector.DF, 0)
        return second

    def interrupt(self, vector: int) -> None:
        """Deliver an external interrupt; a fault on the way is delivered in its place.

        An interrupt is not re-raised by the faulting handler: it is lost as on the processor only when
        the guest's IDT cannot take it.
        """
        try:
            self._deliver(vector, None, False, True)
        except GuestFault as fault:
            self.exception(fault.vector, fault.error_code, fault.address)
        except BadAddress:
            self.exception(Vector.GP, 0)

    def software(self, vector: int) -> None:
        """INT n, INT3 or INTO, RIP being behind it: faults point at the instruction."""
        try:
            self._deliver(vector, None, True, False)
        except (GuestFault, BadAddress) as error:
            self._back_to_software(vector)
            fault = error if isinstance(error, GuestFault) else GeneralProtection()
            self.exception(fault.vector, fault.error_code, fault.address)
        except BaseException:
            self._back_to_software(vector)
            raise

    def _back_to_software(self, vector: int) -> None:
        """Put RIP back to the instruction of a software interrupt that has just been fetched and executed."""
        q = self.q
        length = 2
        if vector in _ONE_BYTE:
            last = q[at.CS + 1] + q[at.RIP] - 1
            length = 1 if self.linear.read(last, 1)[0] == _ONE_BYTE[vector] else 2
        q[at.RIP] -= length

    # -- by mode -----------------------------------------------------------------------------------

    def _deliver(self, vector: int, error_code: int | None, software: bool, external: bool) -> None:
        q = self.q
        if error_code is None and not software and not external and vector in PUSHES_ERROR_CODE:
            error_code = 0
        if q[at.EFER] & EFER_LMA:
            self._long(vector, error_code, software, external)
        elif q[at.CR] & CR0_PE:
            self._protected(vector, error_code, software, external)
        else:
            self._real(vector)

    def _saved_flags(self, vector: int, software: bool, external: bool) -> int:
        flags = self.regs.rflags()
        if not software and not external and vector not in _NO_RESUME:
            flags |= RFLAGS_RF
        return flags

    def _long(self, vector: int, error_code: int | None, software: bool, external: bool) -> None:
        q, regs, linear = self.q, self.regs, self.linear
        ext = 0 if software else SELECTOR_EXT
        if vector * 16 + 15 > q[at.IDTR + 2] & MASK32:
            raise GeneralProtection(vector * 8 | SELECTOR_IDT | ext)
        low, high = linear.read_pair(q[at.IDTR + 1] + vector * 16)
        kind = low >> 40 & 0x1F
        if kind not in (_INTERRUPT_GATE, _TRAP_GATE):
            raise GeneralProtection(vector * 8 | SELECTOR_IDT | ext)
        cpl = self.d[at.HFLAGS] & 3
        if software and low >> 45 & 3 < cpl:
            raise GeneralProtection(vector * 8 | SELECTOR_IDT)
        if not low >> 47 & 1:
            raise GuestFault(Vector.NP, vector * 8 | SELECTOR_IDT | ext)
        selector = low >> 16 & 0xFFFF
        target = low & 0xFFFF | low >> 32 & 0xFFFF_0000 | (high & MASK32) << 32
        segment, new_cpl = self._code_segment(selector, cpl, ext)
        if not segment.attributes & ds.LONG or segment.attributes & ds.BIG:
            raise GeneralProtection(selector & 0xFFFC | ext)
        ist = low >> 32 & 7
        switch = ist != 0 or new_cpl < cpl
        if switch:
            offset = ds.tss64_ist(ist) if ist else ds.tss64_stack(new_cpl)
            if offset + 7 > q[at.TR + 2] & MASK32:
                raise GuestFault(Vector.TS, q[at.TR] & 0xFFFC | ext)
            stack = linear.read_quad(q[at.TR + 1] + offset)
        else:
            stack = q[4]
        flags = self._saved_flags(vector, software, external)
        frame = (q[at.RIP], q[at.CS] & 0xFFFF, flags, q[4], q[at.SS] & 0xFFFF)
        size = 40 if error_code is None else 48
        stack = (stack & ~15) - size & (1 << 64) - 1
        if not is_canonical(stack):
            raise GuestFault(Vector.SS, ext)
        if not is_canonical(target):
            raise GeneralProtection(ext)
        data = _FRAME5.pack(*frame) if error_code is None else _FRAME6.pack(error_code, *frame)
        linear.write(stack, data)
        # nothing below can fail
        q[4] = stack
        q[at.RIP] = target
        if switch:
            regs.load_segment(at.SS, new_cpl, new_cpl << ds.DPL_SHIFT, 0, 0)
        regs.load_segment(at.CS, selector & ~3 | new_cpl, segment.attributes, segment.limit, segment.base)
        self._finish_flags(flags, kind == _INTERRUPT_GATE, new_cpl)

    def _finish_flags(self, flags: int, mask: bool, cpl: int) -> None:
        flags &= ~_CLEARED
        if mask:
            flags &= ~RFLAGS_IF
        self.regs.set_rflags(flags)
        self.d[at.HFLAGS] &= ~at.HF_INHIBIT_IRQ
        self.regs.refresh_hidden_flags(cpl)

    def _code_segment(self, selector: int, cpl: int, ext: int) -> tuple[Segment, int]:
        """The gate's code segment and the CPL its handler runs at, checked (APM vol. 2, 8.7.4)."""
        if ds.is_null(selector):
            raise GeneralProtection(ext)
        place = ds.locate(selector, self.regs.table(at.GDTR), self.regs.segment(at.LDTR), external=ext)
        segment = self._decoded(self.linear.read_quad(place))
        dpl = ds.dpl(segment.attributes)
        if not ds.is_code(segment.attributes) or dpl > cpl:
            raise GeneralProtection(selector & 0xFFFC | ext)
        if not segment.attributes & ds.PRESENT:
            raise GuestFault(Vector.NP, selector & 0xFFFC | ext)
        return segment, cpl if ds.is_conforming(segment.attributes) else dpl

    def _decoded(self, descriptor: int) -> Segment:
        """The segment of a descriptor (its selector left 0); the same few come again and again."""
        segment = self._segments.get(descriptor)
        if segment is None:
            if len(self._segments) >= _MOST_SEGMENTS:
                self._segments.clear()
            segment = self._segments[descriptor] = ds.decode_segment(0, descriptor)
        return segment

    # -- legacy protected mode and virtual-8086 -------------------------------------------------------------

    def _protected(self, vector: int, error_code: int | None, software: bool, external: bool) -> None:
        q, regs, linear = self.q, self.regs, self.linear
        ext = 0 if software else SELECTOR_EXT
        blame = vector * 8 | SELECTOR_IDT
        if vector * 8 + 7 > q[at.IDTR + 2] & MASK32:
            raise GeneralProtection(blame | ext)
        gate = ds.decode_gate(linear.read_quad(q[at.IDTR + 1] + vector * 8 & MASK32))
        if gate.type == ds.TASK_GATE:
            raise Unsupported(f"a task gate for vector {vector}: task switches are not supported")
        if gate.type not in (ds.INTERRUPT_GATE16, ds.TRAP_GATE16, ds.INTERRUPT_GATE32, ds.TRAP_GATE32):
            raise GeneralProtection(blame | ext)
        v86 = bool(q[at.RFLAGS] & RFLAGS_VM)
        cpl = 3 if v86 else regs.cpl
        if software and gate.dpl < cpl:
            raise GeneralProtection(blame)
        if not gate.present:
            raise GuestFault(Vector.NP, blame | ext)
        segment, new_cpl = self._code_segment(gate.selector, cpl, ext)
        if v86 and new_cpl:
            raise GeneralProtection(gate.selector & 0xFFFC | ext)
        if gate.offset > segment.limit:
            raise GeneralProtection(ext)
        flags = self._saved_flags(vector, software, external)
        width = 4 if gate.type & 8 else 2
        values = [] if error_code is None else [error_code]
        values += [q[at.RIP], q[at.CS] & 0xFFFF, flags]
        if new_cpl < cpl:
            stack_segment, stack = self._inner_stack(new_cpl, ext)
            values += [q[4], q[at.SS] & 0xFFFF]
            if v86:
                values += [q[index] & 0xFFFF for index in (at.ES, at.DS, at.FS, at.GS)]
        else:
            stack_segment, stack = regs.segment(at.SS), q[4]
        mask = MASK32 if stack_segment.attributes & ds.BIG else 0xFFFF
        cut = (1 << 8 * width) - 1
        frame = b"".join((value & cut).to_bytes(width, "little") for value in values)
        stack = stack - len(frame) & mask
        self._check_stack(stack_segment, stack, len(frame), ext)
        linear.write(stack_segment.base + stack & MASK32, frame)
        # nothing below can fail
        q[4] = q[4] & ~mask & MASK32 | stack if new_cpl == cpl else stack
        if new_cpl < cpl:
            regs.load_segment(at.SS, stack_segment.selector, stack_segment.attributes, stack_segment.limit,
                              stack_segment.base)
            if v86:
                for index in (at.ES, at.DS, at.FS, at.GS):
                    regs.load_segment(index, 0, 0, 0, 0)
        regs.load_segment(at.CS, gate.selector & ~3 | new_cpl, segment.attributes, segment.limit,
                          segment.base)
        q[at.RIP] = gate.offset
        self._finish_flags(flags, not gate.type & 1, new_cpl)

    @staticmethod
    def _check_stack(segment: Segment, low: int, size: int, ext: int) -> None:
        high = low + size - 1
        if segment.attributes & ds.EXPAND_DOWN:
            top = MASK32 if segment.attributes & ds.BIG else 0xFFFF
            good = low > segment.limit and high <= top
        else:
            good = high <= segment.limit
        if not good:
            raise GuestFault(Vector.SS, ext)

    def _inner_stack(self, ring: int, ext: int) -> tuple[Segment, int]:
        """SS and (E)SP of an inner ring from the TSS, checked (APM vol. 2, 8.7.3 and 12.2)."""
        regs = self.regs
        task = regs.segment(at.TR)
        wide = task.attributes & ds.TYPE & 8
        offset, size = (ds.tss32_stack(ring), 8) if wide else (ds.tss16_stack(ring), 4)
        if offset + size - 1 > task.limit:
            raise GuestFault(Vector.TS, task.selector & 0xFFFC | ext)
        data = self.linear.read(task.base + offset & MASK32, size)
        half = size // 2
        stack, selector = int.from_bytes(data[:half], "little"), int.from_bytes(data[half:half + 2], "little")
        if ds.is_null(selector):
            raise GuestFault(Vector.TS, ext)
        blame = selector & 0xFFFC | ext
        place = ds.locate(selector, regs.table(at.GDTR), regs.segment(at.LDTR), Vector.TS, external=ext)
        segment = ds.decode_segment(selector, self.linear.read_quad(place & MASK32))
        if selector & 3 != ring or ds.dpl(segment.attributes) != ring or not ds.is_writable_data(
                segment.attributes):
            raise GuestFault(Vector.TS, blame)
        if not segment.attributes & ds.PRESENT:
            raise GuestFault(Vector.SS, blame)
        return segment, stack

    def _real(self, vector: int) -> None:
        """Through the interrupt vector table: IP, CS and FLAGS are pushed, 16 bits each."""
        q, regs = self.q, self.regs
        if vector * 4 + 3 > q[at.IDTR + 2] & MASK32:
            raise GeneralProtection(vector * 8 | SELECTOR_IDT)
        memory = self.linear.general()
        entry = int.from_bytes(memory.read(q[at.IDTR + 1] + vector * 4, 4), "little")
        flags = regs.rflags()
        stack = q[4] - 6 & 0xFFFF
        frame = struct.pack("<3H", q[at.RIP] & 0xFFFF, q[at.CS] & 0xFFFF, flags & 0xFFFF)
        memory.write(q[at.SS + 1] + stack, frame)
        q[4] = q[4] & ~0xFFFF | stack
        selector = entry >> 16
        old = regs.segment(at.CS)
        regs.load_segment(at.CS, selector, old.attributes, old.limit, selector << 4)
        q[at.RIP] = entry & 0xFFFF
        self._finish_flags(flags, True, 0)
