/* Ops over GGUF's blocks: which outputs a thread multiplies, by which instructions; see gguf.h. */

#include <math.h>
#include <stdlib.h>

#include "dispatch.h"
#include "gguf.h"
#include "threads.h"

enum { BEST, SCALAR, AVX2, AVX512, PANEL }; /* numbers of gguf_cpu.VARIANTS */

#define MANY_TOKENS 8     /* for which unpacking weights into a panel pays */
#define FEW_NUMBERS 65536 /* activations that one thread quantizes */

/* Widest first. */
static int has(int64_t variant) {
#ifdef HAS_X86
    __builtin_cpu_init();
    if (variant == AVX512 || variant == PANEL)
        return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (variant == AVX2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#endif
    return variant == SCALAR || variant == BEST;
}

/* Whether this processor runs a variant. */
typedef struct {
    int64_t variant;
    int64_t *answer;
} Has;

void gguf_has(const Has *a) { *a->answer = has(a->variant); }

static int best(void) {
    static int found;
    if (!found)
        found = has(AVX512) ? AVX512 : has(AVX2) ? AVX2 : SCALAR;
    return found;
}

typedef struct {
    const float *x;
    int64_t x_stride;
    const int64_t *pieces; /* [count][4]: address, kind, outputs, first output */
    int64_t count;
    const float *bias; /* or NULL */
    float *y;
    int64_t y_stride, tokens, inputs, variant;
    int64_t by_rows; /* whether a token's bits are to be alike for any number of them */
    int64_t threads;
} LinearGguf;

/* One call. */
typedef struct {
    const LinearGguf *a;
    Multiply multiply;
    Tokens made;
    char *memory;
    int64_t space; /* bytes of a panel, or 0 */
} Product;

INLINE void quantize(const float *x, int64_t inputs, int64_t width, int8_t *q, float *scales, float *sums) {
    for (int64_t at = 0; at < width; at += 32) {
        float *scale = scales + at / 16, *sum = sums + at / 16;
        if (at >= inputs) {
            memset(q + at, 0, 32);
            scale[0] = scale[1] = sum[0] = sum[1] = 0;
            continue;
        }
        float most = 0, wrong = 0;
#pragma omp simd reduction(max : most)
        for (int i = 0; i < 32; i++)
            most = fabsf(x[at + i]) > most ? fabsf(x[at + i]) : most;
#pragma omp simd reduction(+ : wrong)
        for (int i = 0; i < 32; i++)
            wrong += x[at + i] * 0; /* NaN, where one is NaN or infinite */
        const float step = most / 127, by = wrong == 0 && step > 0 ? step : INFINITY;
        int total[2] = {0, 0};
        for (int i = 0; i < 32; i++)
            q[at + i] = (int8_t)(int)rintf(x[at + i] / by);
        for (int i = 0; i < 16; i++) {
            total[0] += q[at + i];
            total[1] += q[at + 16 + i];
        }
        scale[0] = step + wrong;
        scale[1] = scale[0] * (float)(total[0] + total[1]);
        sum[0] = scale[0] * (float)total[0];
        sum[1] = scale[0] * (float)total[1];
    }
}

DISPATCHED static void quantize_tokens(const void *job, int64_t first, int64_t stop) {
    const Product *p = job;
    const int64_t width = p->made.width;
    for (int64_t t = first; t < stop; t++) {
        char *at = p->memory + t * p->made.stride;
        float *scales = (float *)(at + width);
        quantize(p->a->x + t * p->a->x_stride, p->a->inputs, width, (int8_t *)at, scales, scales + width / 16);
    }
}

/* Units are counted through all pieces; one never spans two. */
static void multiply_units(const void *job, int64_t first, int64_t stop) {
    const Product *p = job;
    const LinearGguf *a = p->a;
    void *space = p->space ? aligned_alloc(64, (size_t)p->space) : 0;
    if (p->space && !space)
        abort();
    int64_t before = 0;
    for (const int64_t *piece = a->pieces; piece < a->pieces + 4 * a->count; piece += 4) {
        const int64_t outputs = piece[2], units = (outputs + UNIT - 1) / UNIT;
        const Format format = FORMATS[piece[1]];
        const int64_t row = a->inputs / format.elements * format.bytes;
        for (int64_t u = first > before ? first - before : 0; u < units && before + u < stop; u++) {
            const int64_t n = u * UNIT, at = piece[3] + n;
            const Outputs o = {(const uint8_t *)(intptr_t)piece[0] + n * row, piece[1],
                               outputs - n < UNIT ? outputs - n : UNIT, a->inputs, row,
                               a->bias ? a->bias + at : 0, a->y + at, a->y_stride};
            p->multiply(&o, &p->made, space);
        }
        before += units;
    }
    free(space);
}

void linear_gguf(const LinearGguf *a) {
    const int64_t width = (a->inputs + 63) / 64 * 64, stride = width + width / 8 * (int64_t)sizeof(float);
    char *memory = malloc((size_t)(a->tokens * stride));
    Product p = {a, multiply_scalar, {(const int8_t *)memory, stride, width, a->tokens}, memory, 0};
    if (!memory)
        abort();
#ifdef HAS_X86
    int64_t variant = a->variant == BEST ? best() : a->variant;
    if (a->variant == BEST && variant == AVX512 && a->tokens >= MANY_TOKENS && !a->by_rows)
        variant = PANEL;
    if (variant == PANEL) {
        p.multiply = multiply_panel_avx512;
        p.space = panel_bytes(width);
    } else
        p.multiply = variant == AVX512 ? multiply_avx512 : variant == AVX2 ? multiply_avx2 : multiply_scalar;
#endif
    share_out(quantize_tokens, &p, a->tokens, a->tokens * a->inputs > FEW_NUMBERS ? a->threads : 1);
    int64_t units = 0;
    for (int64_t i = 0; i < a->count; i++)
        units += (a->pieces[4 * i + 2] + UNIT - 1) / UNIT;
    share_out(multiply_units, &p, units, a->threads);
    free(memory);
}

typedef struct {
    const int32_t *ids;
    const int64_t *pieces; /* of one piece, as above */
    float *x;
    int64_t x_stride, tokens, width;
} EmbeddingGguf;

void embedding_gguf(const EmbeddingGguf *a) {
    const int64_t kind = a->pieces[1], row = a->width / FORMATS[kind].elements * FORMATS[kind].bytes;
    for (int64_t t = 0; t < a->tokens; t++)
        dequantize_row((const uint8_t *)(intptr_t)a->pieces[0] + a->ids[t] * row, kind, a->width, a->x + t * a->x_stride);
}
