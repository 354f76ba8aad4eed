/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * fuzz: a hostile guest.  Sweeps every I/O port in every size, then for `rounds=N` (default 20000) does
 * pseudo-random accesses to ports, to addresses without memory, to MSRs and to CPUID; `seed=N` chooses
 * them.  Leaves with status 0 if the machine let it come that far.
 *
 * What would end it sooner by the machine's own rules (reset, power-off, debug exit, INIT) is left out,
 * unless the word `all` is given: then the machine may end in any of these ways.
 */
#include "trap.h"

#define MMIO_START 0xFE000000u
#define IOAPIC 0xFEC00000u
#define LOCAL_APIC 0xFEE00000u
#define ICR_LOW 0x300u
#define MSR_X2APIC_ICR 0x830u

struct range {
    uint32_t first, last;
};

/* Ports that end the guest: i8042 command, fast reset, debug exit, ACPI PM1, reset control. */
static const struct range fatal_ports[] = {{0x64, 0x64}, {0x92, 0x92}, {0xF4, 0xF7}, {0x600, 0x60F}, {0xCF9, 0xCF9}};

/* Where MSRs are: architectural, hypervisors', AMD's. */
static const struct range msr_ranges[] = {{0, 0x1FFF},
                                          {0x40000000, 0x400000FF},
                                          {0x4B564D00, 0x4B564D0F},
                                          {0xC0000000, 0xC00001FF},
                                          {0xC0010000, 0xC00111FF},
                                          {0, 0xFFFFFFFF}};

#define COUNT(array) (sizeof(array) / sizeof(array)[0])

static uint32_t random_state, accesses, protection_faults;
static uint32_t memory_end;
static int everything;

static uint32_t random(void)
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    random_state ^= random_state << 5;
    return random_state;
}

static uint32_t random_in(struct range range)
{
    uint32_t span = range.last - range.first + 1;

    return range.first + (span ? random() % span : random());
}

/* RDMSR and WRMSR of what does not exist are skipped here; NMIs come from the local APIC. */
void trap(struct frame *frame)
{
    const uint8_t *code = (const uint8_t *)frame->eip;

    if (frame->vector == 2)
        return;
    if (frame->vector != EXCEPTION_GENERAL_PROTECTION || code[0] != 0x0F || (code[1] & ~0x02) != 0x30) {
        console_open();
        unexpected(frame);
    }
    protection_faults++;
    frame->eip += 2;
}

static int port_allowed(uint32_t port, uint32_t size)
{
    if (everything)
        return 1;
    for (uint32_t i = 0; i < COUNT(fatal_ports); i++)
        if (port <= fatal_ports[i].last && port + size > fatal_ports[i].first)
            return 0;
    return 1;
}

static void touch_port(uint32_t port, uint32_t size)
{
    uint32_t value = random();

    if (!port_allowed(port, size))
        return;
    accesses += 2;
    if (size == 1) {
        inb(port);
        outb(port, value);
    } else if (size == 2) {
        inw(port);
        outw(port, value);
    } else {
        inl(port);
        outl(port, value);
    }
}

static void sweep_ports(void)
{
    for (uint32_t size = 1; size <= 4; size *= 2)
        for (uint32_t port = 0; port <= 0xFFFF; port++)
            touch_port(port, size);
}

static void touch_random_port(void) { touch_port(random() & 0xFFFF, 1 << random() % 3); }

static void touch_string_port(void)
{
    static uint8_t buffer[64];
    uint32_t port = random() & 0xFFFF, count = random() % (sizeof buffer / 4);
    void *at = buffer;

    if (!port_allowed(port, 4))
        return;
    accesses += count;
    if (random() & 1)
        asm volatile("rep insl" : "+D"(at), "+c"(count) : "d"(port) : "memory");
    else
        asm volatile("rep outsb" : "+S"(at), "+c"(count) : "d"(port) : "memory");
}

/* An address without memory: half of the time in one of the APICs. */
static uint32_t random_mmio(void)
{
    switch (random() % 4) {
    case 0:
        return LOCAL_APIC + random() % 0x400;
    case 1:
        return IOAPIC + random() % 0x20;
    case 2:
        return random_in((struct range){memory_end, MMIO_START - 1});
    default:
        return random_in((struct range){MMIO_START, 0xFFFFFFFF - 8});
    }
}

static void touch_mmio(void)
{
    uint32_t address = random_mmio(), value = random();
    volatile uint8_t *byte = (volatile uint8_t *)address;

    if (!everything && address / 16 * 16 <= LOCAL_APIC + ICR_LOW && address + 4 > LOCAL_APIC + ICR_LOW)
        return;
    accesses++;
    switch (random() % 8) {
    case 0:
        (void)*byte;
        break;
    case 1:
        (void)*(volatile uint16_t *)byte;
        break;
    case 2:
        (void)*(volatile uint32_t *)byte;
        break;
    case 3:
        *byte = value;
        break;
    case 4:
        *(volatile uint16_t *)byte = value;
        break;
    case 5:
        *(volatile uint32_t *)byte = value;
        break;
    case 6:
        asm volatile("lock xaddl %0, %1" : "+r"(value), "+m"(*(volatile uint32_t *)byte));
        break;
    case 7:
        asm volatile("xchgb %b0, %1" : "+q"(value), "+m"(*byte));
        break;
    }
}

static void touch_msr(void)
{
    uint32_t msr = random_in(msr_ranges[random() % COUNT(msr_ranges)]);
    uint32_t low = random(), high = random() & 1 ? random() : 0;

    accesses++;
    if (random() & 1)
        asm volatile("rdmsr" : "=a"(low), "=d"(high) : "c"(msr));
    else if (everything || msr != MSR_X2APIC_ICR)
        asm volatile("wrmsr" ::"c"(msr), "a"(low), "d"(high));
}

static void touch_cpuid(void)
{
    uint32_t leaf = random_in((struct range[]){{0, 0x20}, {0x40000000, 0x40000020}, {0x80000000, 0x80000020}}[random() % 3]);
    uint32_t subleaf = random() % 8;

    accesses++;
    asm volatile("cpuid" : "+a"(leaf), "+c"(subleaf)::"ebx", "edx");
}

static void (*const touches[])(void) = {touch_random_port, touch_string_port, touch_mmio, touch_mmio, touch_msr, touch_cpuid};

/* The console, whatever state the garbage left it in, on a line of its own. */
static void reopen(void)
{
    console_open();
    print("\n");
}

int main(const struct multiboot_info *info)
{
    uint32_t seed = option_number(info, "seed", 1), rounds = option_number(info, "rounds", 20000);

    everything = option_set(info, "all");
    random_state = seed * 2654435761u | 1;
    memory_end = (info->mem_upper + 1024) * 1024;
    console_open();
    traps_open(0);
    print("fuzz: seed %u, %u rounds\n", seed, rounds);
    sweep_ports();
    reopen();
    print("fuzz: every port swept\n");
    for (uint32_t round = 1; round <= rounds; round++) {
        touches[random() % COUNT(touches)]();
        if (round % 5000 == 0) {
            reopen();
            print("fuzz: round %u\n", round);
        }
    }
    reopen();
    print("fuzz: %u accesses, %u protection faults, survived\n", accesses, protection_faults);
    return 0;
}
