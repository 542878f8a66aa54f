// The state of the scan as it is stored: float as it is, float16 rounded at random so that no step is lost on
// average: x goes up with the probability of its distance from the float16 below, and the mean of many is x.
//
// The bits come from Philox 4x32 (Salmon et al. 2011), 7 rounds: a function of the element, of how often the
// block was called before, which a word of global memory counts for each, and of the position in this call.
#pragma once
#include "common.cuh"

struct Random {
    unsigned word[4];

    DEVICE Random(unsigned long long element, unsigned call, unsigned again = 0) {
        unsigned key0 = 0x243f6a88u, key1 = 0x85a308d3u;
        word[0] = (unsigned)element, word[1] = (unsigned)(element >> 32), word[2] = call, word[3] = again;
#pragma unroll
        for (int round = 0; round < 7; round++) {
            unsigned low0 = word[0] * 0xd2511f53u, high0 = __umulhi(word[0], 0xd2511f53u);
            unsigned low1 = word[2] * 0xcd9e8d57u, high1 = __umulhi(word[2], 0xcd9e8d57u);
            word[0] = high1 ^ word[1] ^ key0, word[1] = low1;
            word[2] = high0 ^ word[3] ^ key1, word[3] = low0;
            key0 += 0x9e3779b9u, key1 += 0xbb67ae85u;
        }
    }

    // The i-th of eight numbers of 13 bits.
    DEVICE unsigned bits(int i) const { return (word[i >> 1] >> (i & 1 ? 19 : 3)) & 0x1fffu; }
};

// x to the float16 below or above it, at most to the largest. `random` has 13 bits, as many as are lost.
DEVICE unsigned short rounded_at_random(float x, unsigned random) {
    float size = fabsf(x);
    if (!(size < 65504.0f)) return f16_bits(size > 65504.0f ? copysignf(65504.0f, x) : x);
    if (size < 6.103515625e-05f)  // below the normal ones: multiples of 2^-24
        size = floorf(size * 16777216.0f + random / 8192.0f) / 16777216.0f;
    else size = __uint_as_float((__float_as_uint(size) + random) & ~0x1fffu);
    return f16_bits(copysignf(fminf(size, 65504.0f), x));
}

// N values of a state; those of `random` from the `from`-th on are used.
template <int N>
DEVICE void write_state(float* p, const float (&v)[N], const Random&, int) {
    write(p, v);
}
template <int N>
DEVICE void write_state(Half* p, const float (&v)[N], const Random& random, int from) {
    if constexpr (N == 1) {
        p->bits = rounded_at_random(v[0], random.bits(from));
    } else {
        unsigned words[N / 2];
#pragma unroll
        for (int i = 0; i < N / 2; i++)
            words[i] = rounded_at_random(v[2 * i], random.bits(from + 2 * i)) |
                       (unsigned)rounded_at_random(v[2 * i + 1], random.bits(from + 2 * i + 1)) << 16;
        write_words<2 * N>(p, words);
    }
}

// How often this block was called before; every thread of it asks once. Null: nothing is rounded at random.
DEVICE unsigned count_call(int* calls) {
    if (calls == nullptr) return 0;
    long long block = blockIdx.x + (long long)gridDim.x * (blockIdx.y + (long long)gridDim.y * blockIdx.z);
    int before = calls[block];
    __syncthreads();
    if (threadIdx.x == 0) calls[block] = before + 1;
    return before;
}
