/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Interrupts and exceptions: every one ends in the kernel's own `trap`.
 */
#ifndef TRAP_H
#define TRAP_H

#include "guest.h"

/* What the stubs of trap.S leave on the stack; `user_esp` and `user_ss` exist only if `cs` is of ring 3. */
struct frame {
    uint32_t edi, esi, ebp, esp_ignored, ebx, edx, ecx, eax;
    uint32_t vector, error;
    uint32_t eip, cs, eflags, user_esp, user_ss;
};

#define EXCEPTION_GENERAL_PROTECTION 13
#define EXCEPTION_PAGE_FAULT 14

/* Each kernel's own.  The return is to `frame`, which may have been changed. */
void trap(struct frame *frame);

/* Go to where `frame` says, leaving the present stack for good. */
_Noreturn void resume_task(const struct frame *frame);

/* Load the IDT and move the 8259 pair to VECTOR_IRQ0, every line masked but `lines`. */
void traps_open(uint16_t lines);

/* Tell the 8259 pair that the interrupt at `vector` is served. */
void interrupt_done(uint32_t vector);

/* PIT channel 0: one interrupt after `ticks` of 1193182 Hz, or one every `ticks`. */
void timer_once(uint16_t ticks);
void timer_every(uint16_t ticks);
#define TIMER_HZ 1193182u

/* An exception nobody expected: say so and leave with status 0x7f. */
_Noreturn void unexpected(const struct frame *frame);

#endif
