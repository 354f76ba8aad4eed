/* SPDX-License-Identifier: GPL-2.0-or-later
 *
 * spec: the loop of an interpreter, a switch over the instructions of a stack machine.
 */
#include "spec.h"

enum { PUSH, LOAD, STORE, ADD, SUBTRACT, AND, EXCLUSIVE, MULTIPLY, LESS, JUMP_IF, HALT };
enum { I, N, X, SUM, VARIABLES };
enum { OUTER = 0, INNER = 17 };

/* do { i++; x = (i & 255) + 1; do { sum = (sum ^ x) * 31; x--; } while (x); } while (i < n); */
static const uint8_t code[] = {
    /*  0 */ LOAD, I, PUSH, 1, ADD, STORE, I,
    /*  7 */ LOAD, I, PUSH, 255, AND, PUSH, 1, ADD, STORE, X,
    /* 17 */ LOAD, SUM, LOAD, X, EXCLUSIVE, PUSH, 31, MULTIPLY, STORE, SUM,
    /* 27 */ LOAD, X, PUSH, 1, SUBTRACT, STORE, X,
    /* 34 */ LOAD, X, JUMP_IF, INNER,
    /* 38 */ LOAD, I, LOAD, N, LESS, JUMP_IF, OUTER,
    /* 45 */ HALT,
};

uint32_t spec_interpret(uint32_t rounds)
{
    uint32_t variables[VARIABLES] = {[N] = rounds}, stack[8], *top = stack;
    const uint8_t *at = code;

    for (;;) {
        switch (*at++) {
        case PUSH:
            *top++ = *at++;
            break;
        case LOAD:
            *top++ = variables[*at++];
            break;
        case STORE:
            variables[*at++] = *--top;
            break;
        case ADD:
            top--, top[-1] += *top;
            break;
        case SUBTRACT:
            top--, top[-1] -= *top;
            break;
        case AND:
            top--, top[-1] &= *top;
            break;
        case EXCLUSIVE:
            top--, top[-1] ^= *top;
            break;
        case MULTIPLY:
            top--, top[-1] *= *top;
            break;
        case LESS:
            top--, top[-1] = top[-1] < *top;
            break;
        case JUMP_IF:
            at = *--top ? code + *at : at + 1;
            break;
        case HALT:
            return variables[SUM];
        }
    }
}
