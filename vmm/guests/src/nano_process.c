/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * nano: processes, as many as forkwait needs: one, and its child.  The kernel runs with interrupts off on one
 * stack, which is empty, down to what user_run saved, whenever a process runs.
 */
#include "nano.h"

enum state { NONE, RUNNING, WAITING, ENDED };

static struct process {
    enum state state;
    uint32_t *space;
    struct frame frame;
} parent, child, *current;

static void enter(struct process *process)
{
    current = process;
    current->state = RUNNING;
    space_enter(current->space);
}

/* The child is there, and runs when its parent waits for it. */
static void sys_fork(void)
{
    if (current != &parent || child.state != NONE)
        wrong("fork");
    child.space = space_fork(parent.space);
    child.frame = parent.frame;
    child.frame.eax = 0;
    child.state = RUNNING;
    parent.frame.eax = 1;
}

static void sys_exit(void)
{
    if (current != &child || parent.state != WAITING)
        wrong("exit");
    child.state = ENDED;
    space_free(child.space);
    enter(&parent);
    child.state = NONE;
    parent.frame.eax = 1;
}

static void sys_wait(void)
{
    if (current != &parent || child.state != RUNNING)
        wrong("wait");
    parent.state = WAITING;
    enter(&child);
}

static uint32_t fault_address(void)
{
    uint32_t address;

    asm volatile("movl %%cr2, %0" : "=r"(address));
    return address;
}

#define PAGE_FAULT_WRITE 2u

void trap(struct frame *frame)
{
    if (!(frame->cs & 3))
        unexpected(frame);
    if (frame->vector == EXCEPTION_PAGE_FAULT) {
        if (!space_fault(current->space, fault_address(), frame->error & PAGE_FAULT_WRITE))
            unexpected(frame);
        return;
    }
    if (frame->vector != VECTOR_SYSCALL)
        unexpected(frame);
    if (frame->eax == CALL_END)
        user_end(frame->ebx);
    current->frame = *frame;
    if (frame->eax == CALL_FORK)
        sys_fork();
    else if (frame->eax == CALL_EXIT)
        sys_exit();
    else if (frame->eax == CALL_WAIT)
        sys_wait();
    else
        wrong("system call");
    *frame = current->frame;
}

/* Time `program` as the first process. */
static uint64_t timed(user_program *program, uint32_t count, uint32_t *result)
{
    struct frame frame = {
        .eax = count, .eip = (uint32_t)program, .cs = USER_CS, .eflags = 2, .user_esp = USER_END, .user_ss = USER_DS,
    };
    uint32_t *before;

    asm volatile("movl %%cr3, %0" : "=r"(before));
    parent.space = space_new();
    enter(&parent);
    uint64_t began = cycles_now();
    *result = user_run(&frame);
    uint64_t cycles = cycles_now() - began;
    space_free(parent.space);
    space_enter(before);
    return cycles;
}

uint64_t nano_syscall(uint32_t count)
{
    uint32_t left;
    uint64_t cycles = timed(user_syscall, count, &left);

    if (left)
        wrong("syscall");
    return cycles;
}

uint64_t nano_forkwait(uint32_t count)
{
    uint32_t forked;
    uint64_t cycles = timed(user_forkwait, count, &forked);

    if (forked != count)
        wrong("forkwait");
    return cycles;
}
