/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * The Multiboot 1 header (specification, 3.1), which guest.ld puts first.
 */
#include "layout.h"

    .section .multiboot, "a"
    .align 4
    .long MULTIBOOT_MAGIC
    .long MULTIBOOT_FLAGS
    .long -(MULTIBOOT_MAGIC + MULTIBOOT_FLAGS)
