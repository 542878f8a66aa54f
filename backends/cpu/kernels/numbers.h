// Read two vectors of weights at a time, as float32, from the dtype of the file. So a product is written once for all
// dtypes.
//
// A bfloat16 is the upper half of a float32, so a pair of them in 32 bits is widened by one shift (the even one) and
// one mask (the odd one). Therefore rows of x have the even and the odd positions of every 2 LANES apart. An FP8 with
// its sign extended and shifted by 4 is a bfloat16 of 2^-120 of its value, subnormal ones too. So that products with
// it do not become subnormal, such rows of x are multiplied by UP. For other dtypes the rows stay as they are.
#pragma once
#include "structures.h"
#include "vectors.h"

#if (defined(__F16C__) || defined(__AVX2__)) && !defined(WIDE)
#include <immintrin.h>
#endif

constexpr i64 PAIR = 2 * LANES;
typedef int16_t shorts __attribute__((vector_size(4 * LANES)));
typedef int8_t codes __attribute__((vector_size(2 * LANES)));
typedef uint8_t octets __attribute__((vector_size(LANES)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };
struct e4m3 { uint8_t bits; };  // FP8; NaN becomes 480
constexpr float UP = 0x1p48f;   // of x beside FP8
constexpr float DOWN = 0x1p72f;  // of such a product: 2^120 / UP

template <class To, class From>
static inline To same(From from) { To to; memcpy(&to, &from, sizeof to); return to; }

// Widen the first and the second half of 2 LANES float16; with integer operations where the CPU has no instruction.
static inline vec widened_half(halves h) {
#if defined(__AVX512F__) && defined(__F16C__) && !defined(WIDE)
    return (vec)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__) && !defined(WIDE)
    return (vec)_mm256_cvtph_ps((__m128i)h);
#else
    words u = __builtin_convertvector(h, words), sign = (u & 0x8000) << 16, bits = (u & 0x7fff) << 13;
    words scaled = same<words>(same<vec>(bits) * 0x1p112f);  // exponents move from bias 15 to bias 127
    words special = (words)((u & 0x7c00) == 0x7c00);         // infinities and NaNs keep their bits
    return same<vec>(sign | (special & (bits | 0x7f800000)) | (~special & scaled));
#endif
}

// Return 2 LANES codes as 16-bit numbers, with their signs. GCC makes several instructions of a conversion.
static inline shorts extended(codes from) {
#if defined(__AVX512BW__) && !defined(WIDE)
    return (shorts)_mm512_cvtepi8_epi16((__m256i)from);
#elif defined(__AVX2__) && !defined(WIDE)
    return (shorts)_mm256_cvtepi8_epi16((__m128i)from);
#else
    return __builtin_convertvector(from, shorts);
#endif
}

template <class T>
struct Two;  // 2 LANES numbers of a row of weights

template <>
struct Two<float> {
    static constexpr bool apart = false;
    vec first, second;
    explicit Two(const float* w) : first(load<vec>(w)), second(load<vec>(w + LANES)) {}
    vec low() const { return first; }
    vec high() const { return second; }
};

template <>
struct Two<f16> {
    static constexpr bool apart = false;
    halves first, second;
    explicit Two(const f16* w) : first(load<halves>(w)), second(load<halves>(w + LANES)) {}
    vec low() const { return widened_half(first); }
    vec high() const { return widened_half(second); }
};

template <>
struct Two<bf16> {
    static constexpr bool apart = true;
    words pair;
    explicit Two(const bf16* w) : pair(load<words>(w)) {}
    vec low() const { return same<vec>(pair << 16); }
    vec high() const { return same<vec>(pair & 0xffff0000u); }
};

template <>
struct Two<e4m3> {
    static constexpr bool apart = true;
    words pair;
    explicit Two(const e4m3* w)
        : pair(same<words>(extended(load<codes>(w)) << 4 & (short)0x87f0)) {}
    vec low() const { return same<vec>(pair << 16); }
    vec high() const { return same<vec>(pair & 0xffff0000u); }
};

// Return the last `count` < 2 LANES numbers, padded with zeros.
template <class T>
static inline Two<T> rest(const T* w, i64 count) {
    T all[PAIR] = {};
    memcpy(all, w, count * sizeof(T));
    return Two<T>(all);
}

static inline i64 padded(i64 n) { return (n + PAIR - 1) / PAIR * PAIR; }

// Return the index of position j in a row that has the even and the odd positions of every PAIR apart.
static inline i64 place_apart(i64 j) { return (j & ~(PAIR - 1)) | (j & 1) * LANES | (j & (PAIR - 1)) >> 1; }

// Widen `count` weights to float32, in order; FP8 to 2^-8 of its value, as a float16 with another bias.
static inline void widen_to(const float* from, i64 count, float* to) { memcpy(to, from, count * sizeof(float)); }
static inline void widen_to(const bf16* from, i64 count, float* to) { widened(&from->bits, count, to); }
static inline void widen_to(const f16* from, i64 count, float* to) {
    for (; count >= LANES; count -= LANES, from += LANES, to += LANES) store(to, widened_half(load<halves>(from)));
    halves last = {};
    memcpy(&last, from, count * sizeof(f16));
    const vec wide = widened_half(last);
    memcpy(to, &wide, count * sizeof(float));
}
static inline void widen_to(const e4m3* from, i64 count, float* to) {
    auto wide = [](octets code) {
        const halves bits = __builtin_convertvector(code, halves);
        return widened_half((bits & 0x80) << 8 | (bits & 0x7f) << 7);
    };
    for (; count >= LANES; count -= LANES, from += LANES, to += LANES) store(to, wide(load<octets>(from)));
    octets last = {};
    memcpy(&last, from, count);
    const vec end = wide(last);
    memcpy(to, &end, count * sizeof(float));
}

typedef float four __attribute__((vector_size(16)));

static inline float sum(vec v) {
    four all[LANES / 4];
    memcpy(all, &v, sizeof v);
    for (int half = LANES / 8; half; half /= 2)
        for (int i = 0; i < half; i++) all[i] += all[i + half];
    all[0] += __builtin_shufflevector(all[0], all[0], 2, 3, 0, 1);
    return all[0][0] + all[0][1];
}

// Call f(a null pointer to the type of that kind).
template <class F>
static inline void of_kind(i64 kind, F f) {
    switch (kind) {
        case FLOAT32: f((const float*)nullptr); break;
        case FLOAT16: f((const f16*)nullptr); break;
        case FLOAT8: f((const e4m3*)nullptr); break;
        default: f((const bf16*)nullptr);
    }
}
