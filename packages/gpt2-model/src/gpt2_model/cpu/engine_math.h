// The arithmetic of engine.c: vectors of 16 floats, and matrix products for one to eight rows of activations.

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE__)
#include <immintrin.h>
#endif

enum { LANES = 16, ROWS = 8 };
enum { OUTS = 3 };      // outputs at a time: 8 x 3 sums take three quarters of AVX-512's 32 registers
enum { AHEAD = 9216 };  // bytes to prefetch ahead: a seventh more tokens/s for fp32, two fifths for bf16 and int8
enum { FP32, BF16, INT8 };  // TYPE, the type of the weights, is a macro set by the compiler's -D
enum { GELU_NEW, GELU, RELU, SILU, TANH };  // in the order of config.ACTIVATIONS

typedef float floats __attribute__((vector_size(64)));
typedef float floats_at __attribute__((vector_size(64), aligned(2), may_alias));  // 2, since rows can be bf16
typedef int32_t ints __attribute__((vector_size(64)));
typedef int32_t ints_at __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t words __attribute__((vector_size(64)));
typedef double doubles __attribute__((vector_size(128)));

typedef struct {
    const void *weight;   // (outs, ins) fp32 or bf16; int8: (panels, ins / 4, 16 outs, 4 ins), padded with zeros
    const float *scale;   // int8: what one step of a weight is worth, for each output, padded to whole panels
    const int32_t *sums;  // int8: the sum of each output's weights, padded likewise
    const float *bias;    // (outs,) or NULL
    int64_t outs, ins;
} Matrix;

// Rows of activations in the form that products need besides plain fp32.
// int8 weights: as 16-bit numbers, x = step * (256 * high + low - 32768). The products are then sums of whole
// numbers, exact and fast (AVX-512's vpdpbusd).
// bf16 weights: 32 at a time, first the 16 of even index, then the 16 of odd index, since one shift and one mask
// yield the weights in this order; or as bf16 where the processor multiplies pairs of it.
typedef struct {
    float *step;
    uint8_t *high, *low;  // (rows, ins rounded up to 4)
    char *pairs;          // (rows, ins / 32, PAIRS)
} Prepared;
#if defined(__AVX512BF16__)
enum { PAIRS = 64 };
#else
enum { PAIRS = 128 };
#endif

static inline floats larger(floats a, floats b) {
    const ints where = a > b;
    return (floats)(((ints)a & where) | ((ints)b & ~where));
}

typedef float four __attribute__((vector_size(16)));

static inline four quarter(floats x) {
    typedef float eight __attribute__((vector_size(32)));
    eight halves[2];
    four quarters[2];
    memcpy(halves, &x, sizeof x);
    halves[0] += halves[1];
    memcpy(quarters, halves, sizeof quarters);
    return quarters[0] + quarters[1];
}

static inline float add_up(floats x) {
    const four q = quarter(x);
    return (q[0] + q[2]) + (q[1] + q[3]);
}

// `add_up` of `count` vectors (a multiple of 4), with a third of the work.
static inline void add_up_all(const floats *x, int count, float *y) {
    for (int i = 0; i < count; i += 4) {
        four a = quarter(x[i]), b = quarter(x[i + 1]), c = quarter(x[i + 2]), d = quarter(x[i + 3]);
#if defined(__SSE__)
        _MM_TRANSPOSE4_PS(a, b, c, d);
        a = (a + c) + (b + d);
#else
        a = (four){(a[0] + a[2]) + (a[1] + a[3]), (b[0] + b[2]) + (b[1] + b[3]), (c[0] + c[2]) + (c[1] + c[3]),
                   (d[0] + d[2]) + (d[1] + d[3])};
#endif
        memcpy(y + i, &a, sizeof a);
    }
}

static inline float bf16_to_float(uint16_t x) {
    return (union { uint32_t bits; float value; }){(uint32_t)x << 16}.value;
}

// e^x with a relative error of up to 2e-7: 2^n by the exponent's bits, the rest by its series on [-ln2/2, ln2/2].
static inline floats exponential(floats x) {
    const floats zero = {0};
    x = larger(x, zero - 87.0f);  // beyond these the exponent's bits overflow
    x = -larger(-x, zero - 88.0f);
    const floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
    const floats n = shifted - 12582912.0f;
    const floats r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln2 in two parts
    floats p = r * 1.9841270e-4f + 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return p * (floats)((__builtin_convertvector(n, ints) + 127) << 23);
}

static inline floats activate(floats x, int64_t kind) {
    // x/2 (1 + tanh z) = x / (1 + exp(-2z))
    if (kind == GELU_NEW) return x / (1.0f + exponential(-1.59576912f * (x + 0.044715f * x * x * x)));
    if (kind == SILU) return x / (1.0f + exponential(-x));
    if (kind == RELU) return larger(x, (floats){0});
    for (int i = 0; i < LANES; i++)
        x[i] = kind == GELU ? 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f)) : tanhf(x[i]);
    return x;
}

// y[i] = x . rows[i] for up to 4 rows of n, one after another in memory.
static inline void dots(const float *x, const float *rows, int64_t n, int count, float *y) {
    floats sums[4] = {{0}};
    float four_sums[4];
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES)
        for (int i = 0; i < count; i++) sums[i] += *(const floats_at *)(x + k) * *(const floats_at *)(rows + i * n + k);
    add_up_all(sums, 4, four_sums);
    for (int i = 0; i < count; i++) {
        float rest = 0;
        for (int64_t j = k; j < n; j++) rest += x[j] * rows[i * n + j];
        y[i] = four_sums[i] + rest;
    }
}

static inline void layer_norm(const float *x, const float *weight, const float *bias, int64_t n, double epsilon,
                              float *y) {
    floats sums = {0};
    float rest = 0;
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES) sums += *(const floats_at *)(x + k);
    for (; k < n; k++) rest += x[k];
    const float mean = (add_up(sums) + rest) / (float)n;
    for (k = 0; k < n; k++) y[k] = x[k] - mean;
    dots(y, y, n, 1, &rest);
    const float scale = (float)(1.0 / sqrt(rest / (double)n + epsilon));
    for (k = 0; k < n; k++) y[k] = y[k] * scale * weight[k] + bias[k];
}

static inline void to_steps(const float *x, int64_t n, int64_t row, Prepared s) {
    const int64_t stride = (n + 3) / 4 * 4;
    floats most = {0};
    float largest = 1e-30f;
    int64_t k = 0;
    for (; k + LANES <= n; k += LANES) {
        const floats v = *(const floats_at *)(x + k);
        most = larger(most, larger(v, -v));
    }
    for (int i = 0; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    for (; k < n; k++) largest = fabsf(x[k]) > largest ? fabsf(x[k]) : largest;
    const float steps = 32767.0f / largest;
    s.step[row] = largest / 32767.0f;
    for (k = 0; k < n; k++) {
        const int32_t number = (int32_t)(x[k] * steps + 32768.5f);
        s.high[row * stride + k] = (uint8_t)(number >> 8);
        s.low[row * stride + k] = (uint8_t)number;
    }
    for (; k < stride; k++) s.high[row * stride + k] = s.low[row * stride + k] = 0;
}

static inline void to_pairs(const float *x, int64_t n, int64_t row, Prepared s) {
    char *to = s.pairs + row * (n / 32) * PAIRS;
    for (int64_t k = 0; k + 32 <= n; k += 32, to += PAIRS)
#if defined(__AVX512BF16__)
        _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + k + 16), _mm512_loadu_ps(x + k)));
#else
        for (int i = 0; i < 32; i++) ((float *)to)[i % 2 * 16 + i / 2] = x[k + i];
#endif
}

// sum[lane] += x[2 lane] * w[2 lane] + x[2 lane + 1] * w[2 lane + 1], w in bf16.
static inline floats add_pairs(floats sum, const char *x, floats w) {
#if defined(__AVX512BF16__)
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(x), (__m512bh)w);
#else
    const floats even = (floats)((words)w << 16), odd = (floats)((words)w & 0xffff0000u);
    return sum + *(const floats_at *)x * even + *(const floats_at *)(x + 64) * odd;
#endif
}

// y[r * outs + o] = sum over k of x[row + r][k] * weight[first + o][k]; rows and outs are constants wherever this
// is inlined, and y has room for a multiple of 4.
static inline __attribute__((always_inline)) void tile_floats(const Matrix *m, const float *x, Prepared p, int64_t row,
                                                              int64_t first, int rows, int outs, float *y) {
    const int64_t ins = m->ins, size = TYPE == FP32 ? 4 : 2, step = 64 / size, whole = ins - ins % step;
    const char *weight = (const char *)m->weight + first * ins * size, *pairs = p.pairs + row * (ins / 32) * PAIRS;
    const int count = (rows * outs + 3) / 4 * 4;
    floats sum[ROWS * OUTS];
    x += row * ins;
    for (int i = 0; i < count; i++) sum[i] = (floats){0};
    for (int64_t k = 0; k < whole; k += step) {
        floats w[OUTS];
#pragma GCC unroll 3
        for (int o = 0; o < outs; o++) {
            const char *at = weight + (o * ins + k) * size;
            w[o] = *(const floats_at *)at;
            if (row == 0) __builtin_prefetch(at + AHEAD);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const char *pair = pairs + (r * (ins / 32) + k / 32) * PAIRS;
            const floats value = *(const floats_at *)(x + r * ins + k);
#pragma GCC unroll 3
            for (int o = 0; o < outs; o++)
                if (TYPE == FP32) sum[r * outs + o] += value * w[o];
                else sum[r * outs + o] = add_pairs(sum[r * outs + o], pair, w[o]);
        }
    }
    add_up_all(sum, count, y);
    for (int r = 0; r < rows && whole < ins; r++)
        for (int o = 0; o < outs; o++) {
            float rest = 0;
            for (int64_t k = whole; k < ins; k++) {
                const char *at = weight + (o * ins + k) * size;
                rest += x[r * ins + k] * (TYPE == FP32 ? *(const float *)at : bf16_to_float(*(const uint16_t *)at));
            }
            y[r * outs + o] += rest;
        }
}

// sum[lane] += the dot product of 4 unsigned bytes of x and 4 signed bytes of each of 16 outputs.
static inline ints add_products(ints sum, const uint8_t *x, const int8_t *w) {
#if defined(__AVX512VNNI__)
    int32_t four;
    memcpy(&four, x, 4);
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four), _mm512_loadu_si512(w));
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < 4; j++) sum[i] += x[j] * w[4 * i + j];
    return sum;
#endif
}

// The 16 outputs of a panel of int8 weights: two exact sums, combined into one real number.
static inline __attribute__((always_inline)) void tile_int8(const Matrix *m, Prepared s, int64_t row, int64_t panel,
                                                            int rows, float *y) {
    const int64_t fours = (m->ins + 3) / 4;
    const int8_t *w = (const int8_t *)m->weight + panel * fours * 64;
    const uint8_t *high = s.high + row * fours * 4, *low = s.low + row * fours * 4;
    ints h[ROWS], l[ROWS];
    for (int r = 0; r < rows; r++) h[r] = l[r] = (ints){0};
    for (int64_t k = 0; k < fours; k++, w += 64) {
        __builtin_prefetch(w + AHEAD);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            h[r] = add_products(h[r], high + (r * fours + k) * 4, w);
            l[r] = add_products(l[r], low + (r * fours + k) * 4, w);
        }
    }
    const doubles offset = 32768.0 * __builtin_convertvector(*(const ints_at *)(m->sums + panel * LANES), doubles);
    const floats scale = *(const floats_at *)(m->scale + panel * LANES);
    for (int r = 0; r < rows; r++) {
        const doubles total = 256.0 * __builtin_convertvector(h[r], doubles) + __builtin_convertvector(l[r], doubles);
        const floats values = __builtin_convertvector(total - offset, floats) * (s.step[row + r] * scale);
        memcpy(y + r * LANES, &values, sizeof values);
    }
}
