// x[i] <- max(x[i], 0)^2, in place.
#include "common.cuh"

extern "C" __global__ void relu2(Real* x, long long size) {
    for (long long i = first_element(); i < size; i += next_element()) {
        float v = fmaxf(load(x[i]), 0.0f);
        x[i] = store(v * v);
    }
}
