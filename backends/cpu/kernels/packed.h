// Packed weights: codes of 4 to 8 bits, and scales of blocks of columns, as they lie in the files.
//
// With few rows, x is multiplied with the codes directly. A row is converted to integers of 24 bits with a scale for
// each 64 or 256 columns, in three planes of signed bytes, because products of unsigned and signed bytes are the
// fastest of AVX2. Sums within a block are exact, so the product is as exact as one in float32. With more rows, or
// without such a loop for the kind or the processor, tiles of weights are dequantized in cache.
#pragma once
#include "structures.h"

constexpr i64 TILE = 256;  // columns of a tile, a multiple of the block of every kind

// Return the bytes from one row of codes to the next.
i64 packed_row(i64 kind, i64 n);

// Dequantize `count` weights of a row to float32, in order, from column `from` on, a multiple of TILE.
void dequantize(const Matrix& w, i64 n, i64 row, i64 from, i64 count, float* to);

// Return the size in floats of a row of n columns as integers; 0 if the kind has no loop for them.
i64 integers_room(i64 kind, i64 n);
void to_integers(i64 kind, const float* x, i64 n, float* to);

// sums[r][o] = x[r] . w[first + o], for rows of integers, or for float rows if the kind has a loop for them (else
// return false). At most MOST_DIRECT rows; with more, panels are faster.
constexpr i64 MOST_DIRECT = 12;
void integer_products(const Matrix& w, i64 n, i64 first, i64 outs, const float* const* x, i64 rows, float* sums);
bool float_products(const Matrix& w, i64 n, i64 first, i64 outs, const float* const* x, i64 rows, float* sums);
