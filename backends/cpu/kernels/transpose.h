// Transposed copies, in tiles of four by four and the rest one by one.
#pragma once
#include "numbers.h"

// to(c)[r] = from(r)[c] for `rows` rows of `columns`; from(r) and to(c) return the address of a row.
template <class From, class To>
static inline void transpose_rows(From from, i64 rows, i64 columns, To to) {
    const i64 r4 = rows / 4 * 4, c4 = columns / 4 * 4;
    for (i64 c = 0; c < c4; c += 4)
        for (i64 r = 0; r < r4; r += 4) {
            const four a = load<four>(from(r) + c), b = load<four>(from(r + 1) + c);
            const four d = load<four>(from(r + 2) + c), e = load<four>(from(r + 3) + c);
            const four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5), AB = __builtin_shufflevector(a, b, 2, 6, 3, 7);
            const four de = __builtin_shufflevector(d, e, 0, 4, 1, 5), DE = __builtin_shufflevector(d, e, 2, 6, 3, 7);
            store(to(c) + r, __builtin_shufflevector(ab, de, 0, 1, 4, 5));
            store(to(c + 1) + r, __builtin_shufflevector(ab, de, 2, 3, 6, 7));
            store(to(c + 2) + r, __builtin_shufflevector(AB, DE, 0, 1, 4, 5));
            store(to(c + 3) + r, __builtin_shufflevector(AB, DE, 2, 3, 6, 7));
        }
    for (i64 c = 0; c < columns; c++)
        for (i64 r = c < c4 ? r4 : 0; r < rows; r++) to(c)[r] = from(r)[c];
}

// The same for a list of row addresses, and for rows that are `step` and `to_step` apart.
static inline void transpose(const float* const* from, i64 rows, i64 columns, float* const* to) {
    transpose_rows([=](i64 r) { return from[r]; }, rows, columns, [=](i64 c) { return to[c]; });
}
static inline void transpose(const float* from, i64 step, i64 rows, i64 columns, float* to, i64 to_step) {
    transpose_rows([=](i64 r) { return from + r * step; }, rows, columns, [=](i64 c) { return to + c * to_step; });
}
