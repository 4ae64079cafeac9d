/* Gated delta net on the CPU: its convolution and its recurrence; see cpu_ops.c for how functions are called and what may
 * be reassociated. A token of a row gives the same whatever else is in the step, and however the row was cut.
 */

#include "activations.h"

#define CHANNELS 256 /* of a convolution, that one item takes through all tokens of a row */
#define TAPS 8
#define WIDTH 32     /* features of a value, that one item takes through all tokens of a row */
#define MAX_KEY 256  /* features of a key: so many rows of WIDTH numbers are an item's state */

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

typedef struct {
    const float *x;
    int64_t x_stride;
    const float *weight; /* [taps, channels] */
    float *tail;         /* [blocks, taps - 1, channels] */
    const int32_t *state_in, *state_out, *query_start, *query_len;
    float *y;
    int64_t y_stride, tokens, rows, channels, taps;
    int64_t threads;
} CausalConv;

/* Items are a row's slices of channels. */
DISPATCHED static void convolve_items(const void *job, int64_t first, int64_t stop) {
    const CausalConv *a = job;
    const int64_t slices = (a->channels + CHANNELS - 1) / CHANNELS, kept = a->taps - 1;
    float before[TAPS][CHANNELS];
    for (int64_t item = first; item < stop; item++) {
        const int64_t r = item / slices, from = item % slices * CHANNELS, count = a->query_len[r];
        const int64_t width = a->channels - from < CHANNELS ? a->channels - from : CHANNELS;
        if (count == 0)
            continue;
        const float *tail = a->tail + a->state_in[r] * kept * a->channels + from;
        float *left = a->tail + a->state_out[r] * kept * a->channels + from;
        const float *x = a->x + a->query_start[r] * a->x_stride + from;
        float *y = a->y + a->query_start[r] * a->y_stride + from;
        for (int64_t j = 0; j < kept; j++)
            memcpy(before[j], tail + j * a->channels, (size_t)width * sizeof(float));
        for (int64_t t = 0; t < count; t++) {
            float *restrict out = y + t * a->y_stride;
            for (int64_t c = 0; c < width; c++)
                out[c] = 0;
            for (int64_t j = 0; j < a->taps; j++) {
                const int64_t at = t - kept + j;
                const float *input = at < 0 ? before[at + kept] : x + at * a->x_stride;
                const float *weight = a->weight + j * a->channels + from;
                for (int64_t c = 0; c < width; c++)
                    out[c] += weight[c] * input[c];
            }
            for (int64_t c = 0; c < width; c++)
                out[c] *= sigmoid(out[c]);
        }
        for (int64_t j = 0; j < kept; j++) {
            const int64_t at = count - kept + j;
            const float *input = at < 0 ? before[at + kept] : x + at * a->x_stride;
            memcpy(left + j * a->channels, input, (size_t)width * sizeof(float));
        }
    }
}

INLINE void clear(float *y, int64_t stride, int64_t tokens, int64_t width) {
    for (int64_t t = 0; t < tokens; t++)
        memset(y + t * stride, 0, (size_t)width * sizeof(float));
}

void causal_conv_silu(const CausalConv *a) {
    clear(a->y, a->y_stride, a->tokens, a->channels);
    const int64_t slices = (a->channels + CHANNELS - 1) / CHANNELS;
    share_out(convolve_items, a, a->rows * slices, a->tokens * a->channels > FEW ? a->threads : 1);
}

typedef struct {
    const float *qkv;
    int64_t qkv_stride;
    const float *ba;
    int64_t ba_stride;
    const float *a_log, *dt_bias;
    void *state; /* [blocks, value_heads, key_dim, value_dim] of fp32 or bf16, as `dtype` says */
    const int32_t *state_in, *state_out, *query_start, *query_len;
    float *y;
    int64_t y_stride, tokens, rows, key_heads, key_dim, value_heads, value_dim;
    int64_t dtype, each; /* each: bf16 states are rounded behind every token */
    double eps;
    int64_t threads;
} DeltaRule;

/* log(1 + e^x) */
INLINE float softplus(float x) { return x > 20.0f ? x : log1pf(exponential(x)); }

INLINE void unit(const float *x, int64_t count, float eps, float scale, float *y) {
    const float by = scale / sqrtf(dot(x, x, count) + eps);
    for (int64_t i = 0; i < count; i++)
        y[i] = x[i] * by;
}

typedef float Wide __attribute__((vector_size(64), aligned(64), may_alias));
#define PARTS (WIDTH / 16)

/* k S of `keys` rows of a slice: two sums, so that a row need not wait for the one before. */
INLINE void product(const Wide s[][PARTS], const float *k, int64_t keys, Wide *y) {
    Wide one[PARTS] = {0}, other[PARTS] = {0};
    int64_t i = 0;
    for (; i + 2 <= keys; i += 2)
#pragma GCC unroll 2
        for (int j = 0; j < PARTS; j++) {
            one[j] += k[i] * s[i][j];
            other[j] += k[i + 1] * s[i + 1][j];
        }
    for (int j = 0; j < PARTS; j++) {
        y[j] = one[j] + other[j];
        if (i < keys)
            y[j] += k[i] * s[i][j];
    }
}

/* S = decay S + k correction; y = q S */
INLINE void correct(
    Wide s[][PARTS], float decay, const float *k, const Wide *correction, const float *q, int64_t keys, Wide *y
) {
    Wide sum[PARTS] = {0};
    for (int64_t i = 0; i < keys; i++)
#pragma GCC unroll 2
        for (int j = 0; j < PARTS; j++) {
            s[i][j] = decay * s[i][j] + k[i] * correction[j];
            sum[j] += q[i] * s[i][j];
        }
    for (int j = 0; j < PARTS; j++)
        y[j] = sum[j];
}

/* A slice of a state from where it is kept, rows of `value_dim` numbers. */
INLINE void load_state(const DeltaRule *a, int64_t at, int64_t width, Wide s[][PARTS]) {
    float space[WIDTH];
    for (int64_t i = 0; i < a->key_dim; i++)
        memcpy(s[i], load(a->state, at + i * a->value_dim, width, a->dtype, space), (size_t)width * sizeof(float));
}

INLINE void store_state(const DeltaRule *a, int64_t at, int64_t width, Wide s[][PARTS]) {
    for (int64_t i = 0; i < a->key_dim; i++)
        store(a->state, at + i * a->value_dim, (const float *)s[i], width, a->dtype);
}

INLINE void round_state(Wide s[][PARTS], int64_t keys) {
    float *x = (float *)s;
    for (int64_t i = 0; i < keys * WIDTH; i++)
        x[i] = from_bfloat16(to_bfloat16(x[i]));
}

/* Items are slices of the values of a row's heads: a slice of the state stays in the first cache meanwhile. */
DISPATCHED static void delta_items(const void *job, int64_t first, int64_t stop) {
    const DeltaRule *a = job;
    const int64_t keys = a->key_dim, values = a->value_dim, slices = (values + WIDTH - 1) / WIDTH;
    const float scale = 1.0f / sqrtf((float)keys);
    Wide s[MAX_KEY][PARTS], correction[PARTS], out[PARTS];
    float q[MAX_KEY], k[MAX_KEY];
    for (int64_t item = first; item < stop; item++) {
        const int64_t r = item / (a->value_heads * slices), h = item / slices % a->value_heads;
        const int64_t from = item % slices * WIDTH, width = values - from < WIDTH ? values - from : WIDTH;
        const int64_t key_head = h * a->key_heads / a->value_heads, count = a->query_len[r];
        if (count == 0)
            continue;
        memset(s, 0, (size_t)keys * sizeof(s[0])); /* what is beyond the values stays zero */
        load_state(a, (a->state_in[r] * a->value_heads + h) * keys * values + from, width, s);
        const float rate = -exponential(a->a_log[h]);
        for (int64_t t = a->query_start[r]; t < a->query_start[r] + count; t++) {
            const float *x = a->qkv + t * a->qkv_stride + key_head * keys, *ba = a->ba + t * a->ba_stride;
            const float *value = a->qkv + t * a->qkv_stride + 2 * a->key_heads * keys + h * values + from;
            const float decay = exponential(rate * softplus(ba[a->value_heads + h] + a->dt_bias[h]));
            const float beta = sigmoid(ba[h]);
            unit(x, keys, (float)a->eps, scale, q);
            unit(x + a->key_heads * keys, keys, (float)a->eps, 1.0f, k);
            product((const Wide(*)[PARTS])s, k, keys, correction); /* of the state before it decays */
            float *known = (float *)correction;
            for (int64_t j = 0; j < width; j++)
                known[j] = (value[j] - decay * known[j]) * beta;
            correct(s, decay, k, correction, q, keys, out);
            memcpy(a->y + t * a->y_stride + h * values + from, out, (size_t)width * sizeof(float));
            if (a->dtype == BFLOAT16 && a->each)
                round_state(s, keys);
        }
        store_state(a, (a->state_out[r] * a->value_heads + h) * keys * values + from, width, s);
    }
}

void delta_rule(const DeltaRule *a) {
    clear(a->y, a->y_stride, a->tokens, a->value_heads * a->value_dim);
    const int64_t slices = (a->value_dim + WIDTH - 1) / WIDTH, items = a->rows * a->value_heads * slices;
    share_out(delta_items, a, items, a->tokens * a->value_heads * a->key_dim * a->value_dim > FEW ? a->threads : 1);
}

typedef struct {
    const float *x;
    int64_t x_stride;
    const float *gate;
    int64_t gate_stride;
    const float *weight;
    float *y;
    int64_t y_stride, tokens, heads, head_dim;
    double eps;
    int64_t threads;
} GatedNorm;

INLINE float silu(float x) { return x * sigmoid(x); }

DISPATCHED static void gated_norm_tokens(const void *job, int64_t first, int64_t stop) {
    const GatedNorm *a = job;
    const int64_t size = a->head_dim;
    for (int64_t item = first * a->heads; item < stop * a->heads; item++) {
        const int64_t t = item / a->heads, from = item % a->heads * size;
        const float *x = a->x + t * a->x_stride + from, *gate = a->gate + t * a->gate_stride + from;
        float *restrict y = a->y + t * a->y_stride + from;
        const float scale = 1.0f / sqrtf(dot(x, x, size) / (float)size + (float)a->eps);
        for (int64_t i = 0; i < size; i++)
            y[i] = x[i] * scale * a->weight[i] * silu(gate[i]);
    }
}

void gated_head_rms_norm(const GatedNorm *a) {
    share(gated_norm_tokens, a, a->tokens, a->heads * a->head_dim, a->threads);
}

typedef struct {
    const float *x;
    int64_t x_stride;
    const float *gate;
    int64_t gate_stride;
    float *y;
    int64_t y_stride, tokens, width;
    int64_t threads;
} SigmoidMul;

DISPATCHED static void sigmoid_mul_tokens(const void *job, int64_t first, int64_t stop) {
    const SigmoidMul *a = job;
    for (int64_t t = first; t < stop; t++) {
        const float *x = a->x + t * a->x_stride, *gate = a->gate + t * a->gate_stride;
        float *restrict y = a->y + t * a->y_stride;
        for (int64_t i = 0; i < a->width; i++)
            y[i] = x[i] * sigmoid(gate[i]);
    }
}

void sigmoid_mul(const SigmoidMul *a) { share(sigmoid_mul_tokens, a, a->tokens, a->width, a->threads); }
