// h W', one logit for each token and expert, in float whatever Real is.
//
// For few tokens each row of W is read once, by a block of its own; for many, a block has a tile of tokens
// and experts. There the bfloat16 build splits W into three bfloat16 that add up to it, so that tensor cores
// lose nothing. What follows from the logits is in route.cu.
#include "tiles.cuh"

constexpr int FEW = 8;                                // tokens of a block of router_few
constexpr int TOKENS = 32, COLUMNS = 64, DEPTH = 64;  // the tile of router_many
#ifdef REAL_BF16
constexpr int PIECES = 3;
#else
constexpr int PIECES = 1;
#endif

template <int N>
DEVICE void dots(const Real* h, const float* gate, int tokens, int d, long long h_stride, float (&sum)[FEW]) {
    for (int at = threadIdx.x * N; at < d; at += blockDim.x * N) {
        float w[N], x[N];
        read(gate + at, w);
#pragma unroll
        for (int t = 0; t < FEW; t++) {
            if (t >= tokens) continue;
            read(h + t * h_stride + at, x);
#pragma unroll
            for (int i = 0; i < N; i++) sum[t] += w[i] * x[i];
        }
    }
}

// logits [tokens, experts] of h, a row every h_stride values, and gate [experts, d].
// Grid: experts, FEWs of tokens.
extern "C" __global__ void __launch_bounds__(256)
    router_few(const Real* h, const float* gate, float* logits, int tokens, int experts, int d,
               long long h_stride) {
    __shared__ float partial[32];
    int first = blockIdx.y * FEW;
    float sum[FEW] = {};
    h += first * h_stride;
    gate += (long long)blockIdx.x * d;
    if (d % PACK == 0 && h_stride % PACK == 0 && aligned(h) && aligned(gate))
        dots<PACK>(h, gate, tokens - first, d, h_stride, sum);
    else dots<1>(h, gate, tokens - first, d, h_stride, sum);
#pragma unroll
    for (int t = 0; t < FEW; t++) {
        if (t >= tokens - first) continue;
        float total = block_sum(sum[t], partial);
        if (threadIdx.x == 0) logits[(long long)(first + t) * experts + blockIdx.x] = total;
    }
}

typedef Tile<TOKENS, DEPTH> Rows;
typedef Tile<COLUMNS, DEPTH> Columns;
constexpr int THREADS = 128, H_PACKS = TOKENS * DEPTH / PACK / THREADS,
              GATE_PACKS = COLUMNS * DEPTH / PACK / THREADS;

// What a thread reads of h and of the gate, while the block still multiplies what was read before.
struct Ahead {
    float h[H_PACKS][PACK], gate[GATE_PACKS][PACK];

    // PACK of the `width` values from the step `at` on of row `row`, of which `count` are there; else zeros.
    template <class T>
    DEVICE static void take(float (&v)[PACK], const T* from, int row, int count, int at, int width,
                            long long stride, bool fast) {
        from += row * stride + at;
        if (fast && row < count && at + PACK <= width) {
            read(from, v);
        } else {
#pragma unroll
            for (int i = 0; i < PACK; i++) v[i] = row < count && at + i < width ? load(from[i]) : 0.0f;
        }
    }

    // Where the i-th pack of this thread is in a tile.
    DEVICE static int row(int i) { return (threadIdx.x + i * THREADS) / (DEPTH / PACK); }
    DEVICE static int step() { return threadIdx.x % (DEPTH / PACK) * PACK; }

    DEVICE void read_h(const Real* from, int count, int first, int d, long long stride, bool fast) {
#pragma unroll
        for (int i = 0; i < H_PACKS; i++) take(h[i], from, row(i), count, first + step(), d, stride, fast);
    }
    DEVICE void read_gate(const float* from, int count, int first, int d, bool fast) {
#pragma unroll
        for (int i = 0; i < GATE_PACKS; i++) take(gate[i], from, row(i), count, first + step(), d, d, fast);
    }
    DEVICE void keep(Real* rows, Real* columns) {
#pragma unroll
        for (int i = 0; i < H_PACKS; i++) write(rows + Rows::at(row(i), step()), h[i]);
#pragma unroll
        for (int i = 0; i < GATE_PACKS; i++)
#pragma unroll
            for (int piece = 0; piece < PIECES; piece++) {
                write(columns + piece * Columns::size + Columns::at(row(i), step()), gate[i]);
#pragma unroll
                for (int e = 0; e < PACK; e++) gate[i][e] -= load(store(gate[i][e]));
            }
    }
};

// Grid: tiles of tokens, and within each tiles of experts; four warps, each 16 tokens and 32 experts.
extern "C" __global__ void __launch_bounds__(THREADS)
    router_many(const Real* h, const float* gate, float* logits, int tokens, int experts, int d,
                long long h_stride) {
    __shared__ __align__(16) Real rows[Rows::size];
    __shared__ __align__(16) Real columns[PIECES * Columns::size];
    int across = (experts + COLUMNS - 1) / COLUMNS, warp = threadIdx.x >> 5;
    int token = blockIdx.x / across * TOKENS, expert = blockIdx.x % across * COLUMNS;
    int row = 16 * (warp & 1), column = 32 * (warp >> 1);
    float sum[1][4][4] = {};
    h += token * h_stride;
    gate += (long long)expert * d;
    bool fast_h = h_stride % PACK == 0 && aligned(h), fast_gate = d % PACK == 0 && aligned(gate);
    Ahead ahead;
    ahead.read_h(h, tokens - token, 0, d, h_stride, fast_h);
    ahead.read_gate(gate, experts - expert, 0, d, fast_gate);
    for (int first = 0; first < d; first += DEPTH) {
        ahead.keep(rows, columns);
        __syncthreads();
        if (first + DEPTH < d) {
            ahead.read_h(h, tokens - token, first + DEPTH, d, h_stride, fast_h);
            ahead.read_gate(gate, experts - expert, first + DEPTH, d, fast_gate);
        }
        float part[1][4][4] = {};  // matrix units cut off what they add; the long sum is rounded to nearest
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++)
            multiply<Rows, Columns>(part, rows + Rows::at(row, 0),
                                    columns + piece * Columns::size + Columns::at(column, 0), DEPTH);
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int p = 0; p < 4; p++) sum[0][j][p] += part[0][j][p];
        __syncthreads();  // the tiles have been read
    }
    each_pair(sum, [&](int r, int c, float* v) {
        r += token + row, c += expert + column;
        if (r < tokens) write_pair(logits + (long long)r * experts + c, v, experts - c, experts % 2 == 0);
    });
}
