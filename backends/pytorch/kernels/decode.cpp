// Decoding on a CPU: few rows meet each weight once. Weights are bfloat16, everything else float32.
//
// A bfloat16 is the upper half of a float32, so a pair of them in 32 bits is widened by one shift (the even one) and one
// mask (the odd one), and products are as exact as float32 products. For that the rows of x are kept with the even and
// the odd positions of every sixteen apart (`spread`). Vectors are GCC's own, so the same text serves AVX2, AVX-512 and
// NEON. Compiled on first use by backends/pytorch/native.py; every function has a slower equivalent in PyTorch.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef int64_t i64;
typedef float f8 __attribute__((vector_size(32)));
typedef uint32_t u8 __attribute__((vector_size(32)));

template <class To, class From>
static inline To same(From from) {
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
static inline f8 load(const float* p) {
    f8 f;
    memcpy(&f, p, sizeof f);
    return f;
}
static inline float sum(f8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// Where position j of a row of n values is kept.
static inline i64 spread(i64 j, i64 n) { return j < n / 16 * 16 ? (j & ~15) | (j & 1) << 3 | (j & 15) >> 1 : j; }

static const float* spread_rows(const float* x, i64 rows, i64 n) {
    static thread_local std::vector<float> kept;
    kept.resize(rows * n);
    for (i64 r = 0; r < rows; r++)
        for (i64 j = 0; j < n; j++) kept[r * n + spread(j, n)] = x[r * n + j];
    return kept.data();
}

// Outputs that one thread takes at a time; handed out as threads come, for another process may hold one up.
static const i64 STRIP = 24;

// out[r][o] = x[r] . w[o] for R rows and O outputs that share their loads; the next outputs are asked for meanwhile.
template <int R, int O>
static inline void tile(const uint16_t* w, i64 n, const float* const* x, float out[R][O]) {
    f8 acc[R][O] = {}, odd[R][O] = {};
    i64 k = 0;
    for (; k + 16 <= n; k += 16) {
        f8 low[O], high[O];
        for (int o = 0; o < O; o++) {
            u8 pair;
            memcpy(&pair, w + o * n + k, sizeof pair);
            low[o] = same<f8>(pair << 16), high[o] = same<f8>(pair & 0xffff0000u);
            __builtin_prefetch(w + o * n + k + (O > 1 ? O * n : 2048));
        }
        for (int r = 0; r < R; r++) {
            f8 even = load(x[r] + k), uneven = load(x[r] + k + 8);
            for (int o = 0; o < O; o++) {
                acc[r][o] += even * low[o];
                (R * O > 2 ? acc : odd)[r][o] += uneven * high[o];
            }
        }
    }
    for (int r = 0; r < R; r++)
        for (int o = 0; o < O; o++) {
            out[r][o] = sum(acc[r][o] + odd[r][o]);
            for (i64 j = k; j < n; j++) out[r][o] += x[r][j] * same<float>((uint32_t)w[o * n + j] << 16);
        }
}

// put(r, o, x[r] . w[o]) for R rows and the outputs first .. last-1.
template <int R, int O, class Put>
static void block(const uint16_t* w, i64 n, const float* const* x, i64 first, i64 last, Put put) {
    float out[R][O];
    for (; first + O <= last; first += O) {
        tile<R, O>(w + first * n, n, x, out);
        for (int r = 0; r < R; r++)
            for (int o = 0; o < O; o++) put(r, first + o, out[r][o]);
    }
    if (O > 1 && first < last) block<R, 1>(w, n, x, first, last, put);
}

// The same for any number of rows. The weights of a strip stay in cache meanwhile.
template <class Put>
static void products(const uint16_t* w, i64 n, const float* const* x, i64 rows, i64 first, i64 last, Put put) {
    for (i64 at = 0; at < rows;) {
        i64 left = rows - at, take = left == 5 ? 5 : left == 6 ? 3 : std::min<i64>(left, 4);
        auto from = [&](i64 r, i64 o, float v) { put(at + r, o, v); };
        switch (take) {
            case 1: block<1, 1>(w, n, x + at, first, last, from); break;
            case 2: block<2, 2>(w, n, x + at, first, last, from); break;
            case 3: block<3, 2>(w, n, x + at, first, last, from); break;
            case 4: block<4, 2>(w, n, x + at, first, last, from); break;
            case 5: block<5, 2>(w, n, x + at, first, last, from); break;
        }
        at += take;
    }
}

extern "C" {

// y[r][o] = x[r] . w[o]
void linear(const uint16_t* w, i64 outs, i64 n, const float* x, i64 rows, float* y, int threads) {
    std::vector<const float*> row(rows);
    x = spread_rows(x, rows, n);
    for (i64 r = 0; r < rows; r++) row[r] = x + r * n;
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (i64 s = 0; s < (outs + STRIP - 1) / STRIP; s++)
        products(w, n, row.data(), rows, s * STRIP, std::min(outs, (s + 1) * STRIP),
                 [&](i64 r, i64 o, float v) { y[r * outs + o] = v; });
}

// y[t] = sum over the k experts of token t of  weight relu(u[t] up')^2 down'.  Hits are sorted by expert, so that a matrix
// is read once; a thread owns some outputs and adds to them in one order.
void experts(const uint16_t* const* up, const uint16_t* const* down, i64 count, const i64* expert, const float* weight,
             i64 tokens, i64 k, i64 n, i64 width, const float* u, float* y, int threads) {
    std::vector<i64> begin(count + 1, 0), hit, token(tokens * k);
    std::vector<float> share(tokens * k);
    static thread_local std::vector<float> kept;
    for (i64 j = 0; j < tokens * k; j++) begin[expert[j] + 1]++;
    for (i64 e = 0; e < count; e++) {
        if (begin[e + 1]) hit.push_back(e);
        begin[e + 1] += begin[e];
    }
    std::vector<i64> next(begin);
    for (i64 j = 0; j < tokens * k; j++) {
        i64 at = next[expert[j]]++;
        token[at] = j / k, share[at] = weight[j];
    }
    if ((i64)kept.size() < tokens * k * width) kept.resize(tokens * k * width);
    float* inner = kept.data();
    u = spread_rows(u, tokens, n);
    std::fill(y, y + tokens * n, 0.f);
#pragma omp parallel num_threads(threads)
    {
        std::vector<const float*> row(tokens);
        i64 strips = (width + STRIP - 1) / STRIP;
#pragma omp for schedule(dynamic, 4)
        for (i64 s = 0; s < (i64)hit.size() * strips; s++) {
            i64 e = hit[s / strips], first = s % strips * STRIP, b = begin[e], rows = begin[e + 1] - b;
            for (i64 r = 0; r < rows; r++) row[r] = u + token[b + r] * n;
            products(up[e], n, row.data(), rows, first, std::min(width, first + STRIP), [&](i64 r, i64 o, float v) {
                v = v > 0 ? v : 0;
                inner[(b + r) * width + spread(o, width)] = v * v;
            });
        }
#pragma omp for schedule(dynamic)
        for (i64 s = 0; s < (n + STRIP - 1) / STRIP; s++)
            for (i64 e : hit) {
                i64 b = begin[e], rows = begin[e + 1] - b;
                for (i64 r = 0; r < rows; r++) row[r] = inner + (b + r) * width;
                products(down[e], width, row.data(), rows, s * STRIP, std::min(n, (s + 1) * STRIP),
                         [&](i64 r, i64 o, float v) { y[token[b + r] * n + o] += share[b + r] * v; });
            }
    }
}

// One position of the recurrence for b sequences:  next = exp(dt A) S + dt x B',  y = next C + D x.  `real`: null, or
// whether each sequence has this position. x, dt, B, C are rows of wider arrays, `*_step` apart.
void scan_step(const float* S, float* next, const float* x, i64 x_step, const float* dt, i64 dt_step, const float* A_log,
               const float* B, i64 B_step, const float* C, i64 C_step, const float* D, const float* bias,
               const i64* real, float low, float high, float* y, i64 b, i64 h, i64 p, i64 n, i64 g, int threads) {
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

// One position of the causal convolution, w [k][c]:  y = silu(bias + sum_j w[j] window[j]), and the next tail.
void conv_step(const float* x, i64 x_step, const float* w, const float* bias, const float* tail, const i64* real, float* y,
               float* next, i64 b, i64 c, i64 k, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (b > 1)
    for (i64 s = 0; s < b; s++) {
        const float *row = x + s * x_step, *old = tail + s * (k - 1) * c;
        float *out = y + s * c, *kept = next + s * (k - 1) * c;
        for (i64 i = 0; i < c; i++) out[i] = bias[i] + w[(k - 1) * c + i] * row[i];
        for (i64 j = 0; j < k - 1; j++)
            for (i64 i = 0; i < c; i++) out[i] += w[j * c + i] * old[j * c + i];
        for (i64 i = 0; i < c; i++) out[i] /= 1 + expf(-out[i]);
        if (real && !real[s]) {
            memcpy(kept, old, (k - 1) * c * sizeof(float));
        } else {
            memcpy(kept, old + c, (k - 2) * c * sizeof(float));
            memcpy(kept + (k - 2) * c, row, c * sizeof(float));
        }
    }
}

// total = x + delta (delta may be null),  y = total / rms(total) w
void rms_norm(const float* x, const float* delta, const float* w, float eps, float* y, float* total, i64 rows, i64 d) {
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

// out = y silu(z), each group over its rms, times w
void gated_rms_norm(const float* y, const float* z, i64 z_step, const float* w, float eps, float* out, i64 rows, i64 groups,
                    i64 c) {
    for (i64 r = 0; r < rows; r++)
        for (i64 g = 0; g < groups; g++) {
            const float *v = y + (r * groups + g) * c, *gate = z + r * z_step + g * c, *scales = w + g * c;
            float *to = out + (r * groups + g) * c, squares = 0;
            for (i64 i = 0; i < c; i++) to[i] = v[i] * gate[i] / (1 + expf(-gate[i]));
            for (i64 i = 0; i < c; i++) squares += to[i] * to[i];
            float scale = 1 / sqrtf(squares / c + eps);
            for (i64 i = 0; i < c; i++) to[i] *= scale * scales[i];
        }
}

// The k best of logits' sigmoid + bias for each row, best first, the lower index on a tie; weights from the sigmoid alone.
void choose(const float* logits, const float* bias, i64 rows, i64 count, i64 k, int normalise, float factor, i64* expert,
            float* weight) {
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
