// y[i] = a[i] + b[i], rounded once.
#include "common.cuh"

extern "C" __global__ void add(const Real* a, const Real* b, Real* y, long long size) {
    long long first = (long long)blockIdx.x * blockDim.x + threadIdx.x, step = (long long)gridDim.x * blockDim.x;
    for (long long i = first; i < size; i += step) y[i] = store(load(a[i]) + load(b[i]));
}
