/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * rogue: a guest that does to its machine what no sane one does.  The first word of its command line chooses
 * what; `at=N` is the address that `execute`, `stack`, `idt`, `gdt`, `task` and `tables` are at (default: the
 * local APIC's page), where there is a device or nothing at all.
 */
#include "rogue.h"

#define LOCAL_APIC 0xFEE00000u
#define APIC_EOI 0xB0u
#define APIC_SPURIOUS 0xF0u
#define APIC_TIMER 0x320u
#define APIC_INITIAL_COUNT 0x380u
#define APIC_DIVIDE 0x3E0u
#define VECTOR_APIC_TIMER (VECTOR_IRQ0 + 3)
#define RTC_A 0x0A
#define RTC_B 0x0B
#define RTC_C 0x0C

static uint32_t ticks;

void trap(struct frame *frame)
{
    if (wild_recovers(frame))
        return;
    if (frame->vector < VECTOR_IRQ0)
        unexpected(frame);
    if (frame->vector == VECTOR_APIC_TIMER) {
        *(volatile uint32_t *)(LOCAL_APIC + APIC_EOI) = 0;
    } else {
        outb(0x70, RTC_C); /* reading it re-arms the interrupt */
        inb(0x71);
        interrupt_done(frame->vector);
    }
    if (++ticks % 10000 == 0)
        print("rogue: %u interrupts\n", ticks);
}

/* Nothing wakes it. */
static void deaf(uint32_t at)
{
    (void)at;
    for (;;)
        asm volatile("cli; hlt");
}

/* Nothing interrupts it. */
static void spin(uint32_t at)
{
    (void)at;
    for (;;)
        asm volatile("cli");
}

/* Output without end, and without asking whether there is room. */
static void flood(uint32_t at)
{
    static char line[256];

    (void)at;
    for (uint32_t i = 0; i < sizeof line; i++)
        line[i] = i == sizeof line - 1 ? '\n' : 'a' + i % 26;
    for (;;) {
        const char *from = line;
        uint32_t count = sizeof line;

        asm volatile("rep outsb" : "+S"(from), "+c"(count) : "d"(0x3F8) : "memory");
    }
}

/* Every timer at its shortest period. */
static void timers(uint32_t at)
{
    (void)at;
    traps_open(1 << 0 | 1 << 8);
    timer_every(1);
    outb(0x70, RTC_A);
    outb(0x71, 0x23); /* 8192 Hz */
    outb(0x70, RTC_B);
    outb(0x71, 0x42); /* periodic interrupts */
    *(volatile uint32_t *)(LOCAL_APIC + APIC_SPURIOUS) = 0x1FF;
    *(volatile uint32_t *)(LOCAL_APIC + APIC_DIVIDE) = 0xB; /* by 1 */
    *(volatile uint32_t *)(LOCAL_APIC + APIC_TIMER) = 1 << 17 | VECTOR_APIC_TIMER;
    *(volatile uint32_t *)(LOCAL_APIC + APIC_INITIAL_COUNT) = 1;
    for (;;)
        asm volatile("sti; hlt");
}

static void execute(uint32_t at)
{
    asm volatile("jmp *%0" ::"r"(at));
}

static void stack(uint32_t at)
{
    asm volatile("movl %0, %%esp; pushl $1; popl %%eax; ud2" ::"r"(at + 0x100));
}

struct table {
    uint16_t limit;
    uint32_t base;
} __attribute__((packed));

static void idt(uint32_t at)
{
    struct table table = {0x7FF, at};

    asm volatile("lidt %0; int $0x30" ::"m"(table));
}

static void gdt_(uint32_t at)
{
    struct table table = {0xFF, at};

    asm volatile("lgdt %0; movw %w1, %%fs" ::"m"(table), "r"(KERNEL_DS));
}

/* The processor wants an inner stack from the task state when ring 3 is interrupted. */
static void task(uint32_t at)
{
    extern uint32_t gdt[];

    gdt[TASK_STATE / 4] = at << 16 | 0x67;
    gdt[TASK_STATE / 4 + 1] = (at & 0xFF000000) | 0x8900 | (at >> 16 & 0xFF);
    asm volatile("ltr %w0\n\t"
                 "pushl %1\n\tpushl %%esp\n\tpushl $2\n\tpushl %2\n\tpushl $1f\n\tiret\n"
                 "1:\tint $0x80" ::"r"(TASK_STATE), "i"(USER_DS), "i"(USER_CS));
}

static void tables(uint32_t at)
{
    asm volatile("movl %0, %%cr3; movl %%cr0, %%eax; orl $0x80000000, %%eax; movl %%eax, %%cr0; ud2" ::"r"(at) : "eax");
}

/* Code that rewrites the constant of the instruction right behind the store, ten thousand times. */
static void rewrite(uint32_t at)
{
    uint32_t got = 0, wrong = 0;

    (void)at;
    for (uint32_t value = 0; value < 10000; value++) {
        asm volatile("movl %1, 1f + 1\n"
                     "1:\tmovl $0xFFFFFFFF, %%eax"
                     : "=&a"(got)
                     : "r"(value)
                     : "memory");
        wrong += got != value;
    }
    print("rogue: %u instructions were stale\n", wrong);
    leave(0);
}

static const struct {
    const char *name;
    void (*deed)(uint32_t at);
} deeds[] = {{"deaf", deaf}, {"spin", spin}, {"flood", flood}, {"timers", timers}, {"execute", execute}, {"stack", stack},
             {"idt", idt},   {"gdt", gdt_},  {"task", task},   {"tables", tables}, {"rewrite", rewrite}};

int main(const struct multiboot_info *info)
{
    uint32_t at = option_number(info, "at", LOCAL_APIC);

    console_open();
    traps_open(0);
    if (option_set(info, "wild"))
        wild(option_number(info, "seed", 1), option_number(info, "rounds", 300));
    for (uint32_t i = 0; i < sizeof deeds / sizeof deeds[0]; i++)
        if (option_set(info, deeds[i].name)) {
            print("rogue: %s\n", deeds[i].name);
            deeds[i].deed(at);
        }
    return 1;
}
