/* Small ops of a step on the CPU: fp32 activations, results written in place, tokens shared among threads where there
 * are many.
 *
 * PyTorch spends 50-300 us on each of these at a few rows, nearly all of it per-op overhead. Every function
 * takes one pointer to a struct whose fields are 8 bytes each (pointer, int64_t or double), in the order in
 * which kernels/native.py packs them, the last one the number of threads; ops that use one thread leave it out.
 * Strides count elements. The contracts in kernels/ say what is computed; LAYOUT changes whenever a struct does.
 *
 * Only the loops marked "omp simd reduction" may be reassociated; everything else is strict IEEE, so that
 * NaN and infinity behave as in the references.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "dispatch.h"
#include "numbers.h"
#include "threads.h"

#define LAYOUT 7
#define MAX_HEAD 1024 /* features of a head: rows of that length live on the stack */
#define MAX_GROUP 64  /* query heads of a KV head */
#define QUERIES 16    /* of a row, that share keys */
#define MAX_TILED 256 /* features of a head */
#define BLOCK 64      /* keys whose scores are held at once */
#define FEW 16384     /* numbers that one thread is done with before another has begun */

enum { FLOAT32, BFLOAT16, FLOAT16 }; /* numbers of native.DTYPES */

int64_t layout(void) { return LAYOUT; }

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

INLINE void normalise(const float *x, const float *weight, double eps, double offset, int64_t count, float *y) {
    const float scale = 1.0f / sqrtf(dot(x, x, count) / (float)count + (float)eps), more = (float)offset;
    for (int64_t i = 0; i < count; i++)
        y[i] = x[i] * scale * (weight[i] + more);
}

/* A loop over tokens of so many numbers, in several threads where it is worth waking them. */
INLINE void share(Part part, const void *job, int64_t tokens, int64_t width, int64_t threads) {
    share_out(part, job, tokens, tokens * width > FEW ? threads : 1);
}

typedef struct {
    const float *x;
    int64_t x_stride;
    const float *weight;
    float *y;
    int64_t y_stride, tokens, width;
    double eps, offset; /* offset is added to the weights */
    int64_t threads;
} RmsNorm;

DISPATCHED static void rms_norm_tokens(const void *job, int64_t first, int64_t stop) {
    const RmsNorm *a = job;
    for (int64_t t = first; t < stop; t++)
        normalise(a->x + t * a->x_stride, a->weight, a->eps, a->offset, a->width, a->y + t * a->y_stride);
}

void rms_norm(const RmsNorm *a) { share(rms_norm_tokens, a, a->tokens, a->width, a->threads); }

typedef struct {
    const float *x;
    int64_t x_stride;
    const float *residual;
    int64_t residual_stride;
    const float *weight;
    float *y;
    int64_t y_stride;
    float *total;
    int64_t total_stride, tokens, width;
    double eps, offset; /* offset is added to the weights */
    int64_t threads;
} AddRmsNorm;

DISPATCHED static void add_rms_norm_tokens(const void *job, int64_t first, int64_t stop) {
    const AddRmsNorm *a = job;
    for (int64_t t = first; t < stop; t++) {
        const float *x = a->x + t * a->x_stride, *residual = a->residual + t * a->residual_stride;
        float *total = a->total + t * a->total_stride;
        for (int64_t i = 0; i < a->width; i++)
            total[i] = x[i] + residual[i];
        normalise(total, a->weight, a->eps, a->offset, a->width, a->y + t * a->y_stride);
    }
}

void add_rms_norm(const AddRmsNorm *a) { share(add_rms_norm_tokens, a, a->tokens, a->width, a->threads); }

typedef struct {
    const int32_t *token_ids, *row_slot, *row_start, *query_start, *query_len;
    int32_t *length, *history;
    int32_t *ids, *positions, *token_slot, *context_len;
    int64_t tokens, rows, null_slot, history_stride;
} Locate;

void locate(const Locate *a) {
    for (int64_t t = 0; t < a->tokens; t++) {
        a->ids[t] = a->positions[t] = 0;
        a->token_slot[t] = (int32_t)a->null_slot;
    }
    for (int64_t r = 0; r < a->rows; r++) {
        const int32_t slot = a->row_slot[r];
        a->context_len[r] = 0;
        if (slot == a->null_slot)
            continue;
        const int32_t start = a->row_start[r] >= 0 ? a->row_start[r] : a->length[slot];
        int32_t *history = a->history + slot * a->history_stride;
        for (int32_t i = 0; i < a->query_len[r]; i++) {
            const int64_t t = a->query_start[r] + i;
            const int32_t at = start + i;
            if (a->token_ids[t] >= 0)
                history[at] = a->token_ids[t];
            a->ids[t] = history[at];
            a->positions[t] = at;
            a->token_slot[t] = slot;
        }
        a->length[slot] = a->context_len[r] = start + a->query_len[r];
    }
}

typedef struct {
    const int32_t *positions, *row_slot, *query_start, *query_len, *context_len, *grow_at, *grow_page;
    int32_t *pages;
    int32_t *kv_slot, *page_table;
    int64_t tokens, rows, grow, null_slot, width, page_size;
} FindPages;

void find_pages(const FindPages *a) {
    for (int64_t t = 0; t < a->tokens; t++)
        a->kv_slot[t] = 0;
    for (int64_t r = 0; r < a->rows; r++) {
        const int32_t slot = a->row_slot[r], size = (int32_t)a->page_size;
        int32_t *pages = a->pages + slot * a->width, *table = a->page_table + r * a->width;
        const int64_t held = (a->context_len[r] + a->page_size - 1) / a->page_size;
        if (slot != a->null_slot) {
            for (int64_t g = 0; g < a->grow; g++)
                if (a->grow_page[r * a->grow + g])
                    pages[a->grow_at[r] + g] = a->grow_page[r * a->grow + g];
            for (int32_t i = 0; i < a->query_len[r]; i++) {
                const int64_t t = a->query_start[r] + i;
                a->kv_slot[t] = pages[a->positions[t] / size] * size + a->positions[t] % size;
            }
        }
        for (int64_t b = 0; b < a->width; b++)
            table[b] = b < held ? pages[b] : 0;
    }
}

typedef struct {
    const float *gate_up;
    int64_t gate_up_stride;
    float *y;
    int64_t y_stride, tokens, width; /* width of y */
    int64_t threads;
} GatedMul;

DISPATCHED static void silu_mul_tokens(const void *job, int64_t first, int64_t stop) {
    const GatedMul *a = job;
    for (int64_t t = first; t < stop; t++) {
        const float *gate = a->gate_up + t * a->gate_up_stride, *up = gate + a->width;
        float *restrict y = a->y + t * a->y_stride;
        for (int64_t i = 0; i < a->width; i++)
            y[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
    }
}

void silu_mul(const GatedMul *a) { share(silu_mul_tokens, a, a->tokens, a->width, a->threads); }

/* gate / 2 * (1 + tanh(u)) is gate / (1 + exp(-2 u)), u = sqrt(2 / pi) (gate + 0.044715 gate^3) */
DISPATCHED static void gelu_tanh_mul_tokens(const void *job, int64_t first, int64_t stop) {
    const GatedMul *a = job;
    for (int64_t t = first; t < stop; t++) {
        const float *gate = a->gate_up + t * a->gate_up_stride, *up = gate + a->width;
        float *restrict y = a->y + t * a->y_stride;
        for (int64_t i = 0; i < a->width; i++) {
            const float cube = gate[i] * gate[i] * gate[i];
            y[i] = gate[i] / (1.0f + exponential(-1.5957691216057308f * (gate[i] + 0.044715f * cube))) * up[i];
        }
    }
}

void gelu_tanh_mul(const GatedMul *a) { share(gelu_tanh_mul_tokens, a, a->tokens, a->width, a->threads); }

typedef struct {
    const float *qkv;
    int64_t qkv_stride;
    const float *rows;
    int64_t rows_stride;
    const float *q_norm, *k_norm; /* both or neither */
    const int32_t *kv_slot;
    void *k_cache, *v_cache; /* [slots, kv_heads, head_dim] of `dtype` */
    float *q;
    int64_t q_stride, tokens, heads, kv_heads, head_dim, rotary, dtype;
    double eps, offset; /* offset is added to the weights */
    int64_t threads;
} NormRopeKvWrite;

INLINE void rotate(const float *x, const float *row, int64_t rotary, int64_t count, float *restrict y) {
    const int64_t half = rotary / 2;
    const float *cosine = row, *sine = row + half;
    for (int64_t i = 0; i < half; i++) {
        y[i] = x[i] * cosine[i] - x[i + half] * sine[i];
        y[i + half] = x[i + half] * cosine[i] + x[i] * sine[i];
    }
    for (int64_t i = rotary; i < count; i++)
        y[i] = x[i];
}

DISPATCHED static void norm_rope_kv_write_tokens(const void *job, int64_t first, int64_t stop) {
    const NormRopeKvWrite *a = job;
    const int64_t size = a->head_dim, turned = a->heads + a->kv_heads;
    float normed[MAX_HEAD], key[MAX_HEAD];
    for (int64_t t = first; t < stop; t++) {
        const float *qkv = a->qkv + t * a->qkv_stride, *row = a->rows + t * a->rows_stride;
        const int64_t place = a->kv_slot[t] * a->kv_heads * size;
        for (int64_t h = 0; h < turned; h++) {
            const int is_query = h < a->heads;
            const float *x = qkv + h * size;
            if (a->q_norm) {
                normalise(x, is_query ? a->q_norm : a->k_norm, a->eps, a->offset, size, normed);
                x = normed;
            }
            if (is_query) {
                rotate(x, row, a->rotary, size, a->q + t * a->q_stride + h * size);
            } else {
                rotate(x, row, a->rotary, size, key);
                store(a->k_cache, place + (h - a->heads) * size, key, size, a->dtype);
            }
        }
        store(a->v_cache, place, qkv + turned * size, a->kv_heads * size, a->dtype);
    }
}

void norm_rope_kv_write(const NormRopeKvWrite *a) {
    share(norm_rope_kv_write_tokens, a, a->tokens, (a->heads + 2 * a->kv_heads) * a->head_dim, a->threads);
}

typedef struct {
    const float *q;
    int64_t q_stride;
    const void *k_cache, *v_cache; /* [pages, page, kv_heads, head_dim] of `dtype` */
    const int32_t *page_table;
    int64_t table_stride;
    const int32_t *query_start, *query_len; /* NULL: row r has one query, q's row r, unless it has no context */
    const int32_t *context_len;
    const float *sinks; /* NULL, or a logit of each head that joins its denominators */
    float *y;
    int64_t y_stride, rows, tokens, heads, kv_heads, head_dim, page, window, dtype;
    double scale;
    int64_t tiled; /* whether queries of a row may share their keys' way through the cache */
    int64_t threads;
} Attention;

/* What weights of a query of `head` are divided by, of their sum and the maximum that they were taken from. */
INLINE float denominator(const Attention *a, int64_t head, float sum, float largest) {
    return a->sinks ? sum + exponential(a->sinks[head] - largest) : sum;
}

/* y += weight[0] x[0] + .. + weight[3] x[3], one load and store of y for four products */
INLINE void add_four(const float *weight, const float *const *x, int64_t count, float *restrict y) {
    const float *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
    for (int64_t i = 0; i < count; i++)
        y[i] += (weight[0] * x0[i] + weight[1] * x1[i]) + (weight[2] * x2[i] + weight[3] * x3[i]);
}

/* The N query heads of one KV head of token t, the last of row r's first `length` ones, with a running maximum
 * (Milakov and Gimelshein 2018, arXiv:1805.02867): scores of a block of keys, then its values. */
INLINE void attend(const Attention *a, int64_t r, int64_t t, int64_t length, int64_t g, int64_t dtype) {
    const int64_t size = a->head_dim, group = a->heads / a->kv_heads;
    const int32_t *table = a->page_table + r * a->table_stride;
    const float *q = a->q + t * a->q_stride + g * group * size;
    float *y = a->y + t * a->y_stride + g * group * size;
    float score[MAX_GROUP][BLOCK], largest[MAX_GROUP], sum[MAX_GROUP], space[4][MAX_HEAD];
    int64_t place[BLOCK];
    for (int64_t n = 0; n < group; n++) {
        largest[n] = -INFINITY;
        sum[n] = 0;
    }
    memset(y, 0, (size_t)(group * size) * sizeof(float));
    const int64_t first = a->window && length > a->window ? length - a->window : 0;
    int64_t page = first / a->page, slot = first % a->page;
    for (int64_t start = first; start < length; start += BLOCK) {
        const int64_t count = length - start < BLOCK ? length - start : BLOCK;
        for (int64_t i = 0; i < count; i++) {
            place[i] = ((table[page] * a->page + slot) * a->kv_heads + g) * size;
            if (++slot == a->page) {
                slot = 0;
                page++;
            }
            const float *key = load(a->k_cache, place[i], size, dtype, space[0]);
            for (int64_t n = 0; n < group; n++)
                score[n][i] = dot(q + n * size, key, size) * (float)a->scale;
        }
        for (int64_t n = 0; n < group; n++) {
            float top = largest[n], total = 0;
#pragma omp simd reduction(max : top)
            for (int64_t i = 0; i < count; i++)
                top = score[n][i] > top ? score[n][i] : top;
            const float base = top == -INFINITY ? 0 : top; /* -inf - -inf would be NaN before a finite score */
#pragma omp simd reduction(+ : total)
            for (int64_t i = 0; i < count; i++) {
                score[n][i] = exponential(score[n][i] - base);
                total += score[n][i];
            }
            if (start > first) {
                const float shrink = exponential(largest[n] - base);
                sum[n] *= shrink;
                for (int64_t i = 0; i < size; i++)
                    y[n * size + i] *= shrink;
            }
            sum[n] += total;
            largest[n] = top;
        }
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) {
            const float *value[4];
            for (int64_t j = 0; j < 4; j++)
                value[j] = load(a->v_cache, place[i + j], size, dtype, space[j]);
            for (int64_t n = 0; n < group; n++)
                add_four(&score[n][i], value, size, y + n * size);
        }
        for (; i < count; i++) {
            const float *value = load(a->v_cache, place[i], size, dtype, space[0]);
            for (int64_t n = 0; n < group; n++)
                for (int64_t d = 0; d < size; d++)
                    y[n * size + d] += score[n][i] * value[d];
        }
    }
    for (int64_t n = 0; n < group; n++) {
        const float by = denominator(a, g * group + n, sum[n], largest[n]);
        for (int64_t d = 0; d < size; d++)
            y[n * size + d] /= by;
    }
}

typedef float Wide __attribute__((vector_size(64), aligned(4), may_alias));

/* Scores of two queries with a block of keys, which lie feature by feature. */
INLINE void two_scores(const float *q, const float *r, const float *keys, int64_t size, float scale, float *x, float *y) {
    Wide a[BLOCK / 16] = {0}, b[BLOCK / 16] = {0};
    for (int64_t d = 0; d < size; d++) {
        const Wide *key = (const Wide *)(keys + d * BLOCK);
#pragma GCC unroll 4
        for (int i = 0; i < BLOCK / 16; i++) {
            a[i] += q[d] * key[i];
            b[i] += r[d] * key[i];
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < BLOCK / 16; i++) {
        ((Wide *)x)[i] = a[i] * scale;
        ((Wide *)y)[i] = b[i] * scale;
    }
}

/* y += the sum of weight[j] * values[j], over `count` rows of `size` numbers */
INLINE void add_values(const float *weight, const float *values, int64_t count, int64_t size, float *y) {
    int64_t d = 0;
    for (; d + 64 <= size; d += 64) {
        Wide *out = (Wide *)(y + d), sum[4] = {out[0], out[1], out[2], out[3]};
        for (int64_t j = 0; j < count; j++) {
            const Wide *value = (const Wide *)(values + j * size + d);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++)
                sum[i] += weight[j] * value[i];
        }
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++)
            out[i] = sum[i];
    }
    for (; d + 16 <= size; d += 16) {
        Wide *out = (Wide *)(y + d), sum = *out;
        for (int64_t j = 0; j < count; j++)
            sum += weight[j] * *(const Wide *)(values + j * size + d);
        *out = sum;
    }
    for (int64_t j = 0; j < count && d < size; j++)
        for (int64_t e = d; e < size; e++)
            y[e] += weight[j] * values[j * size + e];
}

/* As attend, for `queries` tokens from t on: keys of a block are turned and values widened once for all of them.
 * `length`: keys of the first. */
INLINE void attend_tile(const Attention *a, int64_t r, int64_t t, int64_t queries, int64_t length, int64_t g, int64_t dtype) {
    const int64_t size = a->head_dim, group = a->heads / a->kv_heads, all = queries * group;
    const int32_t *table = a->page_table + r * a->table_stride;
    float keys[MAX_TILED * BLOCK], values[BLOCK * MAX_TILED], score[2][BLOCK], space[MAX_TILED];
    float largest[QUERIES * MAX_GROUP], sum[QUERIES * MAX_GROUP];
    for (int64_t m = 0; m < all; m++) {
        largest[m] = -INFINITY;
        sum[m] = 0;
    }
    const int64_t oldest = a->window && length > a->window ? length - a->window : 0, last = length + queries - 1;
    for (int64_t start = oldest; start < last; start += BLOCK) {
        const int64_t count = last - start < BLOCK ? last - start : BLOCK;
        for (int64_t i = 0; i < count; i++) {
            const int64_t at = start + i, slot = table[at / a->page] * a->page + at % a->page;
            const int64_t place = (slot * a->kv_heads + g) * size;
            const float *key = load(a->k_cache, place, size, dtype, space);
            for (int64_t d = 0; d < size; d++)
                keys[d * BLOCK + i] = key[d];
            const float *value = load(a->v_cache, place, size, dtype, space);
            memcpy(values + i * size, value, (size_t)size * sizeof(float));
        }
        for (int64_t d = 0; d < size && count < BLOCK; d++)
            memset(keys + d * BLOCK + count, 0, (size_t)(BLOCK - count) * sizeof(float));
        for (int64_t m = 0; m < all; m += 2) {
            const int64_t both = m + 1 < all ? m + 1 : m;
            const float *q = a->q + g * group * size;
            two_scores(q + (t + m / group) * a->q_stride + m % group * size,
                       q + (t + both / group) * a->q_stride + both % group * size, keys, size, (float)a->scale, score[0],
                       score[1]);
            for (int64_t n = m; n <= both; n++) {
                const int64_t own = length + n / group; /* keys of this query */
                const int64_t stop = own - start < count ? own - start : count;
                const int64_t first = a->window && own - a->window > start ? own - a->window - start : 0;
                if (first >= stop)
                    continue;
                float *x = score[n - m], *y = a->y + (t + n / group) * a->y_stride + (g * group + n % group) * size;
                float top = largest[n], total = 0;
#pragma omp simd reduction(max : top)
                for (int64_t i = first; i < stop; i++)
                    top = x[i] > top ? x[i] : top;
                const float base = top == -INFINITY ? 0 : top;
#pragma omp simd reduction(+ : total)
                for (int64_t i = first; i < stop; i++) {
                    x[i] = exponential(x[i] - base);
                    total += x[i];
                }
                const float shrink = exponential(largest[n] - base);
                sum[n] = sum[n] * shrink + total;
                largest[n] = top;
                if (shrink != 1)
                    for (int64_t d = 0; d < size; d++)
                        y[d] *= shrink;
                add_values(x + first, values + first * size, stop - first, size, y);
            }
        }
    }
    for (int64_t m = 0; m < all; m++) {
        float *y = a->y + (t + m / group) * a->y_stride + (g * group + m % group) * size;
        const float by = denominator(a, g * group + m % group, sum[m], largest[m]);
        for (int64_t d = 0; d < size; d++)
            y[d] /= by;
    }
}

/* Items are the KV heads of a row's queries, or of QUERIES of them; the last ones first, which have most to do. A query
 * that is not tiled is computed by itself: what it gets does not depend on the step that it is computed in. */
DISPATCHED static void attend_items(const void *job, int64_t first, int64_t stop) {
    const Attention *a = job;
    int64_t before = 0;
    for (int64_t r = a->rows - 1; r >= 0 && before < stop; r--) {
        const int64_t count = a->query_len ? a->query_len[r] : a->context_len[r] > 0;
        const int64_t start = a->query_start ? a->query_start[r] : r, tile = a->tiled ? QUERIES : 1;
        const int64_t from = first > before ? first - before : 0, items = (count + tile - 1) / tile * a->kv_heads;
        for (int64_t item = from; item < items && before + item < stop; item++) {
            const int64_t i = (items - 1 - item) / a->kv_heads * tile, g = item % a->kv_heads;
            const int64_t some = count - i < tile ? count - i : tile, length = a->context_len[r] - count + i + 1;
            if (some > 1 && a->dtype == FLOAT32)
                attend_tile(a, r, start + i, some, length, g, FLOAT32);
            else if (some > 1 && a->dtype == BFLOAT16)
                attend_tile(a, r, start + i, some, length, g, BFLOAT16);
            else if (some > 1)
                attend_tile(a, r, start + i, some, length, g, FLOAT16);
            else if (a->dtype == FLOAT32)
                attend(a, r, start + i, length, g, FLOAT32);
            else if (a->dtype == BFLOAT16)
                attend(a, r, start + i, length, g, BFLOAT16);
            else
                attend(a, r, start + i, length, g, FLOAT16);
        }
        before += items;
    }
}

void attention(const Attention *a) {
    const int64_t tile = a->tiled ? QUERIES : 1;
    int64_t items = 0, keys = 0;
    for (int64_t t = 0; t < a->tokens; t++)
        memset(a->y + t * a->y_stride, 0, (size_t)(a->heads * a->head_dim) * sizeof(float));
    for (int64_t r = 0; r < a->rows; r++) {
        const int64_t count = a->query_len ? a->query_len[r] : a->context_len[r] > 0;
        items += (count + tile - 1) / tile * a->kv_heads;
        keys += count * a->context_len[r];
    }
    share_out(attend_items, a, items, keys * a->heads * a->head_dim > FEW ? a->threads : 1);
}
