/* Many tokens with AVX-512 VNNI: 32 outputs' weights are unpacked into a panel in the cache, which all tokens use.
 *
 * A panel holds four inputs of each of 32 outputs side by side, as vpdpbusd multiplies them by four of a token. Numbers
 * of a token are spread over a register once for two products: that takes as long as a product. */

#include "gguf_avx512.h"

#ifdef HAS_X86

typedef struct {
    uint8_t *weights; /* [inputs / 4][32 outputs][4] */
    float *scale;     /* [inputs / 32 or 16][32 outputs] */
    float *shift;     /* the same */
} Panel;

/* A multiple of 64. */
int64_t panel_bytes(int64_t width) { return width * UNIT + 2 * (width / GROUP * UNIT * (int64_t)sizeof(float)); }

INNER Panel panel_in(void *space, int64_t width) {
    uint8_t *at = space;
    float *scale = (float *)(at + width * UNIT);
    return (Panel){at, scale, scale + width / GROUP * UNIT};
}

/* Register r's number g becomes register g's number r. */
INNER void transpose(__m512i x[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
        x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
    }
}

/* Whether blocks have 256 elements. */
INNER int is_long(int64_t kind) { return FORMATS[kind].elements == MOST; }

/* 64 integers of a row from `at` on; zeros behind its end. */
INNER __m512i integers_at(const uint8_t *row, int64_t at, int64_t inputs, int64_t kind) {
    if (is_long(kind)) {
        const uint8_t *block = row + at / 256 * FORMATS[kind].bytes;
        const int j = (int)(at % 256 / 64);
        return kind == Q6_K ? q6_integers(block, j) : k_integers(block, j, kind);
    }
    const uint8_t *one = row + at / 32 * FORMATS[kind].bytes;
    return integers(one, at + 32 < inputs ? one + FORMATS[kind].bytes : one, kind);
}

/* Scales of a row become column `r` of the panel's. */
INNER void scales_at(const uint8_t *row, int64_t inputs, int64_t kind, int r, const Panel *p) {
    const int64_t bytes = FORMATS[kind].bytes;
    float made[16];
    if (kind == Q6_K) {
        for (int64_t at = 0; at < inputs; at += 256, row += bytes) {
            _mm512_storeu_ps(made, q6_factors(row));
            for (int g = 0; g < 16; g++) {
                p->scale[(at / 16 + g) * UNIT + r] = made[g];
                p->shift[(at / 16 + g) * UNIT + r] = -32 * made[g];
            }
        }
        return;
    }
    const int step = is_long(kind) ? 8 : 2;
    for (int64_t b = 0; b < (inputs + 32) / 64 * 2; b += step, row += is_long(kind) ? bytes : 2 * bytes) {
        if (is_long(kind))
            _mm512_storeu_ps(made, k_factors(row, kind));
        else
            _mm_storeu_ps(made, factors(row, 32 * b + 32 < inputs ? row + bytes : row, kind));
        for (int g = 0; g < step; g++) {
            p->scale[(b + g) * UNIT + r] = made[2 * g];
            p->shift[(b + g) * UNIT + r] = made[2 * g + 1];
        }
    }
}

/* Where there are fewer outputs, the last one stands in for the others. */
INNER void fill(const Outputs *o, int64_t width, int64_t kind, const Panel *p) {
    const uint8_t *row[UNIT];
    for (int r = 0; r < UNIT; r++) {
        row[r] = o->blocks + (r < o->outputs ? r : o->outputs - 1) * o->row;
        scales_at(row[r], o->inputs, kind, r, p);
    }
    for (int half = 0; half < UNIT; half += 16)
        for (int64_t at = 0; at < width; at += 64) {
            __m512i x[16];
            for (int r = 0; r < 16; r++)
                x[r] = integers_at(row[half + r], at, o->inputs, kind);
            transpose(x);
            for (int g = 0; g < 16; g++)
                _mm512_store_si512(p->weights + (at + 4 * g) * UNIT + 4 * half, x[g]);
        }
}

#define AT_ONCE 6 /* tokens: 12 integer and 12 other sums */

/* `count` tokens from t on. `fine`: scales are those of 16 inputs, else of 32. */
INNER void some(const Outputs *o, const Tokens *a, const Panel *p, int64_t t, int count, int fine) {
    const int64_t inputs = fine ? 16 : 32;
    const __mmask16 there[2] = {o->outputs < 16 ? (__mmask16)((1u << o->outputs) - 1) : 0xffff,
                                o->outputs < 16 ? 0 : (__mmask16)((1ull << (o->outputs - 16)) - 1)};
    const int8_t *q[AT_ONCE];
    __m512 sum[AT_ONCE][2];
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) {
        q[i] = q_of(a, t + i);
        for (int h = 0; h < 2; h++)
            sum[i][h] = o->bias ? _mm512_maskz_loadu_ps(there[h], o->bias + 16 * h) : _mm512_setzero_ps();
    }
    for (int64_t at = 0, g = 0; at < a->width; at += inputs, g++) {
        const uint8_t *weights = p->weights + at * UNIT;
        __m512i product[AT_ONCE][2];
#pragma GCC unroll 8
        for (int i = 0; i < count; i++)
            product[i][0] = product[i][1] = _mm512_setzero_si512();
#pragma GCC unroll 8
        for (int j = 0; j < inputs / 4; j++) {
            const __m512i low = _mm512_load_si512(weights + 4 * UNIT * j);
            const __m512i high = _mm512_load_si512(weights + 4 * UNIT * j + 64);
#pragma GCC unroll 8
            for (int i = 0; i < count; i++) {
                const __m512i x = _mm512_set1_epi32((int)word_at((const uint8_t *)q[i] + at + 4 * j));
                product[i][0] = _mm512_dpbusd_epi32(product[i][0], low, x);
                product[i][1] = _mm512_dpbusd_epi32(product[i][1], high, x);
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < count; i++) {
            const float *made = (const float *)(q[i] + a->width);
            const __m512 step = _mm512_set1_ps(made[(fine ? g / 2 : g) * 2]);
            const __m512 total = _mm512_set1_ps(fine ? made[a->width / 16 + g] : made[2 * g + 1]);
#pragma GCC unroll 2
            for (int h = 0; h < 2; h++) {
                const __m512 by = _mm512_mul_ps(_mm512_load_ps(p->scale + g * UNIT + 16 * h), step);
                sum[i][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(product[i][h]), by, sum[i][h]);
                sum[i][h] = _mm512_fmadd_ps(_mm512_load_ps(p->shift + g * UNIT + 16 * h), total, sum[i][h]);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < count; i++)
        for (int h = 0; h < 2; h++)
            _mm512_mask_storeu_ps(o->y + (t + i) * o->y_stride + 16 * h, there[h], sum[i][h]);
}

INNER void all(const Outputs *o, const Tokens *a, const Panel *p, int fine) {
    int64_t t = 0;
    for (; t + 6 <= a->count; t += 6)
        some(o, a, p, t, 6, fine);
    for (; t + 2 <= a->count; t += 2)
        some(o, a, p, t, 2, fine);
    if (t < a->count)
        some(o, a, p, t, 1, fine);
}

ENTRY void multiply_panel_avx512(const Outputs *o, const Tokens *a, void *space) {
    const Panel p = panel_in(space, a->width);
    switch (o->kind) {
    case Q4_0: fill(o, a->width, Q4_0, &p); break;
    case Q4_1: fill(o, a->width, Q4_1, &p); break;
    case Q5_0: fill(o, a->width, Q5_0, &p); break;
    case Q5_1: fill(o, a->width, Q5_1, &p); break;
    case Q8_0: fill(o, a->width, Q8_0, &p); break;
    case Q4_K: fill(o, a->width, Q4_K, &p); break;
    case Q5_K: fill(o, a->width, Q5_K, &p); break;
    case Q6_K: fill(o, a->width, Q6_K, &p); break;
    case IQ4_NL: fill(o, a->width, IQ4_NL, &p); break;
    default: fill(o, a->width, IQ4_XS, &p);
    }
    if (o->kind == Q6_K)
        all(o, a, &p, 1);
    else
        all(o, a, &p, 0);
}

#endif
