// Products on a CPU: few rows meet each weight once. Weights are bfloat16, everything else float32.
//
// A bfloat16 is the upper half of a float32, so a pair of them in 32 bits is widened by one shift (the even
// one) and one mask (the odd one), and products are as exact as float32 products. For that the rows of x are
// kept with the even and the odd positions of every sixteen apart (`spread`). Vectors are GCC's own, so the
// same text serves AVX2, AVX-512 and NEON. Compiled on first use by native.py; every function has a slower
// equivalent in PyTorch.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "verbs.h"

typedef float f8 __attribute__((vector_size(32)));
typedef uint32_t u8 __attribute__((vector_size(32)));

template <class To, class From>
static inline To same(From from) { To to; memcpy(&to, &from, sizeof to); return to; }
static inline f8 load(const float* p) { f8 f; memcpy(&f, p, sizeof f); return f; }
static inline void store(float* p, f8 f) { memcpy(p, &f, sizeof f); }
static inline float sum(f8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// Where position j of a row of n values is kept.
static inline i64 spread(i64 j, i64 n) {
    return j < n / 16 * 16 ? (j & ~15) | (j & 1) << 3 | (j & 15) >> 1 : j;
}

static const float* spread_rows(const float* x, i64 rows, i64 n) {
    static thread_local std::vector<float> kept;
    kept.resize(rows * n);
    for (i64 r = 0; r < rows; r++) {
        const float* from = x + r * n;
        float* to = kept.data() + r * n;
        i64 j = 0;
        for (; j + 16 <= n; j += 16) {
            f8 a = load(from + j), b = load(from + j + 8);
            store(to + j, __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14));
            store(to + j + 8, __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15));
        }
        std::copy(from + j, from + n, to + j);
    }
    return kept.data();
}

// Outputs are handed out as threads come, for another process may hold one up: strips of them, several at a
// time, so that a thread reads about as many bytes on end, whatever the length of a row.
static const i64 STRIP = 24, BYTES = 1 << 18;
static i64 strips_at_a_time(i64 n) { return std::max<i64>(1, BYTES / (2 * STRIP * n)); }
static const i64 AHEAD = 640;  // weights: how far ahead of its use a stream is asked for

// x . w: a stream of weights, asked for in time and summed in eight chains, so that only memory holds it up.
static inline float dot(const uint16_t* w, i64 n, const float* x) {
    f8 even[4] = {}, odd[4] = {};
    auto add = [&](i64 k, int chain) {
        u8 pair;
        memcpy(&pair, w + k, sizeof pair);
        even[chain] += load(x + k) * same<f8>(pair << 16);
        odd[chain] += load(x + k + 8) * same<f8>(pair & 0xffff0000u);
    };
    i64 k = 0;
    for (; k + 64 <= n; k += 64) {
        __builtin_prefetch(w + k + AHEAD);
        __builtin_prefetch(w + k + AHEAD + 32);
        for (int chain = 0; chain < 4; chain++) add(k + 16 * chain, chain);
    }
    for (; k + 16 <= n; k += 16) add(k, 0);
    float total = sum((even[0] + odd[0]) + (even[1] + odd[1]) + ((even[2] + odd[2]) + (even[3] + odd[3])));
    for (; k < n; k++) total += x[k] * same<float>((uint32_t)w[k] << 16);
    return total;
}

// out[r][o] = x[r] . w[o] for R rows and O outputs that share their loads; the next outputs are asked for
// meanwhile.
template <int R, int O>
static inline void tile(const uint16_t* w, i64 n, const float* const* x, float out[R][O]) {
    f8 acc[R][O] = {};
    i64 k = 0;
    for (; k + 16 <= n; k += 16) {
        f8 low[O], high[O];
        for (int o = 0; o < O; o++) {
            u8 pair;
            memcpy(&pair, w + o * n + k, sizeof pair);
            low[o] = same<f8>(pair << 16), high[o] = same<f8>(pair & 0xffff0000u);
            __builtin_prefetch(w + (O + o) * n + k);
        }
        for (int r = 0; r < R; r++) {
            f8 even = load(x[r] + k), uneven = load(x[r] + k + 8);
            for (int o = 0; o < O; o++) {
                acc[r][o] += even * low[o];
                acc[r][o] += uneven * high[o];
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int o = 0; o < O; o++) {
            out[r][o] = sum(acc[r][o]);
            for (i64 j = k; j < n; j++) out[r][o] += x[r][j] * same<float>((uint32_t)w[o * n + j] << 16);
        }
}

// put(r, o, x[r] . w[o]) for R rows and the outputs first .. last-1.
template <int R, int O, class Put>
static void block(const uint16_t* w, i64 n, const float* const* x, i64 first, i64 last, Put put) {
    float out[R][O];
    for (; first + O <= last; first += O) {
        tile<R, O>(w + first * n, n, x, out);
        for (int r = 0; r < R; r++)
            for (int o = 0; o < O; o++) put(r, first + o, out[r][o]);
    }
    if (O > 1 && first < last) block<R, 1>(w, n, x, first, last, put);
}

// The same for any number of rows. The weights of a strip stay in cache meanwhile.
template <class Put>
static void products(const uint16_t* w, i64 n, const float* const* x, i64 rows, i64 first, i64 last,
        Put put) {
    for (i64 at = 0; at < rows;) {
        i64 left = rows - at, take = left == 5 ? 5 : left == 6 ? 3 : std::min<i64>(left, 4);
        auto from = [&](i64 r, i64 o, float v) { put(at + r, o, v); };
        switch (take) {
            case 1:
                for (i64 o = first; o < last; o++) from(0, o, dot(w + o * n, n, x[at]));
                break;
            case 2: block<2, 2>(w, n, x + at, first, last, from); break;
            case 3: block<3, 2>(w, n, x + at, first, last, from); break;
            case 4: block<4, 2>(w, n, x + at, first, last, from); break;
            default: block<5, 2>(w, n, x + at, first, last, from);
        }
        at += take;
    }
}

extern "C" {

// y[r][o] = x[r] . w[o]
void linear(const uint16_t* w, i64 outs, i64 n, const float* x, i64 rows, float* y, int threads) {
    std::vector<const float*> row(rows);
    x = spread_rows(x, rows, n);
    for (i64 r = 0; r < rows; r++) row[r] = x + r * n;
#pragma omp parallel for schedule(dynamic, strips_at_a_time(n)) num_threads(threads)
    for (i64 s = 0; s < (outs + STRIP - 1) / STRIP; s++)
        products(w, n, row.data(), rows, s * STRIP, std::min(outs, (s + 1) * STRIP),
                 [&](i64 r, i64 o, float v) { y[r * outs + o] = v; });
}

// y[t] = sum over the k experts of token t of  weight relu(u[t] up')^2 down', of those that are here: the
// `count` from `base`.  Hits are sorted by expert, so that a matrix is read once, from its beginning to its
// end; they are added up in that order.
void experts(const uint16_t* const* up, const uint16_t* const* down, i64 base, i64 count, const i64* expert,
             const float* weight, i64 tokens, i64 k, i64 n, i64 width, const float* u, float* y,
             int threads) {
    auto here = [&](i64 e) { return e < base || e >= base + count ? count : e - base; };
    std::vector<i64> begin(count + 2, 0), hit, token(tokens * k);
    std::vector<float> share(tokens * k);
    static thread_local std::vector<float> kept;
    for (i64 j = 0; j < tokens * k; j++) begin[here(expert[j]) + 1]++;
    for (i64 e = 0; e < count; e++) {
        if (begin[e + 1]) hit.push_back(e);
        begin[e + 1] += begin[e];
    }
    std::vector<i64> next(begin);
    for (i64 j = 0; j < tokens * k; j++) {
        i64 at = next[here(expert[j])]++;
        token[at] = j / k, share[at] = weight[j];
    }
    i64 hits = begin[count];
    if ((i64)kept.size() < hits * (width + n)) kept.resize(hits * (width + n));
    float *inner = kept.data(), *out = inner + hits * width;
    u = spread_rows(u, tokens, n);
#pragma omp parallel num_threads(threads)
    {
        std::vector<const float*> row(tokens);
        // put(row, output, value) of each matrix [outs][ins], its rows beginning where `from` says
        auto each = [&](const uint16_t* const* matrices, i64 outs, i64 ins, auto from, auto put) {
            i64 strips = (outs + STRIP - 1) / STRIP;
#pragma omp for schedule(dynamic, strips_at_a_time(ins))
            for (i64 s = 0; s < (i64)hit.size() * strips; s++) {
                i64 e = hit[s / strips], first = s % strips * STRIP, b = begin[e], rows = begin[e + 1] - b;
                for (i64 r = 0; r < rows; r++) row[r] = from(b + r);
                products(matrices[e], ins, row.data(), rows, first, std::min(outs, first + STRIP),
                         [&](i64 r, i64 o, float v) { put(b + r, o, v); });
            }
        };
        each(up, width, n, [&](i64 j) { return u + token[j] * n; }, [&](i64 j, i64 o, float v) {
            v = v > 0 ? v : 0;
            inner[j * width + spread(o, width)] = v * v;
        });
        each(down, n, width, [&](i64 j) { return inner + j * width; },
             [&](i64 j, i64 o, float v) { out[j * n + o] = share[j] * v; });
#pragma omp for schedule(static)
        for (i64 first = 0; first < n; first += STRIP) {
            i64 last = std::min(n, first + STRIP);
            for (i64 t = 0; t < tokens; t++) std::fill(y + t * n + first, y + t * n + last, 0.f);
            for (i64 j = 0; j < hits; j++)
                for (i64 o = first; o < last; o++) y[token[j] * n + o] += out[j * n + o];
        }
    }
}
}
