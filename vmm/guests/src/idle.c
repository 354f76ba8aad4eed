/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * idle: a guest that sleeps.  Halts until the one-shot timer has counted `ms=N` milliseconds (default
 * 1000), prints a tick, and starts over; leaves with status 0 after `ticks=N` if that is given.
 */
#include "trap.h"

/* The counter has 16 bits, 54 ms; a tick is slept in naps of at most this. */
#define NAP_MS 50

static volatile uint32_t wakeups;

void trap(struct frame *frame)
{
    if (frame->vector != VECTOR_IRQ0)
        unexpected(frame);
    wakeups++;
    interrupt_done(frame->vector);
}

static void nap(uint32_t ms)
{
    uint32_t before = wakeups;

    timer_once(ms * (TIMER_HZ / 1000));
    while (wakeups == before)
        /* STI delays interrupts by one instruction, so none is lost between the test and the halt. */
        asm volatile("sti; hlt; cli" ::: "memory");
}

int main(const struct multiboot_info *info)
{
    uint32_t ticks = option_number(info, "ticks", 0);
    uint32_t ms = option_number(info, "ms", 1000);

    if (ms == 0)
        ms = 1;
    console_open();
    traps_open(1 << 0);
    print("idle: a tick every %u ms\n", ms);
    for (uint32_t tick = 1;; tick++) {
        for (uint32_t left = ms; left; left -= left < NAP_MS ? left : NAP_MS)
            nap(left < NAP_MS ? left : NAP_MS);
        print("idle: tick %u\n", tick);
        if (tick == ticks)
            return 0;
    }
}
