/* GGUF's blocks on any processor: what they mean, number by number. */

#include "gguf.h"

/* Of a block: its integers as unsigned ones, and for every 16 of them a scale and what is added: q stands for
 * scale * (q - offset of the format) + shift. */
typedef struct {
    uint8_t q[MOST];
    float scale[MOST / GROUP], shift[MOST / GROUP];
} Unpacked;

INLINE void nibbles(const uint8_t *from, int count, uint8_t *q) {
    for (int i = 0; i < count; i++) {
        q[i] = from[i] & 15;
        q[count + i] = from[i] >> 4;
    }
}

INLINE void unpack_32(const uint8_t *block, int64_t kind, Unpacked *u) {
    const float d = float_at(block), m = kind == Q4_1 || kind == Q5_1 ? float_at(block + 2) : 0;
    const uint8_t *from = block + FORMATS[kind].bytes - (kind == Q8_0 ? 32 : 16);
    if (kind == Q8_0)
        for (int i = 0; i < 32; i++)
            u->q[i] = from[i] ^ 0x80;
    else
        nibbles(from, 16, u->q);
    if (kind == Q5_0 || kind == Q5_1) {
        const uint32_t fifth = word_at(from - 4);
        for (int i = 0; i < 32; i++)
            u->q[i] |= (fifth >> i & 1) << 4;
    }
    for (int g = 0; g < 2; g++) {
        u->scale[g] = d;
        u->shift[g] = m;
    }
}

/* Each 32 bytes hold 32 elements in their low nibbles, then 32 in the high ones. */
INLINE void unpack_k(const uint8_t *block, int64_t kind, Unpacked *u) {
    const float d = float_at(block), least = float_at(block + 2);
    const uint8_t *fifth = block + 16, *from = block + (kind == Q5_K ? 48 : 16);
    uint32_t scales[2], minima[2];
    k_scales(block + 4, scales, minima);
    for (int part = 0; part < 8; part++) {
        if (part % 2 == 0)
            nibbles(from + 16 * part, 32, u->q + 32 * part);
        u->scale[2 * part] = u->scale[2 * part + 1] = d * (float)(scales[part / 4] >> 8 * (part % 4) & 255);
        u->shift[2 * part] = u->shift[2 * part + 1] = -(least * (float)(minima[part / 4] >> 8 * (part % 4) & 255));
    }
    if (kind == Q5_K)
        for (int i = 0; i < 256; i++)
            u->q[i] |= (fifth[i % 32] >> i / 32 & 1) << 4;
}

/* Of every 128 elements 64 bytes of nibbles, low ones first, and 32 bytes of bit pairs. */
INLINE void unpack_q6(const uint8_t *block, Unpacked *u) {
    const float d = float_at(block + 208);
    for (int half = 0; half < 2; half++) {
        const uint8_t *low = block + 64 * half, *high = block + 128 + 32 * half;
        nibbles(low, 64, u->q + 128 * half);
        for (int i = 0; i < 128; i++)
            u->q[128 * half + i] |= (high[i % 32] >> 2 * (i / 32) & 3) << 4;
    }
    for (int g = 0; g < 16; g++) {
        u->scale[g] = d * (float)(int8_t)block[192 + g];
        u->shift[g] = 0;
    }
}

/* Each 16 bytes hold 16 elements in their low nibbles, then 16 in the high ones. */
INLINE void unpack_iq4(const uint8_t *block, int64_t kind, Unpacked *u) {
    const int elements = FORMATS[kind].elements;
    const uint8_t *from = block + FORMATS[kind].bytes - elements / 2;
    const float d = float_at(block);
    int8_t scales[8] = {1};
    if (kind == IQ4_XS)
        iq4_scales(block, scales);
    for (int part = 0; part < elements / 32; part++) {
        nibbles(from + 16 * part, 16, u->q + 32 * part);
        u->scale[2 * part] = u->scale[2 * part + 1] = d * (float)scales[part];
        u->shift[2 * part] = u->shift[2 * part + 1] = 0;
    }
    for (int i = 0; i < elements; i++)
        u->q[i] = (uint8_t)(IQ4_VALUES[u->q[i]] + FORMATS[kind].offset);
}

INLINE void unpack(const uint8_t *block, int64_t kind, Unpacked *u) {
    if (kind == Q6_K)
        unpack_q6(block, u);
    else if (kind == Q4_K || kind == Q5_K)
        unpack_k(block, kind, u);
    else if (kind == IQ4_NL || kind == IQ4_XS)
        unpack_iq4(block, kind, u);
    else
        unpack_32(block, kind, u);
}

void dequantize_row(const uint8_t *blocks, int64_t kind, int64_t width, float *y) {
    const Format format = FORMATS[kind];
    Unpacked u;
    for (int64_t at = 0; at < width; at += format.elements, blocks += format.bytes) {
        unpack(blocks, kind, &u);
        for (int i = 0; i < format.elements; i++)
            y[at + i] = u.scale[i / GROUP] * (float)(u.q[i] - format.offset) + u.shift[i / GROUP];
    }
}

/* A token's sum of one output is made alike whatever the other tokens are, here and in the other files. */
void multiply_scalar(const Outputs *o, const Tokens *a, void *space) {
    (void)space;
    const Format format = FORMATS[o->kind];
    Unpacked u;
    for (int64_t n = 0; n < o->outputs; n++) {
        for (int64_t t = 0; t < a->count; t++)
            o->y[t * o->y_stride + n] = 0;
        for (int64_t at = 0; at < o->inputs; at += format.elements) {
            unpack(o->blocks + n * o->row + at / format.elements * format.bytes, o->kind, &u);
            for (int64_t t = 0; t < a->count; t++) {
                const int8_t *q = q_of(a, t) + at;
                const float *scale = scales_of(a, t), *sum = sums_of(a, t);
                float total = 0;
                for (int g = 0; g < format.elements / GROUP; g++) {
                    int32_t product = 0;
                    for (int i = 0; i < GROUP; i++)
                        product += (u.q[GROUP * g + i] - format.offset) * q[GROUP * g + i];
                    const int64_t group = at / GROUP + g;
                    total += u.scale[g] * scale[group / 2 * 2] * (float)product + u.shift[g] * sum[group];
                }
                o->y[t * o->y_stride + n] += total;
            }
        }
        if (o->bias)
            for (int64_t t = 0; t < a->count; t++)
                o->y[t * o->y_stride + n] += o->bias[n];
    }
}
