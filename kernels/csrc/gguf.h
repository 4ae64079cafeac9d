/* Products with GGUF's blocks as a file stores them; see kernels/gguf.py for what is computed.
 *
 * Activations lie in memory of the call's own, a token after the other (Tokens): 8-bit integers, for every 32 of them
 * a scale and scale * sum, for every 16 scale * sum. All are filled up with zeros to a multiple of 64. */

#ifndef MAKEREADY_GGUF_H
#define MAKEREADY_GGUF_H

#include <stdint.h>

#include "numbers.h"

enum { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS }; /* numbers of gguf.KINDS */

#define UNIT 32     /* outputs that are computed at a time */
#define MOST 256    /* elements of the longest block */
#define GROUP 16    /* elements of the shortest part of a block with a scale of its own */

/* Elements and bytes of a block, and what is subtracted from its integers, which are stored as unsigned ones. */
typedef struct {
    int elements, bytes, offset;
} Format;

static const Format FORMATS[] = {
    [Q4_0] = {32, 18, 8},   [Q4_1] = {32, 20, 0},    [Q5_0] = {32, 22, 16},   [Q5_1] = {32, 24, 0},
    [Q8_0] = {32, 34, 128}, [Q4_K] = {256, 144, 0}, [Q5_K] = {256, 176, 0}, [Q6_K] = {256, 210, 32},
    [IQ4_NL] = {32, 18, 128}, [IQ4_XS] = {256, 136, 128},
};

/* What the 4 bits of IQ4 types stand for (ggml-common.h). */
static const int8_t IQ4_VALUES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

typedef struct {
    const int8_t *q;
    int64_t stride, width; /* bytes from token to token; elements, zeros included */
    int64_t count;
} Tokens;

INLINE const int8_t *q_of(const Tokens *a, int64_t t) { return a->q + t * a->stride; }
/* [width / 32][2]: scale, scale * sum */
INLINE const float *scales_of(const Tokens *a, int64_t t) { return (const float *)(q_of(a, t) + a->width); }
/* [width / 16]: scale * sum */
INLINE const float *sums_of(const Tokens *a, int64_t t) { return scales_of(a, t) + a->width / 16; }

/* Neighbouring outputs, at most UNIT of them, of every token. */
typedef struct {
    const uint8_t *blocks;
    int64_t kind, outputs, inputs, row; /* bytes of an output's weights */
    const float *bias;                  /* or NULL */
    float *y;                           /* of the first output and token */
    int64_t y_stride;
} Outputs;

/* `space`: a panel's memory, where the function makes one. */
typedef void (*Multiply)(const Outputs *o, const Tokens *a, void *space);

INLINE uint16_t half_at(const uint8_t *at) {
    uint16_t bits;
    memcpy(&bits, at, 2);
    return bits;
}

INLINE float float_at(const uint8_t *at) { return from_float16(half_at(at)); }

INLINE uint32_t word_at(const uint8_t *at) {
    uint32_t bits;
    memcpy(&bits, at, 4);
    return bits;
}

/* The 8 scales and the 8 minima, of 6 bits each, that K blocks keep in 12 bytes. */
INLINE void k_scales(const uint8_t *packed, uint32_t scales[2], uint32_t minima[2]) {
    const uint32_t first = word_at(packed), second = word_at(packed + 4), third = word_at(packed + 8);
    scales[0] = first & 0x3f3f3f3f;
    scales[1] = (third & 0x0f0f0f0f) | ((first >> 6 & 0x03030303) << 4);
    minima[0] = second & 0x3f3f3f3f;
    minima[1] = (third >> 4 & 0x0f0f0f0f) | ((second >> 6 & 0x03030303) << 4);
}

/* The 8 scales of an IQ4_XS block: nibbles behind its first four bytes, and pairs of bits in the two before. */
INLINE void iq4_scales(const uint8_t *block, int8_t scales[8]) {
    const uint32_t high = half_at(block + 2), low = word_at(block + 4);
    for (int part = 0; part < 8; part++)
        scales[part] = (int8_t)((int)((low >> 4 * part & 15) | (high >> 2 * part & 3) << 4) - 32);
}

void multiply_scalar(const Outputs *o, const Tokens *a, void *space);
void dequantize_row(const uint8_t *blocks, int64_t kind, int64_t width, float *y);
#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_X86
void multiply_avx2(const Outputs *o, const Tokens *a, void *space);
void multiply_avx512(const Outputs *o, const Tokens *a, void *space);
void multiply_panel_avx512(const Outputs *o, const Tokens *a, void *space);
int64_t panel_bytes(int64_t width);

#endif

#endif
