// attention.cu for a few new positions after a long context: the context is cut into parts, side by side.
//
//   attention_decode    for each part: the largest score, the sum of weights and the sum of weighted values
//   attention_combine   y = the parts' sums, each counted by 2 ^ (its largest score - the largest of all),
//                       over the sum of weights; then the lengths move
//
// The number of parts is that of the grid, so that one captured graph serves a context of any length: a part
// is an even share of the keys there are, in whole tiles, and the last parts may be empty. In a block each
// warp takes its TURN keys of every tile, and the warps' sums are added in order at the end.
#include "attention.cuh"

#ifdef REAL_BF16
constexpr int TURN = 16;
#else
constexpr int TURN = 8;
#endif
constexpr int WARPS = 4;
constexpr int KEYS = TURN * WARPS;
constexpr int QUERIES = 16;
using Queries = Tile<QUERIES, HEAD>;

// What a sum under the largest score `most` counts for under `top`.
DEVICE float share(float most, float top) { return exp2f(most - base(top)); }

// q as in attention.cu. For each row of l r kv and part: sums [HEAD]; scales: largest score, sum of weights.
// Grid (tiles of 16 of the l r rows of a key head, parts, b kv).
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    attention_decode(const Real* q, long long stride, long long step, const Kept* keys, const Kept* values,
                     const int* length, const int* n, float* sums, float* scales, int l, int kv,
                     int r, int e, int room, float scale) {
    SHARED(Real, query);
    Real* stages = query + Queries::size;
    __shared__ float most[WARPS][QUERIES];
    __shared__ float weights[WARPS][QUERIES];
    int first = blockIdx.x * QUERIES, head = blockIdx.z % kv, b = blockIdx.z / kv;
    int before = length[b], known = before + added(n, b, l);
    int all = (known + KEYS - 1) / KEYS, each = (all + gridDim.y - 1) / gridDim.y;  // tiles
    int tile = blockIdx.y * each, tiles = max(0, min(each, all - tile));
    long long cache = (long long)blockIdx.z * room * e;
    Copies copies;
    auto fetch_stage = [&](int stage) {
        int key = (tile + stage) * KEYS;
        long long from = cache + (long long)key * e;
        Real* to = stages + stage % 2 * Stage<KEYS>::size;
        if (stage < tiles) Stage<KEYS>::fetch(copies, to, keys + from, values + from, known - key, e);
        copies.close();
    };
    q += b * stride + (long long)head * r * e;
    fetch_queries<QUERIES>(copies, query, q, step, first, l * r, r, e);
    fetch_stage(0);

    int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, sees[2];
#pragma unroll
    for (int half = 0; half < 2; half++) sees[half] = min(before + (first + g + 8 * half) / r + 1, known);
    Rows rows[1];
    begin(rows[0]);
    for (int stage = 0; stage < tiles; stage++) {
        copies.wait<0>();
        __syncthreads();  // this stage has arrived, and all have done with the other
        fetch_stage(stage + 1);
        const Real* here = stages + stage % 2 * Stage<KEYS>::size;
        const Real* key = here + Stage<KEYS>::Keys::at(warp * TURN, 0);
        const Real* value = here + Stage<KEYS>::values + warp * TURN * VALUE;
        float score[1][TURN / 8][4] = {};
        multiply<Queries, Stage<KEYS>::Keys>(score, query, key, e);
        int past = (tile + stage) * KEYS + warp * TURN;
        int visible[2] = {sees[0] - past, sees[1] - past};
        softmax(rows[0], score[0], scale, visible);
        weigh(rows, score, value, e);
    }
    copies.wait<0>();  // for the queries, where there was no key

    __syncthreads();  // the stages become room for the warps' sums, [warp][row][HEAD]
    float* warp_sums = reinterpret_cast<float*>(stages);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        int row = g + 8 * half;
        float sum = quad_sum(rows[0].sum[half]);
        if (t == 0) most[warp][row] = rows[0].most[half], weights[warp][row] = sum;
#pragma unroll
        for (int c = 0; c < HEAD / 64; c++)
#pragma unroll
            for (int i = 0; i < 16; i++)
                warp_sums[(warp * QUERIES + row) * HEAD + 64 * c + 16 * t + i] = rows[0].out[c][i][half];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < QUERIES * HEAD; i += blockDim.x) {
        int row = i / HEAD, query_row = first + row;
        if (query_row >= l * r) break;
        float top = most[0][row], sum = 0.0f, weight = 0.0f;
        for (int w = 1; w < WARPS; w++) top = fmaxf(top, most[w][row]);
        for (int w = 0; w < WARPS; w++) {
            sum += share(most[w][row], top) * warp_sums[w * QUERIES * HEAD + i];
            weight += share(most[w][row], top) * weights[w][row];
        }
        long long part = ((long long)blockIdx.z * l * r + query_row) * gridDim.y + blockIdx.y;
        sums[part * HEAD + i % HEAD] = sum;
        if (i % HEAD == 0) scales[2 * part] = top, scales[2 * part + 1] = weight;
    }
}

// y [b, l, kv, r, e]. Grid (l kv r, b); each of GROUPS warps adds every so many parts, each lane 4 elements.
constexpr int GROUPS = 8;
extern "C" __global__ void __launch_bounds__(32 * GROUPS)
    attention_combine(const float* sums, const float* scales, Real* y, int* length, const int* n,
                      int l, int kv, int r, int e, int parts, float v_scale) {
    __shared__ float group_sum[GROUPS][HEAD];
    __shared__ float group_weight[GROUPS];
    int position = blockIdx.x / (kv * r), head = blockIdx.x / r % kv, b = blockIdx.y;
    int lane = threadIdx.x % 32, group = threadIdx.x / 32;
    long long row = (((long long)b * kv + head) * l + position) * r + blockIdx.x % r;
    float top = -INFINITE;
    for (int part = lane; part < parts; part += 32) top = fmaxf(top, scales[2 * (row * parts + part)]);
    top = warp_max(top);
    float sum[4] = {}, weight = 0.0f;
#pragma unroll 8
    for (int part = group; part < parts; part += GROUPS) {
        const float* scale = scales + 2 * (row * parts + part);
        float v[4], counts = share(scale[0], top);
        read(sums + (row * parts + part) * HEAD + 4 * lane, v);
        weight += counts * scale[1];
#pragma unroll
        for (int i = 0; i < 4; i++) sum[i] += counts * v[i];
    }
    if (lane == 0) group_weight[group] = weight;
#pragma unroll
    for (int i = 0; i < 4; i++) group_sum[group][4 * lane + i] = sum[i];
    __syncthreads();
    if (threadIdx.x >= e) return;
    float total = 0.0f, value = 0.0f;
    for (int i = 0; i < GROUPS; i++) total += group_weight[i], value += group_sum[i][threadIdx.x];
    long long to = ((long long)b * gridDim.x + blockIdx.x) * e + threadIdx.x;
    y[to] = store(total > 0.0f ? value / total * v_scale : 0.0f);
    if (blockIdx.x == 0 && threadIdx.x == 0) length[b] += added(n, b, l);
}
