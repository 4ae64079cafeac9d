/* Keys and values of a cache as fp32, with scales where it has them: kernels/attention/scaled.py says how they lie. */
#pragma once
#include "activations.h"

/* Numbers of scaled_cpu.CODES, behind those of native.DTYPES. */
enum { INT8_SCALED = 3, FLOAT8_SCALED, INT4_SCALED };

INLINE int64_t code_bytes(int64_t size, int64_t dtype) { return dtype == INT4_SCALED ? size / 2 : size; }

/* An e4m3 number that is none of its two NaN. */
INLINE float from_float8(uint8_t x) {
    return as_float((uint32_t)(x & 0x7f) << 20 | (uint32_t)(x & 0x80) << 24) * 0x1p120f;
}

/* |x| <= 448, to nearest, ties to even */
INLINE uint8_t to_float8(float x) {
    const uint32_t bits = as_bits(x) & 0x7fffffffu, sign = (as_bits(x) >> 24) & 0x80u;
    const uint32_t subnormal = as_bits(as_float(bits) + 16384.0f) - as_bits(16384.0f); /* whose ulp is 2^-9 */
    const uint32_t normal = (bits - (120u << 23) + 0x7ffff + ((bits >> 20) & 1)) >> 20;
    return (uint8_t)((bits < 0x3c800000u ? subnormal : normal) | sign);
}

/* |x| < 2^22, to nearest, ties to even */
INLINE float to_whole(float x) {
    const float shift = 12582912.0f;
    return (x + shift) - shift;
}

/* The key or value of `head` (slot * kv_heads + g), `size` features, as fp32: in place, or converted into `space`. */
INLINE const float *load_head(
    const void *cache, const uint16_t *scales, int64_t head, int is_value, int64_t size, int64_t dtype, float *space
) {
    if (dtype < INT8_SCALED)
        return load(cache, head * size, size, dtype, space);
    const uint8_t *codes = (const uint8_t *)cache + head * code_bytes(size, dtype);
    if (dtype == INT4_SCALED) {
        const float scale = from_float16(scales[head * 4 + is_value * 2]);
        const float offset = from_float16(scales[head * 4 + is_value * 2 + 1]);
        for (int64_t i = 0; i < size / 2; i++) {
            space[2 * i] = (float)((codes[i] & 15) - 8) * scale + offset;
            space[2 * i + 1] = (float)((codes[i] >> 4) - 8) * scale + offset;
        }
        return space;
    }
    const float scale = from_float16(scales[head * 2 + is_value]);
    if (dtype == INT8_SCALED)
        for (int64_t i = 0; i < size; i++)
            space[i] = (float)(int8_t)codes[i] * scale;
    else
        for (int64_t i = 0; i < size; i++)
            space[i] = from_float8(codes[i]) * scale;
    return space;
}

INLINE void store_scaled(
    void *cache, uint16_t *scales, int64_t head, int is_value, const float *x, int64_t size, int64_t dtype
) {
    uint8_t *codes = (uint8_t *)cache + head * code_bytes(size, dtype);
    uint16_t *own = scales + head * (dtype == INT4_SCALED ? 4 : 2) + is_value * (dtype == INT4_SCALED ? 2 : 1);
    float least = x[0], most = x[0], none = 0; /* none: NaN where a number is not finite */
    for (int64_t i = 0; i < size; i++) {
        least = x[i] < least ? x[i] : least;
        most = x[i] > most ? x[i] : most;
        none += x[i] * 0;
    }
    float offset = 0;
    const float magnitude = -least > most ? -least : most;
    const float range = dtype == INT4_SCALED ? (most - least) / 15 : magnitude / (dtype == INT8_SCALED ? 127 : 448);
    own[0] = to_float16(range + none);
    const float scale = from_float16(own[0]);
    int good = scale - scale == 0;
    if (dtype == INT4_SCALED) {
        own[1] = to_float16(least + 8 * scale);
        offset = from_float16(own[1]);
        good &= offset - offset == 0;
    }
    if (!good)
        own[0] = own[dtype == INT4_SCALED] = 0x7e00;
    good &= scale > 0;
    if (dtype == INT4_SCALED) {
        for (int64_t i = 0; i < size; i += 2) {
            int code[2];
            for (int j = 0; j < 2; j++) {
                const float step = good ? to_whole((x[i + j] - offset) / scale) + 8 : 8;
                code[j] = (int)(step < 0 ? 0 : step > 15 ? 15 : step);
            }
            codes[i / 2] = (uint8_t)(code[0] | code[1] << 4);
        }
        return;
    }
    const float largest = dtype == INT8_SCALED ? 127 : 448;
    for (int64_t i = 0; i < size; i++) {
        float step = good ? x[i] / scale : 0;
        step = step < -largest ? -largest : step > largest ? largest : step;
        codes[i] = dtype == INT8_SCALED ? (uint8_t)(int8_t)to_whole(step) : to_float8(step);
    }
}
