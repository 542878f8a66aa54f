// Queries, keys and values of one key head, on their way into shared memory.
#pragma once
#include "kept.cuh"

constexpr int HEAD = 128;  // the largest head_dim

// Values lie by keys; one pack more a row, so that the rows of four keys begin in different banks.
constexpr int VALUE = HEAD + PACK;

// KEYS keys and their values in shared memory. Keys are read by multiply, 32 or 4 elements of e at a time,
// values by weigh, 64 at a time; what is beyond e, or beyond the keys there are, is 0.
template <int KEYS>
struct Stage {
    using Keys = Tile<KEYS, HEAD>;
    static constexpr int values = Keys::size;  // where they begin
    static constexpr int size = values + KEYS * VALUE;

    // The first `count` of KEYS keys and values, of e elements each.
    DEVICE static void fetch(Copies& copies, Real* to, const Kept* key, const Kept* value, int count, int e) {
#pragma unroll 1
        for (int i = threadIdx.x; i < KEYS * (HEAD / PACK); i += blockDim.x) {
            int row = i / (HEAD / PACK), step = i % (HEAD / PACK) * PACK;
            if (step >= (e + 63) / 64 * 64) continue;
            int there = row < count ? e - step : 0, from = there > 0 ? row * e + step : 0;
            ::fetch(copies, to + Keys::at(row, step), key + from, there, e % PACK == 0);
            ::fetch(copies, to + values + row * VALUE + step, value + from, there, e % PACK == 0);
        }
    }
};

// QUERIES rows of the queries of one key head, from row `first` on, into a tile; beyond the last they are 0.
// A position begins every `step` elements of q.
template <int QUERIES>
DEVICE void fetch_queries(Copies& copies, Real* to, const Real* q, long long step, int first, int rows, int r,
                          int e) {
    bool fast = e % PACK == 0 && step % PACK == 0 && aligned(q);
#pragma unroll 1
    for (int i = threadIdx.x; i < QUERIES * (HEAD / PACK); i += blockDim.x) {
        int row = first + i / (HEAD / PACK), s = i % (HEAD / PACK) * PACK, there = row < rows ? e - s : 0;
        const Real* from = there > 0 ? q + row / r * step + row % r * e + s : q;
        fetch(copies, to + Tile<QUERIES, HEAD>::at(row - first, s), from, there, fast);
    }
}

// How many of the l new positions of row b are real.
DEVICE int added(const int* n, int b, int l) { return n ? min(n[b], l) : l; }
