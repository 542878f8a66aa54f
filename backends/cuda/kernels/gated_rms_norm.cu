// u = y silu(z), then u / sqrt(mean(u^2) + eps) * w over each group of `width` channels.
//
// A block for each group of each row; the host takes about width / PACK threads, as in rms_norm.cu. Where
// several ranks share a group, `gated_squares` gives the mean of squares of this rank's part, and
// `gated_scale` takes the mean of the whole group from outside.
#include "common.cuh"

template <int N>
DEVICE void gate(const Real* y, const Real* z, int at, float (&u)[N]) {
    float gates[N];
    read(y + at, u);
    read(z + at, gates);
#pragma unroll
    for (int i = 0; i < N; i++) u[i] *= silu(gates[i]);
}

// The mean of squares of a group, in every thread; `held` keeps what this thread saw first.
template <int N>
DEVICE float mean_square(const Real* y, const Real* z, int width, float (&held)[N]) {
    __shared__ float partial[32];
    int first = threadIdx.x * N;
    float squares = 0.0f;
    for (int at = first; at < width; at += blockDim.x * N) {
        float u[N];
        gate(y, z, at, u);
#pragma unroll
        for (int i = 0; i < N; i++) {
            squares += u[i] * u[i];
            if (at == first) held[i] = u[i];
        }
    }
    return block_sum(squares, partial) / width;
}

template <int N>
DEVICE void scaled(const Real* y, const Real* z, const float* weight, Real* out, int width, float scale,
                   float (&held)[N]) {
    int first = threadIdx.x * N;
    for (int at = first; at < width; at += blockDim.x * N) {
        float u[N], w[N];
        if (at > first) gate(y, z, at, u);
        read(weight + at, w);
#pragma unroll
        for (int i = 0; i < N; i++) u[i] = (at > first ? u[i] : held[i]) * scale * w[i];
        write(out + at, u);
    }
}

// The group of this block: where its channels begin in y and z, whose rows are y_stride and z_stride apart.
struct Group {
    const Real *y, *z;
    long long row;
    int channel, index;
    bool packed;

    DEVICE Group(const Real* y, const Real* z, int groups, int width, long long y_stride, long long z_stride)
        : row(blockIdx.x / groups), index(blockIdx.x % groups) {
        channel = index * width;
        this->y = y + row * y_stride + channel;
        this->z = z + row * z_stride + channel;
        packed = width % PACK == 0 && aligned(this->y) && aligned(this->z);
    }
};

template <int N>
DEVICE void whole(const Group& g, const float* weight, Real* out, int width, float eps) {
    float held[N];
    float mean = mean_square(g.y, g.z, width, held);
    scaled(g.y, g.z, weight, out, width, 1.0f / sqrtf(mean + eps), held);
}

extern "C" __global__ void __launch_bounds__(1024)
    gated_rms_norm(const Real* y, const Real* z, const float* weight, Real* out, int groups, int width,
                   long long y_stride, long long z_stride, float eps) {
    Group g(y, z, groups, width, y_stride, z_stride);
    out += (g.row * groups + g.index) * width;
    weight += g.channel;
    if (g.packed && aligned(out) && aligned(weight)) whole<PACK>(g, weight, out, width, eps);
    else whole<1>(g, weight, out, width, eps);
}

template <int N>
DEVICE float squares(const Group& g, int width) {
    float held[N];
    return mean_square(g.y, g.z, width, held);
}

// mean [rows, groups]: of the squares of u.
extern "C" __global__ void __launch_bounds__(1024)
    gated_squares(const Real* y, const Real* z, float* mean, int groups, int width, long long y_stride,
                  long long z_stride) {
    Group g(y, z, groups, width, y_stride, z_stride);
    float here = g.packed ? squares<PACK>(g, width) : squares<1>(g, width);
    if (threadIdx.x == 0) mean[blockIdx.x] = here;
}

template <int N>
DEVICE void given(const Group& g, const float* weight, Real* out, int width, float scale) {
    float held[N];
    if (threadIdx.x * N < width) gate(g.y, g.z, threadIdx.x * N, held);
    scaled(g.y, g.z, weight, out, width, scale, held);
}

extern "C" __global__ void __launch_bounds__(1024)
    gated_scale(const Real* y, const Real* z, const float* mean, const float* weight, Real* out, int groups,
                int width, long long y_stride, long long z_stride, float eps) {
    Group g(y, z, groups, width, y_stride, z_stride);
    out += (g.row * groups + g.index) * width;
    weight += g.channel;
    float scale = 1.0f / sqrtf(mean[blockIdx.x] + eps);
    if (g.packed && aligned(out) && aligned(weight)) given<PACK>(g, weight, out, width, scale);
    else given<1>(g, weight, out, width, scale);
}
