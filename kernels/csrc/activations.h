/* Activations and caches as fp32 on the CPU: conversions, e^x, sums of products, loops over tokens in threads. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "dispatch.h"
#include "numbers.h"
#include "threads.h"

#define MAX_HEAD 1024 /* features of a head: rows of that length live on the stack */
#define FEW 16384     /* numbers that one thread is done with before another has begun */

enum { FLOAT32, BFLOAT16, FLOAT16 }; /* numbers of native.DTYPES */

/* e^x to 2 ulp: x = n ln 2 + r with |r| < 0.35, the Taylor series of e^r to r^7 (5e-9), times 2^n in two
 * factors, since n spans -150..128. NaN fails both comparisons and goes through the series. */
INLINE float exponential(float x) {
    const float whole = 12582912.0f; /* 1.5 * 2^23: adding it leaves the nearest integer in the low bits */
    x = x < -104.0f ? -104.0f : x;
    x = x > 89.0f ? 89.0f : x;
    const float shifted = x * 1.44269504f + whole;
    const float n = shifted - whole;
    const int32_t power = (int32_t)(as_bits(shifted) - 0x4b400000u);
    float r = x - n * 0.693359375f; /* ln 2 in two parts; the product with the first is exact */
    r = r - n * -2.12194440e-4f;
    float y = 1.0f / 5040;
    y = y * r + 1.0f / 720;
    y = y * r + 1.0f / 120;
    y = y * r + 1.0f / 24;
    y = y * r + 1.0f / 6;
    y = y * r + 0.5f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
    const int32_t half = power >> 1;
    return y * as_float((uint32_t)(half + 127) << 23) * as_float((uint32_t)(power - half + 127) << 23);
}

INLINE float from_bfloat16(uint16_t x) { return as_float((uint32_t)x << 16); }

/* Both round to nearest, ties to even. */
INLINE uint16_t to_bfloat16(float x) {
    const uint32_t bits = as_bits(x);
    return x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE uint16_t to_float16(float x) {
    const uint32_t bits = as_bits(x) & 0x7fffffffu, sign = (as_bits(x) >> 16) & 0x8000u;
    uint32_t made;
    if (bits > 0x7f800000u)
        made = 0x7e00;
    else if (bits >= 0x477ff000u) /* 65520 and more */
        made = 0x7c00;
    else if (bits < 0x38800000u) /* subnormal: 0.5 has the ulp of fp16's smallest number */
        made = as_bits(as_float(bits) + 0.5f) - 0x3f000000u;
    else
        made = (bits - 0x38000000u + 0xfff + ((bits >> 13) & 1)) >> 13;
    return (uint16_t)(made | sign);
}

/* Elements `at` .. `at + count` of a tensor as fp32: in place, or converted into `space`. */
INLINE const float *load(const void *from, int64_t at, int64_t count, int64_t dtype, float *space) {
    if (dtype == FLOAT32)
        return (const float *)from + at;
    const uint16_t *x = (const uint16_t *)from + at;
    if (dtype == BFLOAT16)
        for (int64_t i = 0; i < count; i++)
            space[i] = from_bfloat16(x[i]);
    else
        for (int64_t i = 0; i < count; i++)
            space[i] = from_float16(x[i]);
    return space;
}

INLINE void store(void *to, int64_t at, const float *x, int64_t count, int64_t dtype) {
    if (dtype == FLOAT32) {
        memcpy((float *)to + at, x, (size_t)count * sizeof(float));
        return;
    }
    uint16_t *y = (uint16_t *)to + at;
    for (int64_t i = 0; i < count; i++)
        y[i] = dtype == BFLOAT16 ? to_bfloat16(x[i]) : to_float16(x[i]);
}

INLINE float dot(const float *x, const float *y, int64_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; i++)
        sum += x[i] * y[i];
    return sum;
}

/* A loop over tokens of so many numbers, in several threads where it is worth waking them. */
INLINE void share(Part part, const void *job, int64_t tokens, int64_t width, int64_t threads) {
    share_out(part, job, tokens, tokens * width > FEW ? threads : 1);
}
