// x[i] = table[ids[i]]        rows of the table, not scaled
//
// An id outside the table makes a row of NaN: nothing else is read, and nothing hides it.
#include "common.cuh"

// table [vocabulary, width]. One block a row.
extern "C" __global__ void embed(const int* ids, const Real* table, Real* x, int vocabulary, int width) {
    int id = ids[blockIdx.x];
    bool there = 0 <= id && id < vocabulary;
    const Real* from = table + (long long)(there ? id : 0) * width;
    Real* to = x + (long long)blockIdx.x * width;
    if (there && width % PACK == 0 && aligned(table) && aligned(x)) {
        for (int i = threadIdx.x; i < width / PACK; i += blockDim.x)
            reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(from)[i];
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x)
            to[i] = there ? from[i] : store(__int_as_float(0x7fc00000));
    }
}
