/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Programs with one result each, for a flat 32-bit guest and, with HOST defined, for the host itself. */

typedef unsigned u32;
typedef unsigned char u8;

static u32 data[1 << 20];

static u32 primes(u32 limit)
{
    u32 count = 0;
    for (u32 n = 2; n < limit; n++) {
        u32 d = 2;
        while (d * d <= n && n % d)
            d++;
        count += d * d > n;
    }
    return count;
}

__attribute__((noinline)) static u32 fib(u32 n)
{
    return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

static u32 sieve(u32 limit)
{
    u8 *composite = (u8 *)data;
    u32 count = 0;
    for (u32 i = 0; i < limit; i++)
        composite[i] = 0;
    for (u32 i = 2; i < limit; i++) {
        if (composite[i])
            continue;
        count++;
        for (u32 j = 2 * i; j < limit; j += i)
            composite[j] = 1;
    }
    return count;
}

/* once by words, once by bytes with rep movsb */
static u32 copy(u32 rounds)
{
    u32 *to = data + (1 << 18), words = 1 << 16;
    for (u32 i = 0; i < words; i++)
        data[i] = i * 2654435761u;
    for (u32 r = 0; r < rounds; r++) {
        for (u32 i = 0; i < words; i++)
            to[i] = data[i] + r;
        void *source = to, *target = to + words;
        u32 bytes = 4 * words;
        __asm__ volatile("rep movsb" : "+S"(source), "+D"(target), "+c"(bytes) : : "memory");
    }
    u32 sum = 0;
    for (u32 i = 0; i < words; i++)
        sum = sum * 31 + to[words + i];
    return sum;
}

static u32 add(u32 a) { return a + 7; }
static u32 twist(u32 a) { return a ^ a << 5; }
static u32 turn(u32 a) { return a << 3 | a >> 29; }
static u32 less(u32 a) { return a - (a >> 3); }

static u32 indirect(u32 rounds)
{
    static u32 (*const calls[])(u32) = { add, twist, turn, less };
    u32 value = 1;
    for (u32 i = 0; i < rounds; i++)
        value = calls[value >> 7 & 3](value);
    return value;
}

static u32 switches(u32 rounds)
{
    u32 value = 12345;
    for (u32 i = 0; i < rounds; i++) {
        switch (value % 9) {
        case 0: value += 1013; break;
        case 1: value ^= 0x5bd1e995; break;
        case 2: value = value * 33 + i; break;
        case 3: value -= value >> 9; break;
        case 4: value = ~value; break;
        case 5: value = value << 7 | value >> 25; break;
        case 6: value *= 2654435761u; break;
        case 7: value ^= i << 3; break;
        default: value += i; break;
        }
    }
    return value;
}

static u32 x87(u32 rounds)
{
    long double sum = 0, step = 1;
    for (u32 i = 1; i <= rounds; i++) {
        step = __builtin_sqrtl(step + i) / 3;
        sum += step * (i & 1 ? 1 : -1);
    }
    double result = sum * 1e6;
    return (u32)(int)result;
}

__attribute__((target("sse2"), optimize("O2", "tree-vectorize"))) static u32 sse2(u32 rounds)
{
    typedef double pair __attribute__((vector_size(16)));
    typedef int four __attribute__((vector_size(16)));
    pair sum = { 1.5, 2.5 }, factor = { 1.0000001, 0.9999999 };
    four mix = { 1, 2, 3, 4 };
    for (u32 i = 0; i < rounds; i++) {
        sum = sum * factor + (pair){ 0.25, -0.125 };
        mix = (mix << 3) ^ (mix + (int)i);
    }
    union { pair p; u32 w[4]; } all = { sum };
    union { four f; u32 w[4]; } other = { mix };
    return all.w[0] ^ all.w[1] ^ all.w[2] ^ all.w[3] ^ other.w[0] ^ other.w[1] ^ other.w[2] ^ other.w[3];
}

static u32 collatz(u32 limit)
{
    u32 longest = 0;
    for (u32 n = 1; n < limit; n++) {
        u32 steps = 0;
        for (unsigned long long m = n; m != 1; steps++)
            m = m & 1 ? 3 * m + 1 : m / 2;
        longest = steps > longest ? steps : longest;
    }
    return longest;
}

static u32 (*const programs[])(u32) = {
    primes, fib, sieve, copy, indirect, switches, x87, sse2, collatz,
};

__attribute__((used, noinline)) u32 run(u32 number, u32 argument)
{
    return programs[number](argument);
}

#ifdef HOST
static u32 number(const char *text)
{
    u32 value = 0;
    while (*text)
        value = value * 10 + (u32)(*text++ - '0');
    return value;
}

__attribute__((used)) void begin(char **argv)
{
    u32 result = run(number(argv[1]), number(argv[2]));
    int ignored;
    __asm__ volatile("int $0x80" : "=a"(ignored) : "0"(4), "b"(1), "c"(&result), "d"(4) : "memory");
    __asm__ volatile("int $0x80" : "=a"(ignored) : "0"(1), "b"(0));
}

__asm__(".globl _start\n_start: lea 4(%esp), %eax\nand $-16, %esp\nsub $12, %esp\npush %eax\ncall begin\n");
#else
/* eax, edx: the program's number and its argument; eax at the hlt: its result */
__asm__(".globl _start\n_start: push %edx\npush %eax\ncall run\nhlt\n");
#endif
