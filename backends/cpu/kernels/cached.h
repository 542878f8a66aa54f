// Numbers of a cache of keys and values: float32, bfloat16, or E4M3 (FP8) times a scale. They are rounded to nearest
// even when a position is written, and read as float32.
#pragma once
#include <algorithm>
#include <cmath>

#include "numbers.h"

typedef uint8_t bytes __attribute__((vector_size(LANES)));

static inline uint16_t to_bfloat16(float x) {
    const uint32_t bits = same<uint32_t>(x);
    return x != x ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// Return x as E4M3, at most 448 in magnitude; NaN stays NaN.
static inline uint8_t to_e4m3(float x) {
    const uint32_t sign = same<uint32_t>(x) >> 24 & 0x80;
    if (x != x) return sign | 0x7f;
    const float size = std::min(std::fabs(x), 448.f);
    if (size < 0x1p-6f) return sign | (uint32_t)std::nearbyint(size * 512);  // multiples of 2^-9
    const uint32_t bits = same<uint32_t>(size);
    return sign | (((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3));  // exponents from bias 127 to 7
}

// Write `count` numbers, the first at `at`.
static inline void keep(i64 kind, float scale, void* into, i64 at, const float* from, i64 count) {
    if (kind == FLOAT32) memcpy((float*)into + at, from, count * sizeof(float));
    if (kind == BFLOAT16)
        for (i64 i = 0; i < count; i++) ((uint16_t*)into)[at + i] = to_bfloat16(from[i]);
    if (kind == E4M3)
        for (i64 i = 0; i < count; i++) ((uint8_t*)into)[at + i] = to_e4m3(from[i] / scale);
}

// Write keys and values of l positions of row s, the first at position `from`: k and v [l][kv][e], `step` apart.
static inline void append(const Cache& cache, i64 s, i64 from, i64 l, i64 kv, i64 e, const float* k, const float* v,
                          i64 step) {
    for (i64 i = 0; i < l; i++) {
        const i64 at = from + i;
        const Page& page = cache.pages[s * cache.count + at / cache.each];
        for (i64 g = 0; g < kv; g++) {
            const i64 to = g * page.step + at % cache.each * e;
            keep(cache.kind, cache.k_scale, page.k, to, k + i * step + g * e, e);
            keep(cache.kind, cache.v_scale, page.v, to, v + i * step + g * e, e);
        }
    }
}

// E4M3 is a float16 with one bit of exponent less, 2^8 times as large.
static inline vec widened_bytes(bytes b) {
    const halves h = __builtin_convertvector(b, halves), size = h & 0x7f;
    const ints nan = __builtin_convertvector(size == 0x7f, ints);
    const vec v = widened_half((h & 0x80) << 8 | size << 7) * 256.f;
    return nan ? vec{} + NAN : v;
}
static inline const float* widened(const uint8_t* from, i64 count, float* room) {
    i64 i = 0;
    for (; i + LANES <= count; i += LANES) store(room + i, widened_bytes(load<bytes>(from + i)));
    bytes last = {};
    memcpy(&last, from + i, count - i);
    const vec v = widened_bytes(last);
    memcpy(room + i, &v, (count - i) * sizeof(float));
    return room;
}
