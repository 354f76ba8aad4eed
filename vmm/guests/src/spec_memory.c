/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * spec: memory.  sieve strides, copy and string stream, compress looks back.
 */
#include "spec.h"

#define SIEVE (1u << 20)
static uint8_t composite[SIEVE];

uint32_t spec_sieve(uint32_t rounds)
{
    uint32_t sum = 0;

    for (uint32_t round = 0; round < rounds; round++) {
        uint32_t count = 0;

        for (uint32_t i = 0; i < SIEVE; i++)
            composite[i] = 0;
        for (uint32_t i = 2; i < SIEVE; i++) {
            if (composite[i])
                continue;
            count++;
            for (uint32_t multiple = 2 * i; multiple < SIEVE; multiple += i)
                composite[multiple] = 1;
        }
        sum = fold(sum, count + round);
    }
    return sum;
}

#define WORDS (1u << 18)
#define GAP (37u << 10)
static uint32_t memory[2 * WORDS + GAP];
/* Apart by no power of two: what is measured is not how caches and TLBs cope with equal lower bits. */
static uint32_t *const from = memory, *const to = memory + WORDS + GAP;

static void fill(void)
{
    uint32_t state = 1;

    for (uint32_t i = 0; i < WORDS; i++)
        from[i] = next_random(&state);
}

static uint32_t fold_all(uint32_t sum)
{
    for (uint32_t i = 0; i < WORDS; i++)
        sum = fold(sum, from[i]);
    return sum;
}

/* A megabyte, a word at a time, there and back. */
uint32_t spec_copy(uint32_t rounds)
{
    uint32_t sum = 0;

    fill();
    for (uint32_t round = 0; round < rounds; round++) {
        for (uint32_t i = 0; i < WORDS; i++)
            to[i] = from[i] + round;
        for (uint32_t i = 0; i < WORDS; i++)
            from[i] = to[i];
        sum = fold(sum, from[round % WORDS]);
    }
    return fold_all(sum);
}

static void copy_string(uint32_t *target, const uint32_t *source, uint32_t count)
{
    asm volatile("rep movsl" : "+S"(source), "+D"(target), "+c"(count)::"memory");
}

/* The same with string instructions. */
uint32_t spec_string(uint32_t rounds)
{
    uint32_t sum = 0;

    fill();
    for (uint32_t round = 0; round < rounds; round++) {
        copy_string(to, from, WORDS);
        to[round % WORDS] += round;
        copy_string(from, to, WORDS);
        sum = fold(sum, from[round % WORDS]);
    }
    return fold_all(sum);
}

#define TEXT (1u << 16)
#define MATCH_MIN 4u
#define MATCH_MAX 255u
static uint8_t text[TEXT], packed[2 * TEXT];
static uint32_t last[4096];

/* Few letters, so that strings repeat. */
static void write_text(uint32_t seed)
{
    for (uint32_t i = 0; i < TEXT; i++) {
        uint32_t random = next_random(&seed);

        text[i] = i > 64 && random >> 30 ? text[i - 1 - (random >> 8) % 64] : 'a' + (random >> 24) % 16;
    }
}

/* LZ77 with one candidate: a match is a zero, its length and its distance; all else is itself. */
static uint32_t pack(void)
{
    uint32_t size = 0;

    for (uint32_t i = 0; i < 4096; i++)
        last[i] = 0;
    for (uint32_t at = 0; at < TEXT;) {
        uint32_t length = 0, start = 0;

        if (at + MATCH_MIN <= TEXT) {
            uint32_t four = text[at] | text[at + 1] << 8 | text[at + 2] << 16 | (uint32_t)text[at + 3] << 24;
            uint32_t *slot = &last[four * 2654435761u >> 20];

            start = *slot;
            *slot = at + 1;
            while (start && length < MATCH_MAX && at + length < TEXT && text[start - 1 + length] == text[at + length])
                length++;
        }
        if (length < MATCH_MIN) {
            packed[size++] = text[at++];
            continue;
        }
        packed[size++] = 0;
        packed[size++] = length;
        packed[size++] = at + 1 - start;
        packed[size++] = (at + 1 - start) >> 8;
        at += length;
    }
    return size;
}

uint32_t spec_compress(uint32_t rounds)
{
    uint32_t sum = 0;

    for (uint32_t round = 0; round < rounds; round++) {
        write_text(round + 1);
        uint32_t size = pack();
        sum = fold(sum, size);
        for (uint32_t i = 0; i < size; i++)
            sum = fold(sum, packed[i]);
    }
    return sum;
}
