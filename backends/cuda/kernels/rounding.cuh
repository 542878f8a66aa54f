// The state of the scan as it is stored: float as it is, float16 rounded at random so that no step is lost on
// average: x goes up with the probability of its distance from the float16 below, and the mean of many is x.
//
// The random numbers are those of chapter 5: a function of a key of the sequence and the layer, of the position after
// which S is stored, and of the element within the sequence's S.
#pragma once
#include "common.cuh"

DEVICE unsigned mix(unsigned x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

struct Random {
    unsigned step;

    DEVICE Random(unsigned key, unsigned position) : step(mix((position ^ key) + 0x9e3779b9u)) {}

    // 13 bits.
    DEVICE unsigned bits(unsigned element) const { return mix(mix(element ^ step) + step) >> 19; }
};

// The random numbers of sequence b after `count` more positions; any where nothing is rounded (null).
DEVICE Random random_of(const int* key, const int* position, long long b, int count) {
    return key ? Random(key[b], position[b] + count) : Random(0, 0);
}

// x to the float16 below or above it, at most to the largest. `random` has 13 bits, as many as are lost.
DEVICE unsigned short rounded_at_random(float x, unsigned random) {
    float size = fabsf(x);
    if (!(size < 65504.0f)) return f16_bits(size > 65504.0f ? copysignf(65504.0f, x) : x);
    if (size < 6.103515625e-05f)  // below the normal ones: multiples of 2^-24
        size = floorf(size * 16777216.0f + random / 8192.0f) / 16777216.0f;
    else size = __uint_as_float((__float_as_uint(size) + random) & ~0x1fffu);
    return f16_bits(copysignf(fminf(size, 65504.0f), x));
}

// N values of a state, from `element` on.
template <int N>
DEVICE void write_state(float* p, const float (&v)[N], const Random&, unsigned) {
    write(p, v);
}
template <int N>
DEVICE void write_state(Half* p, const float (&v)[N], const Random& random, unsigned element) {
    if constexpr (N == 1) {
        p->bits = rounded_at_random(v[0], random.bits(element));
    } else {
        unsigned words[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            words[i] = rounded_at_random(v[2 * i], random.bits(element + 2 * i)) |
                       (unsigned)rounded_at_random(v[2 * i + 1], random.bits(element + 2 * i + 1)) << 16;
        write_words<2 * N>(p, words);
    }
}
