// y = u / sqrt(mean(u^2) + eps) * w over the d channels, where u = x, or u = x + delta rounded to Real.
//
// A block for each row. The host takes about d / PACK threads, so that a thread holds its 16 bytes of the row
// in registers between the two passes; what is beyond those, in rows too long for that, is read again.
#include "common.cuh"

// The sum at `at`, as it will be stored; `total` is where to, or null where there is nothing to add.
template <int N>
DEVICE void add(const Real* x, const Real* delta, Real* total, int at, float (&u)[N]) {
    read(x + at, u);
    if (total == nullptr) return;
    float more[N];
    read(delta + at, more);
#pragma unroll
    for (int i = 0; i < N; i++) u[i] = load(store(u[i] + more[i]));
    write(total + at, u);
}

template <int N>
DEVICE void normalise(const Real* x, const Real* delta, const float* weight, Real* y, Real* total, int d,
                      float eps) {
    __shared__ float partial[32];
    int first = threadIdx.x * N, step = blockDim.x * N;
    float held[N], squares = 0.0f;
    for (int at = first; at < d; at += step) {
        float u[N];
        add(x, delta, total, at, u);
#pragma unroll
        for (int i = 0; i < N; i++) {
            squares += u[i] * u[i];
            if (at == first) held[i] = u[i];
        }
    }
    float scale = 1.0f / sqrtf(block_sum(squares, partial) / d + eps);
    for (int at = first; at < d; at += step) {
        float u[N], w[N];
        if (at > first) read((total ? total : x) + at, u);
        read(weight + at, w);
#pragma unroll
        for (int i = 0; i < N; i++) u[i] = (at > first ? u[i] : held[i]) * scale * w[i];
        write(y + at, u);
    }
}

// x and delta have a row every x_stride and delta_stride values; y and total are [rows, d]. Where nothing is
// added, delta and total are null.
extern "C" __global__ void __launch_bounds__(1024)
    rms_norm(const Real* x, const Real* delta, const float* weight, Real* y, Real* total, int d,
             long long x_stride, long long delta_stride, float eps) {
    long long row = blockIdx.x;
    x += row * x_stride;
    y += row * d;
    if (total) delta += row * delta_stride, total += row * d;
    if (d % PACK == 0 && aligned(x) && aligned(y) && aligned(weight) && aligned(delta) && aligned(total))
        normalise<PACK>(x, delta, weight, y, total, d, eps);
    else normalise<1>(x, delta, weight, y, total, d, eps);
}
