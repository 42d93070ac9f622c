"""The C++ of the machine probe (`probe.py`): loops that only read, multiply, or wait for each other.

Header-free like everything that we compile: the few system calls are declared by hand, vectors are the
compiler's own, dot products are inline assembly because the intrinsics live in headers.
"""

from typing import Final

PROBE_SOURCE: Final = r"""
struct Time { long seconds, nanoseconds; };
extern "C" int clock_gettime(int, Time*);
extern "C" int sched_yield(void);

// One cache line each, so that arriving does not disturb those who wait.
struct Team { alignas(64) int arrived; alignas(64) int generation; alignas(64) int size; };

static long now() { Time t; clock_gettime(1, &t); return t.seconds * 1000000000L + t.nanoseconds; }

static void wait_for_all(Team* team) {
    int seen = __atomic_load_n(&team->generation, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&team->arrived, 1, __ATOMIC_ACQ_REL) == team->size) {
        __atomic_store_n(&team->arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&team->generation, seen + 1, __ATOMIC_RELEASE);
        return;
    }
    for (long spins = 0; __atomic_load_n(&team->generation, __ATOMIC_ACQUIRE) == seen; spins++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        if (spins > 20000) sched_yield();  // more threads than free cores
    }
}

#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
typedef float Floats __attribute__((vector_size(WIDTH)));
typedef int Ints __attribute__((vector_size(WIDTH)));
typedef long Longs __attribute__((vector_size(WIDTH)));

static volatile long sink_long;
static volatile float sink_float;

template <int STREAMS> static void read_all(const char* data, long bytes) {
    Longs a = {}, b = {}, c = {}, d = {};
    const long part = bytes / STREAMS / (4 * WIDTH) * (4 * WIDTH);
    for (long i = 0; i < part; i += 4 * WIDTH) {
#pragma GCC unroll 4
        for (int s = 0; s < STREAMS; s++) {
            const char* at = data + s * part + i;
            __builtin_prefetch(at + 2048);
            const Longs* v = (const Longs*)at;
            a += v[0]; b += v[1]; c += v[2]; d += v[3];
        }
    }
    sink_long = ((a + b) + (c + d))[0];
}

// Twelve accumulators: two units, four cycles of latency, and some to spare.
#define TWELVE(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)
// Each starts elsewhere, or the compiler would see that they are all the same and keep one.
#define START(n) Accumulator r##n = {}; r##n += n;
#define SUM(n) total += (float)r##n[0];

// Each returns its operations per round.
static double loop_f32(long rounds) {
    typedef Floats Accumulator;
    Floats scale = {}, shift = {};
    scale += 0.75f + (float)sink_float * 0; shift += 0.5f + (float)sink_float * 0;
    TWELVE(START)
    for (long i = 0; i < rounds; i++) {
#define STEP(n) r##n = r##n * scale + shift;
        TWELVE(STEP)
#undef STEP
    }
    float total = 0;
    TWELVE(SUM)
    sink_float = total * 0;
    return 12.0 * 2 * (WIDTH / 4);
}

static double loop_bf16(long rounds) {
#if defined(__AVX512BF16__) && WIDTH == 64
    typedef Floats Accumulator;
    Ints one = {}; one += 0x3f803f80;
    TWELVE(START)
    for (long i = 0; i < rounds; i++) {
#define STEP(n) asm("vdpbf16ps %1, %1, %0" : "+v"(r##n) : "v"(one));
        TWELVE(STEP)
#undef STEP
    }
    float total = 0;
    TWELVE(SUM)
    sink_float = total * 0;
    return 12.0 * 2 * (WIDTH / 2);
#else
    return 0;
#endif
}

static double loop_int8(long rounds) {
#if defined(__AVX512VNNI__) && WIDTH == 64
#define DOT "vpdpbusd %1, %1, %0"
#elif defined(__AVXVNNI__) && WIDTH == 32
#define DOT "{vex} vpdpbusd %1, %1, %0"
#endif
#if defined(DOT)
    typedef Ints Accumulator;
    Ints one = {}; one += 0x01010101;
    TWELVE(START)
    for (long i = 0; i < rounds; i++) {
#define STEP(n) asm(DOT : "+v"(r##n) : "v"(one));
        TWELVE(STEP)
#undef STEP
    }
    float total = 0;
    TWELVE(SUM)
    sink_float = total * 0;
    return 12.0 * 2 * WIDTH;
#else
    return 0;
#endif
}

extern "C" void probe_nothing(void*, long, void*) {}

extern "C" void probe_touch(char* data, long bytes) {
    for (long i = 0; i < bytes; i += 4096) ((volatile char*)data)[i] = 1;
}

// Nanoseconds of each pass, from when all have arrived until all are done; each member notes its own.
extern "C" void probe_read(Team* team, const char* data, long bytes, int streams, int passes, long* ns) {
    for (int pass = 0; pass < passes; pass++) {
        wait_for_all(team);
        long start = now();
        if (streams == 4) read_all<4>(data, bytes); else read_all<1>(data, bytes);
        wait_for_all(team);
        ns[pass] = now() - start;
    }
}

// The same for arithmetic; returns the operations of one pass of one thread, 0 without the instruction.
extern "C" double probe_compute(Team* team, int kind, long rounds, int passes, long* ns) {
    double operations = 0;
    for (int pass = 0; pass < passes; pass++) {
        wait_for_all(team);
        long start = now();
        operations = kind == 0 ? loop_f32(rounds) : kind == 1 ? loop_bf16(rounds) : loop_int8(rounds);
        wait_for_all(team);
        ns[pass] = now() - start;
    }
    return operations * rounds;
}

extern "C" void probe_barriers(Team* team, int count, int passes, long* ns) {
    for (int pass = 0; pass < passes; pass++) {
        long start = now();
        for (int i = 0; i < count; i++) wait_for_all(team);
        ns[pass] = now() - start;
    }
}
"""
