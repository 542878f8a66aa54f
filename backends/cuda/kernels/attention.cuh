// What a warp does with a tile of keys and values: 16 query rows, an online softmax, their sums.
//
// Query heads that share a key head are rows of one product: row = i r + j for position i and the j-th of the
// r heads. A warp holds 16 rows. With g = lane / 4 and t = lane % 4, a lane holds of rows g and g + 8 the
// scores of keys 8 j + 2t, 8 j + 2t + 1, and of the output the elements 64 c + 16 t .. 64 c + 16 t + 15.
#pragma once
#include "keys.cuh"

struct Rows {
    float out[HEAD / 64][16][2];  // [c][i]: element 64 c + 16 t + i of row g and of row g + 8
    float most[2], sum[2];        // of these rows: the largest score so far; this lane's share of the sum
};

DEVICE void begin(Rows& rows) {
#pragma unroll
    for (int c = 0; c < HEAD / 64; c++)
#pragma unroll
        for (int i = 0; i < 16; i++) rows.out[c][i][0] = rows.out[c][i][1] = 0.0f;
    rows.most[0] = rows.most[1] = -INFINITE;
    rows.sum[0] = rows.sum[1] = 0.0f;
}

// What exponents are taken relative to: the largest score, or 0 where no key was seen at all.
DEVICE float base(float most) { return most == -INFINITE ? 0.0f : most; }

DEVICE float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(WARP, x, 1));
    return fmaxf(x, __shfl_xor_sync(WARP, x, 2));
}

DEVICE float quad_sum(float x) {
    x += __shfl_xor_sync(WARP, x, 1);
    return x + __shfl_xor_sync(WARP, x, 2);
}

// Scores [16, 8 N keys] become weights; `visible`: how many of these keys rows g and g + 8 see. The softmax
// is one of powers of 2: `scale` has the factor log2 e in it.
template <int N>
DEVICE void softmax(Rows& rows, float (&score)[N][4], float scale, const int (&visible)[2]) {
    int t = threadIdx.x & 3;
    float most[2] = {rows.most[0], rows.most[1]}, from[2];
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int p = 0; p < 4; p++) {
            bool seen = 8 * j + 2 * t + (p & 1) < visible[p >> 1];
            score[j][p] = seen ? score[j][p] * scale : -INFINITE;
            most[p >> 1] = fmaxf(most[p >> 1], score[j][p]);
        }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        most[half] = quad_max(most[half]);
        from[half] = base(most[half]);
        float keep = exp2f(rows.most[half] - from[half]);  // 0 of what was summed before any key was seen
        rows.most[half] = most[half];
        rows.sum[half] *= keep;
#pragma unroll
        for (int c = 0; c < HEAD / 64; c++)
#pragma unroll
            for (int i = 0; i < 16; i++) rows.out[c][i][half] *= keep;
    }
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int p = 0; p < 4; p++) {
            score[j][p] = exp2f(score[j][p] - from[p >> 1]);
            rows.sum[p >> 1] += score[j][p];
        }
}

// out += weights [16 M, 8 N keys] values; `value` is the row of the first key.
template <int M, int N>
DEVICE void weigh(Rows (&rows)[M], const float (&weight)[M][N][4], const Real* value, int e) {
    int lane = threadIdx.x & 31, t = lane & 3;
#ifdef REAL_BF16
    int g = lane >> 2;
    static_assert(N % 2 == 0, "an instruction sums over 16 keys");
#pragma unroll
    for (int j = 0; j < N; j += 2) {
        unsigned a[M][4];  // the sums of two instructions over e are the left side of one over keys
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int p = 0; p < 4; p++)
                a[m][p] = bf16_pair(weight[m][j + p / 2][p % 2 * 2], weight[m][j + p / 2][p % 2 * 2 + 1]);
#pragma unroll
        for (int c = 0; c < HEAD / 64; c++) {
            if (64 * c >= e) continue;
            // Column g of instruction i is element 64 c + 8 g + i, so that the sums of a lane are neighbours.
            const Real* from = value + (8 * j + 2 * t) * VALUE + 64 * c + 8 * g;
            uint4 v0 = *reinterpret_cast<const uint4*>(from);
            uint4 v1 = *reinterpret_cast<const uint4*>(from + VALUE);
            uint4 v2 = *reinterpret_cast<const uint4*>(from + 8 * VALUE);
            uint4 v3 = *reinterpret_cast<const uint4*>(from + 9 * VALUE);
            unsigned w0[4] = {v0.x, v0.y, v0.z, v0.w}, w1[4] = {v1.x, v1.y, v1.z, v1.w};
            unsigned w2[4] = {v2.x, v2.y, v2.z, v2.w}, w3[4] = {v3.x, v3.y, v3.z, v3.w};
#pragma unroll
            for (int i = 0; i < 8; i++) {
                unsigned b0 = i % 2 ? w0[i / 2] >> 16 | (w1[i / 2] & 0xffff0000u)
                                    : (w0[i / 2] & 0xffffu) | w1[i / 2] << 16;
                unsigned b1 = i % 2 ? w2[i / 2] >> 16 | (w3[i / 2] & 0xffff0000u)
                                    : (w2[i / 2] & 0xffffu) | w3[i / 2] << 16;
#pragma unroll
                for (int m = 0; m < M; m++) {
                    float(&out)[16][2] = rows[m].out[c];
                    float sum[4] = {out[i][0], out[8 + i][0], out[i][1], out[8 + i][1]};
                    mma_bf16(sum, a[m][0], a[m][1], a[m][2], a[m][3], b0, b1);
                    out[i][0] = sum[0], out[8 + i][0] = sum[1], out[i][1] = sum[2], out[8 + i][1] = sum[3];
                }
            }
        }
    }
#else
#pragma unroll
    for (int key = 0; key < 8 * N; key++) {
        int owner = (lane & ~3) | (key % 8 / 2);
        float upper[M], lower[M];
#pragma unroll
        for (int m = 0; m < M; m++) {
            upper[m] = __shfl_sync(WARP, weight[m][key / 8][key % 2], owner);
            lower[m] = __shfl_sync(WARP, weight[m][key / 8][2 + key % 2], owner);
        }
#pragma unroll
        for (int c = 0; c < HEAD / 64; c++) {
            if (64 * c >= e) continue;
            float v[16];
            read(value + key * VALUE + 64 * c + 16 * t, v);
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int i = 0; i < 16; i++) {
                    rows[m].out[c][i][0] += upper[m] * v[i];
                    rows[m].out[c][i][1] += lower[m] * v[i];
                }
        }
    }
#endif
}

// Elements 16 t .. 16 t + 15 of each 64 of one row of the output, times `factor`.
DEVICE void write_row(Real* to, const Rows& rows, int half, float factor, int e) {
    int t = threadIdx.x & 3;
    bool fast = e % PACK == 0 && aligned(to);
#pragma unroll
    for (int c = 0; c < HEAD / 64; c++)
#pragma unroll
        for (int i = 0; i < 16; i += PACK) {
            int s = 64 * c + 16 * t + i;
            float v[PACK];
#pragma unroll
            for (int p = 0; p < PACK; p++) v[p] = rows.out[c][i + p][half] * factor;
            if (fast && s < e) write(to + s, v);
#pragma unroll
            for (int p = 0; p < PACK; p++)
                if (!fast && s + p < e) put(to + s + p, v[p]);
        }
}
