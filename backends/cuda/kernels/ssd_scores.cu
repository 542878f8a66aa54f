// scores[i, j] = C[i].B[j] of each chunk, once for all heads of a group.
//
// A block computes one of the PAIRS of tiles on and below the diagonal, and leaves it as its lanes hold it, 16
// bytes after 16 bytes: the lanes of ssd_outputs.cu that have the same places read it. Grid: (chunk, pair),
// groups, sequences; the arrays are those of ssd.cuh.
#include "ssd.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    ssd_scores(const Real* B, const Real* C, float* scores, const int* n, int first, int l, int g, int state,
               long long B_stride, long long C_stride) {
    SHARED(Real, shared);
    int chunk = blockIdx.x / PAIRS, pair = blockIdx.x % PAIRS, group = blockIdx.y;
    int to = (pair + 1) / 2 * TILE, from = pair / 2 * TILE;
    Span here(n, l, first + chunk * CHUNK, CHUNK);
    if (here.count <= to) return;
    Lines rows_of_C = {C + (here.row + to) * C_stride + group * state, C_stride, here.count - to};
    Lines rows_of_B = {B + (here.row + from) * B_stride + group * state, B_stride, here.count - from};
    Sums sum = {};
    product(sum, rows_of_C, rows_of_B, state, shared, shared + Wide::size);
    scores += scores_at(gridDim.x / PAIRS, chunk, g, group, pair);
#pragma unroll
    for (int k = 0; k < 8; k++) write(scores + k * NEXT_SCORES, sum[k / 4][k % 4]);
}
