/* GGUF's blocks with AVX-512 VNNI: 64 weights of an output at a time, as they lie in the file.
 *
 * Weights are unsigned here; what that adds is taken off with the sums of the activations. A token's sum is made by
 * the same instructions in the same order, however many tokens there are: products are only added by fused ones. */

#include "gguf_avx512.h"

#ifdef HAS_X86

#define AT_ONCE 4 /* tokens for which weights are unpacked once */

INNER __m512 times(__m512i weights, const int8_t *q, __m512 scale, __m512 sum) {
    const __m512i product = _mm512_dpbusd_epi32(_mm512_setzero_si512(), weights, _mm512_loadu_si512(q));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), scale, sum);
}

INNER void rows_32(const uint8_t *row, const Outputs *o, const Tokens *a, int64_t t, int count, int64_t kind, float *y) {
    const int64_t size = FORMATS[kind].bytes, blocks = o->inputs / 32;
    const __m512i spread = _mm512_set_epi32(2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0);
    __m512 sum[AT_ONCE];
    __m128 shifts[AT_ONCE];
    for (int i = 0; i < count; i++) {
        sum[i] = _mm512_setzero_ps();
        shifts[i] = _mm_setzero_ps();
    }
    for (int64_t b = 0; b < blocks; b += 2) {
        const uint8_t *one = row + b * size, *other = b + 1 < blocks ? one + size : one;
        const __m512i weights = integers(one, other, kind); /* behind the last block there are zeros in the tokens */
        const __m128 both = factors(one, other, kind);
        for (int i = 0; i < count; i++) {
            const __m128 made = _mm_loadu_ps(scales_of(a, t + i) + 2 * b);
            const __m512 scale = _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(_mm_mul_ps(both, made)));
            sum[i] = times(weights, q_of(a, t + i) + 32 * b, scale, sum[i]);
            shifts[i] = _mm_fmadd_ps(both, made, shifts[i]);
        }
    }
    for (int i = 0; i < count; i++) {
        const __m128 odd = _mm_movehdup_ps(shifts[i]);
        y[i] = _mm512_reduce_add_ps(sum[i]) + _mm_cvtss_f32(odd) + _mm_cvtss_f32(_mm_movehl_ps(odd, odd));
    }
}

INNER void rows_k(const uint8_t *row, const Outputs *o, const Tokens *a, int64_t t, int count, int64_t kind, float *y) {
    __m512 sum[AT_ONCE], shifts[AT_ONCE];
    for (int i = 0; i < count; i++)
        sum[i] = shifts[i] = _mm512_setzero_ps();
    const __m512i first = _mm512_set_epi32(2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0);
    for (int64_t at = 0; at < o->inputs; at += 256, row += FORMATS[kind].bytes) {
        const __m512 both = k_factors(row, kind);
        __m512i weights[4];
        for (int j = 0; j < 4; j++)
            weights[j] = k_integers(row, j, kind);
        for (int i = 0; i < count; i++) {
            const __m512 made = _mm512_loadu_ps(scales_of(a, t + i) + at / 16);
            const __m512 scales = _mm512_mul_ps(both, made);
            shifts[i] = _mm512_fmadd_ps(both, made, shifts[i]);
            for (int j = 0; j < 4; j++) {
                const __m512i spread = _mm512_add_epi32(first, _mm512_set1_epi32(4 * j));
                sum[i] = times(weights[j], q_of(a, t + i) + at + 64 * j, _mm512_permutexvar_ps(spread, scales), sum[i]);
            }
        }
    }
    for (int i = 0; i < count; i++)
        y[i] = _mm512_reduce_add_ps(sum[i]) + _mm512_mask_reduce_add_ps(0xaaaa, shifts[i]);
}

INNER void rows_q6(const uint8_t *row, const Outputs *o, const Tokens *a, int64_t t, int count, int64_t kind, float *y) {
    const __m512i even = _mm512_set_epi32(14, 14, 12, 12, 10, 10, 8, 8, 6, 6, 4, 4, 2, 2, 0, 0);
    const __m512i first = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    __m512 sum[AT_ONCE], shifts[AT_ONCE];
    for (int i = 0; i < count; i++)
        sum[i] = shifts[i] = _mm512_setzero_ps();
    for (int64_t at = 0; at < o->inputs; at += 256, row += FORMATS[kind].bytes) {
        const __m512 factors = q6_factors(row);
        __m512i weights[4];
        for (int j = 0; j < 4; j++)
            weights[j] = q6_integers(row, j);
        for (int i = 0; i < count; i++) {
            const __m512 made = _mm512_permutexvar_ps(even, _mm512_loadu_ps(scales_of(a, t + i) + at / 16));
            const __m512 scales = _mm512_mul_ps(factors, made);
            shifts[i] = _mm512_fmadd_ps(factors, _mm512_loadu_ps(sums_of(a, t + i) + at / 16), shifts[i]);
            for (int j = 0; j < 4; j++) {
                const __m512i spread = _mm512_add_epi32(first, _mm512_set1_epi32(4 * j));
                sum[i] = times(weights[j], q_of(a, t + i) + at + 64 * j, _mm512_permutexvar_ps(spread, scales), sum[i]);
            }
        }
    }
    for (int i = 0; i < count; i++) /* one rounding, whatever the compiler makes of it */
        y[i] = __builtin_fmaf(-32, _mm512_reduce_add_ps(shifts[i]), _mm512_reduce_add_ps(sum[i]));
}

INNER void some(const Outputs *o, const Tokens *a, int64_t n, int64_t t, int count, int64_t kind) {
    const uint8_t *row = o->blocks + n * o->row;
    float made[AT_ONCE];
    if (kind == Q6_K)
        rows_q6(row, o, a, t, count, kind, made);
    else if (kind == Q4_K || kind == Q5_K || kind == IQ4_XS)
        rows_k(row, o, a, t, count, kind, made);
    else
        rows_32(row, o, a, t, count, kind, made);
    for (int i = 0; i < count; i++)
        o->y[(t + i) * o->y_stride + n] = o->bias ? made[i] + o->bias[n] : made[i];
}

INNER void all(const Outputs *o, const Tokens *a, int64_t kind) {
    for (int64_t n = 0; n < o->outputs; n++) {
        int64_t t = 0;
        for (; t + 4 <= a->count; t += 4)
            some(o, a, n, t, 4, kind);
        for (; t + 2 <= a->count; t += 2)
            some(o, a, n, t, 2, kind);
        if (t < a->count)
            some(o, a, n, t, 1, kind);
    }
}

ENTRY void multiply_avx512(const Outputs *o, const Tokens *a, void *space) {
    (void)space;
    switch (o->kind) {
    case Q4_0: all(o, a, Q4_0); break;
    case Q4_1: all(o, a, Q4_1); break;
    case Q5_0: all(o, a, Q5_0); break;
    case Q5_1: all(o, a, Q5_1); break;
    case Q8_0: all(o, a, Q8_0); break;
    case Q4_K: all(o, a, Q4_K); break;
    case Q5_K: all(o, a, Q5_K); break;
    case Q6_K: all(o, a, Q6_K); break;
    case IQ4_NL: all(o, a, IQ4_NL); break;
    default: all(o, a, IQ4_XS);
    }
}

#endif
