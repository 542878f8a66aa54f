// x[i] <- max(x[i], 0)^2, in place.
#include "common.cuh"

extern "C" __global__ void relu2(Real* x, long long size) {
    long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x, step = (long long)gridDim.x * blockDim.x;
    for (long long i = first; i < size; i += step) {
        float v = fmaxf(load(x[i]), 0.0f);
        x[i] = store(v * v);
    }
}
