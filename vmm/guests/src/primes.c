/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * primes: a processor-bound guest.  Counts the primes below `limit=N` (default 20000) by trial division
 * and leaves with status 0; with `loop` it counts again and again, a line per round.
 */
#include "guest.h"

/* The example program of the paper on virtual machine monitors, section 3.1, unchanged. */
static int isPrime(int a)
{
    for (int i = 2; i < a; i++) {
        if (a % i == 0)
            return 0;
    }
    return 1;
}

static uint32_t count_below(int limit, int show)
{
    uint32_t count = 0;

    for (int a = 2; a < limit; a++) {
        if (!isPrime(a))
            continue;
        if (++count % 1000 == 0 && show)
            print("primes: number %u is %u\n", count, a);
    }
    return count;
}

int main(const struct multiboot_info *info)
{
    uint32_t limit = option_number(info, "limit", 20000);

    console_open();
    print("primes: below %u\n", limit);
    if (option_set(info, "loop"))
        for (uint32_t round = 1;; round++)
            print("primes: round %u: %u below %u\n", round, count_below(limit, 0), limit);
    print("primes: %u below %u\n", count_below(limit, 1), limit);
    return 0;
}
