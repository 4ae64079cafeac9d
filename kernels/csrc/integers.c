/* Products with weights of 4 and 8 bits in the layout of kernels/integers.py. Structs as in cpu_ops.c. */

#include <stdint.h>

#include "dispatch.h"
#include "numbers.h"

typedef struct {
    const float *x; /* NULL: weights are written to `space`, one output after the other, and nothing is multiplied */
    int64_t x_stride;
    const uint16_t *weight;   /* words of kernels/integers.py */
    const uint16_t *scale;    /* fp16 tiles of 64 outputs */
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

DISPATCHED void linear_int(const LinearInt *a) {
    const int64_t whole = (a->inputs + 127) / 128 * 128;
    for (int64_t n = a->first; n < a->stop; n++) {
        float *w = a->space + (a->x ? 0 : (n - a->first) * whole);
        if (a->bits == 4)
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
