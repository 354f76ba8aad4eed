/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * rogue wild: random values into everything that steers the processor, one after the other.  Most of the time
 * sane values are put back after each; now and then they are not, and then what comes, comes.
 */
#include "rogue.h"

#define CR0_SANE 0x00000031u
#define CR0_PG 0x80000000u
#define CR4_PSE 0x00000010u
#define CR4_PAE 0x00000020u
#define MSR_EFER 0xC0000080u

#define PAGE_USABLE 0x07 /* present, writable, user */
#define PAGE_LARGE 0x80

static uint32_t directory[1024] __attribute__((aligned(4096)));      /* 4 MiB pages, identical */
static uint64_t directory_wide[512] __attribute__((aligned(4096)));  /* 2 MiB pages, the first GiB */
static uint64_t pointers[512] __attribute__((aligned(4096)));        /* for PAE, and the level below `top` */
static uint64_t top[512] __attribute__((aligned(4096)));             /* for long mode */

static uint32_t task[26], task_stack[1024]; /* traps from ring 3 come in here */

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

static uint32_t random_state, survived;
uint32_t recover_eip, recover_esp;
extern uint32_t gdt[];

/* Call `deed`; a trap during it counts as its end. */
void attempt(void (*deed)(void));
asm("attempt:\n\t"
    "pushl %ebx; pushl %esi; pushl %edi; pushl %ebp\n\t"
    "movl %esp, recover_esp\n\t"
    "movl $1f, recover_eip\n\t"
    "call *20(%esp)\n"
    "1:\tmovl recover_esp, %esp\n\t"
    "popl %ebp; popl %edi; popl %esi; popl %ebx\n\t"
    "ret");

static uint32_t random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state;
}

/* A few random bits. */
static uint32_t sparse(void) { return 1u << random() % 32 | 1u << random() % 32 | (random() & 1) << random() % 32; }

/* An address: in a table of ours, of a device, of nothing, or anything. */
static uint32_t place(void)
{
    const uint32_t places[] = {(uint32_t)directory, (uint32_t)directory_wide, (uint32_t)pointers, (uint32_t)top,
                               0xFEE00000u,         0xFEC00000u,              0xF0000000u,        random()};

    return places[random() % COUNT(places)];
}

int wild_recovers(struct frame *frame)
{
    if (!recover_eip)
        return 0;
    survived++;
    frame->eip = recover_eip;
    frame->cs = KERNEL_CS;
    frame->eflags = 2;
    return 1;
}

static void write_efer(uint32_t value) { asm volatile("wrmsr" ::"c"(MSR_EFER), "a"(value), "d"(0)); }

static void set_cr0(void) { asm volatile("movl %0, %%cr0" ::"r"(CR0_SANE ^ sparse())); }
static void set_cr4(void) { asm volatile("movl %0, %%cr4" ::"r"(sparse())); }
static void set_efer(void) { write_efer(sparse()); }
static void page(void)
{
    const uint32_t modes[] = {CR4_PSE, CR4_PAE, CR4_PAE, 0};
    const uint32_t tables[] = {(uint32_t)directory, (uint32_t)pointers, (uint32_t)top, place()};
    uint32_t kind = random() % 64 ? random() % 3 : 3;

    if (kind == 2)
        write_efer(1 << 8 | (random() & 1) << 11);
    asm volatile("movl %0, %%cr4" ::"r"(modes[kind] | (random() & 1 ? 0 : sparse())));
    asm volatile("movl %0, %%cr3" ::"r"(tables[kind] | random() % 32));
    asm volatile("movl %0, %%cr0; jmp 1f; 1:" ::"r"(CR0_SANE | CR0_PG | (random() & 1 ? 0 : sparse())));
}
static void set_debug(void)
{
    asm volatile("movl %0, %%dr0; movl %1, %%dr7" ::"r"(place()), "r"(sparse() | random() % 256));
    asm volatile("movl %0, %%dr6" ::"r"(sparse()));
}
static void set_flags(void) { asm volatile("pushl %0; popfl; nop; nop" ::"r"(sparse() & ~0x200u) : "cc"); }
static void set_segment(void) { asm volatile("movw %w0, %%gs; movb %%gs:0, %%al" ::"r"(random()) : "eax"); }
static void set_stack(void)
{
    asm volatile("movl %%esp, %%ecx; movw %w0, %%ss; movl %1, %%esp; pushl %%eax; movl %%ecx, %%esp" ::"r"(random() % 64), "r"(place() + 64)
                 : "ecx", "memory");
}
static void set_task(void) { asm volatile("ltr %w0" ::"r"(random() % 64)); }
static void set_local(void) { asm volatile("lldt %w0; movw %w1, %%fs" ::"r"(random() % 64), "r"(random() % 256 | 4)); }
static void interrupt(void) { asm volatile("int $0x80; int3; into; bound %0, %1" ::"r"(random()), "m"(random_state)); }
static void leave_cpl0(void)
{
    asm volatile("pushl %0; pushl %1; pushl %2; pushl %3; pushl %4; iret" ::"r"(random() % 64), "r"(place()), "r"(sparse() & ~0x200u),
                 "r"(random() % 64), "r"(random() & 1 ? recover_eip : place()));
}
static void far_jump(void)
{
    struct {
        uint32_t offset;
        uint16_t selector;
    } __attribute__((packed)) target = {random() & 1 ? recover_eip : place(), random() % 64};

    asm volatile("ljmp *%0" ::"m"(target));
}
static void rare(void)
{
    switch (random() % 8) {
    case 0:
        asm volatile("vmrun" ::"a"(place()));
        break;
    case 1:
        asm volatile("vmmcall" ::"a"(random()) : "memory");
        break;
    case 2:
        asm volatile("sysenter");
        break;
    case 3:
        asm volatile("syscall" ::: "ecx");
        break;
    case 4:
        asm volatile("invlpg (%0); wbinvd; clts" ::"r"(place()));
        break;
    case 5:
        asm volatile("lmsw %w0" ::"r"(random()));
        break;
    case 6:
        asm volatile("fninit; fldpi; fistpl (%0); fwait" ::"r"(place()) : "memory");
        break;
    case 7:
        asm volatile("xsetbv; rdpmc; monitor" ::"a"(0), "c"(random() % 4), "d"(0));
        break;
    }
}

static void (*const deeds[])(void) = {set_cr0,   set_cr4,  set_efer,  page,      page,       page,     set_debug, set_flags,
                                      set_stack, set_task, set_local, interrupt, leave_cpl0, far_jump, rare,      set_segment};

static void sane(void)
{
    uint32_t zero = 0;

    asm volatile("movl %0, %%cr0" ::"r"(CR0_SANE));
    asm volatile("movl %0, %%cr4" ::"r"(CR4_PSE));
    asm volatile("movl %0, %%cr3" ::"r"(directory));
    asm volatile("movl %0, %%dr7" ::"r"(zero));
    write_efer(0);
    gdt[TASK_STATE / 4] = (uint32_t)task << 16 | (sizeof task - 1);
    gdt[TASK_STATE / 4 + 1] = 0x8900 | (uint32_t)task >> 16;
    asm volatile("ltr %w0" ::"r"(TASK_STATE));
    asm volatile("movw %w0, %%ss; movw %w0, %%ds; movw %w0, %%es; movw %w0, %%fs; movw %w0, %%gs" ::"r"(KERNEL_DS));
}

_Noreturn void wild(uint32_t seed, uint32_t rounds)
{
    random_state = seed * 2654435761u | 1;
    for (uint32_t i = 0; i < 1024; i++)
        directory[i] = i << 22 | PAGE_LARGE | PAGE_USABLE;
    for (uint32_t i = 0; i < 512; i++)
        directory_wide[i] = (uint64_t)i << 21 | PAGE_LARGE | PAGE_USABLE;
    pointers[0] = (uint32_t)directory_wide | 1; /* more bits are reserved under PAE */
    top[0] = (uint32_t)pointers | PAGE_USABLE;
    task[1] = (uint32_t)(task_stack + COUNT(task_stack));
    task[2] = KERNEL_DS;
    print("rogue: wild, seed %u, %u rounds\n", seed, rounds);
    for (uint32_t round = 0; round < rounds; round++) {
        attempt(deeds[random() % COUNT(deeds)]);
        if (random() % 64)
            sane();
        if (round % 50 == 49)
            print("rogue: round %u\n", round + 1);
    }
    recover_eip = 0;
    print("rogue: %u traps, survived\n", survived);
    leave(0);
}
