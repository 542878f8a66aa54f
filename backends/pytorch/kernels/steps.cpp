// One position of the smaller verbs on a CPU, all float32: a call each instead of ten. Compiled on first use
// by native.py; the verbs of layers.py, scan.py and experts.py say the same in PyTorch.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "vectors.h"
#include "verbs.h"

constexpr i64 STRIP = 512;  // channels that a thread takes at a time

extern "C" {

// One position of the recurrence for b sequences:  next = exp(dt A) S + dt x B',  y = next C + D x.  `real`:
// null, or whether each sequence has this position. x, dt, B, C are rows of wider arrays, `*_step` apart;
// next may be S.
void scan_step(const float* S, float* next, const float* x, i64 x_step, const float* dt, i64 dt_step,
               const float* A_log, const float* B, i64 B_step, const float* C, i64 C_step, const float* D,
               const float* bias, const i64* real, float low, float high, float* y, i64 b, i64 h, i64 p,
               i64 n, i64 g, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 s = 0; s < b * h; s++) {
        i64 at = s / h, head = s % h, group = head / (h / g);
        const float *bs = B + at * B_step + group * n, *cs = C + at * C_step + group * n;
        float raw = dt[at * dt_step + head] + bias[head];
        float step = raw > 20 ? raw : log1pf(expf(raw));
        step = real && !real[at] ? 0 : std::min(std::max(step, low), high);
        float decay = expf(-step * expf(A_log[head]));
        for (i64 i = 0; i < p; i++) {
            const float *from = S + (s * p + i) * n, v = x[at * x_step + head * p + i], a = step * v;
            float *to = next + (s * p + i) * n, total = 0;
#pragma omp simd reduction(+ : total)
            for (i64 j = 0; j < n; j++) {
                float w = decay * from[j] + a * bs[j];
                to[j] = w;
                total += w * cs[j];
            }
            y[s * p + i] = total + D[head] * v;
        }
    }
}

// One position of the causal convolution, w [k][c]:  y = silu(bias + sum_j w[j] window[j]), and the next
// tail, which may lie where the last one did.
void conv_step(const float* x, i64 x_step, const float* w, const float* bias, const float* tail,
               const i64* real, float* y, float* next, i64 b, i64 c, i64 k, int threads) {
    const i64 strips = (c + STRIP - 1) / STRIP;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (i64 job = 0; job < b * strips; job++) {
        const i64 s = job / strips, at = job % strips * STRIP, wide = std::min(STRIP, c - at);
        const float *row = x + s * x_step + at, *old = tail + s * (k - 1) * c + at;
        float *out = y + s * c + at, *kept = next + s * (k - 1) * c + at;
        for (i64 i = 0; i < wide; i++) out[i] = bias[at + i] + w[(k - 1) * c + at + i] * row[i];
        for (i64 j = 0; j < k - 1; j++)
            for (i64 i = 0; i < wide; i++) out[i] += w[j * c + at + i] * old[j * c + i];
        silu(out, out, wide);
        for (i64 j = 0; j < k - 1; j++) {
            const float* from = real && !real[s] ? old + j * c : j < k - 2 ? old + (j + 1) * c : row;
            if (from != kept + j * c) memcpy(kept + j * c, from, wide * sizeof(float));
        }
    }
}

// total = x + delta (delta may be null),  y = total / rms(total) w
void rms_norm(const float* x, const float* delta, const float* w, float eps, float* y, float* total, i64 rows,
              i64 d) {
    for (i64 r = 0; r < rows; r++, x += d, y += d) {
        const float* t = x;
        if (delta) {
            for (i64 i = 0; i < d; i++) total[i] = x[i] + delta[i];
            t = total, delta += d, total += d;
        }
        float squares = 0;
        for (i64 i = 0; i < d; i++) squares += t[i] * t[i];
        float scale = 1 / sqrtf(squares / d + eps);
        for (i64 i = 0; i < d; i++) y[i] = t[i] * scale * w[i];
    }
}

// out = y silu(z), each group over its rms, times w; out may be y
void gated_rms_norm(const float* y, const float* z, i64 z_step, const float* w, float eps, float* out,
                    i64 rows, i64 groups, i64 c) {
    std::vector<float> gate(c);
    for (i64 r = 0; r < rows; r++)
        for (i64 g = 0; g < groups; g++) {
            const float *v = y + (r * groups + g) * c, *scales = w + g * c;
            float *to = out + (r * groups + g) * c, squares = 0;
            silu(z + r * z_step + g * c, gate.data(), c);
            for (i64 i = 0; i < c; i++) to[i] = v[i] * gate[i];
            for (i64 i = 0; i < c; i++) squares += to[i] * to[i];
            float scale = 1 / sqrtf(squares / c + eps);
            for (i64 i = 0; i < c; i++) to[i] *= scale * scales[i];
        }
}

// The k best of logits' sigmoid + bias for each row, best first, the lower index on a tie; weights from the
// sigmoid alone.
void choose(const float* logits, const float* bias, i64 rows, i64 count, i64 k, int normalise, float factor,
            i64* expert, float* weight) {
    std::vector<float> score(count), c(count);
    for (i64 r = 0; r < rows; r++, logits += count, expert += k, weight += k) {
        float total = 0;
        for (i64 e = 0; e < count; e++) {
            score[e] = 1 / (1 + expf(-logits[e]));
            c[e] = score[e] + bias[e];
        }
        for (i64 j = 0; j < k; j++) {
            i64 best = 0;
            for (i64 e = 1; e < count; e++)
                if (c[e] > c[best]) best = e;
            expert[j] = best, weight[j] = score[best], total += score[best], c[best] = -3e38f;
        }
        for (i64 j = 0; j < k; j++) weight[j] *= normalise ? factor / (total + 1e-20f) : factor;
    }
}
}
