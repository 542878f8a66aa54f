// Norms, the causal convolution and the choice of experts, all float32.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "pool.h"
#include "vectors.h"
#include "verbs.h"

constexpr i64 STRIP = 512, STRETCH = 64;  // channels and positions in a piece of the convolution

// Return the sum of the squares of `count` numbers, four vectors at a time.
static inline float squares(const float* x, i64 count) {
    vec sum[4] = {};
    i64 i = 0;
    for (; i + 4 * LANES <= count; i += 4 * LANES)
        for (int c = 0; c < 4; c++) {
            const vec v = load<vec>(x + i + c * LANES);
            sum[c] += v * v;
        }
    sum[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    float total = 0;
    for (int lane = 0; lane < LANES; lane++) total += sum[0][lane];
    for (; i < count; i++) total += x[i] * x[i];
    return total;
}

extern "C" {

// total = x + delta (delta may be null),  y = total / rms(total) w
void rms_norm(const float* x, const float* delta, const float* w, float eps, float* y, float* total, i64 rows,
              i64 d, const Run& run) {
    parallel(run, rows, 16 * d, [=](i64 r) {
        const float* t = x + r * d;
        float* to = y + r * d;
        if (delta) {
            float* added = total + r * d;
            for (i64 i = 0; i < d; i++) added[i] = x[r * d + i] + delta[r * d + i];
            t = added;
        }
        const float scale = 1 / sqrtf(squares(t, d) / d + eps);
        for (i64 i = 0; i < d; i++) to[i] = t[i] * scale * w[i];
    });
}

// out = y silu(z), each group divided by its rms, times w; out may be y
void gated_rms_norm(const float* y, const float* z, i64 z_step, const float* w, float eps, float* out,
                    i64 rows, i64 groups, i64 c, const Run& run) {
    parallel(run, rows * groups, 16 * c, [=](i64 job) {
        static thread_local std::vector<float> gate;
        if ((i64)gate.size() < c) gate.resize(c);
        const i64 r = job / groups, g = job % groups;
        const float *v = y + job * c, *scales = w + g * c;
        float* to = out + job * c;
        each_vector(z + r * z_step + g * c, gate.data(), c, [](vec x) { return silu(x); });
        for (i64 i = 0; i < c; i++) to[i] = v[i] * gate[i];
        const float scale = 1 / sqrtf(squares(to, c) / c + eps);
        for (i64 i = 0; i < c; i++) to[i] *= scale * scales[i];
    });
}

// l positions of the causal convolution, w [k][c]:  y = silu(bias + sum_j w[j] window[j])
// next: the tail [b][k-1][c] after real[b] of the positions (null: all), or null; if l is 1, it may be the memory of
// the old tail. Rows of x are x_step apart.
void conv(const float* x, i64 x_step, const float* w, const float* bias, const float* tail, const i64* real,
          float* y, float* next, i64 b, i64 l, i64 c, i64 k, const Run& run) {
    const i64 strips = (c + STRIP - 1) / STRIP, stretches = (l + STRETCH - 1) / STRETCH;
    parallel(run, b * strips * stretches, std::min(STRIP, c) * std::min(STRETCH, l) * (k + 16), [=](i64 job) {
        const i64 s = job / (strips * stretches), at = job % strips * STRIP, wide = std::min(STRIP, c - at);
        const i64 first = job / strips % stretches * STRETCH, end = std::min(l, first + STRETCH);
        const float *rows = x + s * l * x_step + at, *old = tail + s * (k - 1) * c + at;
        float *out = y + s * l * c + at, *kept = next ? next + s * (k - 1) * c + at : nullptr;
        // position t of the window; t < 0 is in the tail
        auto row = [&](i64 t) { return t < 0 ? old + (t + k - 1) * c : rows + t * x_step; };
        for (i64 t = first; t < end; t++) {
            auto channels = [&](i64 i, auto read) {
                vec sum = read(bias + at + i);
                for (i64 j = 0; j < k; j++) sum = fused(read(w + j * c + at + i), read(row(t - k + 1 + j) + i), sum);
                return silu(sum);
            };
            i64 i = 0;
            for (; i + LANES <= wide; i += LANES)
                store(out + t * c + i, channels(i, [](const float* from) { return load<vec>(from); }));
            if (const i64 some = wide - i)
                store_some(out + t * c + i, channels(i, [=](const float* from) { return load_some(from, some); }), some);
        }
        const i64 n = real ? real[s] : l;
        for (i64 j = 0; next && end == l && j < k - 1; j++) {
            const float* from = row(n - k + 1 + j);
            if (from != kept + j * c) memcpy(kept + j * c, from, wide * sizeof(float));
        }
    });
}

// Choose for each row the k experts with the largest sigmoid(logits) + bias, best first, the lower index on a tie.
// Their weights come from the sigmoid alone. Only the best `kept` of `groups` of experts take part; the score of a
// group is the sum of its two best.
void choose(const float* logits, const float* bias, i64 rows, i64 count, i64 k, i64 groups, i64 kept,
            int normalise, float factor, i64* expert, float* weight, const Run& run) {
    parallel(run, rows, count * (4 * k + 16), [=](i64 r) {
        static thread_local std::vector<float> score, c, best;
        score.resize(count), c.resize(count), best.resize(groups);
        const float out = -INFINITY;
        // the first of equal largest ones
        auto first = [](const std::vector<float>& of) { return std::max_element(of.begin(), of.end()) - of.begin(); };
        each_vector(logits + r * count, score.data(), count, [](vec x) { return sigmoid(x); });
        for (i64 e = 0; e < count; e++) c[e] = score[e] + bias[e];
        if (groups > 1) {
            const i64 size = count / groups;
            for (i64 g = 0; g < groups; g++) {
                float one = out, two = out;
                for (i64 e = g * size; e < (g + 1) * size; e++) {
                    if (c[e] > one) two = one, one = c[e];
                    else if (c[e] > two) two = c[e];
                }
                best[g] = size > 1 ? one + two : one;
            }
            std::vector<bool> in(groups, false);
            for (i64 j = 0; j < kept; j++) {
                const i64 g = first(best);
                in[g] = true, best[g] = out;
            }
            for (i64 e = 0; e < count; e++)
                if (!in[e / size]) c[e] = out;
        }
        float total = 0;
        for (i64 j = 0; j < k; j++) {
            const i64 e = first(c);
            expert[r * k + j] = e, weight[r * k + j] = score[e], total += score[e], c[e] = out;
        }
        for (i64 j = 0; j < k; j++) weight[r * k + j] *= normalise ? factor / (total + 1e-20f) : factor;
    });
}
}
