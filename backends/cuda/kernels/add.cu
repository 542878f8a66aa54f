// y[i] = a[i] + b[i], rounded once.
#include "common.cuh"

extern "C" __global__ void add(const Real* a, const Real* b, Real* y, long long size) {
    for (long long i = first_element(); i < size; i += next_element()) y[i] = store(load(a[i]) + load(b[i]));
}
