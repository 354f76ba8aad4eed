/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * nano: single operations that virtualization makes dear, timed with RDTSC; the benchmarks that chapter 5.1.1
 * of the paper names.  Each prints `nano NAME OPERATIONS CYCLES`.  The word `NAME=N` on the command line sets
 * how many operations, 0 for none.  A benchmark whose operations had the wrong effect ends the kernel with
 * status 1.
 *
 * Interrupts are off throughout.  Memory is that of `mix`: the kernel to itself, by pages of 4 KiB, and an
 * address space for every process.
 */
#include "nano.h"

#define GATE_INTERRUPT 0x8E00 /* present, ring 0, 32-bit interrupt gate */
#define GATE_RING3 0x6000
#define EXCEPTION_DIVISION 0
#define PORT_POST 0x80

extern uint64_t gdt[];

struct counters counters;
struct task_state task_state = {.ss0 = KERNEL_DS, .rest[22] = sizeof task_state << 16};
static uint32_t pages[2][1024] __attribute__((aligned(4096)));

_Noreturn void wrong(const char *name)
{
    print("nano: %s went wrong\n", name);
    leave(1);
}

/* Replace an entry of the IDT that traps_open made. */
static void gate(uint32_t vector, const char *handler, uint32_t rights)
{
    struct {
        uint16_t limit;
        uint32_t base;
    } __attribute__((packed)) pointer;

    asm volatile("sidt %0" : "=m"(pointer));
    uint32_t *entry = (uint32_t *)pointer.base + 2 * vector;
    entry[0] = KERNEL_CS << 16 | ((uint32_t)handler & 0xFFFF);
    entry[1] = ((uint32_t)handler & 0xFFFF0000) | rights;
}

static uint64_t nano_in(uint32_t count)
{
    uint64_t began = cycles_now();

    while (count--)
        inb(PORT_POST);
    return cycles_now() - began;
}

static uint64_t nano_cr3wr(uint32_t count)
{
    uint32_t space;

    asm volatile("movl %%cr3, %0" : "=r"(space));
    uint64_t began = cycles_now();
    while (count--)
        space_enter((uint32_t *)space);
    return cycles_now() - began;
}

static uint64_t nano_callret(uint32_t count)
{
    uint64_t began = cycles_now();

    while (count--)
        nothing();
    return cycles_now() - began;
}

/* The handler goes on behind the DIV, so that only a DIV that faults leaves EAX as it was. */
static uint64_t nano_divzero(uint32_t count)
{
    uint32_t number = 7, high = 0, zero = 0;
    uint64_t began = cycles_now();

    while (count--)
        asm volatile("divl %2" : "+a"(number), "+d"(high) : "r"(zero));
    uint64_t cycles = cycles_now() - began;
    if (number != 7)
        wrong("divzero");
    return cycles;
}

/* Pages are touched in turn; when all are mapped, they are unmapped again, which is not timed. */
static uint64_t nano_pgfault(uint32_t count)
{
    const volatile uint32_t *touched = (const uint32_t *)WINDOW;
    uint64_t cycles = 0;
    uint32_t sum = 0;

    pages[0][0] = 3;
    window_entry = (uint32_t)pages[0] | MAPPED;
    for (uint32_t left = count; left;) {
        uint32_t batch = left < WINDOW_PAGES ? left : WINDOW_PAGES;
        uint64_t began = cycles_now();

        for (uint32_t page = 0; page < batch; page++)
            sum += touched[page * (PAGE / 4)];
        cycles += cycles_now() - began;
        for (uint32_t page = 0; page < batch; page++) {
            if (window[page] == 0)
                wrong("pgfault");
            window[page] = 0;
            asm volatile("invlpg (%0)" ::"r"(WINDOW + page * PAGE) : "memory");
        }
        left -= batch;
    }
    if (sum != 3 * count)
        wrong("pgfault");
    return cycles;
}

/* A page that is in use becomes another one, and back. */
static uint64_t nano_ptemod(uint32_t count)
{
    const volatile uint32_t *seen = (const uint32_t *)WINDOW;

    pages[0][0] = 0;
    pages[1][0] = 1;
    window[0] = (uint32_t)pages[0] | MAPPED;
    if (*seen != 0)
        wrong("ptemod");
    uint64_t began = cycles_now();
    for (uint32_t i = 1; i <= count; i++) {
        *(volatile uint32_t *)window = (uint32_t)pages[i & 1] | MAPPED;
        asm volatile("invlpg (%0)" ::"r"(WINDOW) : "memory");
    }
    uint64_t cycles = cycles_now() - began;
    if (*seen != (count & 1))
        wrong("ptemod");
    window[0] = 0;
    asm volatile("invlpg (%0)" ::"r"(WINDOW) : "memory");
    return cycles;
}

static const struct {
    const char *name;
    benchmark *run;
    uint32_t count;
} benchmarks[] = {
    {"syscall", nano_syscall, 100000},
    {"in", nano_in, 100000},
    {"cr3wr", nano_cr3wr, 100000},
    {"callret", nano_callret, 10000000},
    {"pgfault", nano_pgfault, 51200},
    {"divzero", nano_divzero, 100000},
    {"ptemod", nano_ptemod, 100000},
    {"forkwait", nano_forkwait, 40000}, /* as many as in the paper */
};

static void task_state_open(void)
{
    uint64_t base = (uint32_t)&task_state;

    gdt[TASK_STATE / 8] = (sizeof task_state - 1) | (base & 0xFFFFFF) << 16 | 0x89ull << 40 | (base >> 24) << 56;
    asm volatile("ltr %w0" ::"r"(TASK_STATE));
}

int main(const struct multiboot_info *info)
{
    uint32_t counts[sizeof benchmarks / sizeof *benchmarks];
    char digits[21];

    /* while the words are there: they may lie in memory that paging_open gives away */
    for (uint32_t i = 0; i < sizeof benchmarks / sizeof *benchmarks; i++)
        counts[i] = option_number(info, benchmarks[i].name, benchmarks[i].count);
    console_open();
    traps_open(0);
    task_state_open();
    gate(EXCEPTION_DIVISION, skip_division, GATE_INTERRUPT);
    gate(EXCEPTION_PAGE_FAULT, map_page, GATE_INTERRUPT);
    gate(VECTOR_SYSCALL, call_gate, GATE_INTERRUPT | GATE_RING3);
    paging_open((info->mem_upper + 1024) * 1024);
    uint32_t *space = space_new();
    space[WINDOW >> 22] = (uint32_t)window | MAPPED;

    for (uint32_t i = 0; i < sizeof benchmarks / sizeof *benchmarks; i++) {
        space_enter(space);
        if (counts[i])
            print("nano %s %u %s\n", benchmarks[i].name, counts[i], decimal(benchmarks[i].run(counts[i]), digits));
    }
    print("nano: done\n");
    return 0;
}
