/* Attention of rows over their pages on the CPU, in one pass with a running maximum; see cpu_ops.c for how functions are
 * called and what may be reassociated.
 */

#include "cached.h"

#define MAX_GROUP 64  /* query heads of a KV head */
#define QUERIES 16    /* of a row, that share keys */
#define MAX_TILED 256 /* features of a head */
#define BLOCK 64      /* keys whose scores are held at once */

typedef struct {
    const float *q;
    int64_t q_stride;
    const void *k_cache, *v_cache; /* [pages, page, kv_heads, head_dim] of `dtype` */
    const uint16_t *scales;        /* of caches that have them */
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
            place[i] = (table[page] * a->page + slot) * a->kv_heads + g;
            if (++slot == a->page) {
                slot = 0;
                page++;
            }
            const float *key = load_head(a->k_cache, a->scales, place[i], 0, size, dtype, space[0]);
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
                value[j] = load_head(a->v_cache, a->scales, place[i + j], 1, size, dtype, space[j]);
            for (int64_t n = 0; n < group; n++)
                add_four(&score[n][i], value, size, y + n * size);
        }
        for (; i < count; i++) {
            const float *value = load_head(a->v_cache, a->scales, place[i], 1, size, dtype, space[0]);
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
            const int64_t place = slot * a->kv_heads + g;
            const float *key = load_head(a->k_cache, a->scales, place, 0, size, dtype, space);
            for (int64_t d = 0; d < size; d++)
                keys[d * BLOCK + i] = key[d];
            const float *value = load_head(a->v_cache, a->scales, place, 1, size, dtype, space);
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

INLINE void attend_some(const Attention *a, int64_t r, int64_t t, int64_t queries, int64_t length, int64_t g, int64_t dtype) {
    if (queries > 1)
        attend_tile(a, r, t, queries, length, g, dtype);
    else
        attend(a, r, t, length, g, dtype);
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
            switch (a->dtype) {
            case FLOAT32: attend_some(a, r, start + i, some, length, g, FLOAT32); break;
            case BFLOAT16: attend_some(a, r, start + i, some, length, g, BFLOAT16); break;
            case FLOAT16: attend_some(a, r, start + i, some, length, g, FLOAT16); break;
            case INT8_SCALED: attend_some(a, r, start + i, some, length, g, INT8_SCALED); break;
            case FLOAT8_SCALED: attend_some(a, r, start + i, some, length, g, FLOAT8_SCALED); break;
            default: attend_some(a, r, start + i, some, length, g, INT4_SCALED);
            }
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
