/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * nano_forkwait: the paper's program, with its time.  A static program for Linux, run as such on the host and in
 * a Linux guest.  The argument is how many processes, 40000 without; prints `nano linux-forkwait PROCESSES CYCLES`.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cycles.h"

int main(int argc, char *argv[])
{
    int count = argc > 1 ? atoi(argv[1]) : 40000;
    char digits[21];
    uint64_t began = cycles_now();

    for (int i = 0; i < count; i++) {
        int pid = fork();

        if (pid < 0)
            return 1;
        if (pid == 0)
            return 0;
        waitpid(pid, NULL, 0);
    }
    printf("nano linux-forkwait %d %s\n", count, decimal(cycles_now() - began, digits));
    return 0;
}
