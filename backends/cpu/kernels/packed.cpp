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
        const uint8_t mask = 1 << part;
        const bytes bit = high & (bytes{} + mask);
        Columns found = {(part % 2 ? q >> 4 : q & 15) | ((bytes)(bit != 0) & 16), {}, 0};
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

i64 integers_room(i64, i64) { return 0; }
void to_integers(i64, const float*, i64, float*) {}
void integer_products(const Matrix&, i64, i64, i64, const float* const*, i64, float*) {}
bool float_products(const Matrix&, i64, i64, i64, const float* const*, i64, float*) { return false; }

#else

namespace {

// 32 columns of x: x[j] = scale (65536 plane[0][j] + 256 plane[1][j] + plane[2][j]), in the order of the codes. Two
// of these share a scale; the first has the sums of both, eight columns of x in each lane, in the form of the kind.
struct Integers {
    int8_t plane[3][32];
    union {
        int32_t bias[8];   // sum of x times the offset of the codes
        float sum[8];      // sum of x, for the least values
    };
    float scale, unused[7];
};
// 256 columns of x with one scale.
struct Wide {
    int8_t plane[3][256];
    int16_t sums[3][16];  // sums of 16 columns of each plane
    float sum[8];         // sums of 32 columns of x
    float scale, unused[7];
};
constexpr float LARGEST = 8355000;  // slightly less than three planes can hold

INLINE __m256i load8(const void* at) { return _mm256_loadu_si256((const __m256i*)at); }

// Return the eight sums of four neighbouring columns of 32 numbers, in order.
INLINE __m256i in_order(__m256i v) { return _mm256_permutevar8x32_epi32(v, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)); }

INLINE float added(__m256 v) {
    __m128 all = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    all = _mm_add_ps(all, _mm_movehl_ps(all, all));
    return _mm_cvtss_f32(_mm_add_ss(all, _mm_movehdup_ps(all)));
}

// Return the scale of numbers whose largest magnitude this is; NaN if one of them is not finite.
float scale_of(const float* x, i64 count) {
    __m256 largest = _mm256_setzero_ps(), bad = largest;
    for (i64 j = 0; j < count; j += 8) {
        const __m256 v = _mm256_loadu_ps(x + j);
        largest = _mm256_max_ps(largest, _mm256_andnot_ps(_mm256_set1_ps(-0.f), v));
        bad = _mm256_add_ps(bad, _mm256_sub_ps(v, v));
    }
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    const float most = std::max(four[0], four[1]), wrong = added(bad);
    return most < 1e-30f ? wrong : most / LARGEST + wrong;
}

// Write 32 columns of x as three planes `step` bytes apart; return the eight sums of four columns.
INLINE __m256i planes_of(const float* x, float scale, int8_t* to, i64 step) {
    const __m256 up = _mm256_set1_ps(scale > 0 ? 1 / scale : 0);
    const __m256i low = _mm256_set1_epi32(255), round = _mm256_set1_epi32(128);
    __m256i v[4];
    for (int i = 0; i < 4; i++) v[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), up));
    const __m256i sums = in_order(_mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3])));
    for (int plane = 2; plane >= 0; plane--) {
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

// Split 64 columns of x into planes, for codes with this offset; a negative offset: keep the sums of x.
void pair_of(const float* first, const float* second, float scale, int offset, Integers* to) {
    const __m256i sums = _mm256_add_epi32(planes_of(first, scale, to[0].plane[0], 32),
                                          planes_of(second, scale, to[1].plane[0], 32));
    const __m256i bias = _mm256_mullo_epi32(sums, _mm256_set1_epi32(offset));
    const __m256 sum = _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_set1_ps(scale));
    if (offset < 0) memcpy(to->sum, &sum, sizeof sum);
    else memcpy(to->bias, &bias, sizeof bias);
    to->scale = scale;
}

void wide_of(const float* x, Wide& to) {
    to.scale = scale_of(x, 256);
    for (int i = 0; i < 8; i++) {
        const __m256i sums = planes_of(x + 32 * i, to.scale, to.plane[0] + 32 * i, 256);
        to.sum[i] = added(_mm256_cvtepi32_ps(sums)) * to.scale;
    }
    for (int plane = 0; plane < 3; plane++)
        for (int i = 0; i < 16; i++) {
            int sum = 0;
            for (int j = 0; j < 16; j++) sum += to.plane[plane][16 * i + j];
            to.sums[plane][i] = sum;
        }
}

// acc += scale (sums of products of codes and x); only the last step rounds.
template <bool BIAS>
INLINE __m256 multiplied(__m256i high, __m256i middle, __m256i low, const Integers& x, __m256 scale, __m256 acc) {
    const __m256i ones = _mm256_set1_epi16(1), up = _mm256_set1_epi16(256);
    const __m256i upper = _mm256_add_epi32(_mm256_madd_epi16(high, up), _mm256_madd_epi16(middle, ones));
    __m256i lower = _mm256_madd_epi16(low, ones);
    if (BIAS) lower = _mm256_sub_epi32(lower, load8(x.bias));
    const __m256i sum = _mm256_add_epi32(_mm256_slli_epi32(upper, 8), lower);
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), _mm256_mul_ps(scale, _mm256_set1_ps(x.scale)), acc);
}
template <bool BIAS>
INLINE __m256 multiplied(__m256i first, __m256i second, const Integers* x, __m256 scale, __m256 acc) {
    __m256i plane[3];
    for (int i = 0; i < 3; i++)
        plane[i] = _mm256_add_epi16(_mm256_maddubs_epi16(first, load8(x[0].plane[i])),
                                    _mm256_maddubs_epi16(second, load8(x[1].plane[i])));
    return multiplied<BIAS>(plane[0], plane[1], plane[2], x[0], scale, acc);
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
template <class K, int R>
void dots_of_32(const Matrix& w, i64 n, i64 row, const Integers* const* x, float* out) {
    __m256 acc[R] = {};
    const uint8_t* a = (const uint8_t*)w.at + row * (n / 32) * K::BYTES;
    for (i64 p = 0; p < n / 32; p += 2, a += 2 * K::BYTES) {
        _mm_prefetch((const char*)a + 1024, _MM_HINT_T0);
        const uint8_t* b = p + 1 < n / 32 ? a + K::BYTES : a;  // if the last block is alone, x is 0 for the second
        __m256i first, second;
        codes_of_two<K>(a, b, first, second);
        __m256 scale;
        if constexpr (std::is_same<K, blocks::MXFP4>::value)
            scale = _mm256_set_m128(_mm_set1_ps(blocks::HALF_POWERS[b[0]]), _mm_set1_ps(blocks::HALF_POWERS[a[0]]));
        else
            scale = halves_of(a, b);
        for (int r = 0; r < R; r++) {
            acc[r] = multiplied<!K::LEAST>(first, second, x[r] + p, scale, acc[r]);
            if (K::LEAST) acc[r] = _mm256_fmadd_ps(halves_of(a + 2, b + 2), _mm256_loadu_ps(x[r][p].sum), acc[r]);
        }
    }
    for (int r = 0; r < R; r++) out[r] = added(acc[r]) * w.factor;
}

// Unpack the eight scales and least values of q4_k and q5_k, 6 bits each, into 16-bit integers.
INLINE void sixes(const uint8_t* s, __m128i& scale, __m128i& least) {
    const uint32_t a = load<uint32_t>(s), b = load<uint32_t>(s + 4), c = load<uint32_t>(s + 8);
    const uint32_t scales = (c & 0x0f0f0f0f) | (a >> 6 & 0x03030303) << 4;
    const uint32_t leasts = (c >> 4 & 0x0f0f0f0f) | (b >> 6 & 0x03030303) << 4;
    scale = _mm_cvtepu8_epi16(_mm_cvtsi64_si128((a & 0x3f3f3f3f) | (uint64_t)scales << 32));
    least = _mm_cvtepu8_epi16(_mm_cvtsi64_si128((b & 0x3f3f3f3f) | (uint64_t)leasts << 32));
}

// The same for blocks of 256 columns. Their scales are integers too, so that sums within a block are exact.
template <class K, int R>
void dots_of_256(const Matrix& w, i64 n, i64 row, const Wide* const* x, float* out) {
    __m256 acc[R] = {};
    const uint8_t* b = (const uint8_t*)w.at + row * (n / 256) * K::BYTES;
    for (i64 p = 0; p < n / 256; p++, b += K::BYTES) {
        for (i64 line = 0; line < K::BYTES; line += 64) _mm_prefetch((const char*)b + 1024 + line, _MM_HINT_T0);
        __m256i sum[R][3] = {}, scales;  // scales: those of the parts, as 16-bit integers
        __m128i scale, least;
        if (K::MIXED)
            scales = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(b + 192)));
        else
            sixes(b + 4, scale, least), scales = _mm256_broadcastsi128_si256(scale);
        alignas(32) int16_t kept[16];
        _mm256_store_si256((__m256i*)kept, scales);
#pragma GCC unroll 8
        for (i64 part = 0; part < 8; part++) {
            const __m256i code = (__m256i)K::read(b, part).code;
            __m256i each = _mm256_set1_epi16(kept[K::MIXED ? 2 * part : part]);
            if (K::MIXED) each = _mm256_inserti128_si256(each, _mm_set1_epi16(kept[2 * part + 1]), 1);
            for (int r = 0; r < R; r++)
                for (int i = 0; i < 3; i++)
                    sum[r][i] = _mm256_add_epi32(
                        sum[r][i],
                        _mm256_madd_epi16(_mm256_maddubs_epi16(code, load8(x[r][p].plane[i] + 32 * part)), each));
        }
        for (int r = 0; r < R; r++) {
            const Wide& here = x[r][p];
            if (K::OFFSET)
                for (int i = 0; i < 3; i++) {
                    const __m256i sums = _mm256_madd_epi16(load8(here.sums[i]), scales);
                    sum[r][i] = _mm256_sub_epi32(sum[r][i], _mm256_mullo_epi32(sums, _mm256_set1_epi32(K::OFFSET)));
                }
            __m256 all = _mm256_cvtepi32_ps(sum[r][2]);
            all = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][1]), _mm256_set1_ps(256), all);
            all = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][0]), _mm256_set1_ps(65536), all);
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

// The same for both forms of NVFP4, 64 columns at a time. The low halves of the bytes are multiplied with one piece of
// x and the high halves with the next, so that both have the same scales in the same lanes.
template <bool APART, int R>
void dots_of_nvfp4(const Matrix& w, i64 n, i64 row, const Integers* const* x, float* out) {
    const uint8_t* codes = (const uint8_t*)w.at + (APART ? row * (n / 2) : row * (n / 64) * 36 + 4);
    const uint8_t* scales = APART ? w.scale + row * (n / 16) : codes - 4;
    const i64 codes_step = APART ? 32 : 36, scales_step = APART ? 4 : 36;
    const __m256i table = (__m256i)twice(E2M1), low = _mm256_set1_epi8(15);
    const __m128i spread = _mm_setr_epi8(-1, 0, -1, 0, -1, 1, -1, 1, -1, 2, -1, 2, -1, 3, -1, 3);
    __m256 acc[R] = {};
    auto group = [&](const uint8_t* code, const uint8_t* scale, i64 p) __attribute__((always_inline)) {
        const __m256i q = load8(code);
        const __m256i first = _mm256_shuffle_epi8(table, _mm256_and_si256(q, low));
        const __m256i second = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(q, 4), low));
        __m128i s = _mm_cvtsi32_si128(load<int32_t>(scale));
        if (!APART) {  // GGUF: the sign is ignored, and a NaN counts as 0
            s = _mm_and_si128(s, _mm_set1_epi8(0x7f));
            s = _mm_andnot_si128(_mm_cmpeq_epi8(s, _mm_set1_epi8(0x7f)), s);
        }
        const __m256 each = _mm256_cvtph_ps(_mm_srli_epi16(_mm_shuffle_epi8(s, spread), 1));
        for (int r = 0; r < R; r++) acc[r] = multiplied<true>(first, second, x[r] + p, each, acc[r]);
    };
    i64 p = 0;
    for (; 32 * p + 64 <= n; p += 2, codes += codes_step, scales += scales_step) {
        _mm_prefetch((const char*)codes + 1024, _MM_HINT_T0);
        group(codes, scales, p);
    }
    if (32 * p < n) {  // less than 64 columns are left, in modelopt's form only
        uint8_t code[32] = {}, scale[4] = {};
        memcpy(code, codes, (n - 32 * p) / 2), memcpy(scale, scales, (n - 32 * p) / 16);
        group(code, scale, p);
    }
    for (int r = 0; r < R; r++) out[r] = added(acc[r]) * (w.factor * 128);  // 2^8 for the scales, 1/2 for the codes
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

template <int R>
void dots(const Matrix& w, i64 n, i64 row, const float* const* x, float* out) {
    of_packed(w.kind, [&](auto k) {
        typedef decltype(k) K;
        if constexpr (std::is_same<K, blocks::NVFP4>::value || std::is_same<K, blocks::GGUF_NVFP4>::value)
            dots_of_nvfp4<std::is_same<K, blocks::NVFP4>::value, R>(w, n, row, (const Integers* const*)x, out);
        else if constexpr (K::SUMS && K::COLUMNS == 32)
            dots_of_32<K, R>(w, n, row, (const Integers* const*)x, out);
        else if constexpr (K::SUMS)
            dots_of_256<K, R>(w, n, row, (const Wide* const*)x, out);
    });
}

// Call f(columns of x that share a scale, offset) for a kind that multiplies integers; offset -1: sums of x.
template <class F>
void of_integers(i64 kind, F f) {
    if (kind != MXFP8)
        of_packed(kind, [&](auto k) {
            typedef decltype(k) K;
            if constexpr (K::SUMS) f(K::COLUMNS == 256 ? 256 : 64, K::LEAST ? -1 : K::OFFSET);
        });
}

}  // namespace

i64 integers_room(i64 kind, i64 n) {
    i64 found = 0;
    of_integers(kind, [&](i64 columns, int) {
        found = columns == 256 ? n / 256 * sizeof(Wide) : (n + 63) / 64 * 2 * sizeof(Integers);
    });
    return found / sizeof(float);
}

void to_integers(i64 kind, const float* x, i64 n, float* to) {
    of_integers(kind, [&](i64 columns, int offset) {
        if (columns == 256) {
            for (i64 i = 0; i < n / 256; i++) wide_of(x + 256 * i, ((Wide*)to)[i]);
            return;
        }
        Integers* piece = (Integers*)to;
        for (i64 from = 0; from < n; from += 64, piece += 2) {
            float here[64] = {}, parts[2][32];
            memcpy(here, x + from, std::min<i64>(64, n - from) * sizeof(float));
            for (int j = 0; j < 32; j++) {
                const int at = kind == NVFP4 ? 2 * j : kind == GGUF_NVFP4 ? j / 8 * 16 + j % 8 : j / 16 * 32 + j % 16;
                parts[0][j] = here[at], parts[1][j] = here[at + (kind == NVFP4 ? 1 : kind == GGUF_NVFP4 ? 8 : 16)];
            }
            pair_of(parts[0], parts[1], scale_of(here, 64), offset, piece);
        }
    });
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

}  // namespace

void integer_products(const Matrix& w, i64 n, i64 first, i64 outs, const float* const* x, i64 rows, float* sums) {
    each_product(first, outs, x, rows, sums, [&](i64 here, i64 row, const float* const* at, float* out) {
        switch (here) {
            case 1: return dots<1>(w, n, row, at, out);
            case 2: return dots<2>(w, n, row, at, out);
            case 3: return dots<3>(w, n, row, at, out);
            default: return dots<4>(w, n, row, at, out);
        }
    });
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
