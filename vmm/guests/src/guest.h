/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What every guest kernel can use: ports, the console on COM1, its command line, and the way out.
 */
#ifndef GUEST_H
#define GUEST_H

#include <stddef.h>
#include <stdint.h>

#include "layout.h"

/* Multiboot information (specification, 3.3), as far as the kernels read it. */
struct multiboot_info {
    uint32_t flags, mem_lower, mem_upper, boot_device, cmdline;
};
#define INFO_MEMORY (1u << 0)
#define INFO_CMDLINE (1u << 2)

#define PORT_EXIT 0xF4

static inline void outb(uint16_t port, uint8_t value) { asm volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static inline void outw(uint16_t port, uint16_t value) { asm volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }
static inline void outl(uint16_t port, uint32_t value) { asm volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
static inline uint8_t inb(uint16_t port)
{
    uint8_t value;
    asm volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline uint16_t inw(uint16_t port)
{
    uint16_t value;
    asm volatile("inw %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static inline uint32_t inl(uint16_t port)
{
    uint32_t value;
    asm volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

/* Each kernel's own: the returned value goes to the debug-exit port. */
int main(const struct multiboot_info *info);

/* Write `status` to the debug-exit port; halt for ever where there is none. */
_Noreturn void leave(int status);

/* Console.  `print` knows %u, %x, %s and %c; "\n" goes out as CR LF. */
void console_open(void);
void print(const char *format, ...);

/* Command line.  A word is `name` or `name=value`; only whole names match. */
int option_set(const struct multiboot_info *info, const char *name);
uint32_t option_number(const struct multiboot_info *info, const char *name, uint32_t otherwise);

#endif
