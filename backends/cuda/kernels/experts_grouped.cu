// The matrices of the experts, each read once for a tile of the tokens that were sent to it.
//
//   experts_up     up[p] = relu(u[order[p] / k] up_e')^2      for the places p of a tile of expert e
//   experts_down   down[p] = up[p] down_e'
//
// A block multiplies one tile of experts_sort.cu by COLUMNS rows of a matrix. Steps along the row come
// through shared memory in STAGES stages, fetched ahead while the block multiplies; the gather of tokens is
// part of the fetching. _16 is for a few tokens an expert, where reading matrices is the work; _64 for many.
#include "tiles.cuh"

#ifdef REAL_BF16
constexpr int STAGES = 4, COLUMNS_16 = 128, COLUMNS_64 = 256;
#else
constexpr int STAGES = 3, COLUMNS_16 = 128, COLUMNS_64 = 128;
#endif
constexpr int DEPTH = 32;  // steps of a stage
constexpr int THREADS = 128;

// Fetches steps k .. k + DEPTH - 1 of ROWS rows of `width`; source(row) is where a row begins, null where
// there is none; `any` is any address.
template <int ROWS, class Source>
DEVICE void fetch_rows(Copies& copies, Real* tile, Source source, const Real* any, int k, int width,
                       bool fast) {
    for (int i = threadIdx.x; i < ROWS * (DEPTH / PACK); i += THREADS) {
        int row = i / (DEPTH / PACK), step = i % (DEPTH / PACK) * PACK;
        const Real* from = source(row);
        int count = from ? width - k - step : 0;
        Real* to = tile + Tile<ROWS, DEPTH>::at(row, step);
        fetch(copies, to, count > 0 ? from + k + step : any, count, fast);
    }
}

// x [.., width] by rows `stride` apart; matrices [experts, columns, width]; y [places, columns]. The token of
// place p is order[p] / k, or p itself if k is 0.
template <int ROWS, int COLUMNS, bool UP>
DEVICE void grouped(const Real* x, long long stride, const Real* matrices, const int* order, const int* tiles,
                    Real* y, int k, int width, int columns) {
    using A = Tile<ROWS, DEPTH>;
    using B = Tile<COLUMNS, DEPTH>;
    constexpr int M = ROWS / 16, N = COLUMNS / 32;  // 16 x 8 blocks of a warp; the warps stand side by side
    SHARED(Real, stages);
    __shared__ long long source[ROWS];
    const int* tile = tiles + 3 * blockIdx.y;
    int places = tile[2], first = tile[1], left = blockIdx.x * COLUMNS;
    if (places == 0) return;
    const Real* matrix = matrices + ((long long)tile[0] * columns + left) * width;
    for (int row = threadIdx.x; row < ROWS; row += THREADS)
        source[row] = row < places ? (k ? order[first + row] / k : first + row) * stride : -1;
    __syncthreads();

    bool fast = width % PACK == 0 && stride % PACK == 0 && aligned(x) && aligned(matrices);
    Copies copies;
    auto fetch_stage = [&](int stage) {
        Real* a = stages + stage % STAGES * (A::size + B::size);
        auto token = [&](int row) { return source[row] < 0 ? nullptr : x + source[row]; };
        auto column = [&](int row) {
            return left + row < columns ? matrix + (long long)row * width : nullptr;
        };
        if (stage * DEPTH < width) {
            fetch_rows<ROWS>(copies, a, token, matrices, stage * DEPTH, width, fast);
            fetch_rows<COLUMNS>(copies, a + A::size, column, matrices, stage * DEPTH, width, fast);
        }
        copies.close();
    };

    int warp = threadIdx.x / 32, right = warp * N * 8;
    float sum[M][N][4] = {};
    for (int stage = 0; stage < STAGES - 1; stage++) fetch_stage(stage);
    for (int stage = 0; stage * DEPTH < width; stage++) {
        copies.wait<STAGES - 2>();
        __syncthreads();  // this stage has arrived, and all have done with the one that is fetched over
        fetch_stage(stage + STAGES - 1);
        const Real* a = stages + stage % STAGES * (A::size + B::size);
        multiply<A, B>(sum, a + A::at(0, 0), a + A::size + B::at(right, 0), DEPTH);
    }

    each_pair(sum, [&](int row, int column, float* v) {
        column += left + right;
        if (row >= places) return;
        if (UP) v[0] = relu2(v[0]), v[1] = relu2(v[1]);
        write_pair(y + (long long)(first + row) * columns + column, v, columns - column, columns % 2 == 0);
    });
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    experts_up_16(const Real* u, long long stride, const Real* up, const int* order, const int* tiles,
                  Real* y, int k, int width, int columns) {
    grouped<16, COLUMNS_16, true>(u, stride, up, order, tiles, y, k, width, columns);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    experts_up_64(const Real* u, long long stride, const Real* up, const int* order, const int* tiles,
                  Real* y, int k, int width, int columns) {
    grouped<64, COLUMNS_64, true>(u, stride, up, order, tiles, y, k, width, columns);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    experts_down_16(const Real* x, const Real* down, const int* tiles, Real* y, int width, int columns) {
    grouped<16, COLUMNS_16, false>(x, width, down, nullptr, tiles, y, 0, width, columns);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
    experts_down_64(const Real* x, const Real* down, const int* tiles, Real* y, int width, int columns) {
    grouped<64, COLUMNS_64, false>(x, width, down, nullptr, tiles, y, 0, width, columns);
}
