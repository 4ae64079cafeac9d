/* GGUF's blocks as AVX-512 registers: 64 unsigned integers of a row, and their scales. */

#ifndef MAKEREADY_GGUF_AVX512_H
#define MAKEREADY_GGUF_AVX512_H

#include "gguf.h"

#ifdef HAS_X86

#include <immintrin.h>

#define WIDE "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"
#define ENTRY __attribute__((target(WIDE)))
#define INNER static inline __attribute__((always_inline, target(WIDE)))

/* Two blocks' 16 bytes as 64 nibbles. */
INNER __m512i nibbles(const uint8_t *one, const uint8_t *other) {
    const __m512i pair = _mm512_mask_broadcast_i32x4(
        _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)one)), 0xff00, _mm_loadu_si128((const __m128i *)other)
    );
    const __m512i shift = _mm512_set_epi64(0x0004000400040004, 0x0004000400040004, 0, 0, 0x0004000400040004,
                                           0x0004000400040004, 0, 0);
    return _mm512_and_si512(_mm512_srlv_epi16(pair, shift), _mm512_set1_epi8(15));
}

/* What IQ4's nibbles stand for, and 128 more. */
INNER __m512i iq4_integers(__m512i nibbles) {
    const __m512i values = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)IQ4_VALUES));
    return _mm512_xor_si512(_mm512_shuffle_epi8(values, nibbles), _mm512_set1_epi8((char)0x80));
}

/* The 64 integers of two blocks of 32. */
INNER __m512i integers(const uint8_t *one, const uint8_t *other, int64_t kind) {
    if (kind == Q8_0) {
        const __m256i low = _mm256_loadu_si256((const __m256i *)(one + 2));
        const __m256i high = _mm256_loadu_si256((const __m256i *)(other + 2));
        return _mm512_xor_si512(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1),
                                _mm512_set1_epi8((char)0x80));
    }
    const int at = FORMATS[kind].bytes - 16;
    const __m512i q = nibbles(one + at, other + at);
    if (kind == IQ4_NL)
        return iq4_integers(q);
    if (kind == Q4_0 || kind == Q4_1)
        return q;
    const __mmask64 fifth = (uint64_t)word_at(other + at - 4) << 32 | word_at(one + at - 4);
    return _mm512_mask_add_epi8(q, fifth, q, _mm512_set1_epi8(16));
}

/* [scale, shift] of two blocks, where `q` stands for scale * q + shift. */
INNER __m128 factors(const uint8_t *one, const uint8_t *other, int64_t kind) {
    if (kind == Q4_1 || kind == Q5_1)
        return _mm_cvtph_ps(_mm_insert_epi32(_mm_cvtsi32_si128((int)word_at(one)), (int)word_at(other), 1));
    const uint32_t d = half_at(one), e = half_at(other);
    const __m128 twice = _mm_cvtph_ps(_mm_insert_epi32(_mm_cvtsi32_si128((int)(d << 16 | d)), (int)(e << 16 | e), 1));
    const float off = (float)-FORMATS[kind].offset;
    return _mm_mul_ps(twice, _mm_set_ps(off, 1, off, 1));
}

/* 32 bytes twice: the low nibbles, then the high ones. */
INNER __m512i both_nibbles(const uint8_t *from) {
    const __m512i twice = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)from));
    const __m512i shift = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    return _mm512_and_si512(_mm512_srlv_epi16(twice, shift), _mm512_set1_epi8(15));
}

/* [scale, shift] of the eight parts of a block of 256. */
INNER __m512 k_factors(const uint8_t *block, int64_t kind) {
    if (kind == IQ4_XS) {
        int8_t of[8];
        iq4_scales(block, of);
        const __m128i packed = _mm_loadl_epi64((const __m128i *)of);
        const __m512 twice = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_unpacklo_epi8(packed, packed)));
        const __m512 d = _mm512_set1_ps(float_at(block)), off = _mm512_set1_ps((float)-FORMATS[kind].offset);
        return _mm512_mul_ps(twice, _mm512_mask_mul_ps(d, 0xaaaa, d, off));
    }
    uint32_t scales[2], minima[2];
    k_scales(block + 4, scales, minima);
    const __m128i low = _mm_set_epi32(0, 0, (int)scales[1], (int)scales[0]);
    const __m128i high = _mm_set_epi32(0, 0, (int)minima[1], (int)minima[0]);
    const __m512 both = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high)));
    const __m128 d = _mm_cvtph_ps(_mm_cvtsi32_si128((int)word_at(block)));
    return _mm512_mul_ps(both, _mm512_broadcast_f32x4(_mm_xor_ps(_mm_movelh_ps(d, d), _mm_set_ps(-0.f, 0, -0.f, 0))));
}

INNER __m512i k_integers(const uint8_t *block, int j, int64_t kind) {
    if (kind == IQ4_XS)
        return iq4_integers(nibbles(block + 8 + 32 * j, block + 24 + 32 * j));
    const __m512i q = both_nibbles(block + (kind == Q5_K ? 48 : 16) + 32 * j);
    if (kind == Q4_K)
        return q;
    const __m512i fifth = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(block + 16)));
    const __m512i bit = _mm512_inserti64x4(_mm512_set1_epi8((char)(1 << 2 * j)), _mm256_set1_epi8((char)(2 << 2 * j)), 1);
    return _mm512_mask_add_epi8(q, _mm512_test_epi8_mask(fifth, bit), q, _mm512_set1_epi8(16));
}

INNER __m512i q6_integers(const uint8_t *block, int j) {
    const int half = j / 2;
    const __m512i low = _mm512_loadu_si512(block + 64 * half), four = _mm512_set1_epi8(15);
    const __m512i high = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)(block + 128 + 32 * half)));
    const __m256i two = _mm256_set1_epi16(2);
    const __m512i pairs = j % 2 ? _mm512_srlv_epi16(high, _mm512_inserti64x4(_mm512_setzero_si512(), two, 1))
                                : _mm512_sllv_epi16(high, _mm512_inserti64x4(_mm512_set1_epi16(4), two, 1));
    const __m512i nibble = _mm512_and_si512(j % 2 ? _mm512_srli_epi16(low, 4) : low, four);
    return _mm512_or_si512(nibble, _mm512_and_si512(pairs, _mm512_set1_epi8(0x30)));
}

INNER __m512 q6_factors(const uint8_t *block) {
    const __m512 scales = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(block + 192))));
    return _mm512_mul_ps(scales, _mm512_set1_ps(float_at(block + 208)));
}

#endif
#endif
