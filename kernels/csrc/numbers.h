/* 16-bit floats, whatever the processor. */

#ifndef MAKEREADY_NUMBERS_H
#define MAKEREADY_NUMBERS_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* The exponent is corrected by a product, which also makes subnormals normal. */
INLINE float from_float16(uint16_t x) {
    const uint32_t magnitude = (uint32_t)(x & 0x7fff) << 13, sign = (uint32_t)(x & 0x8000) << 16;
    const uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | 0x7f800000u;
    return as_float((magnitude >= 0x0f800000u ? special : finite) | sign);
}

#endif
