/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * mix: the kernel's memory, tasks and system calls.
 */
#ifndef MIX_H
#define MIX_H

#include "trap.h"

#define PAGE 4096u

/* Kernel: identity-mapped, the first 4 MiB by pages, the rest by large pages.  Frames come from here. */
#define KERNEL_END 0x1000000u
/* User: one page table's worth, filled on demand.  Code is in the kernel's image, readable by ring 3. */
#define USER_START 0x40000000u
#define USER_END 0x40400000u

enum { SYS_EXIT, SYS_FORK, SYS_WAIT, SYS_SLEEP, SYS_REPORT, SYS_COUNT };

/* The status of a task that an exception killed. */
#define KILLED 0xDEAD0000u

/* What happened, for the report. */
struct counters {
    uint32_t calls, forks, switches, ticks, demand_faults, write_copies, killed;
};
extern struct counters counters;

/* Paging.  A page directory is known by its physical address, which is also where the kernel sees it. */
void paging_open(uint32_t memory_end);
uint32_t *space_new(void);
uint32_t *space_fork(uint32_t *space);
void space_enter(uint32_t *space);
void space_free(uint32_t *space);
/* Make the page at `address` present, and private if `write`; 0 if the task may not touch it so. */
int space_fault(uint32_t *space, uint32_t address, int write);

/* Ring 3: the whole program.  `tasks` children per round; the parameters are in EAX and EDX. */
_Noreturn void __attribute__((regparm(2))) user_main(uint32_t tasks, uint32_t rounds);

#endif
