// Packed weights: codes of 4 to 8 bits, and scales of blocks of columns, as they lie in the files.
//
// Few rows of x are multiplied with the codes themselves. A row becomes integers of 24 bits with a scale for each 64 or
// 256 columns, in three planes of signed bytes, because products of unsigned and signed bytes are the fastest
// that AVX2 has. Sums within a block are exact, so the product is as exact as one in float32. More rows, and
// kinds and processors without such a loop, take tiles of weights that are dequantized in cache.
#pragma once
#include "structures.h"

constexpr i64 TILE = 256;  // columns of a tile: whole blocks of every kind

// The bytes from one row of codes to the next.
i64 packed_row(i64 kind, i64 n);

// `count` weights of a row as float32, in order, from column `from` on, a multiple of TILE.
void dequantize(const Matrix& w, i64 n, i64 row, i64 from, i64 count, float* to);

// The room for a row of n columns as integers, in floats; 0 if there is no loop for the kind.
i64 integers_room(i64 kind, i64 n);
void to_integers(i64 kind, const float* x, i64 n, float* to);

// sums[r][o] = x[r] . w[first + o] for rows of integers, and for rows as they are if there is a loop for the kind: up to
// MOST_DIRECT rows, beyond which panels are faster.
constexpr i64 MOST_DIRECT = 12;
void integer_products(const Matrix& w, i64 n, i64 first, i64 outs, const float* const* x, i64 rows, float* sums);
bool float_products(const Matrix& w, i64 n, i64 first, i64 outs, const float* const* x, i64 rows, float* sums);
