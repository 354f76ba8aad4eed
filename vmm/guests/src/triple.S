/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * triple: faults with an empty IDT.  #UD cannot be delivered, nor the #GP of that, nor the double fault.
 */
    .text
    .globl _start
_start:
    lidt    no_idt
    ud2

    .align 4
no_idt:
    .word 0
    .long 0
