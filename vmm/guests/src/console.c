/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The console on COM1, polled, and the debug exit.
 */
#include <stdarg.h>

#include "guest.h"

#define COM1 0x3F8
#define LINE_STATUS (COM1 + 5)
#define TRANSMITTER_EMPTY 0x20

void console_open(void)
{
    outb(COM1 + 3, 0x80); /* divisor latch: 115200 baud */
    outb(COM1 + 0, 0x01);
    outb(COM1 + 1, 0x00);
    outb(COM1 + 3, 0x03); /* 8N1 */
    outb(COM1 + 1, 0x00); /* no interrupts */
    outb(COM1 + 2, 0x07); /* FIFOs on and empty */
    outb(COM1 + 4, 0x03); /* DTR, RTS */
}

static void put(char c)
{
    while (!(inb(LINE_STATUS) & TRANSMITTER_EMPTY))
        ;
    outb(COM1, c);
}

static void put_char(char c)
{
    if (c == '\n')
        put('\r');
    put(c);
}

static void put_number(uint32_t value, uint32_t base)
{
    char digits[10];
    int n = 0;

    do
        digits[n++] = "0123456789abcdef"[value % base];
    while (value /= base);
    while (n)
        put(digits[--n]);
}

void print(const char *format, ...)
{
    va_list args;

    va_start(args, format);
    for (; *format; format++) {
        if (*format != '%') {
            put_char(*format);
            continue;
        }
        switch (*++format) {
        case 'u':
            put_number(va_arg(args, uint32_t), 10);
            break;
        case 'x':
            put_number(va_arg(args, uint32_t), 16);
            break;
        case 'c':
            put_char(va_arg(args, int));
            break;
        case 's':
            for (const char *s = va_arg(args, const char *); *s; s++)
                put_char(*s);
            break;
        }
    }
    va_end(args);
}

_Noreturn void leave(int status)
{
    outb(PORT_EXIT, status);
    for (;;)
        asm volatile("cli; hlt");
}
