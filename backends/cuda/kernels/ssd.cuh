// What the kernels of the chunked scan share: where a chunk is, and how its rows come into tiles.
//
// Positions are computed CHUNK at a time, from position `first` of each sequence on; rows beyond its end
// count as zeros. Between kernels, in arrays with a place for every position of every chunk:
//   step   [b, h, chunks * CHUNK]     dt, 0 beyond the end
//   high   [b, h, chunks * CHUNK]     a, the sum of dt A since the chunk began, as the nearest float
//   low    [b, h, chunks * CHUNK]     what is missing to it: differences of long sums must be exact
//   decay  [b, h, chunks]             exp of a at the end of the chunk
//   added  [b, chunks, h, p, n]       what the chunk alone would leave in the state
//   before [b, chunks, h, p, n]       Real: the state in which the chunk begins
#pragma once
#include "tiles.cuh"

constexpr int CHUNK = 128, TILE = 64;
constexpr int THREADS = 128;  // four warps, each a quarter of a TILE x TILE product
typedef Tile<TILE, CHUNK> Wide;
typedef Tile<TILE, TILE> Square;
#ifdef REAL_BF16
constexpr int PIECES = 2;  // what is added to the state keeps 16 bits of a product of x and its weight
#else
constexpr int PIECES = 1;
#endif

// A depth that a product can have.
DEVICE int padded(int depth) { return (depth + 31) / 32 * 32; }

// Rows of the sequence b that stand `stride` values apart, from position `at` on, of which `count` are real.
struct Span {
    long long row;
    int count;

    DEVICE Span(const int* n, int l, int at, int most) {
        long long b = blockIdx.z;
        int end = n ? min(n[b], l) : l;
        row = b * l + at;
        count = max(0, min(most, end - at));
    }
};

// to[r][c] = from[r][c] for TILE rows, of which `rows` are there, and `width` columns, with zeros up to 32.
template <class T>
DEVICE void fill(Copies& copies, Real* to, const Real* from, long long stride, int rows, int width) {
    bool fast = stride % PACK == 0 && aligned(from);
    int packs = padded(width) / PACK;
    for (int i = threadIdx.x; i < TILE * packs; i += blockDim.x) {
        int row = i / packs, column = i % packs * PACK;
        bool there = row < rows && column < width;
        fetch(copies, to + T::at(row, column), there ? from + row * stride + column : from,
              there ? width - column : 0, fast);
    }
}

// to[c][r] = from[r][c] scale[r] for `depth` rows, of which `rows` are there, and TILE columns, of which
// `width` are; scale may be null. `pieces` tiles one after another, whose sum is what is meant.
template <class T, int pieces = 1>
DEVICE void transpose(Real* to, const Real* from, long long stride, int rows, int width, int depth,
                      const float* scale) {
    bool fast = stride % PACK == 0 && aligned(from);
    for (int i = threadIdx.x; i < depth * (TILE / PACK); i += blockDim.x) {
        int row = i % depth, column = i / depth * PACK;
        float v[PACK] = {};
        if (row < rows && fast && column + PACK <= width) {
            read(from + row * stride + column, v);
        } else if (row < rows) {
#pragma unroll
            for (int e = 0; e < PACK; e++)
                if (column + e < width) v[e] = load(from[row * stride + column + e]);
        }
#pragma unroll
        for (int e = 0; e < PACK; e++) {
            float rest = scale ? v[e] * scale[row] : v[e];
#pragma unroll
            for (int piece = 0; piece < pieces; piece++) {
                Real part = store(rest);
                to[piece * T::size + T::at(column + e, row)] = part;
                rest -= load(part);
            }
        }
    }
}

// Where this lane's sums of a TILE x TILE product are: element p of block (i, j).
DEVICE int sum_row(int i, int p) {
    return 32 * ((threadIdx.x >> 5) & 1) + 16 * i + ((threadIdx.x & 31) >> 2) + 8 * (p >> 1);
}
DEVICE int sum_column(int j, int p) {
    return 32 * (threadIdx.x >> 6) + 8 * j + 2 * (threadIdx.x & 3) + (p & 1);
}

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

// sum += a b' over `depth` steps of two tiles of TILE rows.
template <class A, class B>
DEVICE void product(float (&sum)[2][4][4], const Real* a, const Real* b, int depth) {
    int warp = threadIdx.x >> 5;
    multiply<A, B>(sum, a + A::at(32 * (warp & 1), 0), b + B::at(32 * (warp >> 1), 0), depth);
}
