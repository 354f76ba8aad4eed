/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the programs that time themselves use: the time-stamp counter, and 64-bit numbers as text.
 */
#ifndef CYCLES_H
#define CYCLES_H

#include <stdint.h>

static inline uint64_t cycles_now(void)
{
    uint64_t now;

    asm volatile("rdtsc" : "=A"(now)::"memory");
    return now;
}

/* `number` in decimal, written to the end of `text`; the answer points at its first digit. */
static inline char *decimal(uint64_t number, char text[21])
{
    char *at = text + 20;

    *at = '\0';
    do {
        /* in two steps, because a quotient of 64 bits would need the compiler's library */
        uint32_t high = number >> 32, low = number, rest = high % 10;

        asm("divl %4" : "=a"(low), "=d"(rest) : "a"(low), "d"(rest), "r"(10));
        number = (uint64_t)(high / 10) << 32 | low;
        *--at = '0' + rest;
    } while (number);
    return at;
}

#endif
