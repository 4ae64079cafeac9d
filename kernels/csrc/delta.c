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
    float *state; /* [blocks, value_heads, key_dim, value_dim] */
    const int32_t *state_in, *state_out, *query_start, *query_len;
    float *y;
    int64_t y_stride, tokens, rows, key_heads, key_dim, value_heads, value_dim;
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

/* Items are slices of the values of a row's heads: a slice of the state stays in the first cache meanwhile. */
DISPATCHED static void delta_items(const void *job, int64_t first, int64_t stop) {
    const DeltaRule *a = job;
    const int64_t keys = a->key_dim, values = a->value_dim, slices = (values + WIDTH - 1) / WIDTH;
    const float scale = 1.0f / sqrtf((float)keys);
    float s[MAX_KEY][WIDTH], q[MAX_KEY], k[MAX_KEY];
    for (int64_t item = first; item < stop; item++) {
        const int64_t r = item / (a->value_heads * slices), h = item / slices % a->value_heads;
        const int64_t from = item % slices * WIDTH, width = values - from < WIDTH ? values - from : WIDTH;
        const int64_t key_head = h * a->key_heads / a->value_heads, count = a->query_len[r];
        if (count == 0)
            continue;
        const float *old = a->state + (a->state_in[r] * a->value_heads + h) * keys * values + from;
        float *left = a->state + (a->state_out[r] * a->value_heads + h) * keys * values + from;
        memset(s, 0, (size_t)keys * sizeof(s[0]));
        for (int64_t i = 0; i < keys; i++)
            memcpy(s[i], old + i * values, (size_t)width * sizeof(float));
        const float rate = -exponential(a->a_log[h]);
        for (int64_t t = a->query_start[r]; t < a->query_start[r] + count; t++) {
            const float *x = a->qkv + t * a->qkv_stride + key_head * keys, *ba = a->ba + t * a->ba_stride;
            const float *value = a->qkv + t * a->qkv_stride + 2 * a->key_heads * keys + h * values + from;
            const float decay = exponential(rate * softplus(ba[a->value_heads + h] + a->dt_bias[h]));
            const float beta = sigmoid(ba[h]);
            unit(x, keys, (float)a->eps, scale, q);
            unit(x + a->key_heads * keys, keys, (float)a->eps, 1.0f, k);
            float known[WIDTH] = {0}, out[WIDTH] = {0};
            for (int64_t i = 0; i < keys; i++)
                for (int64_t j = 0; j < WIDTH; j++) {
                    s[i][j] *= decay;
                    known[j] += k[i] * s[i][j];
                }
            float correction[WIDTH] = {0};
            for (int64_t j = 0; j < width; j++)
                correction[j] = (value[j] - known[j]) * beta;
            for (int64_t i = 0; i < keys; i++)
                for (int64_t j = 0; j < WIDTH; j++) {
                    s[i][j] += k[i] * correction[j];
                    out[j] += q[i] * s[i][j];
                }
            memcpy(a->y + t * a->y_stride + h * values + from, out, (size_t)width * sizeof(float));
        }
        for (int64_t i = 0; i < keys; i++)
            memcpy(left + i * values, s[i], (size_t)width * sizeof(float));
    }
}

void delta_rule(const DeltaRule *a) {
    clear(a->y, a->y_stride, a->tokens, a->value_heads * a->value_dim);
    const int64_t slices = (a->value_dim + WIDTH - 1) / WIDTH, items = a->rows * a->value_heads * slices;
    share_out(delta_items, a, items, a->tokens * a->value_heads * a->key_dim * a->value_dim > FEW ? a->threads : 1);
}
