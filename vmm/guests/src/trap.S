/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * One stub for each exception, interrupt line and the system call: all push the same frame, struct frame of trap.h.
 */
#include "layout.h"

/* The exceptions that push an error code (APM vol. 2, table 8-1): 8, 10-14, 17, 21, 29, 30. */
#define HAS_ERROR_CODE 0x60227d00

    .text
    .globl trap_stubs
    .align 16
trap_stubs:
    .set vector, 0
    .rept VECTOR_IRQ0 + 16
    .align 16
    .if vector >= 32
    pushl   $0
    .elseif !((HAS_ERROR_CODE >> vector) & 1)
    pushl   $0
    .endif
    pushl   $vector
    jmp     enter
    .set vector, vector + 1
    .endr

    .globl system_call_stub
system_call_stub:
    pushl   $0
    pushl   $VECTOR_SYSCALL

enter:
    pushal
    movl    $KERNEL_DS, %eax
    movl    %eax, %ds
    movl    %eax, %es
    cld
    pushl   %esp
    call    trap
    addl    $4, %esp
leave_kernel:                   /* %esp points at a struct frame */
    testl   $3, 44(%esp)        /* frame.cs */
    jz      1f
    movl    $USER_DS, %eax
    movl    %eax, %ds
    movl    %eax, %es
1:  popal
    addl    $8, %esp
    iret

    .globl resume_task          /* the argument is the frame, to be used up in place */
resume_task:
    movl    4(%esp), %esp
    jmp     leave_kernel
