/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * spec: processor-bound programs.  The same objects are linked into a kernel and into a process of the host, so
 * they call nothing but each other.
 */
#ifndef SPEC_H
#define SPEC_H

#include <stddef.h>
#include <stdint.h>

/* A program does its work `rounds` times; the checksum depends on `rounds` alone. */
typedef uint32_t spec_program(uint32_t rounds);
spec_program spec_primes, spec_fib, spec_calls, spec_hash, spec_sieve, spec_copy, spec_string, spec_compress,
    spec_interpret;

/* A checksum: what is folded in, and in which order, matters. */
static inline uint32_t fold(uint32_t sum, uint32_t value)
{
    return (sum ^ value) * 16777619u;
}

/* The next of a fixed sequence of pseudo-random numbers; the upper bits are the good ones. */
static inline uint32_t next_random(uint32_t *state)
{
    return *state = *state * 1664525u + 1013904223u;
}

/* Each side's own: show a line. */
void say(const char *line);

#endif
