// The state-space scan: the recurrence for few positions, matrix products of spans for more (chapter 8):
//
//     y[i] = sum_{j<=i} (C[i].B[j]) exp(a[i] - a[j]) dt[j] x[j]  +  exp(a[i]) C[i] S  +  D x[i]
//     S    = exp(a[last]) S + sum_j exp(a[last] - a[j]) dt[j] x[j] B[j]'
//
// a[i] is the sum of dt A from the beginning of the span up to i. The work of a span grows with the square of its
// length, so spans are shorter than chunks. A span never crosses the end of a chunk.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "half.h"
#include "pool.h"
#include "scan.h"
#include "transpose.h"
#include "verbs.h"

constexpr i64 SPAN = 32, SHORT = 4;  // positions of a span; longest span that uses the recurrence
constexpr float LOG2E = 1.442695041f;

static i64 whole(i64 n) { return (n + LANES - 1) / LANES * LANES; }

struct Span { i64 start, size; };

// y [p] and S [p][n] after one position; next may be S.
__attribute__((noinline)) static void position(const float* S, float* next, const float* x, float step, float A, const float* B,
                     const float* C, float D, float* y, i64 p, i64 n, i64 row) {
    const float decay = expf(step * A);
    for (i64 i = 0; i < p; i++, S += row, next += row) {
        const float added = step * x[i];
        vec sums = {};
        i64 j = 0;
        for (; j + LANES <= n; j += LANES) {
            const vec v = fused(vec{} + added, load<vec>(B + j), decay * load<vec>(S + j));
            store(next + j, v);
            sums = fused(v, load<vec>(C + j), sums);
        }
        float total = 0;
        for (int lane = 0; lane < LANES; lane++) total += sums[lane];
        for (; j < n; j++) {
            next[j] = decay * S[j] + added * B[j];
            total += next[j] * C[j];
        }
        y[i] = total + D * x[i];
    }
}

// The arrays of one span that the heads of a group share, with zeros beyond its size: C' [n][SPAN], B [size][row],
// B C' [size][SPAN].
struct Shared {
    float *Ct, *B, *BC;
    Shared(float* at, i64 n, i64 row) : Ct(at), B(at + n * SPAN), BC(B + SPAN * row) {}
    static i64 floats(i64 n, i64 row) { return n * SPAN + SPAN * row + SPAN * SPAN; }

    void fill(const float* b, i64 b_step, const float* c, i64 c_step, i64 size, i64 n, i64 row) const {
        std::fill(Ct, Ct + n * SPAN, 0.f);
        std::fill(B, B + size * row, 0.f);
        std::fill(BC, BC + size * SPAN, 0.f);
        transpose(c, c_step, size, n, Ct, SPAN);
        for (i64 i = 0; i < size; i++) memcpy(B + i * row, b + i * b_step, n * sizeof(float));
        product(B, row, 1, size, Ct, SPAN, n, BC, Next{(const char*)B, 0});
    }
};

// Compute y [size][..] of one head, and S [p][row] after a span.
static void span(float* S, const float* x, i64 x_step, const float* dt, float A, const Shared& shared, float D,
                 float* y, i64 y_step, i64 size, i64 p, i64 n, i64 row) {
    static thread_local std::vector<float> kept;
    const i64 wide = whole(p);
    if ((i64)kept.size() < p * SPAN + SPAN * SPAN + SPAN * wide) kept.resize(p * SPAN + SPAN * SPAN + SPAN * wide);
    float *yt = kept.data(), *M = yt + p * SPAN, *u = M + SPAN * SPAN;  // y' [p][SPAN]; [j][i]; [size][p]
    double a[SPAN] = {};  // in octaves
    for (i64 i = 0; i < size; i++) a[i] = (i ? a[i - 1] : 0) + (double)dt[i] * A * 1.4426950408889634;
    for (i64 i = size; i < SPAN; i++) a[i] = a[size - 1];
    // to[i] = 2^(sign (a[i] - from)) scale for i from `first` on; the exponents are at most 0
    auto decays = [&](double from, float sign, float scale, float* to, i64 first) {
        for (i64 i = first; i < SPAN; i++) to[i] = sign * (float)(a[i] - from);
        for (i64 i = first; i < SPAN; i += LANES) {
            vec v = load<vec>(to + i);
            store(to + i, exp2_of<1>(v < 0.f ? v : vec{}) * scale);
        }
    };
    // FROM BEFORE
    std::fill(yt, yt + p * SPAN, 0.f);
    const Next nothing{(const char*)S, 0};
    product(S, row, 1, p, shared.Ct, SPAN, n, yt, nothing);
    float decay[SPAN];
    decays(0, 1, 1, decay, 0);
    for (i64 i = 0; i < p; i++)
        for (i64 j = 0; j < SPAN; j += LANES)
            store(yt + i * SPAN + j, load<vec>(yt + i * SPAN + j) * load<vec>(decay + j));
    // WITHIN
    for (i64 j = 0; j < size; j++) {
        float* m = M + j * SPAN;
        const i64 first = j / LANES * LANES;
        decays(a[j], 1, dt[j], m, first);
        for (i64 i = 0; i < j; i++) m[i] = 0;
        for (i64 i = first; i < SPAN; i += LANES) store(m + i, load<vec>(m + i) * load<vec>(shared.BC + j * SPAN + i));
    }
    product(x, 1, x_step, p, M, SPAN, size, yt, nothing);
    transpose(yt, SPAN, p, size, y, y_step);
    for (i64 i = 0; i < size; i++)
        for (i64 j = 0; j < p; j++) y[i * y_step + j] += D * x[i * x_step + j];
    // ONWARDS
    decays(a[size - 1], -1, 1, decay, 0);
    for (i64 i = 0; i < size; i++)
        for (i64 j = 0; j < p; j++) u[i * p + j] = dt[i] * decay[i] * x[i * x_step + j];
    const float all = (float)std::exp2(std::max(a[size - 1], -126.));
    for (i64 i = 0; i < p * row; i += LANES) store(S + i, all * load<vec>(S + i));
    product(u, 1, p, p, shared.B, row, size, S, nothing);
}

// Scan l positions of b sequences, of which real[b] are real (null: all): y [b][l][h][p], and the state after them in
// `to`, which may be `from` or null. S is float32, or float16 if `key` [b] is given. Then S is rounded at random at the
// end of the call; the random numbers depend on the row's key, the number of positions read (read[b] before the call)
// and the element. x, dt, B, C are rows of wider arrays, `*_step` apart.
extern "C" void scan(const void* from, void* to, const uint32_t* key, const i64* read, const float* x, i64 x_step,
                     const float* dt, i64 dt_step, const float* A_log, const float* B, i64 B_step, const float* C,
                     i64 C_step, const float* D, const float* bias, const i64* real, float low, float high, float* y,
                     i64 b, i64 l, i64 h, i64 p, i64 n, i64 g, i64 chunk, const Run& run) {
    const i64 row = whole(n), r = h / g;
    const float* S = (const float*)from;
    float* next = (float*)to;
    const uint16_t* half = (const uint16_t*)from;
    uint16_t* next_half = (uint16_t*)to;
    auto random_of = [=](i64 s) { return Random(key[s], read[s] + (real ? std::min(real[s], l) : l)); };
    auto step_of = [=](i64 s, i64 t, i64 head) {
        return real && t >= real[s] ? 0 : time_step(dt[(s * l + t) * dt_step + head] + bias[head], low, high);
    };
    if (l == 1) {
        parallel(run, b * h, p * n, [=](i64 job) {
            const i64 s = job / h, head = job % h, group = head / r, at = job * p * n;
            static thread_local std::vector<float> wide;
            if ((key || !to) && (i64)wide.size() < p * n) wide.resize(p * n);
            if (key) widened_halves(half + at, p * n, wide.data());
            position(key ? wide.data() : S + at, key || !to ? wide.data() : next + at, x + s * x_step + head * p,
                     step_of(s, 0, head), -expf(A_log[head]), B + s * B_step + group * n, C + s * C_step + group * n,
                     D[head], y + job * p, p, n, n);
            if (key && to) random_of(s).store(wide.data(), head * p * n, p * n, next_half + at);
        });
        return;
    }
    std::vector<Span> spans;
    for (i64 at = 0; at < l;) {
        const i64 end = std::min(l, (at / chunk + 1) * chunk), size = std::min(SPAN, end - at);
        spans.push_back({at, size});
        at += size;
    }
    const i64 count = spans.size(), floats = Shared::floats(n, row);
    static thread_local std::vector<float> kept;
    if ((i64)kept.size() < b * count * g * floats) kept.resize(b * count * g * floats);
    float* const room = kept.data();
    // Return the number of real positions in a span; positions beyond a row's end must not affect how it is computed.
    auto real_of = [&](i64 s, i64 at) {
        return real ? std::clamp<i64>(real[s] - spans[at].start, 0, spans[at].size) : spans[at].size;
    };
    auto shared = [&](i64 s, i64 at, i64 group) {
        return Shared(room + ((s * count + at) * g + group) * floats, n, row);
    };
    parallel(run, b * count * g, SPAN * SPAN * n * 2, [&](i64 job) {
        const i64 s = job / (count * g), at = job / g % count, group = job % g, first = s * l + spans[at].start;
        if (real_of(s, at) > SHORT)
            shared(s, at, group)
                .fill(B + first * B_step + group * n, B_step, C + first * C_step + group * n, C_step,
                      real_of(s, at), n, row);
    });
    parallel(run, b * h, l * p * n * 3, [&](i64 job) {
        static thread_local std::vector<float> state, steps;
        const i64 s = job / h, head = job % h, group = head / r;
        const float A = -expf(A_log[head]);
        if ((i64)state.size() < p * row) state.resize(p * row);
        if ((i64)steps.size() < l) steps.resize(l);
        std::fill(state.begin(), state.end(), 0.f);
        for (i64 i = 0; i < p; i++) {
            const i64 at = (job * p + i) * n;
            if (key) widened_halves(half + at, n, &state[i * row]);
            else memcpy(&state[i * row], S + at, n * sizeof(float));
        }
        for (i64 t = 0; t < l; t++) steps[t] = step_of(s, t, head);
        for (i64 at = 0; at < count; at++) {
            const i64 start = spans[at].start, size = real_of(s, at), first = s * l + start;
            const float* xs = x + first * x_step + head * p;
            float* out = y + (first * h + head) * p;
            for (i64 i = size; i < spans[at].size; i++) std::fill(out + i * h * p, out + i * h * p + p, 0.f);
            if (size > SHORT)
                span(state.data(), xs, x_step, &steps[start], A, shared(s, at, group), D[head], out, h * p, size, p,
                     n, row);
            else
                for (i64 i = 0; i < size; i++)
                    position(state.data(), state.data(), xs + i * x_step, steps[start + i], A,
                             B + (first + i) * B_step + group * n, C + (first + i) * C_step + group * n, D[head],
                             out + i * h * p, p, n, row);
        }
        for (i64 i = 0; to && i < p; i++) {
            const i64 at = (job * p + i) * n;
            if (key) random_of(s).store(&state[i * row], (head * p + i) * n, n, next_half + at);
            else memcpy(next + at, &state[i * row], n * sizeof(float));
        }
    });
}
