/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * nano_host: of nano's operations those that a 32-bit process can do on the host itself.  Where nano has a
 * handler in its kernel, the host's kernel takes part: divzero and pgfault are signals, caught and returned from.
 * Prints `nano NAME OPERATIONS CYCLES` for each of its arguments `NAME=N`.
 */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <ucontext.h>

#include "cycles.h"

#define PAGE 4096u
#define WINDOW_PAGES 1024u
#define DIV_BYTES 2 /* in its register form */

static _Noreturn void wrong(const char *what)
{
    perror(what);
    exit(1);
}

static void handle(int number, void (*handler)(int, siginfo_t *, void *))
{
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO};

    if (sigaction(number, &action, NULL))
        wrong("sigaction");
}

static uint64_t host_syscall(uint32_t count)
{
    uint64_t began = cycles_now();

    while (count--) {
        uint32_t number = SYS_getpid;
        asm volatile("int $0x80" : "+a"(number)::"memory");
    }
    return cycles_now() - began;
}

static void __attribute__((noinline)) nothing(void) { asm volatile(""); }

static uint64_t host_callret(uint32_t count)
{
    uint64_t began = cycles_now();

    while (count--)
        nothing();
    return cycles_now() - began;
}

static void skip_division(int number, siginfo_t *info, void *context)
{
    (void)number, (void)info;
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_EIP] += DIV_BYTES;
}

static uint64_t host_divzero(uint32_t count)
{
    uint32_t number = 7, high = 0, zero = 0;

    handle(SIGFPE, skip_division);
    uint64_t began = cycles_now();
    while (count--)
        asm volatile("divl %2" : "+a"(number), "+d"(high) : "r"(zero));
    return cycles_now() - began;
}

static void map_page(int number, siginfo_t *info, void *context)
{
    (void)number, (void)context;
    if (mprotect((void *)((uintptr_t)info->si_addr & ~(uintptr_t)(PAGE - 1)), PAGE, PROT_READ | PROT_WRITE))
        wrong("mprotect");
}

static uint64_t host_pgfault(uint32_t count)
{
    uint64_t cycles = 0;
    volatile char *window = mmap(NULL, WINDOW_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    if (window == MAP_FAILED)
        wrong("mmap");
    memset((char *)window, 1, WINDOW_PAGES * PAGE); /* what is timed is the protection, not the first touch */
    handle(SIGSEGV, map_page);
    while (count) {
        uint32_t batch = count < WINDOW_PAGES ? count : WINDOW_PAGES;

        if (mprotect((char *)window, WINDOW_PAGES * PAGE, PROT_NONE))
            wrong("mprotect");
        uint64_t began = cycles_now();
        for (uint32_t page = 0; page < batch; page++)
            (void)window[page * PAGE];
        cycles += cycles_now() - began;
        count -= batch;
    }
    return cycles;
}

static const struct {
    const char *name;
    uint64_t (*run)(uint32_t count);
} benchmarks[] = {
    {"syscall", host_syscall},
    {"callret", host_callret},
    {"divzero", host_divzero},
    {"pgfault", host_pgfault},
};

int main(int argc, char *argv[])
{
    char digits[21];

    for (int i = 1; i < argc; i++)
        for (uint32_t j = 0; j < sizeof benchmarks / sizeof *benchmarks; j++) {
            size_t length = strlen(benchmarks[j].name);
            uint32_t count;

            if (strncmp(argv[i], benchmarks[j].name, length) || argv[i][length] != '=')
                continue;
            count = strtoul(argv[i] + length + 1, NULL, 10);
            printf("nano %s %u %s\n", benchmarks[j].name, count, decimal(benchmarks[j].run(count), digits));
        }
    return 0;
}
