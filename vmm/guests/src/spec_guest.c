/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * spec as a kernel: flat memory without paging, interrupts off.  What it says goes to the console.
 */
#include "guest.h"
#include "spec.h"

void say(const char *line)
{
    console_open();
    print("%s", line);
}
