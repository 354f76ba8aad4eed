/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Programs with one result each, for a flat 32-bit guest and, with HOST defined, for the host itself. */

typedef unsigned u32;
typedef unsigned long long u64;
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

/* 64 bits in pairs of registers: shld, adc, mul; and the bit scans */
static u32 wide(u32 rounds)
{
    u64 value = 0x0123456789abcdefull, sum = 0;
    for (u32 i = 1; i <= rounds; i++) {
        value ^= value << 13;
        value ^= value >> 7;
        value ^= value << 17;
        sum += value * i - (sum >> 9);
        u32 low = (u32)value, high = (u32)(value >> 32);
        if (low)
            sum ^= (u64)__builtin_ctz(low) << 40;
        if (high)
            sum -= (u32)__builtin_clz(high);
        sum += (int)low < (int)high ? (u64)((long long)(int)low * (int)high) : (low | 1) % (high | 3);
    }
    return (u32)sum ^ (u32)(sum >> 32);
}

/* factorial in decimal digits, nine to a word */
static u32 digits(u32 n)
{
    u32 length = 1, sum = 0;
    data[0] = 1;
    for (u32 i = 2; i <= n; i++) {
        u64 carry = 0;
        for (u32 j = 0; j < length; j++) {
            carry += (u64)data[j] * i;
            /* the quotient has 32 bits: the dividend is less than 2^30 * 2^32 */
            u32 quotient, rest;
            __asm__("divl %4" : "=a"(quotient), "=d"(rest)
                    : "0"((u32)carry), "1"((u32)(carry >> 32)), "r"(1000000000u));
            data[j] = rest;
            carry = quotient;
        }
        if (carry)
            data[length++] = (u32)carry;
    }
    for (u32 j = 0; j < length; j++)
        for (u32 word = data[j]; word; word /= 10)
            sum += word % 10;
    return sum;
}

static u32 length_of(const u8 *text)
{
    u32 left = -1;
    __asm__ volatile("repne scasb" : "+D"(text), "+c"(left) : "a"(0) : "memory", "cc");
    return -left - 2;
}

static int compare(const u8 *one, const u8 *other, u32 bytes)
{
    int less, more;
    /* so that no bytes are equal */
    __asm__ volatile("cmp %%eax, %%eax\n\trepe cmpsb\n\tsetb %b3\n\tseta %b4"
                     : "+S"(one), "+D"(other), "+c"(bytes), "=&a"(less), "=&d"(more) : : "memory", "cc");
    return (more & 1) - (less & 1);
}

/* names are made, compared, moved up to make room, and a text of them is walked through */
static u32 strings(u32 count)
{
    u8 *table = (u8 *)data, *text = table + 16 * count, *end = text;
    u32 filled = 0, seed = 7;
    for (; filled < count; filled++) {
        u8 name[16];
        void *clear = name;
        u32 words = 4;
        __asm__ volatile("rep stosl" : "+D"(clear), "+c"(words) : "a"(0) : "memory");
        seed = seed * 1103515245 + 12345;
        for (u32 i = 0; i < 3 + (seed >> 28) % 10; i++)
            name[i] = 'a' + (u8)((seed >> i) % 26);
        u32 at = 0;
        while (at < filled && compare(name, table + 16 * at, 16) > 0)
            at++;
        u8 *from = table + 16 * filled - 1, *to = from + 16;
        u32 bytes = 16 * (filled - at);
        __asm__ volatile("std\n\trep movsb\n\tcld" : "+S"(from), "+D"(to), "+c"(bytes) : : "memory");
        __builtin_memcpy(table + 16 * at, name, 16);
    }
    for (u32 i = 0; i < count; i++) {
        u32 bytes = length_of(table + 16 * i) + 1;
        const u8 *from = table + 16 * i;
        __asm__ volatile("rep movsb" : "+S"(from), "+D"(end), "+c"(bytes) : : "memory");
    }
    u32 sum = (u32)(end - text);
    while (text < end) {
        u8 letter;
        __asm__ volatile("lodsb" : "=a"(letter), "+S"(text) : : "memory");
        sum = sum * 31 + letter;
    }
    return sum;
}

static void sort(u32 *from, u32 *to)
{
    while (to - from > 1) {
        u32 middle = from[(to - from) / 2], *low = from, *high = to - 1;
        while (low <= high) {
            while (*low < middle)
                low++;
            while (*high > middle)
                high--;
            if (low <= high) {
                u32 value = *low;
                *low++ = *high;
                *high-- = value;
            }
        }
        sort(from, high + 1);
        from = low;
    }
}

static u32 recursion(u32 count)
{
    u32 seed = 1, sum = 0;
    for (u32 i = 0; i < count; i++)
        data[i] = seed = seed * 1664525 + 1013904223;
    sort(data, data + count);
    for (u32 i = 0; i < count; i++)
        sum = sum * 33 + data[i] + (i && data[i] < data[i - 1]);
    return sum;
}

__attribute__((noinline)) static u32 ackermann(u32 m, u32 n)
{
    return !m ? n + 1 : ackermann(m - 1, n ? ackermann(m, n - 1) : 1);
}

static u32 towers(u32 n)
{
    return ackermann(2, n) * 100 + ackermann(1, n);
}

static void *out[5];
static volatile u32 depth, caught;

__attribute__((noinline)) static void descend(u32 levels, u32 until)
{
    depth++;
    if (levels == until)
        __builtin_longjmp(out, 1);
    descend(levels + 1, until);
    depth += 1000;
}

/* out of ever deeper calls in one step, over all their frames */
__attribute__((noinline)) static u32 setjmps(u32 rounds)
{
    static volatile u32 round;
    depth = caught = 0;
    for (round = 0; round < rounds; round++)
        if (!__builtin_setjmp(out))
            descend(0, round % 40);
        else
            caught += round;
    return depth * 65537 + caught;
}

/* the x87 by itself: rounding to all precisions in all directions, integers of all sizes */
static u32 rounding(u32 rounds)
{
    u32 sum = 0;
    long double value = 1;
    for (u32 i = 1; i <= rounds; i++) {
        u32 precision = i % 3 ? i % 3 + 1 : 0;
        unsigned short control = (unsigned short)(0x7f | (i & 3) << 10 | precision << 8), usual;
        __asm__ volatile("fnstcw %0\n\tfldcw %1" : "=m"(usual) : "m"(control));
        value = value * 1.0625L + 1.0L / i;
        long double third = value / 3, rest = third - 0.7L / i;
        long long whole;
        int word;
        short half;
        __asm__ volatile("fistpll %0" : "=m"(whole) : "t"(third * 1e4L) : "st");
        __asm__ volatile("fistl %0" : "=m"(word) : "t"(rest * 1e3L));
        __asm__ volatile("fists %0" : "=m"(half) : "t"(rest));
        __asm__ volatile("fldcw %0" : : "m"(usual));
        if (value > 1e4L)
            value = __builtin_sqrtl(value);
        sum = sum * 31 + (u32)whole + (u32)(whole >> 32) + (u32)word + (unsigned short)half;
        sum += (third > rest) + 2 * (rest < 0.5f) + 4 * ((double)third == third);
    }
    return sum;
}

/* functions only approximated elsewhere: results are those of the processor that computes them */
static u32 functions(u32 rounds)
{
    u32 sum = 0;
    for (u32 i = 1; i <= rounds; i++) {
        long double x = i / 7.0L, sine, cosine, angle, power, rest;
        __asm__("fsincos" : "=t"(cosine), "=u"(sine) : "0"(x));
        __asm__("fpatan" : "=t"(angle) : "0"(x), "u"(sine) : "st(1)");
        __asm__("f2xm1" : "=t"(power) : "0"(cosine));
        __asm__("fprem" : "=t"(rest) : "0"(x), "u"(0.3L) : "cc");
        union { long double f; u32 u[3]; } all = { sine * 3 + cosine + angle + power / 7 + rest };
        sum = sum * 31 + (all.u[0] ^ all.u[1]);
    }
    return sum;
}

/* integers of all sizes in vectors, conversions, shuffles and masks */
__attribute__((target("sse2"))) static u32 vectors(u32 rounds)
{
    typedef char bytes __attribute__((vector_size(16)));
    typedef short halves __attribute__((vector_size(16)));
    typedef int words __attribute__((vector_size(16)));
    typedef float singles __attribute__((vector_size(16)));
    typedef double doubles __attribute__((vector_size(16)));
    words mix = { 0x12345678, -2, 77, 0x7fffffff };
    singles scale = { 0.5f, 1.25f, -3.0f, 1e-3f };
    u32 sum = 0;
    for (u32 i = 1; i <= rounds; i++) {
        words step = { (int)i, (int)(i * 3), -(int)i, 9 };
        mix = mix + step ^ __builtin_ia32_pshufd((__typeof__(mix))mix, 0x39);
        halves packed = __builtin_ia32_packssdw128(mix, step);
        bytes capped = __builtin_ia32_paddusb128((bytes)mix, __builtin_ia32_packuswb128(packed, packed));
        sum += (u32)__builtin_ia32_pmovmskb128((bytes)(capped > (bytes)mix));
        mix ^= (words)__builtin_ia32_pmaddwd128(packed, (halves)capped);
        scale = __builtin_ia32_sqrtps(scale * scale + __builtin_ia32_cvtdq2ps(step));
        doubles wide = __builtin_ia32_cvtps2pd(scale) * (doubles){ 1.5, 1e3 };
        mix += __builtin_ia32_cvttpd2dq(wide) + (words)(scale > (singles){ 1, 2, 3, 4 });
        sum = sum * 31 + (u32)__builtin_ia32_movmskpd(wide - 2.0);
    }
    union { words w; u32 u[4]; } all = { mix };
    return sum ^ all.u[0] ^ all.u[1] ^ all.u[2] ^ all.u[3];
}

static u32 (*const programs[])(u32) = {
    primes, fib, sieve, copy, indirect, switches, x87, sse2, collatz,
    wide, digits, strings, recursion, towers, setjmps, rounding, vectors, functions,
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
