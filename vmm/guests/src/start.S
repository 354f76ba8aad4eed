/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Entry.  The boot loader's GDT may vanish at any time (specification, 3.2), so
 * ours is loaded first; then main(info) runs on our stack with interrupts off.
 */
#include "layout.h"

    .text
    .globl _start
_start:
    cld
    lgdt    gdt_pointer
    ljmp    $KERNEL_CS, $1f
1:  movl    $KERNEL_DS, %ecx
    movl    %ecx, %ds
    movl    %ecx, %es
    movl    %ecx, %fs
    movl    %ecx, %gs
    movl    %ecx, %ss
    movl    $stack_top, %esp
    xorl    %ebp, %ebp
    pushl   %ebx
    cmpl    $MULTIBOOT_LOADED, %eax
    jne     2f
    call    main
    pushl   %eax
    call    leave
2:  cli
    hlt
    jmp     2b

    .data
    .align 8
    .globl gdt
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    /* KERNEL_CS */
    .quad 0x00cf93000000ffff    /* KERNEL_DS */
    .quad 0x00cffb000000ffff    /* USER_CS */
    .quad 0x00cff3000000ffff    /* USER_DS */
    .quad 0                     /* TASK_STATE, written by those who enter ring 3 */
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt

    .bss
    .align 16
    .skip STACK_BYTES
    .globl stack_top
stack_top:
