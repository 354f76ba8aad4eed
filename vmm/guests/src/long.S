/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * long: enters by Multiboot like all kernels here, builds page tables and switches itself to 64-bit mode.
 * There it prints its command line and the sum of its module's bytes, and takes a breakpoint through its IDT.
 */
#include "layout.h"

#define COM1 0x3F8
#define LINE_STATUS (COM1 + 5)
#define TRANSMITTER_EMPTY 0x20
#define PORT_EXIT 0xF4

/* Multiboot information (specification, 3.3): flags, and offsets */
#define INFO_CMDLINE (1 << 2)
#define INFO_MODULES (1 << 3)
#define CMDLINE 16
#define MODULE_COUNT 20
#define MODULES 24

#define PRESENT_WRITABLE 0x03
#define LARGE_PAGE 0x83
#define CR0_PG 0x80000000
#define CR4_PAE 0x20
#define MSR_EFER 0xC0000080
#define EFER_LME 0x100
#define LONG_CS 0x08
#define LONG_DS 0x10
#define BREAKPOINT 3
#define LONG_INTERRUPT_GATE 0x8E00

    .text
    .globl _start
_start:
    cld
    movl    $stack_top, %esp
    movl    %ebx, %ebp

    /* the first GiB, one to one, in pages of 2 MiB */
    movl    $pointers + PRESENT_WRITABLE, root
    movl    $directory + PRESENT_WRITABLE, pointers
    movl    $directory, %edi
    movl    $LARGE_PAGE, %eax
1:  movl    %eax, (%edi)
    addl    $8, %edi
    addl    $0x200000, %eax
    cmpl    $0x40000000, %eax
    jb      1b

    movl    %cr4, %eax
    orl     $CR4_PAE, %eax
    movl    %eax, %cr4
    movl    $root, %eax
    movl    %eax, %cr3
    movl    $MSR_EFER, %ecx
    rdmsr
    orl     $EFER_LME, %eax
    wrmsr
    movl    %cr0, %eax
    orl     $CR0_PG, %eax
    movl    %eax, %cr0
    lgdt    gdt_pointer
    ljmp    $LONG_CS, $in_long_mode

    .code64
in_long_mode:
    movl    $LONG_DS, %eax
    movl    %eax, %ds
    movl    %eax, %es
    movl    %eax, %ss
    movl    $in_64_bits, %esi
    call    print

    testl   $INFO_CMDLINE, (%rbp)
    jz      1f
    movl    $its_command_line, %esi
    call    print
    movl    CMDLINE(%rbp), %esi
    call    print
    call    end_line

1:  testl   $INFO_MODULES, (%rbp)
    jz      3f
    cmpl    $0, MODULE_COUNT(%rbp)
    je      3f
    movl    MODULES(%rbp), %ebx
    movl    (%rbx), %esi
    movl    4(%rbx), %ecx
    /* the sum in the upper half of a register: there are 64 bits */
    xorl    %r12d, %r12d
2:  lodsb
    movzbl  %al, %eax
    shlq    $32, %rax
    addq    %rax, %r12
    cmpq    %rcx, %rsi
    jb      2b
    movl    $its_module, %esi
    call    print
    call    print_number

    /* a breakpoint, whose handler prints r12 too */
3:  movl    $handler, %eax
    movl    $idt + 16 * BREAKPOINT, %edi
    movw    %ax, (%rdi)
    movw    $LONG_CS, 2(%rdi)
    movw    $LONG_INTERRUPT_GATE, 4(%rdi)
    shrl    $16, %eax
    movl    %eax, 6(%rdi)
    movl    $idt_pointer, %eax
    lidt    (%rax)
    movq    $0x0123456789abcdef, %r12
    int3
    movl    $behind_breakpoint, %esi
    call    print
    xorl    %eax, %eax
    outb    %al, $PORT_EXIT
4:  cli
    hlt
    jmp     4b

handler:
    movl    $at_breakpoint, %esi
    call    print
    call    print_number
    iretq

/* Print the string at rsi.  Changes rax, rdx, rsi. */
print:
    lodsb
    testb   %al, %al
    jz      1f
    call    put
    jmp     print
1:  ret

/* Print r12 in hexadecimal, and end the line.  Changes rax, rcx, rdx. */
print_number:
    movl    $16, %ecx
1:  rolq    $4, %r12
    movl    %r12d, %eax
    andl    $15, %eax
    cmpl    $10, %eax
    jb      2f
    addl    $'a' - '0' - 10, %eax
2:  addl    $'0', %eax
    call    put
    loop    1b
end_line:
    movb    $'\r', %al
    call    put
    movb    $'\n', %al

/* Send al.  Changes rdx. */
put:
    pushq   %rax
    movl    $LINE_STATUS, %edx
1:  inb     %dx, %al
    testb   $TRANSMITTER_EMPTY, %al
    jz      1b
    popq    %rax
    movl    $COM1, %edx
    outb    %al, %dx
    ret

    .section .rodata, "a"
in_64_bits:         .asciz "long: in 64-bit mode\r\n"
its_command_line:   .asciz "long: command line: "
its_module:         .asciz "long: sum of the module: "
at_breakpoint:      .asciz "long: breakpoint: "
behind_breakpoint:  .asciz "long: done\r\n"

    .data
    .align 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    /* LONG_CS */
    .quad 0x00cf93000000ffff    /* LONG_DS */
gdt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
idt_pointer:
    .word 16 * (BREAKPOINT + 1) - 1
    .long idt, 0

    .bss
    .align 4096
root:       .skip 4096
pointers:   .skip 4096
directory:  .skip 4096
idt:        .skip 16 * (BREAKPOINT + 1)
    .align 16
    .skip STACK_BYTES
stack_top:
