/* Products with weights of 4 and 8 bits in the layout of kernels/integers.py and kernels/mx.py. Structs as in cpu_ops.c. */

#include <stdint.h>
#include <string.h>

#include "dispatch.h"
#include "numbers.h"

typedef struct {
    const float *x; /* NULL: weights are written to `space`, one output after the other, and nothing is multiplied */
    int64_t x_stride;
    const uint16_t *weight;   /* words of kernels/integers.py */
    const uint16_t *scale;    /* fp16 tiles of 64 outputs */
    const uint8_t *exponent;  /* e8m0 tiles in the place of scale: weights are e2m1, in blocks of 32 */
    const uint16_t *pair;     /* the same with two numbers of e4m3, each for 16 inputs, */
    const float *global;      /* and a factor of every output, or NULL for 1 */
    const uint8_t *zero;      /* NULL: symmetric */
    const float *bias;
    float *y;
    int64_t y_stride, tokens, first, stop, inputs, bits, group; /* outputs first .. stop; group: a multiple of 32 */
    float *space; /* whole spans of 128 inputs */
} LinearInt;

/* Weights of output n as fp32: fields of words one after the other, each a run of inputs of at most two groups. */
INLINE void widen_output(const LinearInt *a, int64_t n, const int64_t bits, float *restrict w) {
    const int64_t count = 8 * bits, spans = (a->inputs + 127) / 128, groups = (a->inputs + a->group - 1) / a->group;
    const int32_t mask = (1 << bits) - 1;
    const uint16_t *words = a->weight + n * spans * count;
    for (int64_t s = 0; s < spans; s++, words += count)
        for (int64_t field = 0; field < 16 / bits; field++)
            for (int64_t part = 0; part < count; part += 32) {
                const int64_t k = 128 * s + field * count + part;
                const int64_t g = k / a->group < groups ? k / a->group : groups - 1;
                const int64_t at = (n / 64 * groups + g) * 64 + n % 64;
                const float scale = from_float16(a->scale[at]);
                const int32_t zero = a->zero ? a->zero[at] : 1 << (bits - 1), shift = (int32_t)(bits * field);
                for (int64_t j = 0; j < 32; j++)
                    w[k + j] = (float)((((int32_t)words[part + j] >> shift) & mask) - zero) * scale;
            }
}

/* One number of e4m3 without a sign. */
INLINE float from_e4m3(uint32_t bits) {
    const uint32_t wide = (bits & 0x7F) << 20; /* its exponent and mantissa where fp32 has them: 2^-120 times it */
    float x;
    memcpy(&x, &wide, sizeof(x));
    return x * 0x1p120f;
}

INLINE float from_e8m0(uint32_t e) {
    const uint32_t bits = e == 255 ? 0x7FC00000u : e ? e << 23 : 0x00400000u;
    float x;
    memcpy(&x, &bits, sizeof(x));
    return x;
}

/* 32 numbers of e2m1 times the scales of their halves. Twice a number is its mantissa, with a leading one unless the
 * exponent is 0, moved up by one less than the exponent. Arithmetic, as tables are no vectors. */
INLINE void widen_field(const uint16_t *words, int64_t shift, float first, float second, float *restrict w) {
    first *= 0.5f;
    second *= 0.5f;
    for (int64_t j = 0; j < 32; j++) {
        const int32_t q = words[j] >> shift, e = q >> 1 & 3;
        const int32_t twice = ((q & 1) | (e ? 2 : 0)) << (e ? e - 1 : 0);
        w[j] = (float)(q & 8 ? -twice : twice) * (j < 16 ? first : second);
    }
}

/* The same of 4-bit floats: a field is one block of MXFP4, or two of NVFP4. */
INLINE void widen_floats(const LinearInt *a, int64_t n, const int paired, float *restrict w) {
    const int64_t spans = (a->inputs + 127) / 128, blocks = (a->inputs + 31) / 32;
    const uint16_t *words = a->weight + n * spans * 32;
    const float global = a->global ? a->global[n] : 1.0f;
    for (int64_t s = 0; s < spans; s++, words += 32)
        for (int64_t field = 0; field < 4; field++) {
            const int64_t k = 128 * s + 32 * field, g = k / 32 < blocks ? k / 32 : blocks - 1;
            const int64_t at = (n / 64 * blocks + g) * 64 + n % 64;
            const float first = paired ? from_e4m3(a->pair[at]) : from_e8m0(a->exponent[at]);
            const float second = paired ? from_e4m3(a->pair[at] >> 8) : first;
            widen_field(words, 4 * field, first * global, second * global, w + k);
        }
}

DISPATCHED void linear_int(const LinearInt *a) {
    const int64_t whole = (a->inputs + 127) / 128 * 128;
    for (int64_t n = a->first; n < a->stop; n++) {
        float *w = a->space + (a->x ? 0 : (n - a->first) * whole);
        if (a->exponent)
            widen_floats(a, n, 0, w);
        else if (a->pair)
            widen_floats(a, n, 1, w);
        else if (a->bits == 4)
            widen_output(a, n, 4, w);
        else
            widen_output(a, n, 8, w);
        if (!a->x)
            continue;
        for (int64_t t = 0; t < a->tokens; t++) {
            const float *x = a->x + t * a->x_stride;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t k = 0; k < a->inputs; k++)
                sum += w[k] * x[k];
            a->y[t * a->y_stride + n] = sum + (a->bias ? a->bias[n] : 0.0f);
        }
    }
}
