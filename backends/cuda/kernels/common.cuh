// What all kernels share: storage types, vector access, sums over a warp and a block, activations.
//
// Activations and matrices are stored as Real: float, or bfloat16 under -DREAL_BF16. The state of the scan is
// stored as State: float, or float16 under -DSTATE_F16. Every computation is in float.
#pragma once
#include "ptx.cuh"

struct Bf16 {
    unsigned short bits;
};
struct Half {
    unsigned short bits;
};
#ifdef REAL_BF16
typedef Bf16 Real;
#else
typedef float Real;
#endif
#ifdef STATE_F16
typedef Half State;
#else
typedef float State;
#endif

#define INFINITE __int_as_float(0x7f800000)
constexpr unsigned WARP = 0xffffffffu;   // the mask of a whole warp
constexpr int PACK = 16 / sizeof(Real);  // how many Real one 16-byte access moves

// The dynamic shared memory of the block, an array of T aligned to 16 bytes. The emulator has its own.
#ifndef SHARED
#define SHARED(T, name)                                            \
    extern __shared__ __align__(16) unsigned char shared_memory[]; \
    T* name = reinterpret_cast<T*>(shared_memory)
#endif

DEVICE float load(float x) { return x; }
DEVICE float load(Bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
DEVICE float load(Half x) { return f16_value(x.bits); }

DEVICE void put(float* p, float x) { *p = x; }
DEVICE void put(Bf16* p, float x) { p->bits = bf16_bits(x); }

// x as a Real, to nearest, ties to even.
DEVICE Real store(float x) {
    Real r;
    put(&r, x);
    return r;
}

DEVICE void unpack(unsigned word, float* v, float) { v[0] = __uint_as_float(word); }
DEVICE void unpack(unsigned word, float* v, Bf16) {
    v[0] = __uint_as_float(word << 16);
    v[1] = __uint_as_float(word & 0xffff0000u);
}
DEVICE void unpack(unsigned word, float* v, Half) {
    v[0] = f16_value((unsigned short)word);
    v[1] = f16_value((unsigned short)(word >> 16));
}
DEVICE unsigned pack(const float* v, float) { return __float_as_uint(v[0]); }
DEVICE unsigned pack(const float* v, Bf16) { return bf16_pair(v[0], v[1]); }

// `bytes` as 32-bit words, in accesses of up to 16 bytes; p is aligned to min(bytes, 16).
template <int bytes>
DEVICE void read_words(const void* p, unsigned* words) {
    if constexpr (bytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < bytes / 16; i++) {
            uint4 w = static_cast<const uint4*>(p)[i];
            words[4 * i] = w.x, words[4 * i + 1] = w.y, words[4 * i + 2] = w.z, words[4 * i + 3] = w.w;
        }
    } else if constexpr (bytes == 8) {
        uint2 w = *static_cast<const uint2*>(p);
        words[0] = w.x, words[1] = w.y;
    } else {
        static_assert(bytes == 4, "4, 8, or a multiple of 16 bytes");
        words[0] = *static_cast<const unsigned*>(p);
    }
}

template <int bytes>
DEVICE void write_words(void* p, const unsigned* words) {
    if constexpr (bytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < bytes / 16; i++)
            static_cast<uint4*>(p)[i] =
                make_uint4(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3]);
    } else if constexpr (bytes == 8) {
        *static_cast<uint2*>(p) = make_uint2(words[0], words[1]);
    } else {
        static_assert(bytes == 4, "4, 8, or a multiple of 16 bytes");
        *static_cast<unsigned*>(p) = words[0];
    }
}

// N values at p, which is aligned to their size, up to 16 bytes.
template <int N, class T>
DEVICE void read(const T* p, float (&v)[N]) {
    if constexpr (N == 1) {
        v[0] = load(*p);
    } else {
        constexpr int each = 4 / sizeof(T);  // values in a word
        unsigned words[N / each];
        read_words<N * sizeof(T)>(p, words);
#pragma unroll
        for (int i = 0; i < N / each; i++) unpack(words[i], v + i * each, T());
    }
}

// The other way, rounded to T.
template <int N, class T>
DEVICE void write(T* p, const float (&v)[N]) {
    if constexpr (N == 1) {
        put(p, v[0]);
    } else {
        constexpr int each = 4 / sizeof(T);
        unsigned words[N / each];
#pragma unroll
        for (int i = 0; i < N / each; i++) words[i] = pack(v + i * each, T());
        write_words<N * sizeof(T)>(p, words);
    }
}

DEVICE bool aligned(const void* p) { return (reinterpret_cast<unsigned long long>(p) & 15) == 0; }

// The sum over a warp, in every lane, in a fixed order.
DEVICE float warp_sum(float x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane >>= 1) x += __shfl_xor_sync(WARP, x, lane);
    return x;
}

DEVICE float warp_max(float x) {
#pragma unroll
    for (int lane = 16; lane > 0; lane >>= 1) x = fmaxf(x, __shfl_xor_sync(WARP, x, lane));
    return x;
}

// The sum over a block of whole warps, in every thread; `partial` is the caller's shared memory, 32 values.
DEVICE float block_sum(float x, float* partial) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    x = warp_sum(x);
    if (warps == 1) return x;
    if (lane == 0) partial[warp] = x;
    __syncthreads();
    x = warp_sum(lane < warps ? partial[lane] : 0.0f);
    __syncthreads();  // partial may be used again
    return x;
}

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
DEVICE float silu(float x) { return x / (1.0f + expf(-x)); }
DEVICE float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// How far a head of the scan steps, by what the projection says of a position.
DEVICE float time_step(const Real* dt, float bias, float least, float most) {
    return fminf(fmaxf(softplus(load(*dt) + bias), least), most);
}

// In kernels that treat each element alike: which one a thread begins with, and how far it is to its next.
DEVICE long long first_element() { return (long long)blockIdx.x * blockDim.x + threadIdx.x; }
DEVICE long long next_element() { return (long long)gridDim.x * blockDim.x; }

// Two neighbours, as far as they are among the `count` that are there. `even`: the first is aligned to both.
template <class T>
DEVICE void write_pair(T* p, const float* v, int count, bool even) {
    if (even && count > 1) {
        float both[2] = {v[0], v[1]};
        write(p, both);
    } else {
        if (count > 0) put(p, v[0]);
        if (count > 1) put(p + 1, v[1]);
    }
}
