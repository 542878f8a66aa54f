// y[i] = sum over j <= i of  softmax_j(q[i] . k[j] / sqrt(e)) v[j]        for many new positions at once
//
// q [b, l, kv, r, e]; keys and values [b, kv, room, e], the first length[b] of them from earlier calls.
// attention_append adds the n[b] real ones of the l new positions (all, where n is null); attention attends
// from each; then attention_advance moves the lengths. Positions beyond n[b] see what the last real one sees.
//
// A block holds the query rows of one key head, 16 M a warp, and goes through the keys in tiles of KEYS, the
// next of which is on its way while it computes. Blocks with the longest way begin first.
#include "attention.cuh"

#ifdef REAL_BF16
constexpr int M = 2, KEYS = 32;
#else
constexpr int M = 1, KEYS = 16;
#endif
constexpr int WARPS = 4;
constexpr int QUERIES = 16 * M * WARPS;
using Queries = Tile<QUERIES, HEAD>;

// k, v [b, l, kv, e], of which a position begins every `step` and a row every `stride` elements; what is kept is
// divided by the scales. Grid (l, b).
extern "C" __global__ void attention_append(const Real* k, const Real* v, long long stride_k,
                                            long long step_k, long long stride_v, long long step_v,
                                            Kept* keys, Kept* values, const int* length, const int* n, int l,
                                            int kv, int e, int room, float k_scale, float v_scale) {
    int i = blockIdx.x, b = blockIdx.y, at = length[b] + i;
    if (i >= added(n, b, l) || at >= room) return;
    const Real *from_k = k + b * stride_k + i * step_k, *from_v = v + b * stride_v + i * step_v;
    for (int c = threadIdx.x; c < kv * e; c += blockDim.x) {
        long long to = ((long long)(b * kv + c / e) * room + at) * e + c % e;
        put(keys + to, load(from_k[c]) / k_scale);
        put(values + to, load(from_v[c]) / v_scale);
    }
}

// q begins a position every `step` and a row every `stride` elements; y [b, l, kv, r, e]. `scale` has that of keys.
// Grid (tiles of QUERIES of the l r rows of a key head, kv, b).
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)
    attention(const Real* q, long long stride, long long step, const Kept* keys, const Kept* values,
              const int* length, const int* n, Real* y, int l, int kv, int r, int e, int room,
              float scale, float v_scale) {
    SHARED(Real, query);
    Real* stages = query + Queries::size;
    int first = (gridDim.x - 1 - blockIdx.x) * QUERIES, head = blockIdx.y, b = blockIdx.z;
    int before = length[b], last = min((first + QUERIES - 1) / r, l - 1);
    int end = before + min(last + 1, added(n, b, l)), tiles = (end + KEYS - 1) / KEYS;
    long long cache = (long long)(b * kv + head) * room * e;
    Copies copies;
    auto fetch_stage = [&](int stage) {
        long long from = cache + (long long)stage * KEYS * e;
        Real* to = stages + stage % 2 * Stage<KEYS>::size;
        if (stage < tiles)
            Stage<KEYS>::fetch(copies, to, keys + from, values + from, end - stage * KEYS, e);
        copies.close();
    };
    q += b * stride + (long long)head * r * e;
    fetch_queries<QUERIES>(copies, query, q, step, first, l * r, r, e);
    fetch_stage(0);

    __shared__ int sees[QUERIES];  // keys, by query
    for (int i = threadIdx.x; i < QUERIES; i += blockDim.x) sees[i] = min(before + (first + i) / r + 1, end);
    int mine = threadIdx.x / 32 * 16 * M, g = threadIdx.x % 32 / 4;  // the warp's first row; the lane's first
    Rows rows[M];
#pragma unroll
    for (int m = 0; m < M; m++) begin(rows[m]);
    for (int stage = 0; stage < tiles; stage++) {
        copies.wait<0>();
        __syncthreads();  // this stage has arrived, and all have done with the other
        fetch_stage(stage + 1);
        const Real* here = stages + stage % 2 * Stage<KEYS>::size;
        float score[M][KEYS / 8][4] = {};
        multiply<Queries, Stage<KEYS>::Keys>(score, query + Queries::at(mine, 0), here, e);
#pragma unroll
        for (int m = 0; m < M; m++) {
            const int* limit = sees + mine + 16 * m + g;
            int visible[2] = {limit[0] - stage * KEYS, limit[8] - stage * KEYS};
            softmax(rows[m], score[m], scale, visible);
        }
        weigh(rows, score, here + Stage<KEYS>::values, e);
    }
    copies.wait<0>();  // for the queries, where there was no key

#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float sum = quad_sum(rows[m].sum[half]), share = sum > 0.0f ? v_scale / sum : 0.0f;
            int row = first + mine + 16 * m + g + 8 * half;
            if (row >= l * r) continue;
            Real* to = y + (((long long)b * l + row / r) * kv * r + head * r + row % r) * e;
            write_row(to, rows[m], half, share, e);
        }
}

extern "C" __global__ void attention_advance(int* length, const int* n, int l, int rows) {
    int b = blockIdx.x * blockDim.x + threadIdx.x;
    if (b < rows) length[b] += added(n, b, l);
}
