// y[i] = sum_{j <= i} (C[i].B[j]) exp(a[i] - a[j]) dt[j] x[j]  +  exp(a[i]) S C[i]  +  D x[i] within a chunk.
//
// A block computes TILE positions i and TILE columns of a head, four warps a 32 x 32 quarter each. Two tiles of
// shared memory hold C and the state, then C B' (of ssd_scores.cu), weighted, and x. Grid: tiles of positions,
// (head, tile of p), sequences. The arrays are those of ssd.cuh.
#include "ssd.cuh"

// a and dt of the chunk, at the positions up to those of this block.
struct Decays {
    float high[CHUNK], low[CHUNK], step[CHUNK];

    DEVICE void read(const float* high, const float* low, const float* step, int count) {
        for (int t = threadIdx.x; t < count; t += blockDim.x)
            this->high[t] = high[t], this->low[t] = low[t], this->step[t] = step[t];
    }
    DEVICE float since_start(int i) const { return expf(high[i]); }
    // What x[j] counts for at i; nothing where it comes later.
    DEVICE float weight(int j, int i) const {
        return j <= i ? expf((high[i] - high[j]) + (low[i] - low[j])) * step[j] : 0.0f;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    ssd_outputs(const Real* x, const Real* C, const float* D, const float* step, const float* high,
                const float* low, const Real* before, const float* scores, Real* y, const int* n, int first,
                int l, int h, int p, int g, int state, long long x_stride, long long C_stride) {
    SHARED(Real, shared);
    __shared__ Decays decays;
    Real *one = shared, *other = shared + Wide::size;
    int tiles = (p + TILE - 1) / TILE, head = blockIdx.y / tiles, column = blockIdx.y % tiles * TILE;
    int group = head / (h / g), width = min(TILE, p - column);
    int chunk = blockIdx.x / (CHUNK / TILE), start = blockIdx.x % (CHUNK / TILE) * TILE;  // of this chunk
    int chunks = (gridDim.x + CHUNK / TILE - 1) / (CHUNK / TILE);
    Span here(n, l, first + chunk * CHUNK, start + TILE);  // of the chunk, up to the end of this tile
    if (here.count <= start) return;
    x += here.row * x_stride + head * p + column;
    C += (here.row + start) * C_stride + group * state;
    y += ((here.row + start) * h + head) * p + column;
    long long at = (((long long)blockIdx.z * h + head) * chunks + chunk) * CHUNK;
    decays.read(high + at, low + at, step + at, start + TILE);
    // FROM BEFORE: the state, decayed to each position
    Sums sum = {};
    before += ((((long long)blockIdx.z * chunks + chunk) * h + head) * p + column) * state;
    product(sum, {C, C_stride, here.count - start}, {before, state, width}, state, one, other);
    each_sum(sum, [&](int r, int c, float* v) {
        float since = decays.since_start(start + r);
        v[0] *= since, v[1] *= since;
    });
    // WITHIN the chunk: attention-like, masked by causality and weighted by the decay
    __syncthreads();  // C and the state have been read
    for (int from = 0; from <= start; from += TILE) {
        const float* place = scores + scores_at(chunks, chunk, g, group, (start + from) / TILE);
        Sums score;
#pragma unroll
        for (int k = 0; k < 8; k++) read(place + k * NEXT_SCORES, score[k / 4][k % 4]);
        each_sum(score, [&](int r, int c, float* v) {
            v[0] *= decays.weight(from + c, start + r), v[1] *= decays.weight(from + c + 1, start + r);
            write_pair(one + Wide::at(r, from + c), v, 2, true);
        });
    }
    int depth = padded(here.count);
    transpose(other, x, x_stride, here.count, width, depth, nullptr);
    __syncthreads();
    product(sum, one, other, depth);
    // SKIP
    each_sum(sum, [&](int r, int c, float* v) {
        if (start + r >= here.count) return;
        const Real* from = x + (start + r) * x_stride + c;
        for (int e = 0; e < 2; e++)
            if (c + e < width) v[e] += D[head] * load(from[e]);
        write_pair(y + (long long)r * h * p + c, v, width - c, p % 2 == 0);
    });
}
