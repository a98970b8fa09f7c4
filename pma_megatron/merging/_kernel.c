/* The weighted sum of one block, all sources and all outputs in one pass over the memory.
 *
 * `merging/sums.py` calls it, says what it computes, and has the same in torch. What makes the two
 * equal to the bit, on every instruction set:
 *   - the first source that counts is multiplied, every other is added by a fused multiply-add;
 *   - a division is a division, not a product with the reciprocal;
 *   - rounding is to nearest, ties to even; a NaN stays a NaN, its payload is nobody's promise.
 * So: no -ffast-math, and -ffp-contract=off (setup.py), that nothing is fused but what says so.
 *
 * A block is worked on in chunks whose sums stay in the first-level cache. The loops are plain C for
 * the compiler to vectorise; they are compiled once per instruction set, by inlining them into a
 * function that has it (`average_avx2`, ...).
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <errno.h>
#include <math.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define ON_X86 1
#include <cpuid.h>
#include <immintrin.h>
#else
#define ON_X86 0
#endif

#define INLINE static inline __attribute__((always_inline))
#define TARGET_AVX2 "avx2,fma,f16c"
#define AVX512_PARTS "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#ifdef __clang__
#define TARGET_AVX512 AVX512_PARTS
#else
#define TARGET_AVX512 AVX512_PARTS ",prefer-vector-width=512" /* clang drops all for this word */
#endif
#define CHUNK 2048
#define MAX_FAST 64 /* sources that the short way below takes */

enum set { PORTABLE, AVX2, AVX512, SETS };
static const char *SET_NAMES[SETS] = {"portable", "avx2", "avx512"};

/*
 * How this thread rounds. What an application has set (torch.set_flush_denormal) must not change an
 * average: within a call numbers are rounded to nearest, and the smallest are not taken for zeros.
 */
static uint64_t rounding(void) {
#if ON_X86
    return _mm_getcsr();
#elif defined(__aarch64__)
    uint64_t found;
    __asm__ volatile("mrs %0, fpcr" : "=r"(found));
    return found;
#else
    return 0;
#endif
}

static void round_as(uint64_t wanted) {
#if ON_X86
    _mm_setcsr((unsigned)wanted);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(wanted) : "memory");
#else
    (void)wanted;
#endif
}

#define ROUND_EXACTLY (ON_X86 ? 0x1f80 : 0) /* the default of both processors */

/* One output: how it is summed, and where it goes. */
typedef struct {
    const double *weights; /* one per source; 0 leaves a source out */
    double divisor;
    int wide; /* summed in float64 */
    Py_ssize_t first_out, outs;
} Sum;

typedef struct {
    char kind; /* b bfloat16, h float16, f float32, d float64 */
    char *data;
} Array;

typedef struct {
    Py_ssize_t numel, sources, sums;
    Array *in, *out;
    Sum *sum;
} Job;

/* Bits. */

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float from_bfloat16(uint16_t bits) { return as_float((uint32_t)bits << 16); }

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits = float_bits(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

/* float16 by integers, for processors without an instruction for it. */

INLINE float from_float16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    uint32_t normal = (rest << 13) + ((127 - 15) << 23);
    uint32_t special = (rest << 13) | 0x7f800000;
    uint32_t small = float_bits((float)(int32_t)rest * 0x1p-24f);
    uint32_t bits = rest >= 0x7c00 ? special : rest < 0x0400 ? small : normal;
    return as_float(sign | bits);
}

INLINE uint16_t to_float16(float value) {
    uint32_t bits = float_bits(value), sign = (bits >> 16) & 0x8000;
    uint32_t rest = bits & 0x7fffffff;
    /* Subnormal: adding 1/2 makes the hardware round at 2^-24, the last bit of a float16 there. */
    uint32_t small = float_bits(as_float(rest < 0x38800000 ? rest : 0) + 0.5f) - 0x3f000000;
    uint32_t normal = (rest - 0x38000000 + 0x0fff + ((rest >> 13) & 1)) >> 13;
    uint32_t half = rest > 0x7f800000    ? 0x7e00
                    : rest >= 0x477ff000 ? 0x7c00
                    : rest < 0x38800000  ? small
                                         : normal;
    return (uint16_t)(sign | half);
}

/* Fused multiply-add: x * w + a, rounded once. */

INLINE float fused(float x, float w, float a, int has_fma) {
#ifdef FP_FAST_FMAF
    has_fma = 1;
#endif
    if (has_fma) return __builtin_fmaf(x, w, a);
    /* The product of two float32 is exact in float64. Its sum with `a` is rounded to odd: to the
     * neighbour with an odd last bit unless it is exact. Then rounding to float32, which has less
     * than 53 - 1 bits, gives what rounding the exact sum would (Boldo and Melquiond, "Emulation of
     * a FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008). */
    double product = (double)x * (double)w, sum = product + (double)a;
    double part = sum - product;
    double error = (product - (sum - part)) + ((double)a - part);
    int64_t bits;
    memcpy(&bits, &sum, sizeof bits);
    int64_t inexact = (error < 0) | (error > 0), even = ~bits & 1;
    int64_t step = (error > 0) == (sum > 0) ? 1 : -1;
    bits += (inexact & even) * step;
    memcpy(&sum, &bits, sizeof sum);
    return (float)sum;
}

INLINE double fused_wide(double x, double w, double a) { return __builtin_fma(x, w, a); }

/* A power of two has an exact reciprocal, and x times it is x divided, rounded as a division is. */

INLINE int has_exact_reciprocal(float d) {
    return !(float_bits(d) & 0x7fffff) && d >= 0x1p-64f && d <= 0x1p64f;
}

INLINE void divide(float *values, Py_ssize_t n, float d) {
    float reciprocal = 1.0f / d;
    if (has_exact_reciprocal(d))
        for (Py_ssize_t i = 0; i < n; i++) values[i] *= reciprocal;
    else
        for (Py_ssize_t i = 0; i < n; i++) values[i] /= d;
}

/* One chunk of one source into a sum. `begun` is 0 for the first, which the sum becomes. */

#define ADD(NAME, REAL, STORED, LOAD, FUSED)                                                      \
    INLINE void NAME(                                                                             \
        REAL *restrict sum, const STORED *restrict x, Py_ssize_t n, REAL w, int begun, int fma    \
    ) {                                                                                           \
        (void)fma;                                                                                \
        if (begun)                                                                                \
            for (Py_ssize_t i = 0; i < n; i++) sum[i] = FUSED;                                    \
        else                                                                                      \
            for (Py_ssize_t i = 0; i < n; i++) sum[i] = (REAL)LOAD * w;                           \
    }

ADD(add_bfloat16, float, uint16_t, from_bfloat16(x[i]), fused(from_bfloat16(x[i]), w, sum[i], fma))
ADD(add_float32, float, float, x[i], fused(x[i], w, sum[i], fma))
ADD(add_wide_bfloat16, double, uint16_t, from_bfloat16(x[i]),
    fused_wide(from_bfloat16(x[i]), w, sum[i]))
ADD(add_wide_float32, double, float, x[i], fused_wide(x[i], w, sum[i]))
ADD(add_wide_float64, double, double, x[i], fused_wide(x[i], w, sum[i]))

/* float16 chunks, by the processor's instruction where it has one. */

INLINE void halves_to_floats(float *restrict out, const uint16_t *restrict in, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i++) out[i] = from_float16(in[i]);
}

INLINE void floats_to_halves(uint16_t *restrict out, const float *restrict in, Py_ssize_t n) {
    for (Py_ssize_t i = 0; i < n; i++) out[i] = to_float16(in[i]);
}

#if ON_X86
__attribute__((target(TARGET_AVX2))) static void halves_to_floats_f16c(
    float *restrict out, const uint16_t *restrict in, Py_ssize_t n
) {
    Py_ssize_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(in + i))));
    for (; i < n; i++) out[i] = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(in[i])));
}

__attribute__((target(TARGET_AVX2))) static void floats_to_halves_f16c(
    uint16_t *restrict out, const float *restrict in, Py_ssize_t n
) {
    Py_ssize_t i = 0;
    for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(
            (__m128i *)(out + i),
            _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT)
        );
    for (; i < n; i++)
        out[i] = (uint16_t)_mm_cvtsi128_si32(
            _mm_cvtps_ph(_mm_set_ss(in[i]), _MM_FROUND_TO_NEAREST_INT)
        );
}
#else
#define halves_to_floats_f16c halves_to_floats
#define floats_to_halves_f16c floats_to_halves
#endif

/* One chunk of one output. Returns whether every average in it is finite, as it is stored too. */

INLINE void load_halves(float *out, const Array *in, Py_ssize_t at, Py_ssize_t n, int set) {
    if (set == PORTABLE)
        halves_to_floats(out, (const uint16_t *)in->data + at, n);
    else
        halves_to_floats_f16c(out, (const uint16_t *)in->data + at, n);
}

INLINE void add_narrow(
    float *sum, const Array *in, Py_ssize_t at, Py_ssize_t n, float w, int begun, int set
) {
    float loaded[CHUNK];
    switch (in->kind) {
    case 'b':
        add_bfloat16(sum, (const uint16_t *)in->data + at, n, w, begun, set != PORTABLE);
        break;
    case 'h':
        load_halves(loaded, in, at, n, set);
        add_float32(sum, loaded, n, w, begun, set != PORTABLE);
        break;
    default:
        add_float32(sum, (const float *)in->data + at, n, w, begun, set != PORTABLE);
    }
}

INLINE void add_wide(
    double *sum, const Array *in, Py_ssize_t at, Py_ssize_t n, double w, int begun, int set
) {
    float loaded[CHUNK];
    switch (in->kind) {
    case 'b':
        add_wide_bfloat16(sum, (const uint16_t *)in->data + at, n, w, begun, 1);
        break;
    case 'h':
        load_halves(loaded, in, at, n, set);
        add_wide_float32(sum, loaded, n, w, begun, 1);
        break;
    case 'd':
        add_wide_float64(sum, (const double *)in->data + at, n, w, begun, 1);
        break;
    default:
        add_wide_float32(sum, (const float *)in->data + at, n, w, begun, 1);
    }
}

INLINE uint32_t greatest_bits(const float *values, Py_ssize_t n) {
    uint32_t greatest = 0, bits;
    for (Py_ssize_t i = 0; i < n; i++) {
        bits = float_bits(values[i]) & 0x7fffffff;
        greatest = bits > greatest ? bits : greatest;
    }
    return greatest;
}

/* Whether a float32 of these bits, without its sign, is finite when it is rounded to `kind`. */
INLINE int fits(uint32_t bits, char kind) {
    return bits < (kind == 'h' ? 0x477ff000 : kind == 'b' ? 0x7f7f8000 : 0x7f800000);
}

INLINE void store(
    const Array *out, const float *values, const double *wide, Py_ssize_t at, Py_ssize_t n, int set
) {
    uint16_t *halves = (uint16_t *)out->data + at;
    switch (out->kind) {
    case 'b':
        for (Py_ssize_t i = 0; i < n; i++) halves[i] = to_bfloat16(values[i]);
        break;
    case 'h':
        if (set == PORTABLE)
            floats_to_halves(halves, values, n);
        else
            floats_to_halves_f16c(halves, values, n);
        break;
    case 'd':
        memcpy((double *)out->data + at, wide, n * sizeof(double));
        break;
    default:
        memcpy((float *)out->data + at, values, n * sizeof(float));
    }
}

INLINE int all_finite(const double *values, Py_ssize_t n) {
    int finite = 1;
    for (Py_ssize_t i = 0; i < n; i++) finite &= values[i] - values[i] == 0.0;
    return finite;
}

INLINE int chunk(const Job *job, const Sum *how, Py_ssize_t at, Py_ssize_t n, int set) {
    float values[CHUNK];
    double wide[CHUNK];
    int begun = 0;
    for (Py_ssize_t k = 0; k < job->sources; k++) {
        if (how->weights[k] == 0.0) continue;
        if (how->wide)
            add_wide(wide, job->in + k, at, n, how->weights[k], begun, set);
        else
            add_narrow(values, job->in + k, at, n, (float)how->weights[k], begun, set);
        begun = 1;
    }
    if (how->wide) {
        if (!begun) memset(wide, 0, sizeof wide);
        for (Py_ssize_t i = 0; i < n; i++) values[i] = (float)(wide[i] /= how->divisor);
    } else {
        float divisor = (float)how->divisor;
        if (!begun) memset(values, 0, sizeof values);
        if (divisor != 1.0f) divide(values, n, divisor);
    }
    uint32_t greatest = greatest_bits(values, n);
    int finite = how->wide ? all_finite(wide, n) : fits(greatest, 'f');
    for (Py_ssize_t k = how->first_out; k < how->first_out + how->outs; k++) {
        store(job->out + k, values, wide, at, n, set);
        finite &= job->out[k].kind == 'd' || fits(greatest, job->out[k].kind);
    }
    return finite;
}

/* The short way where all sources and the one output are bfloat16: sums stay in registers, and a
 * vector is taken apart into its even and its odd elements, which costs one instruction each.
 *
 * It gives the bits of `chunk`, unless the greatest magnitude that it returns is not finite as a
 * bfloat16: then `chunk` does it again, which knows NaN and Inf. */

typedef struct {
    Py_ssize_t count;
    const uint16_t *data[MAX_FAST];
    float weights[MAX_FAST];
    float divisor, reciprocal; /* 0 where it is not exact */
    uint16_t *out;
} Fast;

#if ON_X86
#define FAST(NAME, TARGET, V, F, VECTOR, PS)                                                       \
    __attribute__((target(TARGET))) static uint32_t NAME(                                          \
        const Fast *job, Py_ssize_t at, Py_ssize_t n                                               \
    ) {                                                                                            \
        const Py_ssize_t wide = (Py_ssize_t)(sizeof(V) / sizeof(uint16_t));                        \
        const V high = PS(set1_epi32)((int)0xffff0000), half = PS(set1_epi32)(0x7fff);             \
        const V one = PS(set1_epi32)(1), sign = PS(set1_epi32)(0x7fffffff);                        \
        const F reciprocal = PS(set1_ps)(job->reciprocal), divisor = PS(set1_ps)(job->divisor);    \
        V greatest = PS(setzero_##VECTOR)();                                                       \
        for (Py_ssize_t i = at; i < at + n; i += 2 * wide) {                                       \
            F sum[4] = {PS(setzero_ps)(), PS(setzero_ps)(), PS(setzero_ps)(), PS(setzero_ps)()};   \
            for (Py_ssize_t k = 0; k < job->count; k++) {                                          \
                const uint16_t *from = job->data[k] + i;                                           \
                const F w = PS(set1_ps)(job->weights[k]);                                          \
                V a = PS(loadu_##VECTOR)((const void *)from);                                      \
                V b = PS(loadu_##VECTOR)((const void *)(from + wide));                             \
                F x[4] = {                                                                         \
                    (F)PS(slli_epi32)(a, 16), (F)(a & high), (F)PS(slli_epi32)(b, 16),             \
                    (F)(b & high)                                                                  \
                };                                                                                 \
                for (int j = 0; j < 4; j++)                                                        \
                    sum[j] = k ? PS(fmadd_ps)(x[j], w, sum[j]) : PS(mul_ps)(x[j], w);              \
            }                                                                                      \
            V bits[4];                                                                             \
            for (int j = 0; j < 4; j++) {                                                          \
                if (job->divisor != 1.0f)                                                          \
                    sum[j] = job->reciprocal != 0.0f ? PS(mul_ps)(sum[j], reciprocal)              \
                                                     : PS(div_ps)(sum[j], divisor);                \
                V all = (V)sum[j];                                                                 \
                greatest = PS(max_epu32)(greatest, (V)(all & sign));                               \
                bits[j] = PS(add_epi32)(                                                           \
                    PS(add_epi32)(all, half), (V)(PS(srli_epi32)(all, 16) & one)                   \
                );                                                                                 \
            }                                                                                      \
            V a = PS(srli_epi32)(bits[0], 16) | (bits[1] & high);                                  \
            V b = PS(srli_epi32)(bits[2], 16) | (bits[3] & high);                                  \
            PS(storeu_##VECTOR)((void *)(job->out + i), a);                                        \
            PS(storeu_##VECTOR)((void *)(job->out + i + wide), b);                                 \
        }                                                                                          \
        uint32_t each[sizeof(V) / sizeof(uint32_t)], most = 0;                                     \
        PS(storeu_##VECTOR)((void *)each, greatest);                                               \
        for (size_t j = 0; j < sizeof(V) / sizeof(uint32_t); j++)                                  \
            most = each[j] > most ? each[j] : most;                                                \
        return most;                                                                               \
    }

#define PS256(NAME) _mm256_##NAME
#define PS512(NAME) _mm512_##NAME
FAST(fast_avx2, TARGET_AVX2, __m256i, __m256, si256, PS256)
FAST(fast_avx512, TARGET_AVX512, __m512i, __m512, si512, PS512)

/* Whether the short way takes this call, and what it needs. */
static int prepare_fast(const Job *job, int set, Fast *fast) {
    const Sum *how = job->sum;
    if (set == PORTABLE || job->sums != 1 || how->wide || how->outs != 1) return 0;
    if (job->out[how->first_out].kind != 'b') return 0;
    fast->count = 0;
    for (Py_ssize_t k = 0; k < job->sources; k++) {
        if (how->weights[k] == 0.0) continue;
        if (job->in[k].kind != 'b' || fast->count == MAX_FAST) return 0;
        fast->data[fast->count] = (const uint16_t *)job->in[k].data;
        fast->weights[fast->count++] = (float)how->weights[k];
    }
    fast->divisor = (float)how->divisor;
    fast->reciprocal = has_exact_reciprocal(fast->divisor) ? 1.0f / fast->divisor : 0.0f;
    fast->out = (uint16_t *)job->out[how->first_out].data;
    return fast->count > 0;
}
#endif

INLINE int average(const Job *job, int set) {
    int finite = 1;
#if ON_X86
    Fast fast;
    const int short_way = prepare_fast(job, set, &fast);
#endif
    for (Py_ssize_t at = 0; at < job->numel; at += CHUNK) {
        Py_ssize_t n = job->numel - at < CHUNK ? job->numel - at : CHUNK;
#if ON_X86
        if (short_way && n == CHUNK) {
            uint32_t most = (set == AVX512 ? fast_avx512 : fast_avx2)(&fast, at, n);
            if (fits(most, 'b')) continue;
        }
#endif
        for (Py_ssize_t k = 0; k < job->sums; k++) finite &= chunk(job, job->sum + k, at, n, set);
    }
    return finite;
}

static int average_portable(const Job *job) { return average(job, PORTABLE); }

#if ON_X86
__attribute__((target(TARGET_AVX2))) static int average_avx2(const Job *job) {
    return average(job, AVX2);
}

__attribute__((target(TARGET_AVX512))) static int average_avx512(const Job *job) {
    return average(job, AVX512);
}

static int (*const AVERAGE[SETS])(const Job *) = {average_portable, average_avx2, average_avx512};

/* By CPUID, not __builtin_cpu_supports: what that links to is missing from some runtimes of clang. */
static int supported(int set) {
    const unsigned wide = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
    unsigned a, b, c, d, kept, high, first = bit_FMA | bit_F16C | bit_AVX | bit_OSXSAVE;
    if (set == PORTABLE) return 1;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & first) != first) return 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return 0;
    __asm__("xgetbv" : "=a"(kept), "=d"(high) : "c"(0)); /* registers that the system saves */
    if (set == AVX2) return (kept & 0x06) == 0x06;
    return (kept & 0xe6) == 0xe6 && (b & wide) == wide;
}
#else
static int (*const AVERAGE[SETS])(const Job *) = {average_portable, NULL, NULL};

static int supported(int set) { return set == PORTABLE; }
#endif

static Py_ssize_t item_bytes(char kind) {
    return kind == 'b' || kind == 'h' ? 2 : kind == 'f' ? 4 : kind == 'd' ? 8 : 0;
}

/* CRC-32 of zips, by carry-less multiplication: V. Gopal et al., "Fast CRC Computation for Generic
 * Polynomials Using PCLMULQDQ Instruction", Intel, 2009. Bits are reflected: bit 31 is x^0. */

#define POLYNOMIAL 0xEDB88320u

static uint32_t crc_table[256];

/* x^n modulo the polynomial. */
static uint32_t power_of_x(int n) {
    uint32_t power = 0x80000000u;
    while (n--) power = power >> 1 ^ (power & 1 ? POLYNOMIAL : 0);
    return power;
}

static uint32_t crc_of_bytes(uint32_t crc, const unsigned char *data, size_t n) {
    while (n--) crc = crc >> 8 ^ crc_table[(crc ^ *data++) & 255];
    return crc;
}

#if ON_X86
/* What moves 128 bits of a message 128, 512 or 2048 bits on: for its first and its last 64. */
static uint64_t by_128[2], by_512[2], by_2048[2];

static void fill_fold(uint64_t fold[2], int bits) {
    fold[0] = (uint64_t)power_of_x(bits + 32) << 1;
    fold[1] = (uint64_t)power_of_x(bits - 32) << 1;
}

#define CLMUL "pclmul,sse4.1"

__attribute__((target(CLMUL))) static inline __m128i folded(__m128i x, __m128i by, __m128i next) {
    __m128i first = _mm_clmulepi64_si128(x, by, 0x00), last = _mm_clmulepi64_si128(x, by, 0x11);
    return _mm_xor_si128(_mm_xor_si128(first, last), next);
}

__attribute__((target(CLMUL))) static inline __m128i loaded(const unsigned char *data) {
    return _mm_loadu_si128((const void *)data);
}

/* The CRC of 16 bytes that stand for all before them, and of what follows. */
__attribute__((target(CLMUL))) static uint32_t crc_tail(
    __m128i x, const unsigned char *data, size_t n
) {
    unsigned char last[16];
    __m128i by = loaded((const unsigned char *)by_128);
    for (; n >= 16; data += 16, n -= 16) x = folded(x, by, loaded(data));
    _mm_storeu_si128((void *)last, x);
    return crc_of_bytes(crc_of_bytes(0, last, sizeof last), data, n);
}

__attribute__((target(CLMUL))) static uint32_t crc_sse(
    uint32_t crc, const unsigned char *data, size_t n
) {
    if (n < 64) return crc_of_bytes(crc, data, n);
    __m128i x[4], by = loaded((const unsigned char *)by_512);
    for (int k = 0; k < 4; k++) x[k] = loaded(data + 16 * k);
    x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128((int)crc));
    for (data += 64, n -= 64; n >= 64; data += 64, n -= 64)
        for (int k = 0; k < 4; k++) x[k] = folded(x[k], by, loaded(data + 16 * k));
    by = loaded((const unsigned char *)by_128);
    for (int k = 1; k < 4; k++) x[k] = folded(x[k - 1], by, x[k]);
    return crc_tail(x[3], data, n);
}

#define WIDE_CLMUL AVX512_PARTS ",vpclmulqdq,pclmul"

__attribute__((target(WIDE_CLMUL))) static inline __m512i folded_wide(
    __m512i x, __m512i by, __m512i next
) {
    __m512i first = _mm512_clmulepi64_epi128(x, by, 0x00);
    __m512i last = _mm512_clmulepi64_epi128(x, by, 0x11);
    return _mm512_ternarylogic_epi64(first, last, next, 0x96);
}

__attribute__((target(WIDE_CLMUL))) static uint32_t crc_avx512(
    uint32_t crc, const unsigned char *data, size_t n
) {
    if (n < 256) return crc_sse(crc, data, n);
    __m512i x[4], by = _mm512_broadcast_i32x4(loaded((const unsigned char *)by_2048));
    for (int k = 0; k < 4; k++) x[k] = _mm512_loadu_si512((const void *)(data + 64 * k));
    x[0] = _mm512_xor_si512(x[0], _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)crc)));
    for (data += 256, n -= 256; n >= 256; data += 256, n -= 256)
        for (int k = 0; k < 4; k++)
            x[k] = folded_wide(x[k], by, _mm512_loadu_si512((const void *)(data + 64 * k)));
    by = _mm512_broadcast_i32x4(loaded((const unsigned char *)by_512));
    for (int k = 1; k < 4; k++) x[k] = folded_wide(x[k - 1], by, x[k]);
    for (; n >= 64; data += 64, n -= 64)
        x[3] = folded_wide(x[3], by, _mm512_loadu_si512((const void *)data));
    __m128i narrow = loaded((const unsigned char *)by_128);
    __m128i y = _mm512_castsi512_si128(x[3]);
    y = folded(y, narrow, _mm512_extracti32x4_epi32(x[3], 1));
    y = folded(y, narrow, _mm512_extracti32x4_epi32(x[3], 2));
    y = folded(y, narrow, _mm512_extracti32x4_epi32(x[3], 3));
    return crc_tail(y, data, n);
}
#endif

typedef uint32_t (*Crc)(uint32_t, const unsigned char *, size_t);
static Crc crc_of[SETS]; /* by the instructions of each set; NULL where there is no fast one */
static const char *crc_names[SETS];

static void choose_crc(void) {
    for (int byte = 0; byte < 256; byte++) {
        uint32_t crc = (uint32_t)byte;
        for (int bit = 0; bit < 8; bit++) crc = crc >> 1 ^ (crc & 1 ? POLYNOMIAL : 0);
        crc_table[byte] = crc;
    }
#if ON_X86
    unsigned a, b, c, d;
    fill_fold(by_128, 128);
    fill_fold(by_512, 512);
    fill_fold(by_2048, 2048);
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_PCLMUL) || !(c & bit_SSE4_1)) return;
    for (int set = 0; set < SETS; set++) {
        crc_of[set] = crc_sse;
        crc_names[set] = "sse";
    }
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (c & 1u << 10)) { /* VPCLMULQDQ */
        crc_of[AVX512] = crc_avx512;
        crc_names[AVX512] = "avx512";
    }
#endif
}

static uint32_t crc32(Crc crc_by, uint32_t crc, const char *data, size_t n) {
    return ~crc_by(~crc, (const unsigned char *)data, n);
}

/* A range of elements from files to files: read, compared, summed, rounded, written, step by step,
 * each step of a size that stays in a core's cache from the first of these to the last. */

enum outcome { DONE, NOT_READ, NOT_FINITE, NOT_PROVED, NOT_WRITTEN };

/* Bytes in a row of an open file, and their CRC-32. */
typedef struct {
    int descriptor;
    long long offset;
    uint32_t crc;
} Place;

typedef struct {
    Job job; /* of a step; its arrays are in the caller's buffer */
    Place *from, *to;
    Py_ssize_t outs;
    Crc crc;
    int set, proofs, compares; /* whether CRC-32 of what is read are wanted */
    Job proof; /* one source, rounded to what is stored beside it */
    Array stored;
    Place stored_at;
    Py_ssize_t numel, step;
    /* What came of it: the number of a source (the stored one is the one after the last) or of an
     * output, and why; 0 if the file ended. */
    enum outcome outcome;
    Py_ssize_t at, which;
    int error;
} Stream;

static int read_all(Place *place, Py_ssize_t at, char *into, size_t bytes, Crc crc) {
    for (size_t done = 0; done < bytes;) {
        ssize_t got = pread(place->descriptor, into + done, bytes - done, place->offset + at + done);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
            if (got == 0) errno = 0;
            return -1;
        }
        done += (size_t)got;
    }
    if (crc) place->crc = crc32(crc, place->crc, into, bytes);
    return 0;
}

static int write_all(Place *place, Py_ssize_t at, const char *data, size_t bytes, Crc crc) {
    place->crc = crc32(crc, place->crc, data, bytes);
    for (size_t done = 0; done < bytes;) {
        ssize_t got = pwrite(place->descriptor, data + done, bytes - done, place->offset + at + done);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
            if (got == 0) errno = ENOSPC;
            return -1;
        }
        done += (size_t)got;
    }
    return 0;
}

static void stopped(Stream *stream, enum outcome outcome, Py_ssize_t which) {
    stream->error = outcome == NOT_READ || outcome == NOT_WRITTEN ? errno : 0;
    stream->outcome = outcome;
    stream->which = which;
}

static int stream_step(Stream *stream, Py_ssize_t n) {
    Job *job = &stream->job;
    Py_ssize_t at = stream->at, bytes;
    const Crc wanted = stream->compares ? stream->crc : NULL;
    job->numel = stream->proof.numel = n;
    for (Py_ssize_t k = 0; k < job->sources; k++) {
        bytes = item_bytes(job->in[k].kind);
        if (read_all(stream->from + k, at * bytes, job->in[k].data, n * bytes, wanted))
            return stopped(stream, NOT_READ, k), -1;
    }
    if (stream->proofs) {
        bytes = item_bytes(stream->stored.kind);
        if (read_all(&stream->stored_at, at * bytes, stream->stored.data, n * bytes, wanted))
            return stopped(stream, NOT_READ, job->sources), -1;
        AVERAGE[stream->set](&stream->proof);
        if (memcmp(stream->proof.out->data, stream->stored.data, n * bytes))
            return stopped(stream, NOT_PROVED, 0), -1;
    }
    if (!AVERAGE[stream->set](job)) return stopped(stream, NOT_FINITE, 0), -1;
    for (Py_ssize_t k = 0; k < stream->outs; k++) {
        bytes = item_bytes(job->out[k].kind);
        if (write_all(stream->to + k, at * bytes, job->out[k].data, n * bytes, stream->crc))
            return stopped(stream, NOT_WRITTEN, k), -1;
    }
    return 0;
}

static void stream_all(Stream *stream) {
    for (stream->at = 0; stream->at < stream->numel; stream->at += stream->step) {
        Py_ssize_t left = stream->numel - stream->at;
        if (stream_step(stream, left < stream->step ? left : stream->step)) return;
    }
}

/* Python. */

/* How many sets this processor has, asked once: a virtual machine answers CPUID in microseconds. */
static int available = 0;

typedef struct {
    Job job;
    Py_buffer *views; /* of the sources, then of the outputs */
    double *weights;
    Py_ssize_t held;
} Call;

enum use { LOOKED_AT, FILLED };

static int hold(Call *call, PyObject *object, char kind, enum use use, Array *array) {
    Py_buffer *view = call->views + call->held;
    Py_ssize_t bytes = item_bytes(kind);
    if (!bytes) {
        PyErr_Format(PyExc_ValueError, "kind '%c' is none of b, h, f, d", kind);
        return -1;
    }
    if (PyObject_GetBuffer(object, view, PyBUF_SIMPLE)) return -1;
    call->held++;
    if (use == FILLED && view->readonly) {
        PyErr_Format(
            PyExc_TypeError, "a buffer of %zd bytes is read-only, and it is to be written to",
            view->len
        );
        return -1;
    }
    if (view->len / bytes < call->job.numel || (uintptr_t)view->buf % bytes) {
        PyErr_Format(
            PyExc_ValueError, "a buffer of %zd bytes is too short, or not aligned, for %zd '%c'",
            view->len, call->job.numel, kind
        );
        return -1;
    }
    array->kind = kind;
    array->data = view->buf;
    return 0;
}

/* Buffers of a tuple, with a letter of `kinds` each. */
static int hold_all(Call *call, PyObject *tuple, const char *kinds, enum use use, Array *arrays) {
    Py_ssize_t count = PyTuple_Size(tuple);
    if (count < 0) return -1;
    if ((Py_ssize_t)strlen(kinds) != count) {
        PyErr_Format(PyExc_ValueError, "%zd buffers, and kinds '%s'", count, kinds);
        return -1;
    }
    for (Py_ssize_t k = 0; k < count; k++)
        if (hold(call, PyTuple_GetItem(tuple, k), kinds[k], use, arrays + k)) return -1;
    return 0;
}

static int read_sum(Call *call, PyObject *described, Sum *sum, double *weights) {
    PyObject *given, *outs;
    const char *kinds;
    Py_ssize_t sources = call->job.sources;
    if (!PyArg_ParseTuple(
            described, "O!dpO!s", &PyTuple_Type, &given, &sum->divisor, &sum->wide, &PyTuple_Type,
            &outs, &kinds
        ))
        return -1;
    if (PyTuple_Size(given) != sources) {
        PyErr_Format(
            PyExc_ValueError, "%zd weights for %zd sources", PyTuple_Size(given), sources
        );
        return -1;
    }
    for (Py_ssize_t k = 0; k < sources; k++) {
        weights[k] = PyFloat_AsDouble(PyTuple_GetItem(given, k));
        if (PyErr_Occurred()) return -1;
        if (call->job.in[k].kind == 'd' && !sum->wide) {
            PyErr_SetString(PyExc_ValueError, "float64 is not summed in float32");
            return -1;
        }
    }
    if (strchr(kinds, 'd') && !sum->wide) {
        PyErr_SetString(PyExc_ValueError, "a float32 sum has no float64 output");
        return -1;
    }
    sum->weights = weights;
    sum->first_out = call->held - sources;
    sum->outs = PyTuple_Size(outs);
    return hold_all(call, outs, kinds, FILLED, call->job.out + sum->first_out);
}

static Py_ssize_t count_outs(PyObject *sums) {
    Py_ssize_t total = 0;
    for (Py_ssize_t k = 0; k < PyTuple_Size(sums); k++) {
        PyObject *sum = PyTuple_GetItem(sums, k);
        if (!PyTuple_Check(sum) || PyTuple_Size(sum) != 5 || !PyTuple_Check(PyTuple_GetItem(sum, 3))) {
            PyErr_SetString(PyExc_TypeError, "a sum is (weights, divisor, wide, outputs, kinds)");
            return -1;
        }
        total += PyTuple_Size(PyTuple_GetItem(sum, 3));
    }
    return total;
}

static void let_go(Call *call) {
    while (call->held) PyBuffer_Release(call->views + --call->held);
    PyMem_Free(call->views);
    PyMem_Free(call->weights);
    PyMem_Free(call->job.in);
    PyMem_Free(call->job.out);
    PyMem_Free(call->job.sum);
}

static int read_call(
    Call *call, PyObject *sources, const char *kinds, enum use of_sources, PyObject *sums
) {
    Job *job = &call->job;
    Py_ssize_t outs = count_outs(sums);
    if (outs < 0) return -1;
    if (job->numel < 0) {
        PyErr_Format(PyExc_ValueError, "%zd elements", job->numel);
        return -1;
    }
    job->sources = PyTuple_Size(sources);
    job->sums = PyTuple_Size(sums);
    call->views = PyMem_Calloc(job->sources + outs + 1, sizeof(Py_buffer));
    call->weights = PyMem_Calloc(job->sources * job->sums + 1, sizeof(double));
    job->in = PyMem_Calloc(job->sources + 1, sizeof(Array));
    job->out = PyMem_Calloc(outs + 1, sizeof(Array));
    job->sum = PyMem_Calloc(job->sums + 1, sizeof(Sum));
    if (!call->views || !call->weights || !job->in || !job->out || !job->sum) {
        PyErr_NoMemory();
        return -1;
    }
    if (hold_all(call, sources, kinds, of_sources, job->in)) return -1;
    for (Py_ssize_t k = 0; k < job->sums; k++)
        if (read_sum(
                call, PyTuple_GetItem(sums, k), job->sum + k, call->weights + k * job->sources
            ))
            return -1;
    return 0;
}

PyDoc_STRVAR(
    average_doc,
    "average(set, numel, sources, kinds, sums) -> bool\n\n"
    "Weighted sums of the first `numel` elements of all sources, oldest first.\n\n"
    "set: number in INSTRUCTION_SETS. sources: tuple of buffers, aligned to their elements.\n"
    "kinds: a letter per source: b bfloat16, h float16, f float32, d float64.\n"
    "sums: a tuple per output: weights (float per source; 0 leaves it out), divisor, whether it\n"
    "is summed in float64, tuple of writable buffers, and a letter for each of them.\n\n"
    "Returns whether every average is finite, as it is summed and as it is stored. Releases the "
    "GIL."
);

static PyObject *py_average(PyObject *module, PyObject *arguments) {
    PyObject *sources, *sums, *result = NULL;
    const char *kinds;
    int set, finite;
    Call call = {0};
    (void)module;
    if (!PyArg_ParseTuple(
            arguments, "inO!sO!", &set, &call.job.numel, &PyTuple_Type, &sources, &kinds,
            &PyTuple_Type, &sums
        ))
        return NULL;
    if (set < 0 || set >= available) {
        PyErr_Format(PyExc_ValueError, "this processor has no instruction set %d", set);
        return NULL;
    }
    if (!read_call(&call, sources, kinds, LOOKED_AT, sums)) {
        Py_BEGIN_ALLOW_THREADS
        const uint64_t before = rounding();
        round_as(ROUND_EXACTLY);
        finite = AVERAGE[set](&call.job);
        round_as(before);
        Py_END_ALLOW_THREADS
        result = PyBool_FromLong(finite);
    }
    let_go(&call);
    return result;
}

/* (descriptor, offset) of every source, then of every output. */
static int read_places(PyObject *tuple, Place *places, Py_ssize_t count) {
    if (PyTuple_Size(tuple) != count) {
        PyErr_Format(PyExc_ValueError, "%zd places for %zd buffers", PyTuple_Size(tuple), count);
        return -1;
    }
    for (Py_ssize_t k = 0; k < count; k++) {
        PyObject *place = PyTuple_GetItem(tuple, k);
        if (!PyTuple_Check(place)) {
            PyErr_SetString(PyExc_TypeError, "a place is (descriptor, offset)");
            return -1;
        }
        if (!PyArg_ParseTuple(place, "iL", &places[k].descriptor, &places[k].offset)) return -1;
    }
    return 0;
}

/* What of the job is compared with what is stored beside it: (source, kind, buffer for what is
 * stored, buffer for what it should be, (descriptor, offset)). */
static int read_proof(Stream *stream, Call *call, Call *own, PyObject *described) {
    static const double one = 1.0;
    static Sum itself = {&one, 1.0, 0, 0, 1};
    PyObject *stored, *rounded;
    Py_ssize_t number;
    int kind;
    Array *arrays = own->job.out;
    if (!PyTuple_Check(described)) {
        PyErr_SetString(PyExc_TypeError, "a proof is (source, kind, stored, rounded, place)");
        return -1;
    }
    if (!PyArg_ParseTuple(
            described, "nCOO(iL)", &number, &kind, &stored, &rounded,
            &stream->stored_at.descriptor, &stream->stored_at.offset
        ))
        return -1;
    if (number < 0 || number >= call->job.sources || call->job.in[number].kind == 'd') {
        PyErr_Format(PyExc_ValueError, "source %zd is not one to prove", number);
        return -1;
    }
    if (kind == 'd' || kind > 127) { /* rounded from a float32 sum, which has no float64 */
        PyErr_SetString(PyExc_ValueError, "what proves a source is of kind b, h or f");
        return -1;
    }
    own->job.numel = call->job.numel;
    if (hold(own, stored, (char)kind, FILLED, arrays)) return -1;
    if (hold(own, rounded, (char)kind, FILLED, arrays + 1)) return -1;
    stream->proofs = 1;
    stream->stored = arrays[0];
    stream->proof = (Job){call->job.numel, 1, 1, call->job.in + number, arrays + 1, &itself};
    return 0;
}

static PyObject *crcs_of(const Place *places, Py_ssize_t count) {
    PyObject *list = PyList_New(0);
    for (Py_ssize_t k = 0; list && k < count; k++) {
        PyObject *crc = PyLong_FromUnsignedLong(places[k].crc);
        int failed = !crc || PyList_Append(list, crc);
        Py_XDECREF(crc);
        if (failed) Py_CLEAR(list);
    }
    return list;
}

PyDoc_STRVAR(
    stream_doc,
    "stream(set, numel, step, sources, kinds, sums, places, proof, compares)\n"
    "    -> (outcome, at, which, errno, crcs, crc)\n\n"
    "`average` of `numel` elements, `step` at a time, from files to files.\n\n"
    "sources, kinds, sums: as for `average`; all buffers are written to, and have room for `step`\n"
    "elements.\n"
    "places: tuple of (descriptor, offset in bytes), one per source, then one per output.\n"
    "proof: None, or (number of a source, letter of a dtype: b, h or f, two writable buffers of\n"
    "that dtype, (descriptor, offset)): the source, rounded to it, must be what is stored there.\n"
    "compares: whether CRC-32 of what is read are wanted.\n\n"
    "outcome: 0 done; 1 source `which` could not be read (errno, 0 if its file ended; the number\n"
    "after the last is the proof's); 2 not finite; 3 not proved; 4 output `which` could not be\n"
    "written; `at` is the first element of the step that was not done. crcs: CRC-32 of all that\n"
    "was read and written, a number per place; crc: of what proves. Releases the GIL."
);

static PyObject *py_stream(PyObject *module, PyObject *arguments) {
    PyObject *sources, *sums, *places, *proof, *result = NULL, *crcs;
    const char *kinds;
    Call call = {0}, own = {0};
    Stream stream = {0};
    Py_buffer views[3] = {{0}};
    Array arrays[2] = {{0}};
    Place *all = NULL;
    (void)module;
    if (!PyArg_ParseTuple(
            arguments, "innO!sO!O!Op", &stream.set, &stream.numel, &stream.step, &PyTuple_Type,
            &sources, &kinds, &PyTuple_Type, &sums, &PyTuple_Type, &places, &proof,
            &stream.compares
        ))
        return NULL;
    if (stream.set < 0 || stream.set >= available || !crc_of[stream.set]) {
        PyErr_Format(
            PyExc_ValueError, "this processor has no instruction set %d, or no fast CRC-32",
            stream.set
        );
        return NULL;
    }
    if (stream.step <= 0 || stream.numel < 0) {
        PyErr_Format(PyExc_ValueError, "%zd elements, %zd at a time", stream.numel, stream.step);
        return NULL;
    }
    stream.crc = crc_of[stream.set];
    call.job.numel = stream.step;
    own.views = views;
    own.job.out = arrays;
    if (read_call(&call, sources, kinds, FILLED, sums)) goto end;
    Py_ssize_t outs = call.held - call.job.sources;
    all = PyMem_Calloc(call.held + 1, sizeof(Place));
    if (!all) {
        PyErr_NoMemory();
        goto end;
    }
    if (read_places(places, all, call.held)) goto end;
    if (proof != Py_None && read_proof(&stream, &call, &own, proof)) goto end;
    stream.job = call.job;
    stream.outs = outs;
    stream.from = all;
    stream.to = all + call.job.sources;
    Py_BEGIN_ALLOW_THREADS
    const uint64_t before = rounding();
    round_as(ROUND_EXACTLY);
    stream_all(&stream);
    round_as(before);
    Py_END_ALLOW_THREADS
    crcs = crcs_of(all, call.held);
    if (crcs)
        result = Py_BuildValue(
            "inniNk", (int)stream.outcome, stream.at, stream.which, stream.error, crcs,
            (unsigned long)stream.stored_at.crc
        );
end:
    while (own.held) PyBuffer_Release(views + --own.held);
    PyMem_Free(all);
    let_go(&call);
    return result;
}

/* A tuple of the sets that this processor has: their own names, or of what else is known by set. */
static int add_names(PyObject *module, const char *what, const char *const *names_of) {
    PyObject *names = PyTuple_New(0), *joined, *one;
    for (int set = 0; names && set < available; set++) {
        one = Py_BuildValue("(z)", names_of[set]);
        joined = one ? PySequence_Concat(names, one) : NULL;
        Py_XDECREF(one);
        Py_DECREF(names);
        names = joined;
    }
    if (!names) return -1;
    int failed = PyModule_AddObjectRef(module, what, names);
    Py_DECREF(names);
    return failed;
}

static int fill_module(PyObject *module) {
    while (available < SETS && supported(available)) available++;
    choose_crc();
    if (add_names(module, "INSTRUCTION_SETS", SET_NAMES)) return -1;
    if (add_names(module, "CHECKSUMS", crc_names)) return -1;
    return PyModule_AddIntConstant(module, "STREAMS", crc_of[PORTABLE] != NULL);
}

static PyMethodDef methods[] = {
    {"average", py_average, METH_VARARGS, average_doc},
    {"stream", py_stream, METH_VARARGS, stream_doc},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef_Slot slots[] = {{Py_mod_exec, fill_module}, {0, NULL}};

static PyModuleDef definition = {
    PyModuleDef_HEAD_INIT,
    .m_name = "_kernel",
    .m_doc = "The weighted sum in C; see merging/sums.py.",
    .m_methods = methods,
    .m_slots = slots,
};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModuleDef_Init(&definition); }
