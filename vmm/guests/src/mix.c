/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * mix: a small operating system at work.  Paging, preempted ring-3 tasks with address spaces of their own,
 * system calls, demand paging, copy-on-write after fork, waiting, and tasks killed for what they try.
 * `rounds=N` (default 4, 0 for ever), `tasks=N` per round (default 8); the checksum depends on these alone.
 *
 * The kernel runs with interrupts off on one stack, which is empty whenever a task runs: a task's
 * registers live in its `frame`.  Only two traps come out of the kernel itself: a page fault on user memory
 * during a system call, and the timer during the wait for something to do.
 */
#include "mix.h"

#define TASKS 64
#define TASKS_PER_ROUND_MAX 32u /* with grandchildren, still less than TASKS */
#define TICK_HZ 500u
#define INT_BYTES 2u /* of the instruction that made the system call */
#define EFLAGS_IF 0x200u
#define PAGE_FAULT_WRITE 2u

enum state { FREE, READY, WAITING, SLEEPING, ENDED };

struct task {
    enum state state;
    uint32_t *space;
    struct task *parent;
    uint32_t status, wake_at;
    struct frame frame;
};

/* The part of the 32-bit task state segment that interrupts from ring 3 use. */
static struct {
    uint32_t link, esp0, ss0, rest[23];
} task_state = {.ss0 = KERNEL_DS, .rest[22] = sizeof task_state << 16};

struct counters counters;
static struct task tasks[TASKS];
static struct task *current;

extern uint64_t gdt[];
extern char stack_top[];

static struct task *task_new(void)
{
    for (struct task *task = tasks; task < tasks + TASKS; task++)
        if (task->state == FREE)
            return task;
    return NULL;
}

/* End the current task; the first task's end is the end of all. */
static void end(uint32_t status)
{
    if (!current->parent) {
        print("mix: %u forks, %u switches, %u system calls, %u ticks\n", counters.forks, counters.switches,
              counters.calls, counters.ticks);
        print("mix: %u demand faults, %u copies on write, %u tasks killed\n", counters.demand_faults,
              counters.write_copies, counters.killed);
        print("mix: checksum %x\n", status);
        leave((status & 0xFFFF0000) == KILLED);
    }
    space_free(current->space);
    current->status = status;
    current->state = ENDED;
    if (current->parent->state == WAITING)
        current->parent->state = READY;
}

static uint32_t sys_fork(void)
{
    struct task *child = task_new();

    if (!child)
        return -1;
    counters.forks++;
    child->space = space_fork(current->space);
    child->parent = current;
    child->frame = current->frame;
    child->frame.eax = 0;
    child->state = READY;
    return child - tasks;
}

/* Store an ended child's status at `where`; if none has ended yet, the call is made again later. */
static uint32_t sys_wait(uint32_t where)
{
    int children = 0;

    if (where < USER_START || where > USER_END - sizeof(uint32_t))
        return -1;
    for (struct task *task = tasks; task < tasks + TASKS; task++) {
        if (task->state == FREE || task->parent != current)
            continue;
        children++;
        if (task->state == ENDED) {
            *(uint32_t *)where = task->status;
            task->state = FREE;
            return task - tasks;
        }
    }
    if (!children)
        return -1;
    current->state = WAITING;
    current->frame.eip -= INT_BYTES;
    return SYS_WAIT;
}

static uint32_t sys_sleep(uint32_t ticks)
{
    current->wake_at = counters.ticks + ticks;
    current->state = SLEEPING;
    return 0;
}

static uint32_t system_call(uint32_t number, uint32_t a, uint32_t b)
{
    counters.calls++;
    switch (number) {
    case SYS_EXIT:
        end(a);
        return 0;
    case SYS_FORK:
        return sys_fork();
    case SYS_WAIT:
        return sys_wait(a);
    case SYS_SLEEP:
        return sys_sleep(a);
    case SYS_REPORT:
        print("mix: round %u, checksum %x\n", a, b);
        return 0;
    default:
        return -1;
    }
}

static void tick(void)
{
    counters.ticks++;
    for (struct task *task = tasks; task < tasks + TASKS; task++)
        if (task->state == SLEEPING && (int32_t)(counters.ticks - task->wake_at) >= 0)
            task->state = READY;
    interrupt_done(VECTOR_IRQ0);
}

/* The next ready task in turn; waits for one in HLT. */
static void schedule(void)
{
    struct task *next = current;

    for (;;) {
        for (int i = 0; i < TASKS; i++) {
            next = next == tasks + TASKS - 1 ? tasks : next + 1;
            if (next->state == READY) {
                counters.switches += next != current;
                current = next;
                space_enter(current->space);
                return;
            }
        }
        asm volatile("sti; hlt; cli" ::: "memory");
    }
}

static uint32_t fault_address(void)
{
    uint32_t address;

    asm volatile("movl %%cr2, %0" : "=r"(address));
    return address;
}

static int served_page_fault(const struct frame *frame)
{
    return frame->vector == EXCEPTION_PAGE_FAULT &&
           space_fault(current->space, fault_address(), frame->error & PAGE_FAULT_WRITE);
}

void trap(struct frame *frame)
{
    if (served_page_fault(frame))
        return;
    if (!(frame->cs & 3)) {
        if (frame->vector != VECTOR_IRQ0)
            unexpected(frame);
        tick();
        return;
    }
    current->frame = *frame;
    if (frame->vector == VECTOR_SYSCALL) {
        uint32_t result = system_call(frame->eax, frame->ebx, frame->ecx);

        current->frame.eax = result;
    } else if (frame->vector == VECTOR_IRQ0) {
        tick();
    } else {
        counters.killed++;
        end(KILLED | frame->vector);
    }
    if (current->state != READY || frame->vector == VECTOR_IRQ0)
        schedule();
    *frame = current->frame;
}

static void task_state_open(void)
{
    uint64_t base = (uint32_t)&task_state;

    task_state.esp0 = (uint32_t)stack_top;
    gdt[TASK_STATE / 8] = (sizeof task_state - 1) | (base & 0xFFFFFF) << 16 | 0x89ull << 40 | (base >> 24) << 56;
    asm volatile("ltr %w0" ::"r"(TASK_STATE));
}

int main(const struct multiboot_info *info)
{
    uint32_t per_round = option_number(info, "tasks", 8);

    current = tasks;
    current->frame.eax = per_round < TASKS_PER_ROUND_MAX ? per_round : TASKS_PER_ROUND_MAX;
    current->frame.edx = option_number(info, "rounds", 4);
    current->frame.eip = (uint32_t)user_main;
    current->frame.cs = USER_CS;
    current->frame.eflags = EFLAGS_IF;
    current->frame.user_esp = USER_END;
    current->frame.user_ss = USER_DS;
    current->state = READY;

    console_open();
    print("mix: %u tasks per round\n", current->frame.eax);
    traps_open(1 << 0);
    task_state_open();
    paging_open((info->mem_upper + 1024) * 1024);
    current->space = space_new();
    space_enter(current->space);
    timer_every(TIMER_HZ / TICK_HZ);
    resume_task(&current->frame);
}
