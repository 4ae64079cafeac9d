/* GGUF's blocks with AVX2: 32 weights of an output at a time, as they lie in the file.
 *
 * Products of unsigned weights are added in pairs of 16 bits, which 63 * 127 * 2 fits. Those of 8 bits do not: there
 * the activations take the weights' signs. A token's sum is made alike, however many tokens there are. */

#include "gguf.h"

#ifdef HAS_X86

#include <immintrin.h>

#define ENTRY __attribute__((target("avx2,fma,f16c")))
#define INNER static inline __attribute__((always_inline, target("avx2,fma,f16c")))
#define AT_ONCE 2 /* tokens for which weights are unpacked once */

INNER __m256i added(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }

INNER float total(__m256 x) {
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

/* Bit i of 32 as 16 in byte i. */
INNER __m256i sixteens(uint32_t bits) {
    const __m256i byte = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32((int)bits), byte);
    const __m256i one = _mm256_set1_epi64x((long long)0x8040201008040201);
    return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, one), one), _mm256_set1_epi8(16));
}

/* Whether weights have signs here. */
INNER int is_signed(int64_t kind) { return kind == Q8_0 || kind == IQ4_NL || kind == IQ4_XS; }

/* 16 bytes: the low nibbles, then the high ones. */
INNER __m256i nibbles(const uint8_t *from) {
    const __m128i packed = _mm_loadu_si128((const __m128i *)from);
    return _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(packed, 4), packed), _mm256_set1_epi8(15));
}

INNER __m256i iq4_integers(const uint8_t *from) {
    const __m256i values = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)IQ4_VALUES));
    return _mm256_shuffle_epi8(values, nibbles(from));
}

INNER __m256i integers(const uint8_t *block, int64_t kind) {
    const uint8_t *from = block + FORMATS[kind].bytes - (kind == Q8_0 ? 32 : 16);
    if (kind == Q8_0)
        return _mm256_loadu_si256((const __m256i *)from);
    if (kind == IQ4_NL)
        return iq4_integers(from);
    const __m256i q = nibbles(from);
    return kind == Q5_0 || kind == Q5_1 ? _mm256_or_si256(q, sixteens(word_at(from - 4))) : q;
}

INNER __m256 times(__m256i weights, const int8_t *q, float scale, __m256 sum, int64_t kind) {
    const __m256i x = _mm256_loadu_si256((const __m256i *)q);
    const __m256i pairs = is_signed(kind)
                              ? _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights))
                              : _mm256_maddubs_epi16(weights, x);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(added(pairs)), _mm256_set1_ps(scale), sum);
}

INNER void rows_32(const uint8_t *row, const Outputs *o, const Tokens *a, int64_t t, int count, int64_t kind, float *y) {
    const int64_t blocks = o->inputs / 32;
    const int shifted = !is_signed(kind);
    __m256 sum[AT_ONCE];
    float shifts[AT_ONCE];
    for (int i = 0; i < count; i++) {
        sum[i] = _mm256_setzero_ps();
        shifts[i] = 0;
    }
    for (int64_t b = 0; b < blocks; b++, row += FORMATS[kind].bytes) {
        const __m256i weights = integers(row, kind);
        const float d = _cvtsh_ss(half_at(row));
        const float m = kind == Q4_1 || kind == Q5_1 ? _cvtsh_ss(half_at(row + 2)) : d * (float)-FORMATS[kind].offset;
        for (int i = 0; i < count; i++) {
            const float *scale = scales_of(a, t + i) + 2 * b;
            sum[i] = times(weights, q_of(a, t + i) + 32 * b, d * scale[0], sum[i], kind);
            if (shifted)
                shifts[i] = __builtin_fmaf(m, scale[1], shifts[i]);
        }
    }
    for (int i = 0; i < count; i++)
        y[i] = total(sum[i]) + shifts[i];
}

INNER void rows_k(const uint8_t *row, const Outputs *o, const Tokens *a, int64_t t, int count, int64_t kind, float *y) {
    const __m256i four = _mm256_set1_epi8(15);
    __m256 sum[AT_ONCE], shifts[AT_ONCE];
    for (int i = 0; i < count; i++)
        sum[i] = shifts[i] = _mm256_setzero_ps();
    for (int64_t at = 0; at < o->inputs; at += 256, row += FORMATS[kind].bytes) {
        uint32_t scales[2], minima[2];
        k_scales(row + 4, scales, minima);
        const __m128i low = _mm_set_epi32(0, 0, (int)scales[1], (int)scales[0]);
        const __m128i high = _mm_set_epi32(0, 0, (int)minima[1], (int)minima[0]);
        const __m256 d = _mm256_set1_ps(_cvtsh_ss(half_at(row))), least = _mm256_set1_ps(-_cvtsh_ss(half_at(row + 2)));
        const __m256 scale = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(low)), d);
        const __m256 shift = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high)), least);
        const __m256i fifth = _mm256_loadu_si256((const __m256i *)(row + 16));
        const uint8_t *from = row + (kind == Q5_K ? 48 : 16);
        float of[AT_ONCE][8];
        for (int i = 0; i < count; i++) {
            const float *made = scales_of(a, t + i) + at / 16;
            const __m256 one = _mm256_loadu_ps(made), other = _mm256_loadu_ps(made + 8);
            const __m256i order = _mm256_set_epi32(7, 6, 3, 2, 5, 4, 1, 0); /* pairs of lanes, as shuffles leave them */
            const __m256 steps = _mm256_permutevar8x32_ps(_mm256_shuffle_ps(one, other, 0x88), order);
            const __m256 sums = _mm256_permutevar8x32_ps(_mm256_shuffle_ps(one, other, 0xdd), order);
            _mm256_storeu_ps(of[i], _mm256_mul_ps(scale, steps));
            shifts[i] = _mm256_fmadd_ps(shift, sums, shifts[i]);
        }
        for (int part = 0; part < 8; part++) {
            const __m256i packed = _mm256_loadu_si256((const __m256i *)(from + 32 * (part / 2)));
            __m256i q = _mm256_and_si256(part % 2 ? _mm256_srli_epi16(packed, 4) : packed, four);
            if (kind == Q5_K) {
                const __m256i bit = _mm256_set1_epi8((char)(1 << part));
                const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(fifth, bit), bit);
                q = _mm256_or_si256(q, _mm256_and_si256(set, _mm256_set1_epi8(16)));
            }
            for (int i = 0; i < count; i++)
                sum[i] = times(q, q_of(a, t + i) + at + 32 * part, of[i][part], sum[i], kind);
        }
    }
    for (int i = 0; i < count; i++)
        y[i] = total(sum[i]) + total(shifts[i]);
}

INNER void rows_q6(const uint8_t *row, const Outputs *o, const Tokens *a, int64_t t, int count, int64_t kind, float *y) {
    const __m256i four = _mm256_set1_epi8(15), two = _mm256_set1_epi8(0x30);
    __m256 sum[AT_ONCE], shifts[AT_ONCE];
    for (int i = 0; i < count; i++)
        sum[i] = shifts[i] = _mm256_setzero_ps();
    for (int64_t at = 0; at < o->inputs; at += 256, row += FORMATS[kind].bytes) {
        const __m256 d = _mm256_set1_ps(_cvtsh_ss(half_at(row + 208)));
        __m256 scale[2];
        for (int h = 0; h < 2; h++) {
            const __m128i packed = _mm_loadl_epi64((const __m128i *)(row + 192 + 8 * h));
            scale[h] = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(packed)), d);
            for (int i = 0; i < count; i++)
                shifts[i] = _mm256_fmadd_ps(scale[h], _mm256_loadu_ps(sums_of(a, t + i) + at / 16 + 8 * h), shifts[i]);
        }
        float of[16];
        _mm256_storeu_ps(of, scale[0]);
        _mm256_storeu_ps(of + 8, scale[1]);
        for (int part = 0; part < 8; part++) { /* of 32, the two halves of which have scales of their own */
            const int half = part / 4, quarter = part % 4;
            const __m256i low = _mm256_loadu_si256((const __m256i *)(row + 64 * half + 32 * (quarter % 2)));
            const __m256i high = _mm256_loadu_si256((const __m256i *)(row + 128 + 32 * half));
            const __m256i nibble = _mm256_and_si256(quarter / 2 ? _mm256_srli_epi16(low, 4) : low, four);
            const __m256i pair = quarter == 0   ? _mm256_slli_epi16(high, 4)
                                 : quarter == 1 ? _mm256_slli_epi16(high, 2)
                                 : quarter == 2 ? high
                                                : _mm256_srli_epi16(high, 2);
            const __m256i q = _mm256_or_si256(nibble, _mm256_and_si256(pair, two));
            const __m256 scales = _mm256_set_m128(_mm_set1_ps(of[2 * part + 1]), _mm_set1_ps(of[2 * part]));
            for (int i = 0; i < count; i++) {
                const __m256i x = _mm256_loadu_si256((const __m256i *)(q_of(a, t + i) + at + 32 * part));
                const __m256 step = _mm256_mul_ps(scales, _mm256_set1_ps(scales_of(a, t + i)[at / 16 + 2 * part]));
                sum[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(added(_mm256_maddubs_epi16(q, x))), step, sum[i]);
            }
        }
    }
    for (int i = 0; i < count; i++)
        y[i] = __builtin_fmaf(-32, total(shifts[i]), total(sum[i]));
}

INNER void rows_iq4(const uint8_t *row, const Outputs *o, const Tokens *a, int64_t t, int count, int64_t kind, float *y) {
    __m256 sum[AT_ONCE];
    for (int i = 0; i < count; i++)
        sum[i] = _mm256_setzero_ps();
    for (int64_t at = 0; at < o->inputs; at += 256, row += FORMATS[kind].bytes) {
        const float d = _cvtsh_ss(half_at(row));
        int8_t scales[8];
        iq4_scales(row, scales);
        for (int part = 0; part < 8; part++) {
            const __m256i weights = iq4_integers(row + 8 + 16 * part);
            const float scale = d * (float)scales[part];
            for (int i = 0; i < count; i++) {
                const float step = scale * scales_of(a, t + i)[at / 16 + 2 * part];
                sum[i] = times(weights, q_of(a, t + i) + at + 32 * part, step, sum[i], kind);
            }
        }
    }
    for (int i = 0; i < count; i++)
        y[i] = total(sum[i]);
}

INNER void some(const Outputs *o, const Tokens *a, int64_t n, int64_t t, int count, int64_t kind) {
    const uint8_t *row = o->blocks + n * o->row;
    float made[AT_ONCE];
    if (kind == Q6_K)
        rows_q6(row, o, a, t, count, kind, made);
    else if (kind == Q4_K || kind == Q5_K)
        rows_k(row, o, a, t, count, kind, made);
    else if (kind == IQ4_XS)
        rows_iq4(row, o, a, t, count, kind, made);
    else
        rows_32(row, o, a, t, count, kind, made);
    for (int i = 0; i < count; i++)
        o->y[(t + i) * o->y_stride + n] = o->bias ? made[i] + o->bias[n] : made[i];
}

INNER void all(const Outputs *o, const Tokens *a, int64_t kind) {
    for (int64_t n = 0; n < o->outputs; n++) {
        int64_t t = 0;
        for (; t + 2 <= a->count; t += 2)
            some(o, a, n, t, 2, kind);
        if (t < a->count)
            some(o, a, n, t, 1, kind);
    }
}

ENTRY void multiply_avx2(const Outputs *o, const Tokens *a, void *space) {
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
