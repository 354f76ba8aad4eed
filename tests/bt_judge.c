/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The host's own processor executes 32-bit code as it stands: a process in compatibility mode.

   It has nothing mapped but the memory of the examples and, in one range of its own, itself.  An example
   ends with a signal, whose handler notes how and begins the next: no handler ever returns.
   bt_judge.py is the other side; it defines CODE, DATA and the other names in capitals not defined here. */

typedef unsigned u32;
typedef unsigned char u8;

enum { WRITABLE_BYTES = 0x2000, DATA_BYTES = 0x3000, STACK_BYTES = 1 << 16, TOP = 0xFFFFE000u };
enum { READ = 3, WRITE = 4, MMAP = 90, MUNMAP = 91, SIGACTION = 174, SIGALTSTACK = 186, SET_THREAD_AREA = 243,
       EXIT = 252 };
enum { PROT_R = 1, PROT_W = 2, PROT_X = 4, MAP_SHARED_FIXED = 0x11 };
enum { SA_SIGINFO = 4, SA_RESTORER = 0x04000000, SA_ONSTACK = 0x08000000, SA_NODEFER = 0x40000000 };

struct state {
    u32 registers[8], eflags, eip;
    u32 trap, error, cr2;
    u32 unused[3];
    u8 fx[512];
};

struct slot {
    struct state before, after;
    u32 code_at, code_bytes, data_from;
    /* of FS, GS and DS */
    u32 base[3];
    u32 unused[26];
    u8 code[CODE_LIMIT];
    u8 memory[WRITABLE_BYTES];
};

/* the file shared with the other side */
static struct shared {
    u8 code[CODE_BYTES], data[DATA_BYTES];
    u8 soil[SOIL_BYTES];
    struct slot slots[SLOTS];
} *const shared = (void *)(HELPER + 0x100000);

/* what the kernel leaves on a signal handler's stack */
struct context {
    u32 flags, link, stack[3];
    u32 gs, fs, es, ds, edi, esi, ebp, esp, ebx, edx, ecx, eax, trap, error, eip, cs, eflags, esp_again, ss;
    u8 *fpu;
    u32 mask, cr2;
};

/* what `enter` loads; segments are FS, GS, DS */
__attribute__((used, aligned(16))) static struct state entered;
__attribute__((used)) static u32 segments[3] = { FS_SELECTOR, GS_SELECTOR };
__attribute__((used, aligned(64))) static u8 stack[STACK_BYTES];
static u32 count, at;
static struct { u32 number, base, limit, bits; } areas[3];
void enter(void);
void restorer(void);

static int syscall(int number, u32 a, u32 b, u32 c, u32 d)
{
    int result;
    __asm__ volatile("int $0x80" : "=a"(result) : "0"(number), "b"(a), "c"(b), "d"(c), "S"(d) : "memory");
    return result;
}

static void require(int holds, int status)
{
    if (!holds)
        syscall(EXIT, status, 0, 0, 0);
}

static void copy(void *to, const void *from, u32 bytes)
{
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
}

static void fill(void *to, u8 value, u32 bytes)
{
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(bytes) : "a"(value) : "memory");
}

static void map(u32 address, u32 bytes, u32 rights, u32 fd, u32 offset)
{
    u32 arguments[6] = { address, bytes, rights, MAP_SHARED_FIXED, fd, offset };
    require(syscall(MMAP, (u32)arguments, 0, 0, 0) == (int)address, 3);
}

static void set_base(u32 index, u32 base)
{
    areas[index].base = base;
    require(syscall(SET_THREAD_AREA, (u32)&areas[index], 0, 0, 0) == 0, 4);
}

static void begin_example(void)
{
    struct slot *slot = &shared->slots[at];
    copy(shared->data, shared->soil + slot->data_from, DATA_BYTES);
    copy(shared->code + slot->code_at, slot->code, slot->code_bytes);
    entered = slot->before;
    /* one call is needed even if no base changes: returning from it makes the processor see the new code */
    for (u32 index = 0; index < 3; index++)
        if (index == 0 || areas[index].base != slot->base[index])
            set_base(index, slot->base[index]);
    segments[2] = slot->base[2] ? DS_SELECTOR : FLAT_SELECTOR;
    enter();
}

static void next(void)
{
    if (++at >= count) {
        u8 done = 1;
        require(syscall(WRITE, 1, (u32)&done, 1, 0) == 1, 5);
        require(syscall(READ, 0, (u32)&count, 4, 0) == 4, 0);
        at = 0;
    }
    begin_example();
}

static void ended(int number, void *info, struct context *context)
{
    struct slot *slot = &shared->slots[at];
    struct state *after = &slot->after;
    u32 *registers = after->registers;
    registers[0] = context->eax;
    registers[1] = context->ecx;
    registers[2] = context->edx;
    registers[3] = context->ebx;
    registers[4] = context->esp;
    registers[5] = context->ebp;
    registers[6] = context->esi;
    registers[7] = context->edi;
    after->eflags = context->eflags;
    after->eip = context->eip;
    after->trap = context->trap;
    after->error = context->error;
    after->cr2 = context->cr2;
    /* the FXSAVE image stands behind the older form of the same */
    copy(after->fx, context->fpu + 112, 512);
    copy(slot->memory, shared->data, WRITABLE_BYTES);
    fill(shared->code + slot->code_at, 0xCC, slot->code_bytes);
    next();
}

__attribute__((used)) static void begin(void)
{
    u32 fd;
    require(syscall(READ, 0, (u32)&fd, 4, 0) == 4, 1);
    require(syscall(MUNMAP, 0, HELPER, 0, 0) == 0, 2);
    require(syscall(MUNMAP, HELPER + HELPER_BYTES, TOP - HELPER - HELPER_BYTES, 0, 0) == 0, 2);
    map((u32)shared, (sizeof *shared + 0xFFF) & ~0xFFF, PROT_R | PROT_W, fd, 0);
    map(CODE, CODE_BYTES, PROT_R | PROT_X, fd, 0);
    map(DATA, WRITABLE_BYTES, PROT_R | PROT_W, fd, CODE_BYTES);
    map(DATA + WRITABLE_BYTES, DATA_BYTES - WRITABLE_BYTES, PROT_R, fd, CODE_BYTES + WRITABLE_BYTES);
    fill(shared->code, 0xCC, CODE_BYTES);
    u32 alternate[3] = { (u32)stack, 0, STACK_BYTES };
    require(syscall(SIGALTSTACK, (u32)alternate, 0, 0, 0) == 0, 6);
    static const u8 signals[] = { 4, 5, 7, 8, 11 };
    u32 action[5] = { (u32)ended, SA_SIGINFO | SA_RESTORER | SA_ONSTACK | SA_NODEFER, (u32)restorer, 0, 0 };
    for (u32 index = 0; index < sizeof signals; index++)
        require(syscall(SIGACTION, signals[index], (u32)action, 0, 8) == 0, 7);
    for (u32 index = 0; index < 3; index++) {
        areas[index].number = (FS_SELECTOR >> 3) + index;
        areas[index].limit = 0xFFFFF;
        areas[index].bits = 0x51;       /* 32-bit, limit in pages, usable */
        set_base(index, 1);
    }
    next();
}

/* once the flags are loaded everything is a move */
__asm__(
    ".globl _start, enter, restorer\n"
    "_start: lea stack+65536, %esp\n"
    "call begin\n"
    "restorer: ud2\n"
    "enter: fxrstor entered+64\n"
    "mov segments, %fs\n"
    "mov segments+4, %gs\n"
    "pushl entered+32\n"
    "popfl\n"
    "mov entered, %eax\n"
    "mov entered+4, %ecx\n"
    "mov entered+8, %edx\n"
    "mov entered+12, %ebx\n"
    "mov entered+16, %esp\n"
    "mov entered+20, %ebp\n"
    "mov entered+24, %esi\n"
    "mov entered+28, %edi\n"
    "mov segments+8, %ds\n"
    "jmp *%cs:entered+36\n");
