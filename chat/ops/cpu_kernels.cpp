// What lies between two matrix products of a decoder layer, on a CPU: normalisation with the
// residual, rotary positions and the KV cache, attention, the gated activation.
//
// Compiled when a model is loaded (cpu_kernels.py), so for the processor it runs on. All sums are in
// float, whatever the model's type T. A forward is a flat list of tokens of any rows: nothing is
// padded, nothing is masked, a token reads the columns that it sees and no others.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int WIDE = 16;       // floats of a vector; compilers split it where registers are narrower
constexpr int BLOCK = 64;      // columns of keys that are looked at together
constexpr int CHUNK = 64;      // queries that share a look at them
constexpr int MANY = 6;        // queries from which on it pays to turn a block of keys
constexpr int LARGEST = 256;   // floats of a head
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

typedef float wide __attribute__((vector_size(4 * WIDE)));
typedef int32_t wide_int __attribute__((vector_size(4 * WIDE)));
typedef uint32_t wide_bits __attribute__((vector_size(4 * WIDE)));
typedef uint16_t half_bits __attribute__((vector_size(2 * WIDE)));
struct bfloat { uint16_t bits; };

inline float value_of(float x) { return x; }
inline float value_of(bfloat x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
inline void store(float *to, float x) { *to = x; }
inline void store(bfloat *to, float x) {  // to the nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    to->bits = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline wide load(const float *x) {
    wide value;
    memcpy(&value, x, sizeof value);
    return value;
}
inline wide load(const bfloat *x) {
    half_bits bits;
    memcpy(&bits, x, sizeof bits);
    return (wide)(__builtin_convertvector(bits, wide_bits) << 16);
}
inline void store(float *to, wide x) { memcpy(to, &x, sizeof x); }
inline void store(bfloat *to, wide x) {
    const wide_bits bits = (wide_bits)x;
    const wide_bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const half_bits half = __builtin_convertvector(x != x ? wide_bits{} + 0x7fc0 : rounded, half_bits);
    memcpy(to, &half, sizeof half);
}
inline float sum(wide x) {  // by halves
    float eight[8], four[4];
    const auto *part = reinterpret_cast<const char *>(&x);
    typedef float v8 __attribute__((vector_size(32)));
    typedef float v4 __attribute__((vector_size(16)));
    v8 a, b;
    memcpy(&a, part, 32), memcpy(&b, part + 32, 32);
    a += b;
    memcpy(eight, &a, 32);
    v4 c, d;
    memcpy(&c, eight, 16), memcpy(&d, eight + 4, 16);
    c += d;
    memcpy(four, &c, 16);
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// e^x for x <= 0, to two units in the last place (Cephes' polynomial). NaN stays NaN.
inline wide exponential(wide x) {
    const wide least = wide{} - 87.0f;
    x = x < least ? least : x;
    const float magic = 12582912.0f;  // adding it rounds to whole numbers
    wide whole = (x * 1.44269504088896341f + magic) - magic;
    wide rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    wide y = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    wide_int power = (__builtin_convertvector(whole, wide_int) + 127) << 23;
    return y * (wide)power;
}

}  // namespace

extern "C" {

// One forward. tokens: those of one row stand together, in the order of their columns, and rows of
// one prefix stand together. row, column [tokens]: where a token's key and value go. prefix
// [tokens]: [layers, 2, kv_heads, prefix_length, dim] of T, or null; each token sees all of it.
// cosine, sine [tokens, dim]. queries [tokens, heads, dim], state [tokens, heads, dim + 2]: scratch.
struct Forward {
    int64_t tokens, heads, kv_heads, dim, threads;
    const int64_t *row, *column, *prefix_length;
    const void *const *prefix;
    const float *cosine, *sine, *prefix_bias;
    float *queries, *state;
    float scale;
};

// One layer. keys, values: of the cache, [rows, kv_heads, columns, dim] with these strides in
// elements. query_weight, key_weight [dim] or null: normalisation of each head.
struct Layer {
    int64_t number, row_stride, head_stride;
    void *keys, *values;
    const float *query_weight, *key_weight;
    float epsilon;
};
}

namespace {

template <typename T>
void normalise(int64_t tokens, int64_t width, float epsilon, int64_t threads, float *residual,
               const T *change, const float *weight, T *out) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens > 1)
    for (int64_t t = 0; t < tokens; t++) {
        float *x = residual + t * width, squares = 0;
        if (change)
            for (int64_t i = 0; i < width; i++) x[i] += value_of(change[t * width + i]);
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < width; i++) squares += x[i] * x[i];
        float factor = 1.0f / std::sqrt(squares / width + epsilon);
        for (int64_t i = 0; i < width; i++) store(out + t * width + i, x[i] * factor * weight[i]);
    }
}

template <typename T>
void gate(int64_t tokens, int64_t width, int64_t threads, const T *x, T *out) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && tokens > 1)
    for (int64_t t = 0; t < tokens; t++) {
        const T *gates = x + t * 2 * width, *ups = gates + width;
        T *to = out + t * width;
        int64_t i = 0;
        for (; i + WIDE <= width; i += WIDE) {
            wide g = load(gates + i), e = exponential(g < 0 ? g : -g);
            wide y = g * (g < 0 ? e : wide{} + 1) / (1 + e) * load(ups + i);
            store(to + i, y);
        }
        for (; i < width; i++) {
            float g = value_of(gates[i]);
            store(to + i, g / (1 + std::exp(-g)) * value_of(ups[i]));
        }
    }
}

// One head of one token: x [dim] is normalised if there is a weight, rotated, scaled.
template <typename T>
void turn(const T *x, int64_t dim, const float *weight, float epsilon, const float *cosine,
          const float *sine, float scale, float *out) {
    float squares = 0, factor = 1;
    if (weight) {
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < dim; i++) squares += value_of(x[i]) * value_of(x[i]);
        factor = 1.0f / std::sqrt(squares / dim + epsilon);
    }
    int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
        float a = value_of(x[i]), b = value_of(x[half + i]);
        if (weight) a *= factor * weight[i], b *= factor * weight[half + i];
        out[i] = (a * cosine[i] - b * sine[i]) * scale;
        out[half + i] = (b * cosine[half + i] + a * sine[half + i]) * scale;
    }
}

// Scores of G queries [dim] for the first `columns` keys: scores[g * BLOCK + j]. `turned` [dim,
// BLOCK] are the keys with dimensions first; null: as they lie.
template <int G, typename T>
inline __attribute__((always_inline)) void score(const T *keys, const float *turned,
                                                 int64_t columns, const int64_t dim,
                                                 const float *queries, float *scores) {
    if (turned) {
        for (int64_t from = 0; from < columns; from += 2 * WIDE) {
            wide part[G][2] = {};
            for (int64_t d = 0; d < dim; d++)
                for (int g = 0; g < G; g++)
                    for (int k = 0; k < 2; k++)
                        part[g][k] += queries[g * dim + d] * load(turned + d * BLOCK + from + k * WIDE);
            for (int g = 0; g < G; g++) memcpy(scores + g * BLOCK + from, part[g], sizeof part[g]);
        }
    } else if (dim % WIDE == 0) {
        for (int64_t j = 0; j < columns; j++) {
            wide part[G] = {};
            for (int64_t d = 0; d < dim; d += WIDE) {
                const wide key = load(keys + j * dim + d);
                for (int g = 0; g < G; g++) part[g] += load(queries + g * dim + d) * key;
            }
            for (int g = 0; g < G; g++) scores[g * BLOCK + j] = sum(part[g]);
        }
    } else {
        for (int64_t j = 0; j < columns; j++)
            for (int g = 0; g < G; g++) {
                float total = 0;
                for (int64_t d = 0; d < dim; d++)
                    total += queries[g * dim + d] * value_of(keys[j * dim + d]);
                scores[g * BLOCK + j] = total;
            }
    }
}

// Scores become weights e^(score - largest so far); returns how much what was summed before fades.
inline float weigh(float *scores, int64_t columns, float *largest_so_far, float *sum_of_weights) {
    float largest = *largest_so_far, weights = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < columns; j++) largest = scores[j] > largest ? scores[j] : largest;
    for (int64_t j = columns; j % WIDE; j++) scores[j] = largest;
    const float faded = std::exp(*largest_so_far - largest);
    for (int64_t j = 0; j < columns; j += WIDE) {
        const wide e = exponential(load(scores + j) - largest);
        memcpy(scores + j, &e, sizeof e);
    }
#pragma omp simd reduction(+ : weights)
    for (int64_t j = 0; j < columns; j++) weights += scores[j];
    *largest_so_far = largest;
    *sum_of_weights = *sum_of_weights * faded + weights;
    return faded;
}

// out[g] [dim], states apart, = faded[g] * out[g] + sum of weights[g * BLOCK + j] * values[j].
template <int G, typename V>
inline __attribute__((always_inline)) void mix(const V *values, int64_t columns, const int64_t dim,
                                               const float *weights, const float *faded,
                                               float *out) {
    int64_t d = 0;
    for (; d + 4 * WIDE <= dim; d += 4 * WIDE) {  // sums stay in registers
        wide part[G][4];
        for (int g = 0; g < G; g++)
            for (int k = 0; k < 4; k++)
                part[g][k] = load(out + g * (dim + 2) + d + k * WIDE) * faded[g];
        for (int64_t j = 0; j < columns; j++)
            for (int k = 0; k < 4; k++) {
                const wide value = load(values + j * dim + d + k * WIDE);
                for (int g = 0; g < G; g++) part[g][k] += weights[g * BLOCK + j] * value;
            }
        for (int g = 0; g < G; g++) memcpy(out + g * (dim + 2) + d, part[g], sizeof part[g]);
    }
    for (; d < dim; d++)
        for (int g = 0; g < G; g++) {
            float total = out[g * (dim + 2) + d] * faded[g];
            for (int64_t j = 0; j < columns; j++)
                total += weights[g * BLOCK + j] * value_of(values[j * dim + d]);
            out[g * (dim + 2) + d] = total;
        }
}

template <int G, typename T>
inline __attribute__((always_inline)) void look_with(const T *keys, const T *values,
                                                     const float *turned, const float *plain,
                                                     int64_t columns, const int64_t dim,
                                                     const float *queries, float *states) {
    alignas(64) float scores[G * BLOCK], faded[G];
    score<G>(keys, turned, columns, dim, queries, scores);
    for (int g = 0; g < G; g++) {
        float *state = states + g * (dim + 2);
        faded[g] = weigh(scores + g * BLOCK, columns, state + dim, state + dim + 1);
    }
    if (turned)
        mix<G>(plain, columns, dim, scores, faded, states);
    else
        mix<G>(values, columns, dim, scores, faded, states);
}

// `count` queries of one key head look at `columns` keys and values [.., dim], of which query i sees
// the first seen[i] (null: all). Query i of the group's head h: queries[(i * heads + h) * dim]. Its
// state, likewise, is the weighted sum so far [dim], the largest score and the sum of weights.
template <typename T>
inline __attribute__((always_inline)) void look(
    const T *keys, const T *values, int64_t columns, const int64_t *seen, int64_t count,
    int64_t heads, int64_t group, const int64_t dim, const float *queries, float *states) {
    alignas(64) float turned[LARGEST * BLOCK], plain[LARGEST * BLOCK];
    const bool together = count * group >= MANY;  // then it pays to turn a block of keys
    for (int64_t from = 0; from < columns; from += BLOCK) {
        const int64_t size = columns - from < BLOCK ? columns - from : BLOCK;
        const T *key = keys + from * dim, *value = values + from * dim;
        if (together) {
            for (int64_t d = 0; d < dim; d++) {
                for (int64_t j = 0; j < size; j++) turned[d * BLOCK + j] = value_of(key[j * dim + d]);
                for (int64_t j = size; j < BLOCK; j++) turned[d * BLOCK + j] = 0;
            }
            for (int64_t i = 0; i < size * dim; i++) plain[i] = value_of(value[i]);
        }
        const float *other = together ? turned : nullptr;
        for (int64_t i = 0; i < count; i++) {
            int64_t visible = seen ? seen[i] - from : size;
            if (visible <= 0) continue;
            if (visible > size) visible = size;
            for (int64_t h = 0; h < group;) {
                const float *query = queries + (i * heads + h) * dim;
                float *state = states + (i * heads + h) * (dim + 2);
                const int64_t left = group - h;
                if (left >= 4) {
                    look_with<4>(key, value, other, plain, visible, dim, query, state), h += 4;
                } else if (left == 3) {
                    look_with<3>(key, value, other, plain, visible, dim, query, state), h += 3;
                } else if (left == 2) {
                    look_with<2>(key, value, other, plain, visible, dim, query, state), h += 2;
                } else {
                    look_with<1>(key, value, other, plain, visible, dim, query, state), h += 1;
                }
            }
        }
    }
}

// The usual head sizes have code of their own, in which the compiler knows `dim`.
template <typename T>
void look_at(const T *keys, const T *values, int64_t columns, const int64_t *seen, int64_t count,
             int64_t heads, int64_t group, int64_t dim, const float *queries, float *states) {
    if (dim == 64)
        look(keys, values, columns, seen, count, heads, group, 64, queries, states);
    else if (dim == 128)
        look(keys, values, columns, seen, count, heads, group, 128, queries, states);
    else
        look(keys, values, columns, seen, count, heads, group, dim, queries, states);
}

template <typename T>
void attend(const Forward &f, const Layer &layer, const T *qkv, T *out) {
    const int64_t dim = f.dim, heads = f.heads, kv_heads = f.kv_heads, group = heads / kv_heads;
    T *keys = static_cast<T *>(layer.keys), *values = static_cast<T *>(layer.values);
#pragma omp parallel for num_threads(f.threads) if (f.threads > 1 && f.tokens > 1)
    for (int64_t t = 0; t < f.tokens; t++) {
        const T *x = qkv + t * (heads + 2 * kv_heads) * dim;
        const float *cosine = f.cosine + t * dim, *sine = f.sine + t * dim;
        for (int64_t h = 0; h < heads; h++) {
            float *state = f.state + (t * heads + h) * (dim + 2);
            turn(x + h * dim, dim, layer.query_weight, layer.epsilon, cosine, sine, f.scale,
                 f.queries + (t * heads + h) * dim);
            for (int64_t d = 0; d < dim; d++) state[d] = 0;
            state[dim] = NOTHING, state[dim + 1] = 0;
        }
        for (int64_t h = 0; h < kv_heads; h++) {
            float key[LARGEST];
            const int64_t at =
                f.row[t] * layer.row_stride + h * layer.head_stride + f.column[t] * dim;
            turn(x + (heads + h) * dim, dim, layer.key_weight, layer.epsilon, cosine, sine, 1, key);
            for (int64_t d = 0; d < dim; d++) store(keys + at + d, key[d]);
            memcpy(values + at, x + (heads + kv_heads + h) * dim, dim * sizeof(T));
        }
    }
    // tokens of one row share a look at its columns, tokens of one prefix a look at that
    std::vector<int64_t> seen(f.tokens), rows{0}, prefixes{0};
    for (int64_t t = 0; t < f.tokens; t++) {
        const bool last = t + 1 == f.tokens;
        seen[t] = f.column[t] + 1;
        if (last || f.row[t + 1] != f.row[t] || t + 1 - rows.back() == CHUNK) rows.push_back(t + 1);
        if (last || f.prefix[t + 1] != f.prefix[t] || t + 1 - prefixes.back() == CHUNK)
            prefixes.push_back(t + 1);
    }
    const auto each = [&](const std::vector<int64_t> &ends, auto look_of) {
        const int64_t looks = int64_t(ends.size()) - 1;
#pragma omp parallel for num_threads(f.threads) if (f.threads > 1) schedule(dynamic)
        for (int64_t job = 0; job < looks * kv_heads; job++)
            look_of(job / looks, ends[job % looks], ends[job % looks + 1]);
    };
    const auto share = [&](const T *k, const T *v, int64_t columns, const int64_t *limits, int64_t h,
                           int64_t from, int64_t end) {
        look_at(k, v, columns, limits, end - from, heads, group, dim,
                f.queries + (from * heads + h * group) * dim,
                f.state + (from * heads + h * group) * (dim + 2));
    };
    each(prefixes, [&](int64_t h, int64_t from, int64_t end) {
        const int64_t columns = f.prefix_length[from], size = columns * dim;
        if (!columns) return;
        const T *k = static_cast<const T *>(f.prefix[from]) +
                     (layer.number * 2 * kv_heads + h) * size;
        share(k, k + kv_heads * size, columns, nullptr, h, from, end);
    });
    // a prefix is looked at first: what is added to all of its scores is added to their largest
    for (int64_t t = 0; f.prefix_bias && t < f.tokens; t++)
        for (int64_t h = 0; h < heads && f.prefix_length[t]; h++)
            f.state[(t * heads + h) * (dim + 2) + dim] += f.prefix_bias[t];
    each(rows, [&](int64_t h, int64_t from, int64_t end) {
        const int64_t at = f.row[from] * layer.row_stride + h * layer.head_stride;
        share(keys + at, values + at, seen[end - 1], seen.data() + from, h, from, end);
    });
#pragma omp parallel for num_threads(f.threads) if (f.threads > 1 && f.tokens > 1)
    for (int64_t i = 0; i < f.tokens * heads; i++) {
        const float *state = f.state + i * (dim + 2), factor = 1.0f / state[dim + 1];
        for (int64_t d = 0; d < dim; d++) store(out + i * dim + d, state[d] * factor);
    }
}

}  // namespace

extern "C" {

// residual += change (null: nothing); out = residual / rms(residual) * weight. All [tokens, width],
// weight [width].
#define NORMALISE(T)                                                                              \
    void normalise_##T(int64_t tokens, int64_t width, float epsilon, int64_t threads,             \
                       float *residual, const T *change, const float *weight, T *out) {           \
        normalise(tokens, width, epsilon, threads, residual, change, weight, out);                \
    }
// x [tokens, 2 * width], gate and up beside each other -> out [tokens, width] = silu(gate) * up.
#define GATE(T)                                                                                   \
    void gate_##T(int64_t tokens, int64_t width, int64_t threads, const T *x, T *out) {           \
        gate(tokens, width, threads, x, out);                                                     \
    }
// qkv [tokens, (heads + 2 * kv_heads) * dim] as the layer's product gives it -> out [tokens, heads *
// dim]; keys and values are stored in the cache. dim: at most LARGEST.
#define ATTEND(T)                                                                                 \
    void attend_##T(const Forward *forward, const Layer *layer, const T *qkv, T *out) {           \
        attend(*forward, *layer, qkv, out);                                                       \
    }
NORMALISE(float)
NORMALISE(bfloat)
GATE(float)
GATE(bfloat)
ATTEND(float)
ATTEND(bfloat)
}
