// S <- exp(dt A) S + dt x B',   y = S C + D x,   for a few positions of each sequence: a step of decoding.
// dt = softplus(dt_raw + dt_bias) within its limit, A = -exp(A_log).
//
// S is [b, h, p, n] and by far the most that is read and written. A warp takes ROWS rows of n values at a
// time, all of them read before any is used, and keeps them from one position to the next where a lane has
// room for its share. Head i reads B and C of group i / (h / g). S is written in place, or, under -DSTAYS, not
// at all: then a lane must have that room. Only the first n[b] positions are real, or all.
#include "rounding.cuh"

constexpr int ROWS = 4;
#ifdef STAYS
constexpr bool stays = true;
#else
constexpr bool stays = false;
#endif

// What differs from one sequence, head and row of S to the next; `x`, `dt`, B and C at the first position.
struct Place {
    const Real *x, *dt, *B, *C;
    State* S;
    Real* y;
    long long x_stride, dt_stride, B_stride, C_stride, y_stride;  // from one position to the next
    unsigned element;                                             // of the first value, within S[b]
    int rows;                                                     // from here to the last of the head
};

// How far a head steps, and how its state decays.
struct Clock {
    float A, bias, least, most;

    DEVICE float step(const Real* dt) const { return time_step(dt, bias, least, most); }
    DEVICE float decay(float step) const { return expf(step * A); }
};

template <int N>
DEVICE void steps(Place at, const Clock& clock, float D, int count, int n, const int* key, const int* position,
                  long long sequence) {
    int lane = threadIdx.x & 31;
    bool kept = n <= 32 * N;
    float s[ROWS][N] = {};
    for (int t = 0; t < count; t++) {
        float step = clock.step(at.dt), decay = clock.decay(step), x[ROWS], sum[ROWS] = {};
#pragma unroll
        for (int r = 0; r < ROWS; r++) x[r] = r < at.rows ? load(at.x[r]) : 0.0f;
        for (int i = lane * N; i < n; i += 32 * N) {
            float b[N], c[N];
            read(at.B + i, b);
            read(at.C + i, c);
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                if (r < at.rows && (t == 0 || !kept)) read(at.S + (long long)r * n + i, s[r]);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
#pragma unroll
                for (int e = 0; e < N; e++) {
                    s[r][e] = decay * s[r][e] + step * x[r] * b[e];
                    sum[r] += s[r][e] * c[e];
                }
            }
            if ((t < count - 1 || stays) && kept) continue;
            Random random = random_of(key, position, sequence, t + 1);
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                if (r < at.rows) write_state(at.S + (long long)r * n + i, s[r], random, at.element + r * n + i);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float total = warp_sum(sum[r]);
            if (lane == r && r < at.rows) at.y[r] = store(total + D * x[r]);
        }
        at.x += at.x_stride, at.dt += at.dt_stride, at.B += at.B_stride, at.C += at.C_stride;
        at.y += at.y_stride;
    }
}

// Grid: tiles of rows (ROWS for each warp), heads, sequences.
extern "C" __global__ void __launch_bounds__(128)
    ssd_step(const Real* x, const Real* dt, const float* A_log, const Real* B, const Real* C, const float* D,
             const float* dt_bias, State* S, Real* y, const int* n, const int* key, const int* read, int l, int h, int p, int g,
             int state, long long x_stride, long long dt_stride, long long B_stride, long long C_stride,
             float least, float most) {
    long long b = blockIdx.z, position = b * l;
    int head = blockIdx.y, group = head / (h / g), warps = blockDim.x >> 5;
    int row = (blockIdx.x * warps + (threadIdx.x >> 5)) * ROWS, count = n ? min(n[b], l) : l;
    if (row >= p) return;
    Place at;
    at.x_stride = x_stride, at.dt_stride = dt_stride, at.B_stride = B_stride, at.C_stride = C_stride;
    at.y_stride = (long long)h * p;
    at.x = x + position * x_stride + head * p + row;
    at.dt = dt + position * dt_stride + head;
    at.B = B + position * B_stride + group * state;
    at.C = C + position * C_stride + group * state;
    at.y = y + position * at.y_stride + head * p + row;
    at.element = (head * p + row) * state;
    at.S = S + b * h * p * state + at.element;
    at.rows = p - row;
    Clock clock = {-expf(A_log[head]), dt_bias[head], least, most};
    bool packed = state % 4 == 0 && B_stride % 4 == 0 && C_stride % 4 == 0 && aligned(at.S) &&
                  aligned(at.B) && aligned(at.C);
    if (packed) steps<4>(at, clock, D[head], count, state, key, read, b);
    else steps<1>(at, clock, D[head], count, state, key, read, b);
}
