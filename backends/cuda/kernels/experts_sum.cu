// y[token] = sum over its choices of  weight rows[place]     in the fixed order of its k slots, in float
//
// A choice with place -1 has its expert on another rank and adds nothing here. A thread makes PACK neighbours
// of a row, or one where rows do not begin on 16 bytes.
#include "common.cuh"

template <int N>
DEVICE void weighted_sum(const Real* rows, const int* place, const float* weight, Real* y, int k, int width,
                         int column) {
    long long choice = (long long)blockIdx.x * k;
    float sum[N] = {};
    for (int slot = 0; slot < k; slot++) {
        int at = place[choice + slot];
        if (at < 0) continue;
        float row[N];
        read(rows + (long long)at * width + column, row);
#pragma unroll
        for (int i = 0; i < N; i++) sum[i] += weight[choice + slot] * row[i];
    }
    write(y + (long long)blockIdx.x * width + column, sum);
}

// One block a token, and as many side by side as its width needs.
extern "C" __global__ void experts_sum(const Real* rows, const int* place, const float* weight, Real* y,
                                       int k, int width) {
    int thread = blockIdx.y * blockDim.x + threadIdx.x;
    bool fast = width % PACK == 0 && aligned(rows) && aligned(y);
    if (fast && thread * PACK < width)
        weighted_sum<PACK>(rows, place, weight, y, k, width, thread * PACK);
    for (int i = thread; !fast && i < width; i += gridDim.y * blockDim.x)
        weighted_sum<1>(rows, place, weight, y, k, width, i);
}
