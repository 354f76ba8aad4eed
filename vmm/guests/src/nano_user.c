/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * nano: what runs in ring 3, in the section that paging lets ring 3 read.
 */
#include "nano.h"

#define IN_USER __attribute__((section(".user"), noinline))

static inline __attribute__((always_inline)) uint32_t call(uint32_t number, uint32_t argument)
{
    asm volatile("int %1" : "+a"(number) : "i"(VECTOR_SYSCALL), "b"(argument) : "memory");
    return number;
}

IN_USER __attribute__((regparm(1))) void user_syscall(uint32_t count)
{
    while (count)
        call(CALL_NOTHING, 0), count--;
    call(CALL_END, count);
}

/* The paper's program.  Parent and child write to a page that was one before the fork: had the two the same
 * memory, the parent would count too many. */
IN_USER __attribute__((regparm(1))) void user_forkwait(uint32_t count)
{
    volatile uint32_t *forked = (volatile uint32_t *)USER_START;

    for (uint32_t i = 0; i < count; i++) {
        int is_parent = call(CALL_FORK, 0);

        ++*forked;
        if (!is_parent)
            call(CALL_EXIT, 0);
        call(CALL_WAIT, 0);
    }
    call(CALL_END, *forked);
}
