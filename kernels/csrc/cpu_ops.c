/* Small ops of a decode step on the CPU: fp32 activations, one thread, results written in place.
 *
 * PyTorch spends 50-300 us on each of these at a few rows, nearly all of it per-op overhead. Every function
 * takes one pointer to a struct whose fields are 8 bytes each (pointer, int64_t or double), in the order in
 * which kernels/native.py packs them. Strides count elements. The contracts in kernels/ say what is computed;
 * LAYOUT changes whenever a struct does.
 *
 * Only the loops marked "omp simd reduction" may be reassociated; everything else is strict IEEE, so that
 * NaN and infinity behave as in the references.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LAYOUT 5
#define MAX_HEAD 1024 /* features of a head: rows of that length live on the stack */
#define MAX_GROUP 64  /* query heads of a KV head */
#define BLOCK 64      /* keys whose scores are held at once */

/* Compiled for AVX-512, AVX2 and the baseline; the loader picks at start. Levels need gcc 12. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__linux__)
#define DISPATCHED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DISPATCHED
#endif
#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32, BFLOAT16, FLOAT16 }; /* numbers of native.DTYPES */

int64_t layout(void) { return LAYOUT; }

INLINE float as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE uint32_t as_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

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

/* The exponent is corrected by a product, which also makes subnormals normal. */
INLINE float from_float16(uint16_t x) {
    const uint32_t magnitude = (uint32_t)(x & 0x7fff) << 13, sign = (uint32_t)(x & 0x8000) << 16;
    const uint32_t finite = as_bits(as_float(magnitude) * 0x1p112f);
    const uint32_t special = magnitude | 0x7f800000u;
    return as_float((magnitude >= 0x0f800000u ? special : finite) | sign);
}

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

typedef struct {
    const float *x;
    int64_t x_stride;
    const float *weight;
    float *y;
    int64_t y_stride, tokens, width;
    double eps, offset; /* offset is added to the weights */
} RmsNorm;

DISPATCHED void rms_norm(const RmsNorm *a) {
    for (int64_t t = 0; t < a->tokens; t++)
        normalise(a->x + t * a->x_stride, a->weight, a->eps, a->offset, a->width, a->y + t * a->y_stride);
}

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
} AddRmsNorm;

DISPATCHED void add_rms_norm(const AddRmsNorm *a) {
    for (int64_t t = 0; t < a->tokens; t++) {
        const float *x = a->x + t * a->x_stride, *residual = a->residual + t * a->residual_stride;
        float *total = a->total + t * a->total_stride;
        for (int64_t i = 0; i < a->width; i++)
            total[i] = x[i] + residual[i];
        normalise(total, a->weight, a->eps, a->offset, a->width, a->y + t * a->y_stride);
    }
}

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
} GatedMul;

DISPATCHED void silu_mul(const GatedMul *a) {
    for (int64_t t = 0; t < a->tokens; t++) {
        const float *gate = a->gate_up + t * a->gate_up_stride, *up = gate + a->width;
        float *restrict y = a->y + t * a->y_stride;
        for (int64_t i = 0; i < a->width; i++)
            y[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
    }
}

/* gate / 2 * (1 + tanh(u)) is gate / (1 + exp(-2 u)), u = sqrt(2 / pi) (gate + 0.044715 gate^3) */
DISPATCHED void gelu_tanh_mul(const GatedMul *a) {
    for (int64_t t = 0; t < a->tokens; t++) {
        const float *gate = a->gate_up + t * a->gate_up_stride, *up = gate + a->width;
        float *restrict y = a->y + t * a->y_stride;
        for (int64_t i = 0; i < a->width; i++) {
            const float cube = gate[i] * gate[i] * gate[i];
            y[i] = gate[i] / (1.0f + exponential(-1.5957691216057308f * (gate[i] + 0.044715f * cube))) * up[i];
        }
    }
}

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

DISPATCHED void norm_rope_kv_write(const NormRopeKvWrite *a) {
    const int64_t size = a->head_dim, turned = a->heads + a->kv_heads;
    float normed[MAX_HEAD], key[MAX_HEAD];
    for (int64_t t = 0; t < a->tokens; t++) {
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

typedef struct {
    const float *q;
    int64_t q_stride;
    const void *k_cache, *v_cache; /* [pages, page, kv_heads, head_dim] of `dtype` */
    const int32_t *page_table;
    int64_t table_stride;
    const int32_t *query_start, *query_len; /* NULL: row r has one query, q's row r, unless it has no context */
    const int32_t *context_len;
    float *y;
    int64_t y_stride, rows, tokens, heads, kv_heads, head_dim, page, window, dtype;
    double scale;
} Attention;

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
    for (int64_t n = 0; n < group; n++)
        for (int64_t d = 0; d < size; d++)
            y[n * size + d] /= sum[n];
}

/* Every query by itself: what a token gets does not depend on the step that it is computed in. */
DISPATCHED void attention(const Attention *a) {
    for (int64_t t = 0; t < a->tokens; t++)
        memset(a->y + t * a->y_stride, 0, (size_t)(a->heads * a->head_dim) * sizeof(float));
    for (int64_t r = 0; r < a->rows; r++) {
        const int64_t count = a->query_len ? a->query_len[r] : a->context_len[r] > 0;
        const int64_t start = a->query_start ? a->query_start[r] : r;
        for (int64_t i = 0; i < count; i++) {
            const int64_t length = a->context_len[r] - count + i + 1;
            for (int64_t g = 0; g < a->kv_heads; g++) {
                if (a->dtype == FLOAT32)
                    attend(a, r, start + i, length, g, FLOAT32);
                else if (a->dtype == BFLOAT16)
                    attend(a, r, start + i, length, g, BFLOAT16);
                else
                    attend(a, r, start + i, length, g, FLOAT16);
            }
        }
    }
}

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
