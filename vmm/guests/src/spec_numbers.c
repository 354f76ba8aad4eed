/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * spec: arithmetic and calls.  primes divides, fib calls and returns, hash shifts and adds, calls goes through
 * a table of functions.
 */
#include "spec.h"

#define NOINLINE __attribute__((noinline, noclone))

/* The paper's example, section 3.1: every smaller number is tried. */
static NOINLINE int is_prime(int number)
{
    for (int i = 2; i < number; i++)
        if (number % i == 0)
            return 0;
    return 1;
}

uint32_t spec_primes(uint32_t rounds)
{
    uint32_t sum = 0;

    for (uint32_t number = 2; number < rounds; number++)
        if (is_prime(number))
            sum = fold(sum, number);
    return sum;
}

static NOINLINE uint32_t fib(uint32_t n)
{
    return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

uint32_t spec_fib(uint32_t rounds)
{
    uint32_t sum = 0;

    for (uint32_t round = 0; round < rounds; round++)
        sum = fold(sum, fib(20 + round % 3));
    return sum;
}

/* SipHash-like rounds on four words: add, rotate, exclusive or. */
uint32_t spec_hash(uint32_t rounds)
{
    uint32_t a = 1, b = 2, c = 3, d = 4;

    for (uint32_t round = 0; round < rounds; round++) {
        a += b, b = b << 5 | b >> 27, b ^= a, a = a << 16 | a >> 16;
        c += d, d = d << 8 | d >> 24, d ^= c;
        a += d, d = d << 7 | d >> 25, d ^= a;
        c += b, b = b << 13 | b >> 19, b ^= c, c = c << 16 | c >> 16;
        a ^= round;
    }
    return fold(fold(fold(a, b), c), d);
}

typedef uint32_t operation(uint32_t a, uint32_t b);
static NOINLINE uint32_t op_add(uint32_t a, uint32_t b) { return a + b; }
static NOINLINE uint32_t op_subtract(uint32_t a, uint32_t b) { return a - b; }
static NOINLINE uint32_t op_exclusive(uint32_t a, uint32_t b) { return a ^ b; }
static NOINLINE uint32_t op_multiply(uint32_t a, uint32_t b) { return a * (b | 1); }
static NOINLINE uint32_t op_rotate(uint32_t a, uint32_t b) { return (a << 3 | a >> 29) + b; }
static NOINLINE uint32_t op_or(uint32_t a, uint32_t b) { return a + (a | b); }
static NOINLINE uint32_t op_and(uint32_t a, uint32_t b) { return b - (a & b); }
static NOINLINE uint32_t op_not(uint32_t a, uint32_t b) { return ~a + b; }

static operation *const volatile operations[8] = {
    op_add, op_subtract, op_exclusive, op_multiply, op_rotate, op_or, op_and, op_not,
};

uint32_t spec_calls(uint32_t rounds)
{
    uint32_t sum = 1, state = 1;

    for (uint32_t round = 0; round < rounds; round++)
        sum = operations[next_random(&state) >> 29](sum, round);
    return sum;
}
