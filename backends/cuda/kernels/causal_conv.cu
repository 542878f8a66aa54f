// y[t] = silu(bias + sum_j w[j] x[t - k + 1 + j]), j = 0 .. k-1; before x comes the tail of k - 1 rows.
//
// x is [b, l, c] with a row every x_stride values, y [b, l, c], weight [c, k], tail [b, k - 1, c], which
// becomes the rows before position n[b]. Only rows before it are read. The thread that computes the first
// positions of some channels reads their tail before it writes it, and no other thread touches it.
#include "common.cuh"

constexpr int TAPS = 4;   // the widest kernel; a narrower one has zeros in front
constexpr int SPAN = 16;  // positions of a thread
constexpr int AHEAD = 4;
constexpr int THREADS = 128;

// Row t of x, counted from the first position; below 0 it is the tail, and below that zeros.
template <int N>
DEVICE void row(const Real* x, const Real* tail, int t, int k, int c, long long x_stride, float (&v)[N]) {
    if (t >= 0) {
        read(x + t * x_stride, v);
    } else if (t + k - 1 >= 0) {
        read(tail + (t + k - 1) * (long long)c, v);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = 0.0f;
    }
}

template <int N>
DEVICE void weigh(const float* weight, int k, float (&w)[TAPS][N]) {
#pragma unroll
    for (int j = 0; j < TAPS; j++) {
        int tap = j - (TAPS - k);
#pragma unroll
        for (int i = 0; i < N; i++) w[j][i] = tap >= 0 ? weight[i * k + tap] : 0.0f;
    }
}

// Positions from `first` on, SPAN of them at most; all pointers at this thread's channels of this sequence.
// The next AHEAD rows are read at once.
template <int N>
DEVICE void convolve(const Real* x, const float* weight, const float* bias, Real* tail, Real* y, int first,
                     int end, int c, int k, long long x_stride) {
    float w[TAPS][N], base[N], window[TAPS - 1 + AHEAD][N];
    weigh(weight, k, w);
    read(bias, base);
#pragma unroll
    for (int j = 1; j < TAPS; j++) row(x, tail, first - TAPS + j, k, c, x_stride, window[j - 1]);
    end = min(first + SPAN, end);
    for (int t = first; t < end; t += AHEAD) {
#pragma unroll
        for (int u = 0; u < AHEAD; u++)
            if (t + u < end) read(x + (t + u) * x_stride, window[TAPS - 1 + u]);
#pragma unroll
        for (int u = 0; u < AHEAD; u++) {
            if (t + u >= end) continue;
            float sum[N];
#pragma unroll
            for (int i = 0; i < N; i++) {
                sum[i] = base[i];
#pragma unroll
                for (int j = 0; j < TAPS; j++) sum[i] += w[j][i] * window[u + j][i];
                sum[i] = silu(sum[i]);
            }
            write(y + (t + u) * (long long)c, sum);
        }
#pragma unroll
        for (int j = 0; j < TAPS - 1; j++)
#pragma unroll
            for (int i = 0; i < N; i++) window[j][i] = window[AHEAD + j][i];
    }
}

// The tail after `end` positions. Its oldest row comes first and is read first, so it can move down in place.
template <int N>
DEVICE void remember(const Real* x, Real* tail, int end, int k, int c, long long x_stride) {
    for (int j = 0; j < k - 1; j++) {
        float v[N];
        row(x, tail, end - (k - 1) + j, k, c, x_stride, v);
        write(tail + j * (long long)c, v);
    }
}

template <int N>
DEVICE void channels(const Real* x, const float* weight, const float* bias, Real* tail, Real* y, int at,
                     int first, int end, int c, int k, long long x_stride) {
    convolve<N>(x + at, weight + (long long)at * k, bias + at, tail + at, y + at, first, end, c, k, x_stride);
    if (first == 0) remember<N>(x + at, tail + at, end, k, c, x_stride);
}

// Grid: SPANs of positions, and within each tiles of channels; sequences. Only the first n[b] positions are
// real, or all.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    causal_conv(const Real* x, const float* weight, const float* bias, Real* tail, Real* y, const int* n,
                int l, int c, int k, long long x_stride) {
    int across = (c + THREADS * PACK - 1) / (THREADS * PACK), first = blockIdx.x / across * SPAN;
    int thread = blockIdx.x % across * THREADS + threadIdx.x;
    long long b = blockIdx.y;
    int end = n ? min(n[b], l) : l;
    x += b * l * x_stride;
    y += b * l * c;
    tail += b * (k - 1) * c;
    bool packed =
        c % PACK == 0 && x_stride % PACK == 0 && aligned(x) && aligned(y) && aligned(tail) && aligned(bias);
    if (packed && thread * PACK < c)
        channels<PACK>(x, weight, bias, tail, y, thread * PACK, first, end, c, k, x_stride);
    if (!packed)
        for (int at = thread * PACK; at < min(c, thread * PACK + PACK); at++)
            channels<1>(x, weight, bias, tail, y, at, first, end, c, k, x_stride);
}

// One position of each sequence, a channel a thread. Grid: channels, sequences.
extern "C" __global__ void __launch_bounds__(THREADS)
    causal_conv_update(const Real* x, const float* weight, const float* bias, Real* tail, Real* y,
                       const int* n, int c, int k, long long x_stride) {
    int at = blockIdx.x * blockDim.x + threadIdx.x;
    long long b = blockIdx.y;
    if (at >= c || (n && n[b] == 0)) return;
    channels<1>(x + b * x_stride, weight, bias, tail + b * (k - 1) * c, y + b * c, at, 0, 1, c, k, x_stride);
}
