// Vectors (GCC's vector extension): exponentials, and a product that vectorises over the query heads of a key head,
// which lie side by side. Attention uses it for both of its products:
//
//     scores [key][head]  =  sum over i of     K[key][i]  q[i][head]
//     y      [i][head]    =  sum over keys of  V[key][i]  p[key][head],
//
// numbers of the cache, widened if they are bfloat16, times vectors of heads.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(__FMA__) && !defined(WIDE)
#include <immintrin.h>
#endif

typedef int64_t i64;
#if defined(__AVX512F__) || defined(WIDE)  // WIDE: to test this width on any processor
constexpr int LANES = 16, ROWS = 24;  // numbers of a vector; rows of a tile that is one vector wide
#else
constexpr int LANES = 8, ROWS = 12;
#endif
typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

template <class To, class From>
static inline To load(const From* from) { To to; memcpy(&to, from, sizeof to); return to; }
template <class From>
static inline void store(float* to, From from) { memcpy(to, &from, sizeof from); }

// a b + c, rounded once if the processor has the instruction. It is written out because in a b + c d a compiler may
// round either product, and not the same one at each use.
static inline vec fused(vec a, vec b, vec c) {
#if defined(__FMA__) && defined(__AVX512F__) && !defined(WIDE)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && !defined(WIDE)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__) || defined(__FMA__)
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

// 2^x for x <= TOP <= 126, with a relative error of 1.6e-8: a polynomial within half an octave of 0, times a power of
// two. Below -126 it is 2^-126.
template <int TOP>
static inline vec exp2_of(vec x) {
    x = x > -126.f ? x : vec{} - 126.f;
    ints whole = __builtin_convertvector(x - (TOP + .5f), ints) + TOP;  // truncates upwards, so rounds to nearest
    vec f = x - __builtin_convertvector(whole, vec);
    vec p = f * 0.0001534581242594868f + 0.0013399930903688073f;
    p = p * f + 0.009618489071726799f;
    p = p * f + 0.05550328642129898f;
    p = p * f + 0.24022646248340607f;
    p = p * f + 0.6931471824645996f;
    p = p * f + 1.f;
    ints bits = load<ints>(&p) + (whole << 23);
    return load<vec>(&bits);
}

// exp(-x), at most 2^126
static inline vec exp_of_minus(vec x) {
    vec octaves = x * -1.442695041f;
    return exp2_of<126>(octaves < 126.f ? octaves : vec{} + 126.f);
}

// 0 if exp(-x) exceeds 2^126
static inline vec sigmoid(vec x) {
    const vec y = x * -1.442695041f < 126.f ? 1.f / (1.f + exp_of_minus(x)) : vec{};
    return x == x ? y : x;
}

static inline vec silu(vec x) { return x / (1.f + exp_of_minus(x)); }

// Load `count` numbers and zeros as a vector; store the first `count` numbers of one.
static inline vec load_some(const float* from, i64 count) {
    vec v = {};
    memcpy(&v, from, count * sizeof(float));
    return v;
}
static inline void store_some(float* to, vec v, i64 count) { memcpy(to, &v, count * sizeof(float)); }

// to[i] = f(from[i]), a vector at a time
template <class F>
static inline void each_vector(const float* from, float* to, i64 count, F f) {
    for (; count >= LANES; count -= LANES, from += LANES, to += LANES) store(to, f(load<vec>(from)));
    if (count) store_some(to, f(load_some(from, count)), count);
}

// Data to prefetch meanwhile, because it is read next: `bytes` for each product of a number and its heads.
struct Next { const char* from; i64 bytes; };

// c [rows][width] += a b, where a[m][k] is at a + m row + k step, and b is [depth][width]: M rows, W vectors.
template <int M, int W>
static inline void tile(const float* a, i64 row, i64 step, const float* b, i64 width, i64 depth, float* c,
                        Next& next) {
    vec sum[M][W] = {};
    const char* ask = next.from;
    const i64 asked = M * next.bytes;
    for (i64 k = 0; k < depth; k++, a += step, b += width, ask += asked) {
        __builtin_prefetch(ask);
        vec heads[W];
        for (int w = 0; w < W; w++) heads[w] = load<vec>(b + w * LANES);
        for (int m = 0; m < M; m++)
            for (int w = 0; w < W; w++) sum[m][w] = fused(vec{} + a[m * row], heads[w], sum[m][w]);
    }
    next.from = ask;
#pragma GCC unroll 24
    for (int m = 0; m < M; m++)
        for (int w = 0; w < W; w++) {
            float* to = c + m * width + w * LANES;
            store(to, load<vec>(to) + sum[m][w]);
        }
}

// The same for any number of rows.
template <int W, int M = ROWS / W>
static inline void strip(const float* a, i64 row, i64 step, i64 rows, const float* b, i64 width, i64 depth,
                         float* c, Next& next) {
    for (; rows >= M; rows -= M, a += M * row, c += M * width)
        tile<M, W>(a, row, step, b, width, depth, c, next);
    if constexpr (M > 1)
        if (rows) strip<W, M - 1>(a, row, step, rows, b, width, depth, c, next);
}

// The same for any width.
static inline void product(const float* a, i64 row, i64 step, i64 rows, const float* b, i64 width, i64 depth,
                           float* c, Next next) {
    i64 at = 0;
    for (; at + 2 * LANES <= width; at += 2 * LANES)
        strip<2>(a, row, step, rows, b + at, width, depth, c + at, next);
    if (at < width) strip<1>(a, row, step, rows, b + at, width, depth, c + at, next);
}

// Return `count` numbers as float32: in place, or widened into `room`.
static inline const float* widened(const float* from, i64, float*) { return from; }
static inline const float* widened(const uint16_t* from, i64 count, float* room) {
    i64 i = 0;
    for (; i + LANES <= count; i += LANES)
        store(room + i, __builtin_convertvector(load<halves>(from + i), words) << 16);
    for (; i < count; i++) store(room + i, (uint32_t)from[i] << 16);
    return room;
}
