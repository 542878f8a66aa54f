// The state passes through the chunks: before[c] = S, S <- decay[c] S + added[c], c = 0, 1, ...
//
// Elementwise, so that each thread goes through all chunks with its N elements of a head's p x n; what it
// reads of the next AHEAD chunks does not wait for the state. S is read at the beginning and written at the
// end, in place. Grid: tiles of a head's elements, heads, sequences. See ssd.cuh for the arrays.
#include "rounding.cuh"

constexpr int AHEAD = 4;

template <int N>
DEVICE void pass(State* S, const float* decay, const float* added, Real* before, int chunks, long long stride,
                 unsigned element, const Random& random) {
    float s[N], next[AHEAD][N];
    read(S, s);
    for (int first = 0; first < chunks; first += AHEAD) {
#pragma unroll
        for (int c = 0; c < AHEAD; c++)
            if (first + c < chunks) read(added + (first + c) * stride, next[c]);
#pragma unroll
        for (int c = 0; c < AHEAD; c++) {
            if (first + c >= chunks) continue;
            write(before + (first + c) * stride, s);
            float factor = decay[first + c];
#pragma unroll
            for (int i = 0; i < N; i++) s[i] = factor * s[i] + next[c][i];
        }
    }
    write_state(S, s, random, element);
}

extern "C" __global__ void __launch_bounds__(128)
    ssd_pass(State* S, const float* decay, const float* added, Real* before, const int* key, const int* read,
             const int* n, int end, int chunks, int h, int size) {
    long long b = blockIdx.z, head = blockIdx.y, at = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
    unsigned element = head * size + at;
    S += b * h * size + element;
    Random random = random_of(key, read, b, n ? min(n[b], end) : end);
    decay += (b * h + head) * chunks;
    long long from = (b * chunks * h + head) * size + at, stride = (long long)h * size;
    if (size % 4 == 0 && at < size)
        pass<4>(S, decay, added + from, before + from, chunks, stride, element, random);
    if (size % 4 != 0)
        for (int i = 0; i < min(4, (int)(size - at)); i++)
            pass<1>(S + i, decay, added + from + i, before + from + i, chunks, stride, element + i, random);
}
