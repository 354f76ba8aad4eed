/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The IDT, the 8259 pair and the interval timer.
 */
#include "trap.h"

#define STUB_BYTES 16
#define GATE_INTERRUPT 0x8E00 /* present, ring 0, 32-bit interrupt gate */
#define GATE_RING3 0x6000

#define PIC1 0x20
#define PIC2 0xA0
#define CASCADE 0x04
#define END_OF_INTERRUPT 0x20

extern const char trap_stubs[], system_call_stub[];

static struct {
    uint32_t low, high;
} idt[256];

static void gate(uint32_t vector, const char *stub, uint32_t rights)
{
    idt[vector].low = KERNEL_CS << 16 | ((uint32_t)stub & 0xFFFF);
    idt[vector].high = ((uint32_t)stub & 0xFFFF0000) | rights;
}

void traps_open(uint16_t lines)
{
    struct {
        uint16_t limit;
        uint32_t base;
    } __attribute__((packed)) pointer = {sizeof idt - 1, (uint32_t)idt};

    for (uint32_t vector = 0; vector < VECTOR_IRQ0 + 16; vector++)
        gate(vector, trap_stubs + vector * STUB_BYTES, GATE_INTERRUPT);
    gate(VECTOR_SYSCALL, system_call_stub, GATE_INTERRUPT | GATE_RING3);
    asm volatile("lidt %0" ::"m"(pointer));

    outb(PIC1, 0x11); /* ICW1: cascade, edge, ICW4 follows */
    outb(PIC2, 0x11);
    outb(PIC1 + 1, VECTOR_IRQ0);
    outb(PIC2 + 1, VECTOR_IRQ0 + 8);
    outb(PIC1 + 1, CASCADE);
    outb(PIC2 + 1, 2);
    outb(PIC1 + 1, 0x01); /* ICW4: 8086 */
    outb(PIC2 + 1, 0x01);
    outb(PIC1 + 1, ~(lines | CASCADE));
    outb(PIC2 + 1, ~(lines >> 8));
}

void interrupt_done(uint32_t vector)
{
    if (vector >= VECTOR_IRQ0 + 8)
        outb(PIC2, END_OF_INTERRUPT);
    outb(PIC1, END_OF_INTERRUPT);
}

static void timer(uint8_t mode, uint16_t ticks)
{
    outb(0x43, 0x30 | mode << 1); /* channel 0, low then high byte */
    outb(0x40, ticks);
    outb(0x40, ticks >> 8);
}

void timer_once(uint16_t ticks) { timer(0, ticks); }

void timer_every(uint16_t ticks) { timer(2, ticks); }

_Noreturn void unexpected(const struct frame *frame)
{
    print("unexpected exception %u, error code %x, at %x\n", frame->vector, frame->error, frame->eip);
    leave(0x7F);
}
