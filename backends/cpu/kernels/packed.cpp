// The kinds of packed weights (packed.h): the layouts of their blocks, and products with few rows.
#include "packed.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "numbers.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define INTEGERS
#endif

namespace {

#define INLINE inline __attribute__((always_inline))  // so that a loop's constants and sums stay in registers

typedef uint8_t bytes __attribute__((vector_size(32)));
typedef uint8_t bytes16 __attribute__((vector_size(16)));
typedef uint16_t pairs __attribute__((vector_size(32)));  // of bytes
typedef int32_t eight_ints __attribute__((vector_size(32)));
typedef float eight __attribute__((vector_size(32)));

// 32 columns: weight = (code - offset of the kind) scale + least, with one scale for each 16 columns.
struct Columns { bytes code; float scale[2], least; };

INLINE float half(uint16_t bits) {
#ifdef INTEGERS
    return _cvtsh_ss(bits);
#else
    const halves all = halves{} + bits;
    return widened_half(all)[0];
#endif
}
INLINE float half_at(const uint8_t* at) { return half(load<uint16_t>(at)); }

// E4M3 read as float16, whose subnormals are the same but 2^8 times smaller. NaN becomes 480.
INLINE float e4m3_of(uint8_t code) { return half((code & 0x80) << 8 | (code & 0x7f) << 7) * 256; }

INLINE bytes looked_up(bytes table, bytes index) {
#ifdef INTEGERS
    return (bytes)_mm256_shuffle_epi8((__m256i)table, (__m256i)index);
#else
    for (int i = 0; i < 32; i++) index[i] = table[index[i]];
    return index;
#endif
}

INLINE bytes twice(const uint8_t (&t)[16]) {
    return bytes{t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], t[10], t[11], t[12], t[13], t[14], t[15],
                 t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7], t[8], t[9], t[10], t[11], t[12], t[13], t[14], t[15]};
}
constexpr uint8_t E2M1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};  // twice the value, plus 12
constexpr uint8_t IQ4[16] = {129, 152, 173, 191, 207, 221, 234, 246, 1, 13, 25, 38, 53, 69, 89, 113};  // signed

// Return the low halves of 16 bytes, then the high halves.
INLINE bytes nibbles(bytes16 q) {
    return __builtin_shufflevector(q & 15, q >> 4, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19,
                                   20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
}

// Return 16 in each byte whose bit is set.
INLINE bytes sixteens(uint32_t bits) {
#ifdef INTEGERS
    const __m256i each = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i bit = _mm256_set1_epi64x(0x8040201008040201);
    const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(bits), each);
    return (bytes)_mm256_cmpeq_epi8(_mm256_and_si256(spread, bit), bit) & 16;
#else
    bytes found = {};
    for (int i = 0; i < 32; i++) found[i] = (bits >> i & 1) << 4;
    return found;
#endif
}

namespace blocks {

// A kind has the columns and bytes of a block, the offset of its codes, and `read`, which returns the 32 columns
// `part` of a block. LEAST: there is a least value. MIXED: each 16 columns have a scale. SUMS: codes are below 64, so
// that products with bytes can be summed in 16 bits; without SUMS, codes are signed and have no offset.
struct Q4_0 {
    static constexpr i64 COLUMNS = 32, BYTES = 18;
    static constexpr int OFFSET = 8;
    static constexpr bool LEAST = false, MIXED = false, SUMS = true;
    static INLINE Columns read(const uint8_t* b, i64) {
        const float d = half_at(b);
        return {nibbles(load<bytes16>(b + 2)), {d, d}, 0};
    }
};
struct Q4_1 {
    static constexpr i64 COLUMNS = 32, BYTES = 20;
    static constexpr int OFFSET = 0;
    static constexpr bool LEAST = true, MIXED = false, SUMS = true;
    static INLINE Columns read(const uint8_t* b, i64) {
        const float d = half_at(b);
        return {nibbles(load<bytes16>(b + 4)), {d, d}, half_at(b + 2)};
    }
};
struct Q5_0 {
    static constexpr i64 COLUMNS = 32, BYTES = 22;
    static constexpr int OFFSET = 16;
    static constexpr bool LEAST = false, MIXED = false, SUMS = true;
    static INLINE Columns read(const uint8_t* b, i64) {
        const float d = half_at(b);
        return {nibbles(load<bytes16>(b + 6)) | sixteens(load<uint32_t>(b + 2)), {d, d}, 0};
    }
};
struct Q5_1 {
    static constexpr i64 COLUMNS = 32, BYTES = 24;
    static constexpr int OFFSET = 0;
    static constexpr bool LEAST = true, MIXED = false, SUMS = true;
    static INLINE Columns read(const uint8_t* b, i64) {
        const float d = half_at(b);
        return {nibbles(load<bytes16>(b + 8)) | sixteens(load<uint32_t>(b + 4)), {d, d}, half_at(b + 2)};
    }
};
struct Q8_0 {
    static constexpr i64 COLUMNS = 32, BYTES = 34;
    static constexpr int OFFSET = 0;
    static constexpr bool LEAST = false, MIXED = false, SUMS = false;
    static INLINE Columns read(const uint8_t* b, i64) {
        const float d = half_at(b);
        return {load<bytes>(b + 2), {d, d}, 0};
    }
};
// Unpack scale and least value of a part of q4_k and q5_k: 6 bits each, in 12 bytes.
INLINE void six(const uint8_t* b, i64 part, Columns& to) {
    const uint8_t* s = b + 4;
    const int high = s[part % 4 + 8];
    const int scale = part < 4 ? s[part] & 63 : (high & 15) | s[part - 4] >> 6 << 4;
    const int least = part < 4 ? s[part + 4] & 63 : high >> 4 | s[part] >> 6 << 4;
    to.scale[0] = to.scale[1] = half_at(b) * scale;
    to.least = -half_at(b + 2) * least;
}
struct Q4_K {
    static constexpr i64 COLUMNS = 256, BYTES = 144;
    static constexpr int OFFSET = 0;
    static constexpr bool LEAST = true, MIXED = false, SUMS = true;
    static INLINE Columns read(const uint8_t* b, i64 part) {
        const bytes q = load<bytes>(b + 16 + part / 2 * 32);
        Columns found = {part % 2 ? q >> 4 : q & 15, {}, 0};
        six(b, part, found);
        return found;
    }
};
struct Q5_K {
    static constexpr i64 COLUMNS = 256, BYTES = 176;
    static constexpr int OFFSET = 0;
    static constexpr bool LEAST = true, MIXED = false, SUMS = true;
    static INLINE Columns read(const uint8_t* b, i64 part) {
        const bytes q = load<bytes>(b + 48 + part / 2 * 32), high = load<bytes>(b + 16);
        const bytes fifth = (bytes)(part < 4 ? (pairs)high << (4 - part) : (pairs)high >> (part - 4)) & 16;
        Columns found = {(part % 2 ? q >> 4 : q & 15) | fifth, {}, 0};
        six(b, part, found);
        return found;
    }
};
struct Q6_K {
    static constexpr i64 COLUMNS = 256, BYTES = 210;
    static constexpr int OFFSET = 32;
    static constexpr bool LEAST = false, MIXED = true, SUMS = true;
    static INLINE Columns read(const uint8_t* b, i64 part) {
        const bytes q = load<bytes>(b + part / 4 * 64 + part % 2 * 32), low = part % 4 < 2 ? q & 15 : q >> 4;
        const bytes high = load<bytes>(b + 128 + part / 4 * 32);
        bytes two;
        switch (part % 4) {
            case 0: two = high << 4; break;
            case 1: two = high << 2; break;
            case 2: two = high; break;
            default: two = high >> 2;
        }
        const int8_t* s = (const int8_t*)(b + 192 + 2 * part);
        const float d = half_at(b + 208);
        return {low | (two & 48), {d * s[0], d * s[1]}, 0};
    }
};
struct IQ4_NL {
    static constexpr i64 COLUMNS = 32, BYTES = 18;
    static constexpr int OFFSET = 0;
    static constexpr bool LEAST = false, MIXED = false, SUMS = false;
    static INLINE Columns read(const uint8_t* b, i64) {
        const float d = half_at(b);
        return {looked_up(twice(IQ4), nibbles(load<bytes16>(b + 2))), {d, d}, 0};
    }
};
const struct HalfPowers {  // 2^(e - 128)
    float of[256];
    HalfPowers() { for (int e = 0; e < 256; e++) of[e] = std::ldexp(1.f, e - 128); }
    float operator[](uint8_t e) const { return of[e]; }
} HALF_POWERS;
struct MXFP4 {
    static constexpr i64 COLUMNS = 32, BYTES = 17;
    static constexpr int OFFSET = 12;
    static constexpr bool LEAST = false, MIXED = false, SUMS = true;
    static INLINE Columns read(const uint8_t* b, i64) {
        const float d = HALF_POWERS[b[0]];
        return {looked_up(twice(E2M1), nibbles(load<bytes16>(b + 1))), {d, d}, 0};
    }
};
INLINE float half_e4m3(uint8_t code) { return (code & 0x7f) == 0x7f ? 0 : e4m3_of(code & 0x7f) / 2; }
struct GGUF_NVFP4 {  // 4 scales, then 8 bytes for each 16 columns; the low halves are the first 8
    static constexpr i64 COLUMNS = 64, BYTES = 36;
    static constexpr int OFFSET = 12;
    static constexpr bool LEAST = false, MIXED = true, SUMS = true;
    static INLINE Columns read(const uint8_t* b, i64 part) {
        const bytes q = nibbles(load<bytes16>(b + 4 + 16 * part));
        const bytes order =
            __builtin_shufflevector(q, q, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23, 8, 9, 10, 11, 12, 13,
                                    14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        return {looked_up(twice(E2M1), order), {half_e4m3(b[2 * part]), half_e4m3(b[2 * part + 1])}, 0};
    }
};
// NVFP4 of modelopt: codes and scales are separate, a scale for 16 columns; the low half of a byte is the even column.
struct NVFP4 {
    static constexpr i64 COLUMNS = 64;
    static constexpr int OFFSET = 12;
    static constexpr bool LEAST = false, MIXED = true, SUMS = true;
    static INLINE Columns read(const uint8_t* codes, const uint8_t* s) {
        const bytes h = nibbles(load<bytes16>(codes));
        const bytes order =
            __builtin_shufflevector(h, h, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26,
                                    11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        return {looked_up(twice(E2M1), order), {e4m3_of(s[0]) / 2, e4m3_of(s[1]) / 2}, 0};
    }
};

}  // namespace blocks

// Call f(a value of the type of the kind); every kind but MXFP8.
template <class F>
void of_packed(i64 kind, F f) {
    switch (kind) {
        case Q8_0: return f(blocks::Q8_0());
        case Q4_0: return f(blocks::Q4_0());
        case Q4_1: return f(blocks::Q4_1());
        case Q5_0: return f(blocks::Q5_0());
        case Q5_1: return f(blocks::Q5_1());
        case Q4_K: return f(blocks::Q4_K());
        case Q5_K: return f(blocks::Q5_K());
        case Q6_K: return f(blocks::Q6_K());
        case IQ4_NL: return f(blocks::IQ4_NL());
        case MXFP4: return f(blocks::MXFP4());
        case GGUF_NVFP4: return f(blocks::GGUF_NVFP4());
        default: return f(blocks::NVFP4());
    }
}

// Return signed bytes 8 i .. 8 i + 7 as floats.
template <int i>
INLINE eight eight_of(bytes code) {
    eight_ints found;
#ifdef INTEGERS
    __m128i part = i < 2 ? _mm256_castsi256_si128((__m256i)code) : _mm256_extracti128_si256((__m256i)code, 1);
    if (i % 2) part = _mm_srli_si128(part, 8);
    found = (eight_ints)_mm256_cvtepi8_epi32(part);
#else
    for (int j = 0; j < 8; j++) found[j] = (int8_t)code[8 * i + j];
#endif
    return __builtin_convertvector(found, eight);
}

template <class K>
INLINE void write_out(const Columns& w, float factor, float* to) {
    const float scale[2] = {w.scale[0] * factor, w.scale[K::MIXED] * factor}, least = w.least * factor;
    const bytes code = K::OFFSET ? w.code - (uint8_t)K::OFFSET : w.code;
    auto part = [&](eight value, int i) __attribute__((always_inline)) {
        value *= scale[i / 2];
        if (K::LEAST) value += least;
        store(to + 8 * i, value);
    };
    part(eight_of<0>(code), 0), part(eight_of<1>(code), 1), part(eight_of<2>(code), 2), part(eight_of<3>(code), 3);
}

// 16 columns of MXFP8, whose scale is a power of two.
INLINE float power_of(uint32_t e) { return same<float>(e ? e << 23 : 0x400000u); }  // 2^(e - 127)
INLINE void codes_of_mxfp8(const e4m3* codes, eight& first, eight& second) {
#ifdef INTEGERS
    __m256i h = _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)codes)), 7);
    h = _mm256_add_epi16(h, _mm256_and_si256(h, _mm256_set1_epi16(0x4000)));  // moves the sign from bit 14 to 15
    first = (eight)_mm256_cvtph_ps(_mm256_castsi256_si128(h));
    second = (eight)_mm256_cvtph_ps(_mm256_extracti128_si256(h, 1));
#else
    float wide[16];
    widen_to(codes, 16, wide);
    first = load<eight>(wide), second = load<eight>(wide + 8);
#endif
}
void dequantize_mxfp8(const Matrix& w, i64 n, i64 row, i64 from, i64 count, float* to) {
    const e4m3* codes = (const e4m3*)w.at + row * n + from;
    const uint8_t* scales = w.scale + (row * n + from) / 16;
    for (i64 j = 0; j < count; j += 16) {
        eight a, b;
        codes_of_mxfp8(codes + j, a, b);
        const float scale = power_of(scales[j / 16]);
        store(to + j, a * 256 * scale), store(to + j + 8, b * 256 * scale);
    }
}

}  // namespace

i64 packed_row(i64 kind, i64 n) {
    if (kind == NVFP4) return n / 2;
    if (kind == MXFP8) return n;
    i64 found = 0;
    of_packed(kind, [&](auto k) {
        typedef decltype(k) K;
        if constexpr (!std::is_same<K, blocks::NVFP4>::value) found = n / K::COLUMNS * K::BYTES;
    });
    return found;
}

#ifdef INTEGERS
// Widen 64 columns of NVFP4; the high halves are the odd columns (in GGUF the second 8 of 16).
template <bool APART>
INLINE void write_nvfp4(const uint8_t* codes, const uint8_t* scales, float factor, float* to) {
    const __m256i table = _mm256_sub_epi8((__m256i)twice(E2M1), _mm256_set1_epi8(blocks::NVFP4::OFFSET));
    const __m256i q = _mm256_loadu_si256((const __m256i*)codes), mask = _mm256_set1_epi8(15);
    const __m256i even = _mm256_shuffle_epi8(table, _mm256_and_si256(q, mask));
    const __m256i odd = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(q, 4), mask));
    const __m256i first = APART ? _mm256_unpacklo_epi8(even, odd) : _mm256_unpacklo_epi64(even, odd);
    const __m256i second = APART ? _mm256_unpackhi_epi8(even, odd) : _mm256_unpackhi_epi64(even, odd);
    for (int i = 0; i < 4; i++, to += 16) {
        const __m256i all = i % 2 ? second : first;
        const __m128i code = i < 2 ? _mm256_castsi256_si128(all) : _mm256_extracti128_si256(all, 1);
        const float single = APART ? e4m3_of(scales[i]) / 2 : blocks::half_e4m3(scales[i]);
        const __m256 scale = _mm256_set1_ps(single * factor);
        _mm256_storeu_ps(to, _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(code)), scale));
        const __m256i last = _mm256_cvtepi8_epi32(_mm_srli_si128(code, 8));
        _mm256_storeu_ps(to + 8, _mm256_mul_ps(_mm256_cvtepi32_ps(last), scale));
    }
}
#endif

void dequantize(const Matrix& w, i64 n, i64 row, i64 from, i64 count, float* to) {
    if (w.kind == MXFP8) return dequantize_mxfp8(w, n, row, from, count, to);
    of_packed(w.kind, [&](auto k) {
        typedef decltype(k) K;
        if constexpr (std::is_same<K, blocks::NVFP4>::value) {
            const uint8_t *code = (const uint8_t*)w.at + (row * n + from) / 2, *scale = w.scale + (row * n + from) / 16;
#ifdef INTEGERS
            for (; count >= 64; count -= 64, code += 32, scale += 4, to += 64)
                write_nvfp4<true>(code, scale, w.factor, to);
#endif
            for (; count >= 32; count -= 32, code += 16, scale += 2, to += 32)
                write_out<K>(K::read(code, scale), w.factor, to);
            if (count) {
                uint8_t codes[16] = {}, scales[2] = {};
                float last[32];
                memcpy(codes, code, count / 2), memcpy(scales, scale, count / 16);
                write_out<K>(K::read(codes, scales), w.factor, last);
                memcpy(to, last, count * sizeof(float));
            }
        } else {
            const uint8_t* block = (const uint8_t*)w.at + (row * n + from) / K::COLUMNS * K::BYTES;
#ifdef INTEGERS
            if constexpr (std::is_same<K, blocks::GGUF_NVFP4>::value)
                for (; count > 0; count -= 64, block += K::BYTES, to += 64)
                    write_nvfp4<false>(block + 4, block, w.factor, to);
#endif
            for (; count > 0; count -= K::COLUMNS, block += K::BYTES)
#pragma GCC unroll 8
                for (i64 part = 0; part < K::COLUMNS / 32; part++, to += 32)
                    write_out<K>(K::read(block, part), w.factor, to);
        }
    });
}

#ifndef INTEGERS

i64 integers_room(i64, i64, int) { return 0; }
void to_integers(i64, const float*, i64, int, float*) {}
void integer_products(const Matrix&, i64, i64, i64, const float* const*, i64, int, float*) {}
bool float_products(const Matrix&, i64, i64, i64, const float* const*, i64, float*) { return false; }

#else

namespace {

// Columns of x that share a scale, 64 to a piece: x[j] = scale (65536 plane[0][j] + 256 plane[1][j] + plane[2][j]), or
// scale (256 plane[0][j] + plane[1][j]) with P = 2.
constexpr i64 SHARED = 256;

// 64 columns of x in the order of the codes of two vectors, and their sums, eight columns in each lane, in the form of
// the kind.
template <int P>
struct Integers {
    int8_t first[P][32], second[P][32];
    union {
        int32_t bias[8];   // sum of x times the offset of the codes
        float sum[8];      // sum of x, for the least values
    };
    float scale, unused[7];
};
struct Shorts {  // SHARED columns beside signed codes: x[j] = scale number[j]
    int16_t number[SHARED];
    float scale, unused[7];
};
template <int P>
struct Wide {  // SHARED columns
    int8_t plane[P][256];
    int16_t sums[P][16];  // sums of 16 columns of each plane, first the even ones, then the odd ones
    float sum[8];         // sums of 32 columns of x
    float scale, unused[7];
};
constexpr float LARGEST[4] = {0, 0, 32630, 8355000};  // slightly less than so many planes can hold

INLINE __m256i load8(const void* at) { return _mm256_loadu_si256((const __m256i*)at); }

// Return the eight sums of four neighbouring columns of 32 numbers, in order.
INLINE __m256i in_order(__m256i v) { return _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); }

INLINE float added(__m256 v) {
    __m128 all = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    all = _mm_add_ps(all, _mm_movehl_ps(all, all));
    return _mm_cvtss_f32(_mm_add_ss(all, _mm_movehdup_ps(all)));
}

// Return the scale of `count` numbers, a multiple of 8, in so many planes; NaN if one of them is not finite.
float scale_of(const float* x, i64 count, int planes) {
    __m256 largest = _mm256_setzero_ps(), bad = largest;
    for (i64 j = 0; j < count; j += 8) {
        const __m256 v = _mm256_loadu_ps(x + j);
        largest = _mm256_max_ps(largest, _mm256_andnot_ps(_mm256_set1_ps(-0.f), v));
        bad = _mm256_add_ps(bad, _mm256_sub_ps(v, v));
    }
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    const float most = std::max(four[0], four[1]), wrong = added(bad);
    return most < 1e-30f ? wrong : most / LARGEST[planes] + wrong;
}

// Write 32 columns of x as P planes `step` bytes apart; return the eight sums of four columns.
template <int P>
INLINE __m256i planes_of(const float* x, float scale, int8_t* to, i64 step) {
    const __m256 up = _mm256_set1_ps(scale > 0 ? 1 / scale : 0);
    const __m256i low = _mm256_set1_epi32(255), round = _mm256_set1_epi32(128);
    __m256i v[4];
    for (int i = 0; i < 4; i++) v[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), up));
    const __m256i sums = in_order(_mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3])));
    for (int plane = P - 1; plane >= 0; plane--) {
        __m256i digit[4];
        for (int i = 0; i < 4; i++) {
            digit[i] = _mm256_and_si256(v[i], low);
            v[i] = _mm256_srai_epi32(_mm256_add_epi32(v[i], round), 8);
        }
        const __m256i all =
            _mm256_packus_epi16(_mm256_packus_epi32(digit[0], digit[1]), _mm256_packus_epi32(digit[2], digit[3]));
        _mm256_storeu_si256((__m256i*)(to + plane * step), in_order(all));
    }
    return sums;
}

void shorts_of(const float* x, Shorts& to) {
    to.scale = scale_of(x, SHARED, 2);
    const __m256 up = _mm256_set1_ps(to.scale > 0 ? 1 / to.scale : 0);
    for (int i = 0; i < SHARED; i += 16) {
        const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), up));
        const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), up));
        const __m256i all = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
        _mm256_storeu_si256((__m256i*)(to.number + i), all);
    }
}

// Split 64 columns of x into planes, for codes with this offset; a negative offset: keep the sums of x.
template <int P>
void piece_of(const float* first, const float* second, float scale, int offset, Integers<P>& to) {
    const __m256i sums = _mm256_add_epi32(planes_of<P>(first, scale, to.first[0], 32),
                                          planes_of<P>(second, scale, to.second[0], 32));
    const __m256i bias = _mm256_mullo_epi32(sums, _mm256_set1_epi32(offset));
    const __m256 sum = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(scale));
    if (offset < 0) memcpy(to.sum, &sum, sizeof sum);
    else memcpy(to.bias, &bias, sizeof bias);
    to.scale = scale;
}

template <int P>
void wide_of(const float* x, Wide<P>& to) {
    to.scale = scale_of(x, SHARED, P);
    for (int i = 0; i < 8; i++) {
        const __m256i sums = planes_of<P>(x + 32 * i, to.scale, to.plane[0] + 32 * i, SHARED);
        to.sum[i] = added(_mm256_cvtepi32_ps(sums)) * to.scale;
    }
    for (int plane = 0; plane < P; plane++)
        for (int i = 0; i < 16; i++) {
            int sum = 0;
            for (int j = 0; j < 16; j++) sum += to.plane[plane][16 * i + j];
            to.sums[plane][i / 2 + i % 2 * 8] = sum;
        }
}

// Return the sums of products of 64 codes and x, eight in each lane; they are exact.
template <bool BIAS, int P>
INLINE __m256 products_of(__m256i first, __m256i second, const Integers<P>& x) {
    const __m256i ones = _mm256_set1_epi16(1), up = _mm256_set1_epi16(256);
    __m256i plane[P];
    for (int i = 0; i < P; i++)
        plane[i] = _mm256_add_epi16(_mm256_maddubs_epi16(first, load8(x.first[i])),
                                    _mm256_maddubs_epi16(second, load8(x.second[i])));
    __m256i sum = _mm256_add_epi32(_mm256_madd_epi16(plane[0], up), _mm256_madd_epi16(plane[1], ones));
    if (P == 3) sum = _mm256_add_epi32(_mm256_slli_epi32(sum, 8), _mm256_madd_epi16(plane[P - 1], ones));
    if (BIAS) sum = _mm256_sub_epi32(sum, load8(x.bias));
    return _mm256_cvtepi32_ps(sum);
}

// Call group(piece, how many, acc) for all pieces, one or two at a time; acc[r] collects sums in units of the scale
// of x[r].
template <int R, int P, class Group>
INLINE void scaled(i64 pieces, const Integers<P>* const* x, __m256* acc, Group group) {
    typedef std::integral_constant<i64, 1> One;
    typedef std::integral_constant<i64, 2> Two;
    for (i64 p = 0; p < pieces;) {
        __m256 here[R] = {};
        const i64 from = p, to = std::min(pieces, p + SHARED / 64);
        for (; p + 2 <= to; p += 2) group(p, Two(), here);
        if (p < to) group(p++, One(), here);
        for (int r = 0; r < R; r++)
            acc[r] = _mm256_fmadd_ps(here[r], _mm256_set1_ps(x[r][from].scale), acc[r]);
    }
}

// Return the float16 numbers at a and b, of two blocks, four times each.
INLINE __m256 halves_of(const uint8_t* a, const uint8_t* b) {
    const __m128i both = _mm_insert_epi16(_mm_cvtsi32_si128(load<uint16_t>(a)), load<uint16_t>(b), 1);
    return _mm256_cvtph_ps(_mm_shuffle_epi8(both, _mm_setr_epi8(0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3, 2, 3)));
}

// Read two blocks of 32 columns, at a and b: the first 16 codes of both into `first`, the others into `second`.
template <class K>
INLINE void codes_of_two(const uint8_t* a, const uint8_t* b, __m256i& first, __m256i& second) {
    constexpr i64 at = K::BYTES - 16;
    const __m256i q = _mm256_loadu2_m128i((const __m128i*)(b + at), (const __m128i*)(a + at));
    const __m256i low = _mm256_set1_epi8(15);
    first = _mm256_and_si256(q, low), second = _mm256_and_si256(_mm256_srli_epi16(q, 4), low);
    if constexpr (std::is_same<K, blocks::MXFP4>::value)
        first = _mm256_shuffle_epi8((__m256i)twice(E2M1), first),
        second = _mm256_shuffle_epi8((__m256i)twice(E2M1), second);
    if constexpr (K::BYTES >= 22) {  // the fifth bits come before the others
        const uint8_t *of_a = a + at - 4, *of_b = b + at - 4;
        const __m128i bits = _mm_insert_epi32(_mm_cvtsi32_si128(load<int32_t>(of_a)), load<int32_t>(of_b), 1);
        const __m256i all = _mm256_permute4x64_epi64(_mm256_castsi128_si256(_mm_shuffle_epi32(bits, 0x50)), 0x50);
        const __m256i bit = _mm256_set1_epi64x(0x8040201008040201), sixteen = _mm256_set1_epi8(16);
        const __m256i each = _mm256_setr_epi64x(0, 0x0101010101010101, 0, 0x0101010101010101);
        auto fifth = [&](__m256i each) __attribute__((always_inline)) {
            const __m256i found = _mm256_and_si256(_mm256_shuffle_epi8(all, each), bit);
            return _mm256_and_si256(_mm256_cmpeq_epi8(found, bit), sixteen);
        };
        first = _mm256_or_si256(first, fifth(each));
        second = _mm256_or_si256(second, fifth(_mm256_add_epi8(each, _mm256_set1_epi8(2))));
    }
}

// out[r] = x[r] . w[row], for blocks of 32 columns, two at a time
template <class K, int R, int P>
void dots_of_32(const Matrix& w, i64 n, i64 row, const Integers<P>* const* x, float* out) {
    __m256 acc[R] = {}, least[R] = {};
    const uint8_t* a = (const uint8_t*)w.at + row * (n / 32) * K::BYTES;
    const uint8_t* last = a + (n / 32 - 1) * K::BYTES;
    auto piece = [&](const uint8_t* a, i64 p, __m256* acc) __attribute__((always_inline)) {
        const uint8_t* b = a == last ? a : a + K::BYTES;  // if the last block is alone, x is 0 for the second
        __m256i first, second;
        codes_of_two<K>(a, b, first, second);
        __m256 scale;
        if constexpr (std::is_same<K, blocks::MXFP4>::value)
            scale = _mm256_set_m128(_mm_set1_ps(blocks::HALF_POWERS[b[0]]), _mm_set1_ps(blocks::HALF_POWERS[a[0]]));
        else
            scale = halves_of(a, b);
        for (int r = 0; r < R; r++) {
            acc[r] = _mm256_fmadd_ps(products_of<!K::LEAST>(first, second, x[r][p]), scale, acc[r]);
            if (K::LEAST) least[r] = _mm256_fmadd_ps(halves_of(a + 2, b + 2), _mm256_loadu_ps(x[r][p].sum), least[r]);
        }
    };
    scaled<R, P>((n + 63) / 64, x, acc, [&](i64 p, auto count, __m256* acc) __attribute__((always_inline)) {
        for (i64 i = 0; i < count; i++, a += 2 * K::BYTES) {
            _mm_prefetch((const char*)a + 1024, _MM_HINT_T0);
            piece(a, p + i, acc);
        }
    });
    for (int r = 0; r < R; r++) out[r] = added(_mm256_add_ps(acc[r], least[r])) * w.factor;
}

// Unpack the eight scales and least values of q4_k and q5_k, 6 bits each, into 16-bit integers.
INLINE void sixes(const uint8_t* s, __m128i& scale, __m128i& least) {
    const uint32_t a = load<uint32_t>(s), b = load<uint32_t>(s + 4), c = load<uint32_t>(s + 8);
    const uint32_t scales = (c & 0x0f0f0f0f) | (a >> 6 & 0x03030303) << 4;
    const uint32_t leasts = (c >> 4 & 0x0f0f0f0f) | (b >> 6 & 0x03030303) << 4;
    scale = _mm_cvtepu8_epi16(_mm_cvtsi64_si128((a & 0x3f3f3f3f) | (uint64_t)scales << 32));
    least = _mm_cvtepu8_epi16(_mm_cvtsi64_si128((b & 0x3f3f3f3f) | (uint64_t)leasts << 32));
}

// The same for blocks of 256 columns. Their scales are integers too, so that sums within a block are exact. Two planes
// have one sum if the scales are below 64: 32 products in each lane, below 32 x 32640 x 64 x 32 = 2^31.
template <class K, int R, int P>
void dots_of_256(const Matrix& w, i64 n, i64 row, const Wide<P>* const* x, float* out) {
    __m256 acc[R] = {};
    const uint8_t* b = (const uint8_t*)w.at + row * (n / 256) * K::BYTES;
    for (i64 p = 0; p < n / 256; p++, b += K::BYTES) {
        for (i64 line = 0; line < K::BYTES; line += 64) _mm_prefetch((const char*)b + 1024 + line, _MM_HINT_T0);
        constexpr bool ONE = P == 2 && !K::MIXED;
        __m256i sum[R][ONE ? 1 : P] = {}, scales;  // scales: of the parts, 16-bit, in each half those of its columns
        __m128i scale, least;
        if (K::MIXED)
            scales = _mm256_cvtepi8_epi16(
                _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(b + 192)),
                                 _mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)));
        else
            sixes(b + 4, scale, least), scales = _mm256_broadcastsi128_si256(scale);
        const __m256i scales_up = _mm256_slli_epi16(scales, 8);
#pragma GCC unroll 8
        for (i64 part = 0; part < 8; part++) {
            const __m256i code = (__m256i)K::read(b, part).code;
            const __m256i place = _mm256_set1_epi16(0x100 + 0x202 * part);
            const __m256i each = _mm256_shuffle_epi8(scales, place), up = _mm256_shuffle_epi8(scales_up, place);
            for (int r = 0; r < R; r++)
                for (int i = 0; i < P; i++) {
                    __m256i& to = sum[r][ONE ? 0 : i];
                    const __m256i products = _mm256_maddubs_epi16(code, load8(x[r][p].plane[i] + 32 * part));
                    to = _mm256_add_epi32(to, _mm256_madd_epi16(products, ONE && i == 0 ? up : each));
                }
        }
        for (int r = 0; r < R; r++) {
            const Wide<P>& here = x[r][p];
            if (K::OFFSET)
                for (int i = 0; i < P; i++) {
                    const __m256i sums = _mm256_madd_epi16(load8(here.sums[i]), scales);
                    sum[r][i] = _mm256_sub_epi32(sum[r][i], _mm256_mullo_epi32(sums, _mm256_set1_epi32(K::OFFSET)));
                }
            __m256 all = _mm256_cvtepi32_ps(sum[r][0]);
            for (int i = 1; i < (ONE ? 1 : P); i++)
                all = _mm256_fmadd_ps(all, _mm256_set1_ps(256), _mm256_cvtepi32_ps(sum[r][i]));
            const float d = half_at(b + (K::MIXED ? 208 : 0));
            acc[r] = _mm256_fmadd_ps(all, _mm256_set1_ps(d * here.scale), acc[r]);
            if (K::LEAST) {
                const __m256 parts = _mm256_cvtepi32_ps(_mm256_cvtepu16_epi32(least));
                acc[r] = _mm256_fnmadd_ps(_mm256_mul_ps(parts, _mm256_set1_ps(half_at(b + 2))),
                                          _mm256_loadu_ps(here.sum), acc[r]);
            }
        }
    }
    for (int r = 0; r < R; r++) out[r] = added(acc[r]) * w.factor;
}

// The same for both forms of NVFP4, 64 columns at a time. The low halves of the bytes are multiplied with the first
// columns of a piece and the high halves with the second, so that both have the same scales in the same lanes.
template <bool APART, int R, int P>
void dots_of_nvfp4(const Matrix& w, i64 n, i64 row, const Integers<P>* const* x, float* out) {
    const uint8_t* codes = (const uint8_t*)w.at + (APART ? row * (n / 2) : row * (n / 64) * 36 + 4);
    const uint8_t* scales = APART ? w.scale + row * (n / 16) : codes - 4;
    constexpr i64 codes_step = APART ? 32 : 36, scales_step = APART ? 4 : 36;
    const __m256i table = (__m256i)twice(E2M1), low = _mm256_set1_epi8(15);
    const __m256i lanes[2] = {_mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3), _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7)};
    auto group = [&](i64 p, auto count, const uint8_t* code, const uint8_t* scale, __m256* acc)
                     __attribute__((always_inline)) {
        __m128i s = count == 2 && APART ? _mm_loadu_si64(scale) : _mm_cvtsi32_si128(load<int32_t>(scale));
        if (count == 2 && !APART) s = _mm_insert_epi32(s, load<int32_t>(scale + scales_step), 1);
        if (!APART) {  // GGUF: the sign is ignored, and a NaN counts as 0
            s = _mm_and_si128(s, _mm_set1_epi8(0x7f));
            s = _mm_andnot_si128(_mm_cmpeq_epi8(s, _mm_set1_epi8(0x7f)), s);
        }
        const __m256 all = _mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(s), 7));
        for (i64 i = 0; i < count; i++) {
            const __m256i q = load8(code + i * codes_step);
            const __m256i first = _mm256_shuffle_epi8(table, _mm256_and_si256(q, low));
            const __m256i second = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(q, 4), low));
            const __m256 each = _mm256_permutevar8x32_ps(all, lanes[i]);
            for (int r = 0; r < R; r++)
                acc[r] = _mm256_fmadd_ps(products_of<true>(first, second, x[r][p + i]), each, acc[r]);
        }
    };
    __m256 acc[R] = {};
    scaled<R, P>(n / 64, x, acc, [&](i64 p, auto count, __m256* acc) __attribute__((always_inline)) {
        _mm_prefetch((const char*)codes + 1024, _MM_HINT_T0);
        group(p, count, codes, scales, acc);
        codes += count * codes_step, scales += count * scales_step;
    });
    if (n % 64) {  // in modelopt's form only
        uint8_t code[32] = {}, scale[4] = {};
        memcpy(code, codes, n % 64 / 2), memcpy(scale, scales, n % 64 / 16);
        __m256 here[R] = {};
        group(n / 64, std::integral_constant<i64, 1>(), code, scale, here);
        for (int r = 0; r < R; r++) acc[r] = _mm256_fmadd_ps(here[r], _mm256_set1_ps(x[r][n / 64].scale), acc[r]);
    }
    for (int r = 0; r < R; r++) out[r] = added(acc[r]) * (w.factor * 128);  // 2^8 for the scales, 1/2 for the codes
}

// The same for kinds with signed codes.
template <class K, int R>
void dots_of_signed(const Matrix& w, i64 n, i64 row, const Shorts* const* x, float* out) {
    __m256 acc[R] = {};
    const uint8_t* block = (const uint8_t*)w.at + row * (n / 32) * K::BYTES;
    for (i64 p = 0; SHARED * p < n; p++) {
        __m256 here[R] = {};
        const i64 count = std::min(SHARED, n - SHARED * p);
        for (i64 j = 0; j < count; j += 32, block += K::BYTES) {
            _mm_prefetch((const char*)block + 1024, _MM_HINT_T0);
            __m128i half[2];
            if constexpr (std::is_same<K, blocks::Q8_0>::value)
                memcpy(half, block + 2, 32);
            else {
                const bytes code = K::read(block, 0).code;
                memcpy(half, &code, 32);
            }
            const __m256i first = _mm256_cvtepi8_epi16(half[0]), second = _mm256_cvtepi8_epi16(half[1]);
            const __m256 scale = _mm256_set1_ps(half_at(block));
            for (int r = 0; r < R; r++) {
                const int16_t* at = x[r][p].number + j;
                const __m256i sum =
                    _mm256_add_epi32(_mm256_madd_epi16(first, load8(at)), _mm256_madd_epi16(second, load8(at + 16)));
                here[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), scale, here[r]);
            }
        }
        for (int r = 0; r < R; r++) acc[r] = _mm256_fmadd_ps(here[r], _mm256_set1_ps(x[r][p].scale), acc[r]);
    }
    for (int r = 0; r < R; r++) out[r] = added(acc[r]) * w.factor;
}

// out[r] = x[r] . w[row] in floats, for kinds with signed codes and for MXFP8
template <class K, int R>
void float_dots(const Matrix& w, i64 n, i64 row, const float* const* x, float* out) {
    eight acc[R] = {};
    const uint8_t* block = (const uint8_t*)w.at + row * (n / 32) * K::BYTES;
    for (i64 j = 0; j < n; j += 32, block += K::BYTES) {
        _mm_prefetch((const char*)block + 1024, _MM_HINT_T0);
        eight code[4];
        if constexpr (std::is_same<K, blocks::Q8_0>::value)
            for (int i = 0; i < 4; i++)
                code[i] = (eight)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadu_si64(block + 2 + 8 * i)));
        else {
            const bytes all = K::read(block, 0).code;
            code[0] = eight_of<0>(all), code[1] = eight_of<1>(all);
            code[2] = eight_of<2>(all), code[3] = eight_of<3>(all);
        }
        const float scale = half_at(block);
        for (int r = 0; r < R; r++) {
            const float* at = x[r] + j;
            eight sum = load<eight>(at) * code[0];
            for (int i = 1; i < 4; i++) sum += load<eight>(at + 8 * i) * code[i];
            acc[r] += sum * scale;
        }
    }
    for (int r = 0; r < R; r++) out[r] = added((__m256)acc[r]) * w.factor;
}
template <int R>
void float_dots_of_mxfp8(const Matrix& w, i64 n, i64 row, const float* const* x, float* out) {
    eight acc[R] = {};
    const e4m3* codes = (const e4m3*)w.at + row * n;
    const uint8_t* scales = w.scale + row * (n / 16);
    for (i64 j = 0; j < n; j += 16) {
        _mm_prefetch((const char*)(codes + j) + 1024, _MM_HINT_T0);
        eight a, b;
        codes_of_mxfp8(codes + j, a, b);
        const float scale = power_of(scales[j / 16]);
        for (int r = 0; r < R; r++) {
            const float* at = x[r] + j;
            acc[r] += (load<eight>(at) * a + load<eight>(at + 8) * b) * scale;
        }
    }
    for (int r = 0; r < R; r++) out[r] = added((__m256)acc[r]) * 256;
}
template <int R>
void float_dots(const Matrix& w, i64 n, i64 row, const float* const* x, float* out) {
    if (w.kind == MXFP8) return float_dots_of_mxfp8<R>(w, n, row, x, out);
    if (w.kind == Q8_0) return float_dots<blocks::Q8_0, R>(w, n, row, x, out);
    return float_dots<blocks::IQ4_NL, R>(w, n, row, x, out);
}

template <int R, int P>
void dots(const Matrix& w, i64 n, i64 row, const float* const* x, float* out) {
    of_packed(w.kind, [&](auto k) {
        typedef decltype(k) K;
        if constexpr (std::is_same<K, blocks::NVFP4>::value || std::is_same<K, blocks::GGUF_NVFP4>::value)
            dots_of_nvfp4<std::is_same<K, blocks::NVFP4>::value, R, P>(w, n, row, (const Integers<P>* const*)x, out);
        else if constexpr (K::SUMS && K::COLUMNS == 32)
            dots_of_32<K, R, P>(w, n, row, (const Integers<P>* const*)x, out);
        else if constexpr (K::SUMS)
            dots_of_256<K, R, P>(w, n, row, (const Wide<P>* const*)x, out);
        else if constexpr (P == 2)
            dots_of_signed<K, R>(w, n, row, (const Shorts* const*)x, out);
    });
}

// Convert a row of x for a kind with the offset of its codes; negative: keep the sums of x.
template <int P>
void pieces_of(i64 kind, int offset, const float* x, i64 n, Integers<P>* piece) {
    for (i64 from = 0; from < n; from += SHARED) {
        float here[SHARED] = {}, first[32], second[32];
        const i64 count = std::min(SHARED, n - from);
        memcpy(here, x + from, count * sizeof(float));
        const float scale = scale_of(here, SHARED, P);
        for (const float* at = here; at < here + count; at += 64, piece++) {
            for (int j = 0; j < 32; j++) {
                const int step = kind == NVFP4 ? 1 : kind == GGUF_NVFP4 ? 8 : 16;
                const float* place = at + j / step * 2 * step + j % step;
                first[j] = place[0], second[j] = place[step];
            }
            piece_of(first, second, scale, offset, *piece);
        }
    }
}

// Call f(x of this form, how many, convert) for a kind that multiplies integers of P planes.
template <int P, class F>
void of_integers(i64 kind, i64 n, F f) {
    if (kind == MXFP8) return;
    of_packed(kind, [&](auto k) {
        typedef decltype(k) K;
        if constexpr (K::SUMS && K::COLUMNS == 256)
            f((Wide<P>*)nullptr, n / 256, [=](const float* x, Wide<P>* to) {
                for (i64 i = 0; i < n / 256; i++) wide_of(x + 256 * i, to[i]);
            });
        else if constexpr (K::SUMS)
            f((Integers<P>*)nullptr, (n + 63) / 64, [=](const float* x, Integers<P>* to) {
                pieces_of<P>(kind, K::LEAST ? -1 : K::OFFSET, x, n, to);
            });
        else if constexpr (P == 2)
            f((Shorts*)nullptr, (n + SHARED - 1) / SHARED, [=](const float* x, Shorts* to) {
                for (i64 from = 0; from < n; from += SHARED, to++) {
                    float here[SHARED] = {};
                    memcpy(here, x + from, std::min(SHARED, n - from) * sizeof(float));
                    shorts_of(here, *to);
                }
            });
    });
}
template <int P>
i64 room_of(i64 kind, i64 n) {
    i64 found = 0;
    of_integers<P>(kind, n, [&](auto* form, i64 count, auto) { found = count * sizeof(*form) / sizeof(float); });
    return found;
}
template <int P>
void convert(i64 kind, const float* x, i64 n, float* to) {
    of_integers<P>(kind, n, [&](auto* form, i64, auto into) { into(x, (decltype(form))to); });
}

}  // namespace

i64 integers_room(i64 kind, i64 n, int planes) { return planes == 2 ? room_of<2>(kind, n) : room_of<3>(kind, n); }

void to_integers(i64 kind, const float* x, i64 n, int planes, float* to) {
    return planes == 2 ? convert<2>(kind, x, n, to) : convert<3>(kind, x, n, to);
}

namespace {

constexpr i64 TOGETHER = 4;  // rows for which a weight is read once

// Compute sums[r][o] by calls of dot(rows, row of w, x, out).
template <class Dot>
void each_product(i64 first, i64 outs, const float* const* x, i64 rows, float* sums, Dot dot) {
    for (i64 o = 0; o < outs; o++)
        for (i64 at = 0; at < rows; at += TOGETHER) {
            float out[TOGETHER];
            const i64 here = std::min(TOGETHER, rows - at);
            dot(here, first + o, x + at, out);
            for (i64 r = 0; r < here; r++) sums[(at + r) * outs + o] = out[r];
        }
}

template <int P>
void integer_products_of(const Matrix& w, i64 n, i64 first, i64 outs, const float* const* x, i64 rows, float* sums) {
    each_product(first, outs, x, rows, sums, [&](i64 here, i64 row, const float* const* at, float* out) {
        switch (here) {
            case 1: return dots<1, P>(w, n, row, at, out);
            case 2: return dots<2, P>(w, n, row, at, out);
            case 3: return dots<3, P>(w, n, row, at, out);
            default: return dots<4, P>(w, n, row, at, out);
        }
    });
}

}  // namespace

void integer_products(const Matrix& w, i64 n, i64 first, i64 outs, const float* const* x, i64 rows, int planes,
                      float* sums) {
    return planes == 2 ? integer_products_of<2>(w, n, first, outs, x, rows, sums)
                       : integer_products_of<3>(w, n, first, outs, x, rows, sums);
}

bool float_products(const Matrix& w, i64 n, i64 first, i64 outs, const float* const* x, i64 rows, float* sums) {
    if (w.kind != MXFP8 && w.kind != Q8_0 && w.kind != IQ4_NL) return false;
    each_product(first, outs, x, rows, sums, [&](i64 here, i64 row, const float* const* at, float* out) {
        switch (here) {
            case 1: return float_dots<1>(w, n, row, at, out);
            case 2: return float_dots<2>(w, n, row, at, out);
            case 3: return float_dots<3>(w, n, row, at, out);
            default: return float_dots<4>(w, n, row, at, out);
        }
    });
    return true;
}

#endif
