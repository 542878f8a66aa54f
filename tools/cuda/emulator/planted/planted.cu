// Kernels with one mistake each, and beside some of them the same without it. tests/backends/cuda/test_emulator.py says who
// must find which. All run with one block of 64 threads unless it says otherwise there.

#ifdef CUDA_ON_CPU
#define DEVICE inline
#else
#define DEVICE __device__ inline
#endif
typedef float Real;

constexpr unsigned WARP = 0xffffffffu;

// y[i] = the sum over a warp of x, plus the value of the next thread, through shared memory.
DEVICE float through_shared(const float* x, bool wait) {
    __shared__ float tile[64];
    tile[threadIdx.x] = x[threadIdx.x];
    if (wait) __syncthreads();
    return tile[(threadIdx.x + 1) % 64];
}

extern "C" __global__ void good_barrier(const float* x, float* y) { y[threadIdx.x] = through_shared(x, true); }
extern "C" __global__ void missing_barrier(const float* x, float* y) { y[threadIdx.x] = through_shared(x, false); }

// The lanes of a warp give each other what they read; a shuffle orders nothing in memory.
DEVICE float through_warp(const float* x, bool wait) {
    __shared__ float tile[64];
    tile[threadIdx.x] = x[threadIdx.x];
    float first = __shfl_sync(WARP, x[threadIdx.x], 0);
    if (wait) __syncwarp();
    return tile[threadIdx.x ^ 1] + 0.0f * first;
}

extern "C" __global__ void good_warp(const float* x, float* y) { y[threadIdx.x] = through_warp(x, true); }
extern "C" __global__ void missing_syncwarp(const float* x, float* y) { y[threadIdx.x] = through_warp(x, false); }

// x has 64 elements.
extern "C" __global__ void read_past_the_end(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }
extern "C" __global__ void write_past_the_end(const float* x, float* y) { y[threadIdx.x + 1] = x[threadIdx.x]; }

// The last element of the tile is never written.
extern "C" __global__ void unwritten_shared(const float* x, float* y) {
    __shared__ float tile[65];
    tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x + 1];
}

extern "C" __global__ void past_shared(const float* x, float* y) {
    __shared__ float tile[64];
    tile[threadIdx.x + 1] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = tile[threadIdx.x];
}

extern "C" __global__ void unwritten_output(const float* x, float* y) {
    if (threadIdx.x < 63) y[threadIdx.x] = x[threadIdx.x];
}

extern "C" __global__ void misaligned(const float* x, float* y) {
    if (threadIdx.x < 8) {
        float4 four = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x + 1);
        y[threadIdx.x] = four.x + four.y + four.z + four.w;
    }
}

// Every block writes the same element.
extern "C" __global__ void cross_block_race(const float* x, float* y) {
    if (threadIdx.x == 0) y[0] = x[blockIdx.x];
}

extern "C" __global__ void own_element(const float* x, float* y) {
    if (threadIdx.x == 0) y[blockIdx.x] = x[blockIdx.x];
}

// Blocks use the same shared memory one after another, which is no race.
extern "C" __global__ void shared_in_each_block(const float* x, float* y) {
    __shared__ float tile[64];
    tile[threadIdx.x] = x[threadIdx.x] + blockIdx.x;
    __syncthreads();
    y[blockIdx.x * 64 + threadIdx.x] = tile[63 - threadIdx.x];
}

extern "C" __global__ void divergent_barrier(const float* x, float* y) {
    if (threadIdx.x < 32) {
        __syncthreads();
        y[threadIdx.x] = x[threadIdx.x];
    } else {
        __syncthreads();
    }
}

extern "C" __global__ void early_exit(const float* x, float* y) {
    if (threadIdx.x == 5) return;
    __syncthreads();
    y[threadIdx.x] = x[threadIdx.x];
}

extern "C" __global__ void barrier_and_shuffle(const float* x, float* y) {
    if (threadIdx.x == 7)
        __syncthreads();
    else
        y[threadIdx.x] = __shfl_sync(WARP, x[threadIdx.x], 0);
}

extern "C" __global__ void exit_before_shuffle(const float* x, float* y) {
    if (threadIdx.x == 9) return;
    y[threadIdx.x] = __shfl_xor_sync(WARP, x[threadIdx.x], 1);
}

extern "C" __global__ void not_in_mask(const float* x, float* y) {
    y[threadIdx.x] = __shfl_sync(0x0000ffffu, x[threadIdx.x], 0);
}

extern "C" __global__ void source_not_in_mask(const float* x, float* y) {
    if (threadIdx.x < 16) y[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, x[threadIdx.x], 16);
}

extern "C" __global__ void different_masks(const float* x, float* y) {
    y[threadIdx.x] = __shfl_sync(threadIdx.x % 32 < 31 ? WARP : 0x80000001u, x[threadIdx.x], 0);
}

extern "C" __global__ void bad_width(const float* x, float* y) {
    y[threadIdx.x] = __shfl_down_sync(WARP, x[threadIdx.x], 1, 12);
}

extern "C" __global__ void bad_source(const float* x, float* y) {
    y[threadIdx.x] = __shfl_sync(WARP, x[threadIdx.x], 8, 8);
}

extern "C" __global__ void bad_distance(const float* x, float* y) {
    y[threadIdx.x] = __shfl_up_sync(WARP, x[threadIdx.x], 32);
}

extern "C" __global__ void undeclared_shared(const float* x, float* y) {
#ifdef CUDA_ON_CPU
    SHARED(float, tile);
#else
    extern __shared__ float tile[];
#endif
    tile[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = tile[threadIdx.x];
}

extern "C" __global__ void too_much_static(const float* x, float* y) {
    __shared__ float tile[12289];
    tile[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = tile[threadIdx.x];
}

extern "C" __global__ void wild_pointer(const float* x, float* y) {
    y[(long long)threadIdx.x << 40] = x[threadIdx.x];
}

constexpr int WARPS = 1;
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2) bounded(const float* x, float* y) {
    y[threadIdx.x] = x[threadIdx.x];
}

extern "C" __global__ void divide_by_zero(const float* x, float* y) {
    y[threadIdx.x] = (int)x[0] / ((int)x[0] - 1);  // x[0] is 1
}

extern "C" __global__ void scalars(float* y, int a, long long b, unsigned long long c, float d) {
    if (threadIdx.x == 0) y[0] = a + b + c + d;
}

// What a warp can ask of its lanes, one answer a row of y [13, 64].
extern "C" __global__ void warp_answers(const float* x, float* y) {
    int i = threadIdx.x, row = 0;
    float v = x[i];
    y[64 * row++ + i] = __shfl_sync(WARP, v, 3);
    y[64 * row++ + i] = __shfl_sync(WARP, v, i % 8, 8);
    y[64 * row++ + i] = __shfl_up_sync(WARP, v, 2);
    y[64 * row++ + i] = __shfl_up_sync(WARP, v, 3, 8);
    y[64 * row++ + i] = __shfl_down_sync(WARP, v, 2);
    y[64 * row++ + i] = __shfl_down_sync(WARP, v, 3, 16);
    y[64 * row++ + i] = __shfl_xor_sync(WARP, v, 5);
    y[64 * row++ + i] = __shfl_xor_sync(WARP, v, 8, 8);
    y[64 * row++ + i] = __ballot_sync(WARP, i % 3 == 0) & 0xffffu;
    y[64 * row++ + i] = __any_sync(WARP, i == 40) + 2 * __all_sync(WARP, i < 32);
    y[64 * row++ + i] = i % 2 ? __shfl_sync(0xaaaaaaaau, v, 7) : __shfl_sync(0x55555555u, v, 6);
    y[64 * row++ + i] = (float)__shfl_sync(WARP, (long long)i << 33, 31);
    y[64 * row++ + i] = __syncthreads_count(i % 4 == 0) + 100 * __syncthreads_or(i == 63) +
                        1000 * __syncthreads_and(i < 63);
}

// Integer sums that no order changes, and a grid of three dimensions.
extern "C" __global__ void count_all(int* y) {
    atomicAdd(y, 1);
    atomicMax(y + 1, (int)(blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z));
    atomicMax(y + 2, (int)(threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z));
    atomicCAS(y + 3, 0, 5);
}

// The order in which threads come to a counter.
extern "C" __global__ void who_comes_first(int* y, int* counter) { y[atomicAdd(counter, 1)] = threadIdx.x; }

extern "C" __global__ void approximate(const float* x, float* y) {
    y[threadIdx.x] = __expf(x[threadIdx.x]);
    y[64 + threadIdx.x] = x[threadIdx.x] * 1e-39f;
}
