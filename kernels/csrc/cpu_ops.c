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

#include "cached.h"

#define LAYOUT 8

int64_t layout(void) { return LAYOUT; }

INLINE void normalise(const float *x, const float *weight, double eps, double offset, int64_t count, float *y) {
    const float scale = 1.0f / sqrtf(dot(x, x, count) / (float)count + (float)eps), more = (float)offset;
    for (int64_t i = 0; i < count; i++)
        y[i] = x[i] * scale * (weight[i] + more);
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

/* Where the last of the places behind which the most of the last tokens stand ends, up to the longest; 0 for none. */
static int64_t repeated(const int32_t *known, int64_t count, int64_t shortest, int64_t longest) {
    int64_t end = 0, best = shortest - 1;
    for (int64_t e = count - 1; e >= 1 && best < longest; e--) {
        int64_t same = 0;
        while (same < longest && same < e && known[e - 1 - same] == known[count - 1 - same])
            same++;
        if (same > best) {
            best = same;
            end = e;
        }
    }
    return end;
}

typedef struct {
    const int32_t *token_ids, *row_slot, *row_start, *query_start, *query_len, *sample_slot, *limit;
    const int32_t *length, *history;
    int32_t *ids, *start, *count, *slot, *context;
    int64_t tokens, rows, null_slot, history_stride, shortest, longest;
} DraftNgram;

void draft_ngram(const DraftNgram *a) {
    int64_t t = 0;
    for (int64_t r = 0; r < a->rows; r++) {
        const int32_t slot = a->row_slot[r];
        int64_t count = slot == a->null_slot ? 0 : a->query_len[r];
        a->start[r] = (int32_t)t;
        a->count[r] = 0;
        if (count == 0)
            continue;
        const int32_t *staged = a->token_ids + a->query_start[r];
        const int32_t *known = a->history + slot * a->history_stride;
        const int64_t start = a->row_start[r] >= 0 ? a->row_start[r] : a->length[slot];
        const int guess = staged[count - 1] < 0;
        int64_t end = 0;
        if (guess) {
            const int64_t most = a->limit[r] - 1 - start;
            count = most < count ? most : count;
            end = count > 1 ? repeated(known, start + 1, a->shortest, a->longest) : 0;
            count = end ? count : 1;
        }
        for (int64_t i = 0; i < count; i++, t++) {
            a->ids[t] = !guess ? staged[i] : i == 0 ? -1 : known[end + (i - 1) % (start + 1 - end)];
            a->slot[t] = a->sample_slot[r];
            a->context[t] = (int32_t)(start + 1 + i);
        }
        a->count[r] = (int32_t)count;
    }
    for (; t < a->tokens; t++) {
        a->ids[t] = a->context[t] = 0;
        a->slot[t] = (int32_t)a->null_slot;
    }
}

typedef struct {
    const int32_t *token_ids, *tokens, *row_slot, *query_start, *query_len, *context_len;
    int32_t *length, *drafted, *accepted;
    int64_t rows, null_slot;
} AcceptDrafts;

void accept_drafts(const AcceptDrafts *a) {
    for (int64_t r = 0; r < a->rows; r++) {
        const int32_t slot = a->row_slot[r], count = a->query_len[r];
        a->drafted[r] = a->accepted[r] = 0;
        if (slot == a->null_slot || count == 0)
            continue;
        const int32_t *ids = a->token_ids + a->query_start[r], *sampled = a->tokens + a->query_start[r];
        int32_t right = 0;
        while (right + 1 < count && ids[right + 1] == sampled[right])
            right++;
        a->drafted[r] = count - 1;
        a->accepted[r] = right;
        a->length[slot] = a->context_len[r] - (count - 1 - right);
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
    uint16_t *scales;        /* of caches that have them */
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

INLINE void write_head(const NormRopeKvWrite *a, int64_t head, int is_value, const float *x) {
    void *cache = is_value ? a->v_cache : a->k_cache;
    if (a->dtype < INT8_SCALED)
        store(cache, head * a->head_dim, x, a->head_dim, a->dtype);
    else
        store_scaled(cache, a->scales, head, is_value, x, a->head_dim, a->dtype);
}

DISPATCHED static void norm_rope_kv_write_tokens(const void *job, int64_t first, int64_t stop) {
    const NormRopeKvWrite *a = job;
    const int64_t size = a->head_dim, turned = a->heads + a->kv_heads;
    float normed[MAX_HEAD], key[MAX_HEAD];
    for (int64_t t = first; t < stop; t++) {
        const float *qkv = a->qkv + t * a->qkv_stride, *row = a->rows + t * a->rows_stride;
        const int64_t place = a->kv_slot[t] * a->kv_heads;
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
                write_head(a, place + h - a->heads, 0, key);
            }
        }
        for (int64_t g = 0; g < a->kv_heads; g++)
            write_head(a, place + g, 1, qkv + (turned + g) * size);
    }
}

void norm_rope_kv_write(const NormRopeKvWrite *a) {
    share(norm_rope_kv_write_tokens, a, a->tokens, (a->heads + 2 * a->kv_heads) * a->head_dim, a->threads);
}
