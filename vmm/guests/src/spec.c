/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * spec: runs what its command line names, as `PROGRAM=ROUNDS`, and says `spec PROGRAM ROUNDS CYCLES CHECKSUM`.
 */
#include "cycles.h"
#include "guest.h"
#include "spec.h"

static const struct {
    const char *name;
    spec_program *run;
} programs[] = {
    {"primes", spec_primes},
    {"fib", spec_fib},
    {"calls", spec_calls},
    {"hash", spec_hash},
    {"sieve", spec_sieve},
    {"copy", spec_copy},
    {"string", spec_string},
    {"compress", spec_compress},
    {"interpret", spec_interpret},
};

static char *append(char *at, const char *text)
{
    while (*text)
        *at++ = *text++;
    return at;
}

static char *append_number(char *at, uint64_t number)
{
    char digits[21];

    return append(append(at, " "), decimal(number, digits));
}

int main(const struct multiboot_info *info)
{
    char line[100];

    for (uint32_t i = 0; i < sizeof programs / sizeof *programs; i++) {
        uint32_t rounds = option_number(info, programs[i].name, 0);

        if (!rounds)
            continue;
        uint64_t began = cycles_now();
        uint32_t checksum = programs[i].run(rounds);
        uint64_t cycles = cycles_now() - began;
        char *at = append(append(line, "spec "), programs[i].name);
        at = append_number(append_number(append_number(at, rounds), cycles), checksum);
        *append(at, "\n") = '\0';
        say(line);
    }
    return 0;
}
