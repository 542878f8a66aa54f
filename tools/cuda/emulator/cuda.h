// CUDA C++ as the kernels use it, for a host compiler. Included before every kernel file; what is missing here does
// not compile, and is added when a kernel needs it.
#pragma once
#include "runtime.h"

// Mathematics of the C library. (What C++ makes of <math.h> are 20,000 lines, which every compilation would read.)
extern "C" {
float expf(float) noexcept;
float exp2f(float) noexcept;
float logf(float) noexcept;
float log2f(float) noexcept;
float log1pf(float) noexcept;
float tanhf(float) noexcept;
float sqrtf(float) noexcept;
float fabsf(float) noexcept;
float floorf(float) noexcept;
float fmaxf(float, float) noexcept;
float fminf(float, float) noexcept;
float copysignf(float, float) noexcept;
float fmaf(float, float, float) noexcept;
}

#define CUDA_ON_CPU 1
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __restrict__ __restrict

#define threadIdx (::cuda_on_cpu::thread_index)
#define blockIdx (::cuda_on_cpu::block_index)
#define blockDim (::cuda_on_cpu::block_size)
#define gridDim (::cuda_on_cpu::grid_size)
constexpr int warpSize = 32;

// The dynamic shared memory as an array of T. (Static arrays are rewritten to cuda_on_cpu::shared by build.py.)
#define SHARED(T, name) T* name = static_cast<T*>(::cuda_on_cpu::dynamic_shared(__FILE__, __LINE__))

namespace cuda_on_cpu {
// Each place in the source, and each instance of a template, has its own `Tag`, and so its own key.
template <class T, class Tag>
T& shared(Tag) {
    static const char key = 0;
    return *static_cast<T*>(static_shared(&key, sizeof(T), alignof(T)));
}

template <class T>
unsigned long long bits_of(T x) {
    static_assert(sizeof(T) <= 8, "a lane gives at most 8 bytes");
    unsigned long long bits = 0;
    __builtin_memcpy(&bits, &x, sizeof x);
    return bits;
}

template <class T>
T value_of(unsigned long long bits) {
    T x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

// Every lane's x, for what a whole warp computes together. For the CPU meaning of an instruction.
template <class T>
void warp_gather(const T& x, T (&all)[32], const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    static_assert(sizeof(T) <= MOST_GATHERED);
    gather(&x, all, sizeof(T), file, line);
}
}  // namespace cuda_on_cpu

// ---- Vectors ----

// Copied by members, because clang checks the alignment of those and not of a whole trivial copy.
#define VECTORS(T, name)                                                                     \
    struct name##1 { T x; };                                                                 \
    struct alignas(2 * sizeof(T)) name##2 {                                                  \
        T x, y;                                                                              \
        name##2() = default;                                                                 \
        name##2(T x, T y) : x(x), y(y) {}                                                    \
        name##2(const name##2& v) : x(v.x), y(v.y) {}                                        \
        name##2& operator=(const name##2& v) { return x = v.x, y = v.y, *this; }             \
    };                                                                                       \
    struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 {                        \
        T x, y, z, w;                                                                        \
        name##4() = default;                                                                 \
        name##4(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}                              \
        name##4(const name##4& v) : x(v.x), y(v.y), z(v.z), w(v.w) {}                        \
        name##4& operator=(const name##4& v) { return x = v.x, y = v.y, z = v.z, w = v.w, *this; } \
    };                                                                                       \
    inline name##2 make_##name##2(T x, T y) { return {x, y}; }                               \
    inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTORS(float, float)
VECTORS(int, int)
VECTORS(unsigned, uint)
VECTORS(short, short)
VECTORS(unsigned short, ushort)
VECTORS(char, char)
VECTORS(unsigned char, uchar)
VECTORS(long long, longlong)
VECTORS(unsigned long long, ulonglong)
#undef VECTORS

// ---- Threads together ----

#define PLACE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define HERE file, line

inline void __syncthreads(PLACE) {
    ::cuda_on_cpu::barrier(::cuda_on_cpu::COUNT_NONE, 0, "__syncthreads", HERE);
}
inline int __syncthreads_count(int x, PLACE) {
    return ::cuda_on_cpu::barrier(::cuda_on_cpu::COUNT_SUM, x, "__syncthreads_count", HERE);
}
inline int __syncthreads_and(int x, PLACE) {
    return ::cuda_on_cpu::barrier(::cuda_on_cpu::COUNT_AND, x, "__syncthreads_and", HERE);
}
inline int __syncthreads_or(int x, PLACE) {
    return ::cuda_on_cpu::barrier(::cuda_on_cpu::COUNT_OR, x, "__syncthreads_or", HERE);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, PLACE) {
    ::cuda_on_cpu::meet(::cuda_on_cpu::SYNCWARP, mask, 0, 0, 32, "__syncwarp", HERE);
}

#define SHUFFLE(name, kind, operand)                                                                        \
    template <class T>                                                                                      \
    T name(unsigned mask, T x, operand lane, int width = 32, PLACE) {                                       \
        return ::cuda_on_cpu::value_of<T>(                                                                  \
            ::cuda_on_cpu::meet(::cuda_on_cpu::kind, mask, ::cuda_on_cpu::bits_of(x), int(lane), width, #name, HERE)); \
    }
SHUFFLE(__shfl_sync, SHUFFLE_IDX, int)
SHUFFLE(__shfl_up_sync, SHUFFLE_UP, unsigned)
SHUFFLE(__shfl_down_sync, SHUFFLE_DOWN, unsigned)
SHUFFLE(__shfl_xor_sync, SHUFFLE_XOR, int)
#undef SHUFFLE

inline unsigned __ballot_sync(unsigned mask, int x, PLACE) {
    return unsigned(::cuda_on_cpu::meet(::cuda_on_cpu::BALLOT, mask, x != 0, 0, 32, "__ballot_sync", HERE));
}
inline int __any_sync(unsigned mask, int x, PLACE) { return __ballot_sync(mask, x, HERE) != 0; }
inline int __all_sync(unsigned mask, int x, PLACE) { return __ballot_sync(mask, x, HERE) == mask; }
#undef PLACE
#undef HERE

inline void __threadfence() {}  // orders nothing here: blocks do not wait for each other
inline void __threadfence_block() {}

// ---- Atomics on integers. (Sums of floats would depend on the order of threads.) ----

#define ATOMIC(T)                                                                                         \
    inline T atomicAdd(T* p, T x) { return __atomic_fetch_add(p, x, __ATOMIC_RELAXED); }                  \
    inline T atomicSub(T* p, T x) { return __atomic_fetch_sub(p, x, __ATOMIC_RELAXED); }                  \
    inline T atomicAnd(T* p, T x) { return __atomic_fetch_and(p, x, __ATOMIC_RELAXED); }                  \
    inline T atomicOr(T* p, T x) { return __atomic_fetch_or(p, x, __ATOMIC_RELAXED); }                    \
    inline T atomicXor(T* p, T x) { return __atomic_fetch_xor(p, x, __ATOMIC_RELAXED); }                  \
    inline T atomicExch(T* p, T x) { return __atomic_exchange_n(p, x, __ATOMIC_RELAXED); }                \
    inline T atomicMax(T* p, T x) { return __atomic_fetch_max(p, x, __ATOMIC_RELAXED); }                  \
    inline T atomicMin(T* p, T x) { return __atomic_fetch_min(p, x, __ATOMIC_RELAXED); }                  \
    inline T atomicCAS(T* p, T expected, T x) {                                                           \
        __atomic_compare_exchange_n(p, &expected, x, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);          \
        return expected;                                                                                  \
    }
ATOMIC(int)
ATOMIC(unsigned)
ATOMIC(unsigned long long)
#undef ATOMIC

// ---- Bits and integers ----

inline float __uint_as_float(unsigned x) { return ::cuda_on_cpu::value_of<float>(x); }
inline float __int_as_float(int x) { return ::cuda_on_cpu::value_of<float>(unsigned(x)); }
inline unsigned __float_as_uint(float x) { return unsigned(::cuda_on_cpu::bits_of(x)); }
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= (x >> i & 1) << (31 - i);
    return r;
}
inline unsigned __umulhi(unsigned x, unsigned y) { return unsigned((unsigned long long)x * y >> 32); }
inline int __mulhi(int x, int y) { return int((long long)x * y >> 32); }

#define LEAST_AND_MOST(T)                          \
    inline T min(T x, T y) { return y < x ? y : x; } \
    inline T max(T x, T y) { return x < y ? y : x; }
LEAST_AND_MOST(int)
LEAST_AND_MOST(unsigned)
LEAST_AND_MOST(long long)
LEAST_AND_MOST(unsigned long long)
#undef LEAST_AND_MOST
inline float min(float x, float y) { return fminf(x, y); }
inline float max(float x, float y) { return fmaxf(x, y); }

template <class T>
T __ldg(const T* p) {
    return *p;
}

// ---- Approximate mathematics: exact here, or off by a few units in the last place under PERTURB ----

namespace cuda_on_cpu {
// x with up to `ulp` units added or taken away, decided by the bits of x.
inline float perturbed(float x, [[maybe_unused]] int ulp) {
#ifdef PERTURB
    unsigned bits = __float_as_uint(x), exponent = bits >> 23 & 255;
    if (exponent != 0 && exponent != 255) {
        unsigned mixed = bits * 2654435761u >> 16;
        x = __uint_as_float(bits + unsigned(int(mixed % unsigned(2 * ulp + 1)) - ulp));
    }
#endif
    return x;
}
}  // namespace cuda_on_cpu

// Errors in units in the last place, from the CUDA C++ Programming Guide, "Mathematical Functions".
inline float __fdividef(float x, float y) { return ::cuda_on_cpu::perturbed(x / y, 2); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float rsqrtf(float x) { return ::cuda_on_cpu::perturbed(1.0f / sqrtf(x), 2); }
inline float __expf(float x) {
    return ::cuda_on_cpu::perturbed(expf(x), 2 + int(fminf(100.0f, fabsf(1.173f * x))));
}
inline float __logf(float x) { return ::cuda_on_cpu::perturbed(logf(x), 3); }
#ifdef PERTURB
#define expf(x) ::cuda_on_cpu::perturbed(::expf(x), 2)
#define exp2f(x) ::cuda_on_cpu::perturbed(::exp2f(x), 2)
#define logf(x) ::cuda_on_cpu::perturbed(::logf(x), 1)
#define log2f(x) ::cuda_on_cpu::perturbed(::log2f(x), 1)
#define log1pf(x) ::cuda_on_cpu::perturbed(::log1pf(x), 2)
#define tanhf(x) ::cuda_on_cpu::perturbed(::tanhf(x), 2)
#endif
