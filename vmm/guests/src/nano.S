/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * nano: handlers of a few instructions, so that what is timed is the operation; and the way to ring 3 and back.
 */
#include "layout.h"

    .text
    .globl call_gate            /* call 0 does nothing; the others are for `trap` */
call_gate:
    testl   %eax, %eax
    jnz     system_call_stub
    iret

    .globl skip_division        /* a register form of DIV has two bytes */
skip_division:
    addl    $2, (%esp)
    iret

    .globl map_page             /* make the entry of the page that was touched `window_entry`; those of */
map_page:                       /* ring 3 (bit 2 of the error code) are for `trap` */
    testl   $4, (%esp)
    jnz     trap_stubs + 14 * 16
    pushl   %eax
    pushl   %edx
    movl    %cr2, %eax
    shrl    $12, %eax
    andl    $1023, %eax
    movl    window_entry, %edx
    movl    %edx, window(,%eax,4)
    popl    %edx
    popl    %eax
    addl    $4, %esp            /* the error code */
    iret

    .globl nothing
nothing:
    ret

    .globl user_run             /* traps from ring 3 get the stack below what is saved here */
user_run:
    pushl   %ebp
    pushl   %ebx
    pushl   %esi
    pushl   %edi
    movl    20(%esp), %eax
    movl    %esp, task_state + 4
    pushl   %eax
    call    resume_task

    .globl user_end
user_end:
    movl    4(%esp), %eax
    movl    task_state + 4, %esp
    popl    %edi
    popl    %esi
    popl    %ebx
    popl    %ebp
    ret

    .bss
    .align 4096
    .globl window, window_entry
window:
    .skip 4096
window_entry:
    .skip 4
