/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * mix: what runs in ring 3.  All of it is in the section that paging lets ring 3 read; no constants or
 * variables elsewhere.  Its results depend on its parameters only, never on when it was interrupted.
 */
#include "mix.h"

#define IN_USER __attribute__((section(".user"), noinline))

#define PAGES 16u
#define DATA ((uint32_t *)USER_START)

static inline __attribute__((always_inline)) uint32_t call(uint32_t number, uint32_t a, uint32_t b)
{
    asm volatile("int %1" : "+a"(number) : "i"(VECTOR_SYSCALL), "b"(a), "c"(b) : "memory");
    return number;
}

static inline __attribute__((always_inline)) uint32_t fold(uint32_t sum, uint32_t value)
{
    return (sum ^ value) * 16777619u;
}

/* Write a word of every page, then read words of every page, with arithmetic in between. */
IN_USER static uint32_t work(uint32_t seed)
{
    uint32_t sum = 2166136261u, x = seed * 2654435761u + 1;

    for (uint32_t page = 0; page < PAGES; page++) {
        for (uint32_t i = 0; i < 500; i++)
            x = x * 1664525u + 1013904223u + x / (i + 3);
        DATA[page * (PAGE / 4) + (x >> 8) % (PAGE / 4)] ^= x;
    }
    for (uint32_t i = 0; i < PAGES * PAGE / 4; i += 7)
        sum = fold(sum, DATA[i]);
    return sum;
}

/* A task that breaks a rule: privileged instruction, write to code, kernel memory, division, bad opcode. */
IN_USER static void misbehave(uint32_t rule)
{
    if (rule == 0)
        asm volatile("cli");
    else if (rule == 1)
        asm volatile("movl $0, (%0)" ::"r"(user_main) : "memory");
    else if (rule == 2)
        asm volatile("movl (%0), %%eax" ::"r"(0x100000) : "eax");
    else if (rule == 3)
        asm volatile("xorl %%edx, %%edx; divl %%edx" ::: "eax", "edx");
    else
        asm volatile("ud2");
}
#define RULES 5u

IN_USER static uint32_t wait_for_one(void)
{
    uint32_t status = 0;

    call(SYS_WAIT, (uint32_t)&status, 0);
    return status;
}

/* A child, and of every second one a grandchild; both on memory that was their parent's. */
IN_USER static uint32_t descend(uint32_t number)
{
    uint32_t sum = work(number);

    if (number % 4 == 3)
        call(SYS_SLEEP, 2, 0);
    if (number % 2) {
        if (call(SYS_FORK, 0, 0) == 0)
            call(SYS_EXIT, work(number + 1000), 0);
        sum = fold(sum, work(number + 2000));
        sum = fold(sum, wait_for_one());
    }
    return sum;
}

IN_USER __attribute__((regparm(2))) void user_main(uint32_t tasks, uint32_t rounds)
{
    uint32_t total = 0;

    for (uint32_t round = 1; round <= rounds || rounds == 0; round++) {
        total = fold(total, work(round));
        for (uint32_t child = 0; child < tasks + RULES; child++) {
            if (call(SYS_FORK, 0, 0) != 0)
                continue;
            if (child >= tasks)
                misbehave(child - tasks);
            call(SYS_EXIT, descend(child), 0);
        }
        work(~round);
        /* Children end in any order, so their statuses are added, which does not care. */
        uint32_t statuses = 0;
        for (uint32_t child = 0; child < tasks + RULES; child++)
            statuses += wait_for_one();
        total = fold(total, statuses);
        call(SYS_REPORT, round, total);
    }
    call(SYS_EXIT, total, 0);
    for (;;)
        ;
}
