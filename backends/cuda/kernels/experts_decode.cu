// The experts of a few tokens: each chosen matrix is read once, straight from memory, for one token.
//
//   experts_up_few     up[t, s] = relu(u[t] up_e')^2                    e = expert[t, s] - first
//   experts_down_few   y[t] = sum over s of  weight[t, s] up[t, s] down_e'     in the order of the slots s
//
// A warp multiplies ROWS rows of a matrix by one vector, 16 bytes a lane and row at a time: the sum is over
// lanes, and the more rows, the more bytes are on their way at once. Choices outside of
// first .. first + count - 1 add nothing.
#include "tiles.cuh"

constexpr int ROWS = 4;
constexpr int WARPS = 4;   // of a block of experts_up_few
constexpr int SLOTS = 64;  // the most choices of a token

// sum[r] = x . matrix[row + r], in every lane. A row beyond the last is read as the last.
template <int N>
DEVICE void rows_by_vector(float (&sum)[ROWS], const Real* x, const Real* matrix, int row, int rows,
                           int width) {
    const Real* from[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        from[r] = matrix + (long long)min(row + r, rows - 1) * width;
        sum[r] = 0.0f;
    }
#pragma unroll 2
    for (int k = threadIdx.x % 32 * N; k < width; k += 32 * N) {
        float v[N], m[N];
        read(x + k, v);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            read(from[r] + k, m);
#pragma unroll
            for (int i = 0; i < N; i++) sum[r] += v[i] * m[i];
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) sum[r] = warp_sum(sum[r]);
}

DEVICE void product(float (&sum)[ROWS], const Real* x, const Real* matrix, int row, int rows, int width) {
    if (width % PACK == 0 && aligned(x) && aligned(matrix))
        rows_by_vector<PACK>(sum, x, matrix, row, rows, width);
    else
        rows_by_vector<1>(sum, x, matrix, row, rows, width);
}

// u [t, width] by rows `stride` apart, up [count, rows, width], y [t k, rows]. Grid (rows / 16, t k).
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    experts_up_few(const Real* u, long long stride, const Real* up, const int* expert, Real* y, int k,
                   int first, int count, int rows, int width) {
    int e = expert[blockIdx.y] - first, row = (blockIdx.x * WARPS + threadIdx.x / 32) * ROWS;
    if (e < 0 || e >= count || row >= rows) return;
    float sum[ROWS];
    product(sum, u + blockIdx.y / k * stride, up + (long long)e * rows * width, row, rows, width);
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
        if (lane == r && row + r < rows) y[(long long)blockIdx.y * rows + row + r] = store(relu2(sum[r]));
}

// x [t k, width], down [count, rows, width], y [t, rows]. Grid (rows / ROWS, t), any number of whole warps,
// each of which takes every so many slots.
extern "C" __global__ void experts_down_few(const Real* x, const Real* down, const int* expert,
                                            const float* weight, Real* y, int k, int first, int count,
                                            int rows, int width) {
    __shared__ float part[SLOTS][ROWS];
    int lane = threadIdx.x % 32, row = blockIdx.x * ROWS;
    long long choice = (long long)blockIdx.y * k;
    for (int slot = threadIdx.x / 32; slot < k; slot += blockDim.x / 32) {
        int e = expert[choice + slot] - first;
        float sum[ROWS] = {};
        if (e >= 0 && e < count)
            product(sum, x + (choice + slot) * width, down + (long long)e * rows * width, row, rows, width);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (lane == r) part[slot][r] = sum[r];
    }
    __syncthreads();
    if (threadIdx.x >= ROWS || row + threadIdx.x >= rows) return;
    float sum = 0.0f;
    for (int slot = 0; slot < k; slot++) sum += weight[choice + slot] * part[slot][threadIdx.x];
    y[(long long)blockIdx.y * rows + row + threadIdx.x] = store(sum);
}
