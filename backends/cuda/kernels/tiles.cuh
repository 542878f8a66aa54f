// Tiles of matrices in shared memory, and the product of the rows of two tiles by one warp.
//
// In the bfloat16 build the product is made of mma.sync. A sum over steps does not depend on their order, so
// a lane may take 8 neighbouring steps, one 16-byte access, for its share of two instructions: lane t of a
// quad takes steps 8t .. 8t + 7 of 32, of both sides alike. The float build has plain fused multiply-adds,
// and leaves the sums in the same lanes.
#pragma once
#include "common.cuh"

#ifdef REAL_BF16
constexpr int STEPS = 32;  // a tile lies as blocks of 32 steps: no two lanes of a quarter warp share a bank
#else
constexpr int STEPS = 4;
#endif

// ROWS rows of DEPTH steps, a multiple of 32.
template <int ROWS, int DEPTH>
struct Tile {
#ifdef REAL_BF16
    static constexpr int size = ROWS * DEPTH;
    DEVICE static int at(int row, int step) { return (step / 32 * ROWS + row) * 32 + step % 32; }
#else
    static constexpr int size = ROWS * (DEPTH + 4);  // four more: eight rows begin in eight different banks
    DEVICE static int at(int row, int step) { return row * (DEPTH + 4) + step; }
#endif
};

// PACK elements from global to shared memory, of which the first `count` are there (perhaps none); the others
// become 0. `fast`: both ends are aligned to 16 bytes.
DEVICE void fetch(Copies& copies, Real* to, const Real* from, int count, bool fast) {
    count = max(0, min(PACK, count));
    if (fast) {
        copies.start(to, from, count * (int)sizeof(Real));
    } else {
        for (int i = 0; i < PACK; i++) to[i] = i < count ? from[i] : store(0.0f);
    }
}

// sum[i][j] += a[16 i ..] b[8 j ..]' over the first `depth` steps, or a few more up to a multiple of STEPS.
// `a` and `b` point into tiles of type A and B, at the first row that the warp reads. Element (r, c) of the
// 16 x 8 block (i, j) is in lane 4 (r % 8) + c / 2, at place 2 (r / 8) + c % 2.
template <class A, class B, int M, int N>
DEVICE void multiply(float (&sum)[M][N][4], const Real* a, const Real* b, int depth) {
    int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll 1
    for (int step = 0; step < depth; step += STEPS) {
#ifdef REAL_BF16
        uint4 low[M], high[M];
#pragma unroll
        for (int i = 0; i < M; i++) {
            low[i] = *reinterpret_cast<const uint4*>(a + A::at(16 * i + g, step + 8 * t));
            high[i] = *reinterpret_cast<const uint4*>(a + A::at(16 * i + g + 8, step + 8 * t));
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            uint4 column = *reinterpret_cast<const uint4*>(b + B::at(8 * j + g, step + 8 * t));
#pragma unroll
            for (int i = 0; i < M; i++) {
                mma_bf16(sum[i][j], low[i].x, high[i].x, low[i].y, high[i].y, column.x, column.y);
                mma_bf16(sum[i][j], low[i].z, high[i].z, low[i].w, high[i].w, column.z, column.w);
            }
        }
#else
        float row[M][2][4], column[2][4];
#pragma unroll
        for (int i = 0; i < M; i++) {
            read(a + A::at(16 * i + g, step), row[i][0]);
            read(a + A::at(16 * i + g + 8, step), row[i][1]);
        }
#pragma unroll
        for (int j = 0; j < N; j++) {
            read(b + B::at(8 * j + 2 * t, step), column[0]);
            read(b + B::at(8 * j + 2 * t + 1, step), column[1]);
#pragma unroll
            for (int i = 0; i < M; i++)
#pragma unroll
                for (int p = 0; p < 4; p++)
#pragma unroll
                    for (int s = 0; s < 4; s++) sum[i][j][p] += row[i][p >> 1][s] * column[p & 1][s];
        }
#endif
    }
}

// f(row, column, v) for every two neighbours v[0], v[1] of the sums that multiply left in this lane.
template <int M, int N, class F>
DEVICE void each_pair(float (&sum)[M][N][4], F f) {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < M; i++)
#pragma unroll
        for (int j = 0; j < N; j++)
#pragma unroll
            for (int half = 0; half < 2; half++) f(16 * i + g + 8 * half, 8 * j + 2 * t, &sum[i][j][2 * half]);
}

DEVICE float relu2(float x) {
    x = fmaxf(x, 0.0f);
    return x * x;
}
