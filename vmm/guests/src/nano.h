/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * nano: what its files share.
 */
#ifndef NANO_H
#define NANO_H

#include "cycles.h"
#include "mix.h"

/* One page table's worth of the kernel's own, whose entries pgfault and ptemod change. */
#define WINDOW 0x80000000u
#define WINDOW_PAGES 1024u
#define MAPPED 0x003u /* present, writable */

/* The calls of nano's processes; NOTHING returns from the gate itself. */
enum { CALL_NOTHING, CALL_FORK, CALL_EXIT, CALL_WAIT, CALL_END };

/* A benchmark does its operation `count` times and answers with the cycles that took. */
typedef uint64_t benchmark(uint32_t count);
benchmark nano_syscall, nano_forkwait;

/* nano.S: the handlers that do the least a handler can. */
extern const char call_gate[], skip_division[], map_page[];
extern uint32_t window[WINDOW_PAGES], window_entry;
void nothing(void);

/* Run `frame` in ring 3 until `user_end(result)`; that is the answer. */
uint32_t user_run(const struct frame *frame);
_Noreturn void user_end(uint32_t result);

/* The part of the 32-bit task state segment that interrupts from ring 3 use. */
struct task_state {
    uint32_t link, esp0, ss0, rest[23];
};
extern struct task_state task_state;

/* What is wrong with a benchmark's result: say so and leave with status 1. */
_Noreturn void wrong(const char *name);

/* nano_user.c: the programs of ring 3; the parameter is in EAX. */
typedef void __attribute__((regparm(1))) user_program(uint32_t count);
user_program user_syscall, user_forkwait;

#endif
