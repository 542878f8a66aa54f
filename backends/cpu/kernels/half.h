// The state S in float16, rounded at random: up with a probability equal to the distance from the float16 below, in
// units of the last place, so that the mean is exact. The random numbers are those of chapter 5, a function of key,
// position and element.
#pragma once
#include <algorithm>
#include <cmath>

#include "numbers.h"

static inline words mix(words x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

// Return x in float16, rounded with 13 bits `random`; in integers, since float16 below 2^-14 are multiples of 2^-24.
static inline words to_half(vec x, words random) {
    const words bits = same<words>(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    const words normal = ((size + random) >> 13) - (112 << 10);
    const vec units = same<vec>(size) * 0x1p24f + __builtin_convertvector(same<ints>(random), vec) * 0x1p-13f;
    const words tiny = same<words>(__builtin_convertvector(units < 2048.f ? units : vec{}, ints));
    words half = size < (113u << 23) ? tiny : (normal < 0x7bffu ? normal : words{} + 0x7bffu);
    half = size > 0x7f800000u ? words{} + 0x7e00u : half;
    return sign | half;
}

struct Random {
    uint32_t step;

    Random(uint32_t key, i64 position) : step(mix(words{} + (((uint32_t)position ^ key) + 0x9e3779b9u))[0]) {}

    words bits(i64 element) const {
        words at;
        for (int i = 0; i < LANES; i++) at[i] = (uint32_t)(element + i);
        return mix(mix(at ^ step) + step) >> 19;
    }

    // to[i] = from[i], rounded, for elements from number `first` on.
    void store(const float* from, i64 first, i64 count, uint16_t* to) const {
        for (i64 i = 0; i < count; i += LANES) {
            const i64 some = std::min<i64>(LANES, count - i);
            vec v = {};
            memcpy(&v, from + i, some * sizeof(float));
            const halves h = __builtin_convertvector(to_half(v, bits(first + i)), halves);
            memcpy(to + i, &h, some * sizeof(uint16_t));
        }
    }
};

// Widen `count` float16 numbers to float32.
static inline void widened_halves(const uint16_t* from, i64 count, float* to) {
    for (i64 i = 0; i < count; i += LANES) {
        const i64 some = std::min<i64>(LANES, count - i);
        halves h = {};
        memcpy(&h, from + i, some * sizeof(uint16_t));
        const vec v = widened_half(h);
        memcpy(to + i, &v, some * sizeof(float));
    }
}
