/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * real: a flat image, entered at 0:7C00 like a boot sector.  It takes software and timer interrupts in real
 * mode, then a software interrupt in 16-bit and in 32-bit protected mode, and returns to real mode.
 */
#define COM1 0x3F8
#define LINE_STATUS (COM1 + 5)
#define TRANSMITTER_EMPTY 0x20
#define PORT_EXIT 0xF4

#define PIC 0x20
#define PIC2 0xA0
#define PIT 0x40
#define VECTOR_IRQ0 0x08
#define VECTOR_CALL 0x60
#define TICKS 3
#define DIVISOR 11932           /* 100 Hz */

#define CODE_32 0x08
#define DATA_32 0x10
#define CODE_16 0x18
#define DATA_16 0x20

    .text
    .code16
    .globl _start
_start:
    cli
    cld
    xorw    %ax, %ax
    movw    %ax, %ds
    movw    %ax, %es
    movw    %ax, %ss
    movw    $0x7c00, %sp
    movw    $in_real_mode, %si
    call    print_16

    movw    $call_real, 4 * VECTOR_CALL
    movw    %ax, 4 * VECTOR_CALL + 2
    movw    $tick, 4 * VECTOR_IRQ0
    movw    %ax, 4 * VECTOR_IRQ0 + 2
    int     $VECTOR_CALL

    /* the interrupt controllers as a PC's BIOS leaves them, all masked but the timer */
    movb    $0x11, %al
    outb    %al, $PIC
    outb    %al, $PIC2
    movb    $VECTOR_IRQ0, %al
    outb    %al, $PIC + 1
    movb    $0x70, %al
    outb    %al, $PIC2 + 1
    movb    $0x04, %al
    outb    %al, $PIC + 1
    movb    $0x02, %al
    outb    %al, $PIC2 + 1
    movb    $0x01, %al
    outb    %al, $PIC + 1
    outb    %al, $PIC2 + 1
    movb    $0xff, %al
    outb    %al, $PIC2 + 1
    movb    $0xfe, %al
    outb    %al, $PIC + 1
    movb    $0x34, %al
    outb    %al, $PIT + 3
    movb    $DIVISOR & 0xff, %al
    outb    %al, $PIT
    movb    $DIVISOR >> 8, %al
    outb    %al, $PIT
1:  sti
    hlt
    cli
    cmpb    $TICKS, ticks
    jb      1b
    movb    $0xff, %al
    outb    %al, $PIC + 1
    movw    $after_ticks, %si
    call    print_16
    jmp     protected

    .org    510
    .word   0xaa55

/* A tick must change nothing but the count. */
tick:
    pushw   %ax
    incb    ticks
    movb    $0x20, %al
    outb    %al, $PIC
    popw    %ax
    iretw

call_real:
    movw    $called_in_real_mode, %si
    call    print_16
    iretw

protected:
    lgdtl   gdt_pointer
    lidtl   idt_pointer
    movl    %cr0, %eax
    orb     $1, %al
    movl    %eax, %cr0
    ljmp    $CODE_16, $1f
1:  movw    $DATA_16, %ax
    movw    %ax, %ds
    movw    %ax, %ss
    int     $0
    ljmpl   $CODE_32, $in_32_bits

call_16:
    movw    $called_in_16_bits, %si
    call    print_16
    iretw

back:
    movw    $DATA_16, %ax
    movw    %ax, %ds
    movw    %ax, %ss
    lidtl   real_idt_pointer
    movl    %cr0, %eax
    andb    $0xfe, %al
    movl    %eax, %cr0
    ljmp    $0, $1f
1:  xorw    %ax, %ax
    movw    %ax, %ds
    movw    %ax, %ss
    int     $VECTOR_CALL
    xorw    %ax, %ax
    outb    %al, $PORT_EXIT
2:  cli
    hlt
    jmp     2b

    .code32
in_32_bits:
    movl    $DATA_32, %eax
    movl    %eax, %ds
    movl    %eax, %ss
    movl    $0x7c00, %esp
    int     $1
    ljmp    $CODE_16, $back

call_32:
    movl    $called_in_32_bits, %esi
    call    print_32
    iretl

/* Print the string at (e)si on COM1.  Changes (e)ax, (e)dx, (e)si. */
    .macro  printer name
\name:
1:  movw    $LINE_STATUS, %dx
2:  inb     %dx, %al
    testb   $TRANSMITTER_EMPTY, %al
    jz      2b
    lodsb
    testb   %al, %al
    jz      3f
    movw    $COM1, %dx
    outb    %al, %dx
    jmp     1b
3:  ret
    .endm

    printer print_32
    .code16
    printer print_16

in_real_mode:           .asciz "real: in real mode\r\n"
called_in_real_mode:    .asciz "real: called in real mode\r\n"
after_ticks:            .asciz "real: the timer ticks\r\n"
called_in_16_bits:      .asciz "real: called in 16-bit protected mode\r\n"
called_in_32_bits:      .asciz "real: called in 32-bit protected mode\r\n"
ticks:                  .byte 0

    .align 8
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    /* CODE_32 */
    .quad 0x00cf93000000ffff    /* DATA_32 */
    .quad 0x00009b000000ffff    /* CODE_16 */
    .quad 0x000093000000ffff    /* DATA_16 */
gdt_end:
idt:
    .word call_16, CODE_16, 0x8600, 0   /* 16-bit interrupt gate */
    .word call_32, CODE_32, 0x8e00, 0   /* 32-bit interrupt gate */
idt_end:
gdt_pointer:
    .word gdt_end - gdt - 1
    .long gdt
idt_pointer:
    .word idt_end - idt - 1
    .long idt
real_idt_pointer:
    .word 0x3ff
    .long 0
