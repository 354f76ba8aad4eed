/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * Constants that assembly and C share.
 */
#ifndef LAYOUT_H
#define LAYOUT_H

#define MULTIBOOT_MAGIC 0x1BADB002
#define MULTIBOOT_FLAGS 0x3 /* modules page-aligned, memory sizes wanted */
#define MULTIBOOT_LOADED 0x2BADB002

#define KERNEL_CS 0x08
#define KERNEL_DS 0x10
#define USER_CS 0x1B
#define USER_DS 0x23
#define TASK_STATE 0x28

#define STACK_BYTES 8192

#define VECTOR_IRQ0 0x20 /* where the 8259 pair is moved to */
#define VECTOR_SYSCALL 0x80

#endif
