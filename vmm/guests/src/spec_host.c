/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * spec as a process of Linux without any library: its first argument is the command line, standard output the
 * console.
 */
#include "guest.h"
#include "spec.h"

enum { SYS_EXIT = 1, SYS_WRITE = 4, STDOUT = 1 };

static uint32_t system_call(uint32_t number, uint32_t a, uint32_t b, uint32_t c)
{
    asm volatile("int $0x80" : "+a"(number) : "b"(a), "c"(b), "d"(c) : "memory");
    return number;
}

void say(const char *line)
{
    uint32_t length = 0;

    while (line[length])
        length++;
    system_call(SYS_WRITE, STDOUT, (uint32_t)line, length);
}

/* The stack as Linux leaves it (System V ABI, i386, figure 3-31): the argument count, then the arguments. */
static __attribute__((used)) _Noreturn void begin(const uint32_t *stack)
{
    struct multiboot_info info = {.flags = stack[0] > 1 ? INFO_CMDLINE : 0, .cmdline = stack[2]};

    system_call(SYS_EXIT, main(&info), 0, 0);
    __builtin_unreachable();
}

asm(".globl _start\n"
    "_start:\n"
    "    movl    %esp, %eax\n"
    "    andl    $-16, %esp\n"
    "    subl    $12, %esp\n"
    "    pushl   %eax\n"
    "    call    begin\n");
