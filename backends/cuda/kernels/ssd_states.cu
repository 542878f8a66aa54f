// added = sum_j exp(a_end - a[j]) dt[j] x[j] B[j]' for each chunk, and its dt, a and decay.
//
// Grid: chunks, (head, tile of p), sequences; CHUNK threads. See ssd.cuh for the arrays.
#include "ssd.cuh"

struct Steps {
    double total[4], end;  // the sums of dt A of each warp, and of all
    float weight[CHUNK];
};

// The sum of x over this thread and those before it in the block; `total` [4] is shared memory.
DEVICE double running_sum(double x, double* total) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        double before = __shfl_up_sync(WARP, x, distance);
        if (lane >= distance) x += before;
    }
    if (lane == 31) total[warp] = x;
    __syncthreads();
    for (int i = 0; i < warp; i++) x += total[i];
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    ssd_states(const Real* x, const Real* dt, const float* A_log, const Real* B, const float* dt_bias,
               float* step, float* high, float* low, float* decay, float* added, const int* n, int first,
               int l, int h, int p, int g, int state, long long x_stride, long long dt_stride,
               long long B_stride, float least, float most) {
    SHARED(Real, shared);
    Real *X = shared, *Bt = shared + PIECES * Wide::size;
    Steps& steps = *reinterpret_cast<Steps*>(Bt);  // until B comes
    int tiles = (p + TILE - 1) / TILE, head = blockIdx.y / tiles, column = blockIdx.y % tiles * TILE;
    int t = threadIdx.x;
    Span span(n, l, first + blockIdx.x * CHUNK, CHUNK);
    // STEPS
    float size = 0.0f;
    if (t < span.count) size = time_step(dt + (span.row + t) * dt_stride + head, dt_bias[head], least, most);
    double a = running_sum(-(double)size * expf(A_log[head]), steps.total);
    if (t == CHUNK - 1) steps.end = a;
    __syncthreads();
    steps.weight[t] = expf((float)(steps.end - a)) * size;
    if (column == 0) {
        long long at = ((long long)blockIdx.z * h + head) * gridDim.x + blockIdx.x;
        step[at * CHUNK + t] = size;
        high[at * CHUNK + t] = (float)a;
        low[at * CHUNK + t] = (float)(a - (float)a);
        if (t == 0) decay[at] = expf((float)steps.end);
    }
    __syncthreads();
    // ADDED: x, weighted, times B, both transposed
    int depth = padded(max(1, span.count)), group = head / (h / g);
    x += span.row * x_stride + head * p + column;
    B += span.row * B_stride + group * state;
    added += ((((long long)blockIdx.z * gridDim.x + blockIdx.x) * h + head) * p + column) * state;
    transpose<PIECES>(X, x, x_stride, span.count, min(TILE, p - column), depth, steps.weight);
    for (int from = 0; from < state; from += TILE) {
        Sums sum = {};
        __syncthreads();  // what was there has been read
        transpose(Bt, B + from, B_stride, span.count, min(TILE, state - from), depth, nullptr);
        __syncthreads();
#pragma unroll
        for (int piece = 0; piece < PIECES; piece++) product(sum, X + piece * Wide::size, Bt, depth);
        each_sum(sum, [&](int r, int c, float* v) {
            c += from;
            if (r < p - column) write_pair(added + (long long)r * state + c, v, state - c, state % 2 == 0);
        });
    }
}
