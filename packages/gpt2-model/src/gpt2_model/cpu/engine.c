// GPT-2's forward pass with a key-value cache, for CPUs: one call per token instead of some 170 calls of PyTorch.
//
// Decoding reads every weight once per token, so its limit is the memory's speed (benchmarks/ has measurements).
// A weight is read once for up to eight rows, and each product is divided among threads. Each number of the result
// is summed in a fixed order, whatever other rows are in the call and however many threads there are.
//
// The vector extensions of GCC and Clang map 16 floats to AVX-512, AVX2 or NEON. engine.py compiles and calls this,
// and packs Matrix, Norm, Layer, Model and Call field by field.

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "engine_math.h"

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("isb")
#else
#define PAUSE() ((void)0)
#endif

typedef struct { const float *weight, *bias; } Norm;

typedef struct {
    Norm ln_1, ln_2;
    Matrix c_attn, attn_c_proj, c_fc, mlp_c_proj;
    double attention_scale;
} Layer;

typedef struct {
    int64_t n_layer, n_head, n_embd, n_inner, activation;
    double epsilon;
    const Layer *layers;
    Matrix wte, head;
    const float *wpe;
    Norm ln_f;
} Model;

typedef struct {
    int64_t rows;              // tokens in this call: any mix of sequences and positions
    int64_t batch, capacity;   // of the cache
    int64_t groups;            // runs of successive rows of one sequence
    const int64_t *tokens;     // (rows,)
    const int64_t *sequences;  // (rows,) the row of the cache
    const int64_t *positions;  // (rows,)
    const int64_t *starts;     // (groups + 1,) each group's first row, then the number of rows
    float *keys, *values;      // (n_layer, batch, n_head, capacity, head_dim)
    float *logits;             // (groups, vocab_size), of each group's last row
} Call;

typedef struct {  // buffers for the activations of a call
    float *stream, *normed, *qkv, *inner;
    float *scores;  // (threads, capacity rounded up to whole vectors)
    Prepared prepared;
} Scratch;

// The threads of a call. One that waits spins for some 100 us, then sleeps. OpenMP's threads keep spinning: on two
// cores, a step took 30 times as long when another program ran.
typedef struct {
    int threads;
    _Atomic int64_t next;  // in the loop that all threads share: the first item that none has taken
    _Atomic int started, arrived, round, stopped;
    pthread_mutex_t mutex;
    pthread_cond_t released;
    pthread_t workers[256];
    const Model *model;
    const Call *call;
    int64_t rows;  // the rows that go through the current layer
    Scratch scratch;
} Team;

typedef void Alone(Team *team, const void *with);

// All threads wait for each other. The last to arrive does what only one can do (`alone`), then releases the rest.
// A wait costs some 3 us, as long as a layer norm; this way there are 61 per token instead of 134.
static void meet(Team *team, Alone *alone, const void *with) {
    const int round = team->round;
    if (atomic_fetch_add(&team->arrived, 1) == team->threads - 1) {
        if (alone) alone(team, with);
        team->arrived = 0;
        team->next = 0;
        pthread_mutex_lock(&team->mutex);
        team->round = round + 1;
        pthread_cond_broadcast(&team->released);
        pthread_mutex_unlock(&team->mutex);
        return;
    }
    for (int spin = 0; spin < 2000; spin++) {
        if (team->round != round) return;
        PAUSE();
    }
    pthread_mutex_lock(&team->mutex);
    while (team->round == round) pthread_cond_wait(&team->released, &team->mutex);
    pthread_mutex_unlock(&team->mutex);
}

enum { STORE, ADD, ACTIVATE };

static inline void put(const Matrix *m, const float *sums, int64_t apart, int64_t first, int rows, int outs, float *y,
                       int then) {
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < outs; o++) {
            const float value = sums[r * apart + o] + (m->bias ? m->bias[first + o] : 0.0f);
            float *to = y + r * m->outs + first + o;
            *to = then == ADD ? *to + value : value;
        }
}

// Outputs begin .. end of every row. Eight rows' activations stay in the L1 cache while these weights pass by.
static inline __attribute__((always_inline)) void outputs(const Matrix *m, const float *x, Prepared p,
                                                          int64_t begin, int64_t end, float *y, int64_t rows,
                                                          int then) {
    float sums[ROWS * LANES];
    for (int64_t row = 0, now; row < rows; row += now) {
        now = rows - row >= 8 ? 8 : rows - row >= 4 ? 4 : rows - row >= 2 ? 2 : 1;
        int64_t first = begin;
#define TILES(R, O)                                                                               \
    for (; first + O <= end; first += O) {                                                        \
        if (TYPE == INT8) tile_int8(m, p, row, first / LANES, R, sums);                           \
        else tile_floats(m, x, p, row, first, R, O, sums);                                        \
        put(m, sums, O, first, R, O, y + row * m->outs, then);                                    \
    }
        enum { MANY = TYPE == INT8 ? LANES : OUTS };
        if (now == 8) TILES(8, MANY)
        else if (now == 4) TILES(4, MANY)
        else if (now == 2) TILES(2, MANY)
        else TILES(1, MANY)
        for (int64_t r = row; r < row + now && first < end; r++) {  // the last few outputs, row by row
            if (TYPE == INT8) tile_int8(m, p, r, first / LANES, 1, sums);
            else
                for (int64_t o = first; o < end; o++) {
                    float padded[4];
                    tile_floats(m, x, p, r, o, 1, 1, padded);
                    sums[o - first] = padded[0];
                }
            put(m, sums, LANES, first, 1, (int)(end - first), y + r * m->outs, then);
        }
    }
}

// y = x W^T + bias, stored, added to y, or put through the activation. The threads must meet after it.
static void linear(Team *team, const Matrix *m, const float *x, float *y, int then) {
    // Large shares for few rows, since the first bytes of each come without a prefetch: a tenth more tokens/s in int8.
    // Small shares for many rows, so that the second eight rows find the weights in the L2 cache.
    const int64_t rows = team->rows, unit = OUTS * LANES, large = m->outs / (4 * team->threads * unit) * unit;
    const int64_t share = rows <= ROWS && large > unit ? large : unit;
    const Prepared p = team->scratch.prepared;
    for (int64_t begin, end; (begin = atomic_fetch_add(&team->next, share)) < m->outs;) {
        end = begin + share < m->outs ? begin + share : m->outs;
        outputs(m, x, p, begin, end, y, rows, then);
        for (int64_t r = 0; then == ACTIVATE && r < rows; r++)
            for (int64_t o = begin; o < end; o += LANES) {
                floats values = {0};
                const size_t bytes = (end - o < LANES ? end - o : LANES) * sizeof(float);
                memcpy(&values, y + r * m->outs + o, bytes);
                values = activate(values, team->model->activation);
                memcpy(y + r * m->outs + o, &values, bytes);
            }
    }
}

// One head of one row: softmax(scale * q k) v up to its own position. `scores` has room for all, rounded up to 16.
static void attend(const float *query, const float *keys, const float *values, int64_t positions, int64_t width,
                   float scale, float *scores, float *y) {
    float best = -INFINITY, total = 0;
    int64_t d = 0;
    for (int64_t t = 0; t < positions; t += 4)
        dots(query, keys + t * width, width, positions - t < 4 ? (int)(positions - t) : 4, scores + t);
    for (int64_t t = 0; t < positions; t++) {
        scores[t] *= scale;
        best = scores[t] > best ? scores[t] : best;
    }
    for (int64_t t = positions; t % LANES; t++) scores[t] = -INFINITY;
    for (int64_t t = 0; t < positions; t += LANES) {
        floats *p = (floats *)(scores + t);
        *p = exponential(*p - best);
    }
    for (int64_t t = 0; t < positions; t++) total += scores[t];
    for (; d + 4 * LANES <= width; d += 4 * LANES) {  // 64 numbers at a time, the usual width of a head
        floats sums[4] = {{0}};
        for (int64_t t = 0; t < positions; t++)
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) sums[i] += scores[t] * *(const floats_at *)(values + t * width + d + i * LANES);
        for (int i = 0; i < 4; i++) *(floats_at *)(y + d + i * LANES) = sums[i] / total;
    }
    for (; d < width; d++) {
        float sum = 0;
        for (int64_t t = 0; t < positions; t++) sum += scores[t] * values[t * width + d];
        y[d] = sum / total;
    }
}

static void prepare(Team *team, const void *activations) {
    const int64_t width = activations == team->scratch.inner ? team->model->n_inner : team->model->n_embd;
    for (int64_t r = 0; r < team->rows && TYPE != FP32; r++)
        (TYPE == INT8 ? to_steps : to_pairs)((const float *)activations + r * width, width, r, team->scratch.prepared);
}

static void normalise(Team *team, const void *with) {
    const Norm *norm = with;
    const int64_t n = team->model->n_embd;
    const double epsilon = team->model->epsilon;
    for (int64_t r = 0; r < team->rows; r++)
        layer_norm(team->scratch.stream + r * n, norm->weight, norm->bias, n, epsilon, team->scratch.normed + r * n);
    prepare(team, team->scratch.normed);
}

static void embed(Team *team, const void *norm) {
    const Model *model = team->model;
    const int64_t n = model->n_embd, fours = (n + 3) / 4;
    for (int64_t r = 0; r < team->rows; r++) {
        const int64_t token = team->call->tokens[r], panel = token / LANES, lane = token % LANES;
        const float *position = model->wpe + team->call->positions[r] * n;
        for (int64_t k = 0; k < n; k++) {
            const float value = TYPE == FP32 ? ((const float *)model->wte.weight)[token * n + k]
                              : TYPE == BF16 ? bf16_to_float(((const uint16_t *)model->wte.weight)[token * n + k])
                              : ((const int8_t *)model->wte.weight)[(panel * fours + k / 4) * 64 + lane * 4 + k % 4]
                                    * model->wte.scale[token];
            team->scratch.stream[r * n + k] = value + position[k];
        }
    }
    normalise(team, norm);
}

// One share is one head of all rows of a group, in order: a row's keys are in the cache before a row reads them.
static void attention(Team *team, int64_t layer, float *scores) {
    const Model *model = team->model;
    const Call *call = team->call;
    const int64_t n = model->n_embd, heads = model->n_head, width = n / heads, cached = call->capacity * width;
    for (int64_t share; (share = atomic_fetch_add(&team->next, 1)) < call->groups * heads;) {
        const int64_t group = share / heads, head = share % heads;
        for (int64_t r = call->starts[group]; r < call->starts[group + 1]; r++) {
            const float *query = team->scratch.qkv + r * 3 * n + head * width;
            const int64_t row = (layer * call->batch + call->sequences[r]) * heads + head, at = call->positions[r];
            float *keys = call->keys + row * cached, *values = call->values + row * cached;
            memcpy(keys + at * width, query + n, width * sizeof(float));
            memcpy(values + at * width, query + 2 * n, width * sizeof(float));
            attend(query, keys, values, at + 1, width, (float)model->layers[layer].attention_scale, scores,
                   team->scratch.normed + r * n + head * width);
        }
    }
}

// In the last layer only the last row of each group is kept, for its logits. Each moves before it is overwritten.
static void choose(Team *team, const void *normed) {
    const int64_t n = team->model->n_embd;
    for (int64_t i = 0; i < team->call->groups; i++) {
        const int64_t from = (team->call->starts[i + 1] - 1) * n;
        memmove(team->scratch.stream + i * n, team->scratch.stream + from, n * sizeof(float));
        memmove(team->scratch.normed + i * n, team->scratch.normed + from, n * sizeof(float));
    }
    team->rows = team->call->groups;
    prepare(team, normed);
}

static void forward(Team *team, int thread) {
    const Model *model = team->model;
    const Scratch *s = &team->scratch;
    float *scores = s->scores + thread * (team->call->capacity / LANES + 1) * LANES;
    meet(team, embed, &model->layers[0].ln_1);
    for (int64_t i = 0; i < model->n_layer; i++) {
        const Layer *layer = &model->layers[i];
        const int last = i + 1 == model->n_layer;
        linear(team, &layer->c_attn, s->normed, s->qkv, STORE);
        meet(team, NULL, NULL);
        attention(team, i, scores);
        meet(team, last ? choose : prepare, s->normed);
        linear(team, &layer->attn_c_proj, s->normed, s->stream, ADD);
        meet(team, normalise, &layer->ln_2);
        linear(team, &layer->c_fc, s->normed, s->inner, ACTIVATE);
        meet(team, prepare, s->inner);
        linear(team, &layer->mlp_c_proj, s->inner, s->stream, ADD);
        meet(team, normalise, last ? &model->ln_f : &layer[1].ln_1);
    }
    linear(team, &model->head, s->normed, team->call->logits, STORE);
    meet(team, NULL, NULL);
}

static void *work(void *argument) {
    Team *team = argument;
    const int thread = 1 + atomic_fetch_add(&team->started, 1);
    for (meet(team, NULL, NULL); !team->stopped; meet(team, NULL, NULL)) forward(team, thread);
    return NULL;
}

void gpt2_stop(Team *team) {
    team->stopped = 1;
    meet(team, NULL, NULL);
    for (int i = 1; i < team->threads; i++) pthread_join(team->workers[i], NULL);
    pthread_mutex_destroy(&team->mutex);
    pthread_cond_destroy(&team->released);
    free(team);
}

// Start threads for calls with one model, fewer than asked for if the system gives no more. NULL: out of memory.
Team *gpt2_start(const Model *model, int threads) {
    Team *team = calloc(1, sizeof(Team));
    if (!team) return NULL;
    team->model = model;
    pthread_mutex_init(&team->mutex, NULL);
    pthread_cond_init(&team->released, NULL);
    team->threads = threads < 1 ? 1 : threads > 256 ? 256 : threads;
    for (int i = 1; i < team->threads; i++)
        if (pthread_create(&team->workers[i], NULL, work, team)) team->threads = i;  // those that wait reread it
    return team;
}

// Tokens in, logits out, keys and values into the cache. Every row's keys are written before any is read, so that
// the tokens of one sequence may come in one call, in order. Returns 0, or 1 when there is no memory.
int gpt2_forward(Team *team, const Call *call) {
    const size_t n = team->model->n_embd, inner = team->model->n_inner, rows = call->rows;
    const size_t widest = ((inner > n ? inner : n) + 3) / 4 * 4, scores = (call->capacity / LANES + 1) * LANES;
    const size_t bytes = 4 * (team->threads * scores + rows * (5 * n + inner + 1)) + 6 * rows * widest;
    float *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (!memory) return 1;
    Scratch *s = &team->scratch;
    s->scores = memory;  // first, since they are read as whole vectors
    s->stream = s->scores + team->threads * scores;
    s->normed = s->stream + rows * n;
    s->qkv = s->normed + rows * n;
    s->inner = s->qkv + rows * 3 * n;
    s->prepared.pairs = (char *)(s->inner + rows * inner);
    s->prepared.high = (uint8_t *)s->prepared.pairs + 4 * rows * widest;
    s->prepared.low = s->prepared.high + rows * widest;
    s->prepared.step = (float *)(s->prepared.low + rows * widest);
    team->call = call;
    team->rows = call->rows;
    meet(team, NULL, NULL);  // the workers wait for this in `work`
    forward(team, 0);
    free(memory);
    return 0;
}
