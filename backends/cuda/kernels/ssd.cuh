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
//   scores [b, chunks, g, PAIRS, ..]  C B' of a group, for each pair of TILEs of positions at or before another
#pragma once
#include "tiles.cuh"

constexpr int CHUNK = 128, TILE = 64, PAIRS = 3;
static_assert(CHUNK == 2 * TILE, "a chunk has two tiles of positions, and three pairs of them");
constexpr int THREADS = 128;  // four warps, each a quarter of a TILE x TILE product
typedef Tile<TILE, CHUNK> Wide;
#ifdef REAL_BF16
constexpr int PIECES = 2;  // what is added to the state keeps 16 bits of a product of x and its weight
#else
constexpr int PIECES = 1;
#endif

// Where this lane's scores of a pair are: 16 bytes of each lane side by side, then the next 16 of each.
DEVICE long long scores_at(int chunks, int chunk, int g, int group, int pair) {
    long long tile = ((blockIdx.z * (long long)chunks + chunk) * g + group) * PAIRS + pair;
    return tile * TILE * TILE + 4 * threadIdx.x;
}
constexpr int NEXT_SCORES = 4 * THREADS;

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
DEVICE void fill(Copies& copies, Real* to, const Real* from, long long stride, int rows, int width) {
    bool fast = stride % PACK == 0 && aligned(from);
    int packs = padded(width) / PACK;
    for (int i = threadIdx.x; i < TILE * packs; i += blockDim.x) {
        int row = i / packs, column = i % packs * PACK;
        bool there = row < rows && column < width;
        fetch(copies, to + Wide::at(row, column), there ? from + row * stride + column : from,
              there ? width - column : 0, fast);
    }
}

// to[c][r] = from[r][c] scale[r] for `depth` rows, of which `rows` are there, and TILE columns, of which
// `width` are; scale may be null. `pieces` tiles one after another, whose sum is what is meant.
template <int pieces = 1>
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
                to[piece * Wide::size + Wide::at(column + e, row)] = part;
                rest -= load(part);
            }
        }
    }
}

// A quarter of a TILE x TILE product, by one warp, and where it begins.
typedef float Sums[2][4][4];
DEVICE int first_row() { return 32 * ((threadIdx.x >> 5) & 1); }
DEVICE int first_column() { return 32 * (threadIdx.x >> 6); }

// f(row, column, v) for every two neighbours v[0], v[1] of this lane's sums of such a product.
template <class F>
DEVICE void each_sum(Sums& sum, F f) {
    each_pair(sum, [&](int row, int column, float* v) { f(first_row() + row, first_column() + column, v); });
}

// sum += a b' over `depth` steps of two tiles of TILE rows.
DEVICE void product(Sums& sum, const Real* a, const Real* b, int depth) {
    multiply<Wide, Wide>(sum, a + Wide::at(first_row(), 0), b + Wide::at(first_column(), 0), depth);
}

// Rows `stride` values apart, of which `count` are there.
struct Lines {
    const Real* from;
    long long stride;
    int count;
};

// sum += a b' over `width` columns of TILE rows each, CHUNK at a time through the two tiles `here` and `there`.
DEVICE void product(Sums& sum, const Lines& a, const Lines& b, int width, Real* here, Real* there) {
    for (int first = 0; first < width; first += CHUNK) {
        Copies copies;
        int piece = min(CHUNK, width - first);
        if (first > 0) __syncthreads();  // what was there has been read
        fill(copies, here, a.from + first, a.stride, a.count, piece);
        fill(copies, there, b.from + first, b.stride, b.count, piece);
        copies.close();
        copies.wait<0>();
        __syncthreads();
        product(sum, here, there, padded(piece));
    }
}
