// Keys and values as the cache stores them. Kept is Real; or, under -DKEPT_F32 or -DKEPT_BF16, float or bfloat16; or,
// under -DKEPT_F8, the bytes of E4M3, which hold them divided by a scale: 4 bits of exponent, 3 of mantissa, no
// infinity, at most 448.
#pragma once
#include "tiles.cuh"

struct F8 {
    unsigned char bits;
};
#if defined(KEPT_F8)
typedef F8 Kept;
#elif defined(KEPT_BF16)
typedef Bf16 Kept;
#elif defined(KEPT_F32)
typedef float Kept;
#else
typedef Real Kept;
#endif

// E4M3 is a float16 with one bit of exponent less, 2^8 times as large.
DEVICE float load(F8 x) {
    unsigned size = x.bits & 0x7fu;
    if (size == 0x7fu) return __uint_as_float(0x7fc00000u);
    return f16_value((unsigned short)((x.bits & 0x80u) << 8 | size << 7)) * 256.0f;
}

// To nearest, ties to even; a NaN stays one.
DEVICE void put(F8* p, float x) {
    unsigned sign = __float_as_uint(x) >> 24 & 0x80u, code;
    float size = fminf(fabsf(x), 448.0f);
    unsigned bits = __float_as_uint(size);
    if (x != x) code = 0x7fu;
    else if (size < 0.015625f) code = (unsigned)(size * 512.0f + 8388608.0f - 8388608.0f);  // multiples of 2^-9
    else code = ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);  // exponents from bias 127 to 7
    p->bits = (unsigned char)(sign | code);
}

// As fetch of tiles.cuh, of numbers that are not activations.
template <class T>
DEVICE void fetch(Copies&, Real* to, const T* from, int count, bool) {
    for (int i = 0; i < PACK; i++) to[i] = i < count ? store(load(from[i])) : store(0.0f);
}
