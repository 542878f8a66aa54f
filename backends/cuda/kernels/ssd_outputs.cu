// y[i] = sum_{j <= i} (C[i].B[j]) exp(a[i] - a[j]) dt[j] x[j]  +  exp(a[i]) S C[i]  +  D x[i] within a chunk.
//
// A block computes TILE positions i and TILE columns of a head, four warps a 32 x 32 quarter each. C stays in
// shared memory; another tile there is the state, then B and x in turn for each TILE of positions j; M is
// C B', weighted. Grid: tiles of positions, (head, tile of p), sequences. The arrays are those of ssd.cuh.
#include "ssd.cuh"

// a and dt of the chunk, at the positions up to those of this block.
struct Decays {
    float high[CHUNK], low[CHUNK], step[CHUNK];

    DEVICE void read(const float* high, const float* low, const float* step, int count) {
        for (int t = threadIdx.x; t < count; t += blockDim.x)
            this->high[t] = high[t], this->low[t] = low[t], this->step[t] = step[t];
    }
    DEVICE float since_start(int i) const { return expf(high[i]); }
    DEVICE float between(int j, int i) const { return expf((high[i] - high[j]) + (low[i] - low[j])); }
};

// sum += rows of C times rows of `from` over the whole state, CHUNK columns at a time, through `other`.
DEVICE void times_C(float (&sum)[2][4][4], const Real* C, Real* other, const Real* from, long long stride,
                    int rows, int state) {
    for (int piece = 0; piece * CHUNK < state; piece++) {
        Copies copies;
        int width = min(CHUNK, state - piece * CHUNK);
        __syncthreads();  // what was in `other` has been read
        fill<Wide>(copies, other, from + piece * CHUNK, stride, rows, width);
        copies.close();
        copies.wait<0>();
        __syncthreads();
        product<Wide, Wide>(sum, C + piece * Wide::size, other, padded(width));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    ssd_outputs(const Real* x, const Real* B, const Real* C, const float* D, const float* step,
                const float* high, const float* low, const Real* before, Real* y, const int* n, int first,
                int l, int h, int p, int g, int state, long long x_stride, long long B_stride,
                long long C_stride) {
    SHARED(Real, shared);
    __shared__ Decays decays;
    int pieces = (state + CHUNK - 1) / CHUNK;
    Real *M = shared, *other = M + Square::size, *rows_of_C = other + Wide::size;
    int tiles = (p + TILE - 1) / TILE, head = blockIdx.y / tiles, column = blockIdx.y % tiles * TILE;
    int group = head / (h / g), width = min(TILE, p - column);
    int chunk = blockIdx.x / (CHUNK / TILE), start = blockIdx.x % (CHUNK / TILE) * TILE;  // of this chunk
    int chunks = (gridDim.x + CHUNK / TILE - 1) / (CHUNK / TILE);
    Span here(n, l, first + chunk * CHUNK, start + TILE);  // of the chunk, up to the end of this tile
    if (here.count <= start) return;
    x += here.row * x_stride + head * p + column;
    B += here.row * B_stride + group * state;
    C += (here.row + start) * C_stride + group * state;
    y += ((here.row + start) * h + head) * p + column;
    long long at = (((long long)blockIdx.z * h + head) * chunks + chunk) * CHUNK;
    decays.read(high + at, low + at, step + at, start + TILE);
    Copies copies;
    for (int piece = 0; piece < pieces; piece++)
        fill<Wide>(copies, rows_of_C + piece * Wide::size, C + piece * CHUNK, C_stride, here.count - start,
                   min(CHUNK, state - piece * CHUNK));
    copies.close();
    copies.wait<0>();
    // FROM BEFORE: the state, decayed to each position
    float sum[2][4][4] = {};
    before += ((((long long)blockIdx.z * chunks + chunk) * h + head) * p + column) * state;
    times_C(sum, rows_of_C, other, before, state, width, state);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int q = 0; q < 4; q++) {
            float since = decays.since_start(start + sum_row(i, q));
#pragma unroll
            for (int j = 0; j < 4; j++) sum[i][j][q] *= since;
        }
    // WITHIN the chunk: attention-like, masked by causality and weighted by the decay
    for (int from = 0; from <= start; from += TILE) {
        int rows = min(TILE, here.count - from);
        float mixed[2][4][4] = {};
        times_C(mixed, rows_of_C, other, B + from * B_stride, B_stride, rows, state);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int q = 0; q < 4; q += 2) {
                    int r = sum_row(i, q), c = sum_column(j, q);
                    float m[2];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        int to = start + r, at = from + c + e;
                        m[e] =
                            at <= to ? mixed[i][j][q + e] * decays.between(at, to) * decays.step[at] : 0.0f;
                    }
                    write(M + Square::at(r, c), m);
                }
        __syncthreads();  // M is there, and B has been read
        transpose<Square>(other, x + from * x_stride, x_stride, rows, width, padded(rows), nullptr);
        __syncthreads();
        product<Square, Square>(sum, M, other, padded(rows));
    }
    // SKIP
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int q = 0; q < 4; q += 2) {
                int r = sum_row(i, q), c = sum_column(j, q);
                if (start + r >= here.count) continue;
                const Real* from = x + (start + r) * x_stride + c;
                for (int e = 0; e < 2; e++)
                    if (c + e < width) sum[i][j][q + e] += D[head] * load(from[e]);
                write_pair(y + (long long)r * h * p + c, &sum[i][j][q], width - c, p % 2 == 0);
            }
}
