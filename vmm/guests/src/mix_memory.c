/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * mix: frames, address spaces, demand paging and copy-on-write.
 */
#include "mix.h"

#define PRESENT 0x001u
#define WRITABLE 0x002u
#define USER 0x004u
#define LARGE 0x080u
#define COPY_ON_WRITE 0x200u /* available to software */
#define FRAME(entry) ((entry) & ~0xFFFu)

#define DIRECTORY_INDEX(address) ((address) >> 22)
#define TABLE_INDEX(address) ((address) >> 12 & 1023)

#define CR0_PG_WP 0x80010000u
#define CR4_PSE 0x10u

extern const char user_text[], user_text_end[], _end[];

static uint32_t kernel_table[1024] __attribute__((aligned(4096)));
static uint32_t kernel_space[1024] __attribute__((aligned(4096)));

/* Owners of each frame; a free frame has none and holds the address of the next free one. */
static uint8_t owners[KERNEL_END / PAGE];
static uint32_t first_free;

static uint32_t frame_new(void)
{
    uint32_t frame = first_free;

    if (!frame) {
        print("mix: out of memory\n");
        leave(1);
    }
    first_free = *(uint32_t *)frame;
    owners[frame / PAGE] = 1;
    for (uint32_t i = 0; i < PAGE / 4; i++)
        ((uint32_t *)frame)[i] = 0;
    return frame;
}

static void frame_drop(uint32_t frame)
{
    if (--owners[frame / PAGE])
        return;
    *(uint32_t *)frame = first_free;
    first_free = frame;
}

void paging_open(uint32_t memory_end)
{
    if (memory_end > KERNEL_END)
        memory_end = KERNEL_END;
    for (uint32_t frame = memory_end - PAGE; frame >= (uint32_t)_end; frame -= PAGE) {
        *(uint32_t *)frame = first_free;
        first_free = frame;
    }
    for (uint32_t i = 0; i < 1024; i++)
        kernel_table[i] = i * PAGE | PRESENT | WRITABLE;
    for (uint32_t page = (uint32_t)user_text; page < (uint32_t)user_text_end; page += PAGE)
        kernel_table[TABLE_INDEX(page)] = page | PRESENT | USER;
    kernel_space[0] = (uint32_t)kernel_table | PRESENT | WRITABLE | USER;
    for (uint32_t i = 1; i < DIRECTORY_INDEX(KERNEL_END); i++)
        kernel_space[i] = i << 22 | PRESENT | WRITABLE | LARGE;
    space_enter(kernel_space);
    asm volatile("movl %%cr4, %%eax; orl %0, %%eax; movl %%eax, %%cr4" ::"i"(CR4_PSE) : "eax");
    asm volatile("movl %%cr0, %%eax; orl %0, %%eax; movl %%eax, %%cr0" ::"i"(CR0_PG_WP) : "eax", "memory");
}

void space_enter(uint32_t *space)
{
    asm volatile("movl %0, %%cr3" ::"r"(space) : "memory");
}

uint32_t *space_new(void)
{
    uint32_t *space = (uint32_t *)frame_new();

    for (uint32_t i = 0; i < DIRECTORY_INDEX(KERNEL_END); i++)
        space[i] = kernel_space[i];
    space[DIRECTORY_INDEX(USER_START)] = frame_new() | PRESENT | WRITABLE | USER;
    return space;
}

static uint32_t *user_table(uint32_t *space)
{
    return (uint32_t *)FRAME(space[DIRECTORY_INDEX(USER_START)]);
}

uint32_t *space_fork(uint32_t *space)
{
    uint32_t *child = space_new();
    uint32_t *from = user_table(space), *to = user_table(child);

    for (uint32_t i = 0; i < 1024; i++) {
        if (!(from[i] & PRESENT))
            continue;
        from[i] = (from[i] & ~WRITABLE) | COPY_ON_WRITE;
        to[i] = from[i];
        owners[FRAME(from[i]) / PAGE]++;
    }
    space_enter(space); /* the parent's pages are read-only from now on: forget the writable ones */
    return child;
}

void space_free(uint32_t *space)
{
    uint32_t *table = user_table(space);

    space_enter(kernel_space);
    for (uint32_t i = 0; i < 1024; i++)
        if (table[i] & PRESENT)
            frame_drop(FRAME(table[i]));
    frame_drop((uint32_t)table);
    frame_drop((uint32_t)space);
}

int space_fault(uint32_t *space, uint32_t address, int write)
{
    uint32_t *entry = &user_table(space)[TABLE_INDEX(address)];

    if (address < USER_START || address >= USER_END)
        return 0;
    if (!(*entry & PRESENT)) {
        *entry = frame_new() | PRESENT | WRITABLE | USER;
        counters.demand_faults++;
        return 1;
    }
    if (!write || !(*entry & COPY_ON_WRITE))
        return 0;
    if (owners[FRAME(*entry) / PAGE] == 1) {
        *entry = (*entry & ~COPY_ON_WRITE) | WRITABLE;
    } else {
        uint32_t shared = FRAME(*entry), copy = frame_new();

        for (uint32_t i = 0; i < PAGE / 4; i++)
            ((uint32_t *)copy)[i] = ((uint32_t *)shared)[i];
        frame_drop(shared);
        *entry = copy | PRESENT | WRITABLE | USER;
        counters.write_copies++;
    }
    asm volatile("invlpg (%0)" ::"r"(address) : "memory");
    return 1;
}
