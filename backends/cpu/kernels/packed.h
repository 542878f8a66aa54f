// Packed weights: codes of 4 to 8 bits, and scales of blocks of columns, as they lie in the files.
//
// With few rows, x is multiplied with the codes directly. A row is converted to integers with a scale for each 256
// columns, in planes of signed bytes, because products of unsigned and signed bytes are the fastest of AVX2 (beside
// signed codes: 16-bit numbers, or floats). Sums within a block are exact. With three planes, 24 bits, the product is
// as exact as one in float32. With two the error of x is 2^-16 of the largest number of its block, which is small
// beside the rounding of bfloat16. With more rows, or without such a loop for the kind or the processor, tiles of
// weights are dequantized in cache.
#pragma once
#include "structures.h"

constexpr i64 TILE = 256;  // columns of a tile, a multiple of the block of every kind

// Return the bytes from one row of codes to the next.
i64 packed_row(i64 kind, i64 n);

// Dequantize `count` weights of a row to float32, in order, from column `from` on, a multiple of TILE.
void dequantize(const Matrix& w, i64 n, i64 row, i64 from, i64 count, float* to);

// Return the size in floats of a row of n columns as integers; 0 if the kind has no loop for them.
i64 integers_room(i64 kind, i64 n, int planes);
void to_integers(i64 kind, const float* x, i64 n, int planes, float* to);

// sums[r][o] = x[r] . w[first + o], for rows of integers, or for float rows if the kind has a loop for them (else
// return false). At most MOST_DIRECT rows; with more, panels are faster.
constexpr i64 MOST_DIRECT = 12;
void integer_products(const Matrix& w, i64 n, i64 first, i64 outs, const float* const* x, i64 rows, int planes,
                      float* sums);
bool float_products(const Matrix& w, i64 n, i64 first, i64 outs, const float* const* x, i64 rows, float* sums);
