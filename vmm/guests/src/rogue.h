/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * What the parts of `rogue` know of each other.
 */
#ifndef ROGUE_H
#define ROGUE_H

#include "trap.h"

/* Switch the processor's control bits at random, `rounds` times; leaves with status 0 if it comes that far. */
_Noreturn void wild(uint32_t seed, uint32_t rounds);

/* Whether `wild` expected this trap; then the return is to where it goes on. */
int wild_recovers(struct frame *frame);

#endif
