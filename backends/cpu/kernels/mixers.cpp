// Run positions through a whole model on a CPU in one call: spec/mixers.py and spec/model.py, with the loops of the
// other files.
//
//     x += delta      delta = mixer(rms_norm(x))      x, delta [b][d] float32
//
// Matrices are of any kind, small weights are float32. The states of layers are changed in place. program.py fills the
// structures of structures.h.
#include <chrono>
#include <cstring>
#include <memory>
#include <vector>

#include "cached.h"
#include "pool.h"
#include "verbs.h"

static std::unique_ptr<float[]> fresh(i64 count) { return std::unique_ptr<float[]>(new float[count]); }

// rms_norm(x) after x += delta; delta is null before the first layer.
static std::unique_ptr<float[]> normed(const Norm& norm, i64 b, float* x, const float* delta,
                                       const Run& run) {
    auto h = fresh(b * norm.d);
    rms_norm(x, delta, norm.weight, norm.eps, h.get(), x, b, norm.d, run);
    return h;
}

// Call f(s, at, l, run) for each sequence s, whose l positions begin at `at`; a position takes about `work`
// multiply-adds. Sequences run in parallel if that keeps all threads busy; otherwise all threads share each one.
template <class F>
static void each(const Sequences& of, i64 work, const Run& run, const F& f) {
    std::vector<i64> ends(of.b + 1, 0);
    for (i64 s = 0; s < of.b; s++) ends[s + 1] = ends[s] + (of.count ? of.count[s] : 1);
    const Run one{1, run.steady, run.planes};
    auto call = [&](i64 s, const Run& run) {
        if (const i64 l = ends[s + 1] - ends[s]) f(s, ends[s], l, run);
    };
    if (run.threads > 1 && (of.b % run.threads == 0 || of.b >= 4 * run.threads))
        parallel(run, of.b, work * of.rows / of.b, [&](i64 s) { call(s, one); });
    else
        for (i64 s = 0; s < of.b; s++) call(s, run);
}

// With a record, the state is not changed, and the record gets x|B|C, dt and the convolved x|B|C of each position.
static void mamba2(const Mamba& w, const Sequences& of, float* x, const float* before, float* delta,
                   const State& state, float* record, const Run& run) {
    const i64 inner = w.heads * w.head_dim, shared = w.groups * w.state, c = inner + 2 * shared;
    const i64 wide = inner + c + w.heads, n = of.rows;
    auto h = normed(w.norm, n, x, before, run);
    // PROJECT
    auto z = fresh(n * wide), y = fresh(n * inner), xBC = fresh(n * c);
    const float *in = z.get() + inner, *dt = in + c;
    linear(w.in_proj, wide, w.norm.d, h.get(), n, z.get(), wide, run);
    each(of, inner * w.state * 3, run, [&](i64 s, i64 at, i64 l, const Run& run) {
        float *own = state.tail[s], *to = &xBC[at * c];
        const std::vector<float> tail(own, own + (w.kernel - 1) * c);
        void* S = state.S[s];
        // CONVOLVE
        conv(in + at * wide, wide, w.conv, w.conv_bias, tail.data(), nullptr, to, record ? nullptr : own, 1, l, c,
             w.kernel, run);
        // SCAN
        float *B = to + inner, *C = B + shared;
        const uint32_t* key = state.key ? state.key + s : nullptr;
        scan(S, record ? nullptr : S, key, state.read + (key ? s : 0), to, c, dt + at * wide, wide, w.A_log, B, c, C,
             c, w.D, w.dt_bias, nullptr, w.low, w.high, &y[at * inner], 1, l, w.heads, w.head_dim, w.state, w.groups,
             l, run);
        for (i64 i = at; record && i < at + l; i++) {
            float* kept = record + i * (2 * c + w.heads);
            memcpy(kept, in + i * wide, (c + w.heads) * sizeof(float));
            memcpy(kept + c + w.heads, &xBC[i * c], c * sizeof(float));
        }
    });
    // GATE
    gated_rms_norm(y.get(), z.get(), wide, w.gate, w.norm.eps, y.get(), n, w.groups, inner / w.groups, run);
    // RETURN
    linear(w.out_proj, w.norm.d, inner, y.get(), n, delta, w.norm.d, run);
}

// With a record, the record gets the keys and values of each position.
static void attention(const Attention& w, const Sequences& of, float* x, const float* before, float* delta,
                      const Cache& cache, float* record, const Run& run) {
    const i64 e = w.head_dim, q_width = w.heads * e, kv_width = w.kv * e, d = w.norm.d, n = of.rows;
    auto h = normed(w.norm, n, x, before, run);
    // PROJECT
    auto q = fresh(n * q_width), k = fresh(n * kv_width), v = fresh(n * kv_width), y = fresh(n * q_width);
    linear(w.q, q_width, d, h.get(), n, q.get(), q_width, run);
    linear(w.k, kv_width, d, h.get(), n, k.get(), kv_width, run);
    linear(w.v, kv_width, d, h.get(), n, v.get(), kv_width, run);
    // ATTEND
    bool even = true;
    i64 at = 0;
    for (i64 s = 0; s < of.b; s++) {
        const i64 l = of.count ? of.count[s] : 1;
        even &= l * of.b == n;
        append(cache, s, of.length[s], l, w.kv, e, &k[at * kv_width], &v[at * kv_width], kv_width);
        at += l;
    }
    if (even)
        attend(q.get(), q_width, cache, of.length, w.scale, y.get(), of.b, n / of.b, w.heads, w.kv, e, run);
    else
        each(of, 0, {1, run.steady, run.planes}, [&](i64 s, i64 at, i64 l, const Run&) {
            Cache own = cache;
            own.pages += s * cache.count;
            attend(&q[at * q_width], q_width, own, of.length + s, w.scale, &y[at * q_width], 1, l, w.heads, w.kv, e, run);
        });
    for (i64 i = 0; record && i < n; i++) {
        memcpy(record + 2 * i * kv_width, &k[i * kv_width], kv_width * sizeof(float));
        memcpy(record + (2 * i + 1) * kv_width, &v[i * kv_width], kv_width * sizeof(float));
    }
    // RETURN
    linear(w.o, d, q_width, y.get(), n, delta, d, run);
}

static void mixture(const Experts& w, i64 b, float* x, const float* before, float* delta, const Run& run) {
    const i64 d = w.norm.d, n = w.latent ? w.latent : d;
    auto h = normed(w.norm, b, x, before, run);
    // ROUTE, from the full-width input
    auto s = fresh(b * w.count), weight = fresh(b * w.chosen);
    std::unique_ptr<i64[]> expert(new i64[b * w.chosen]);
    linear({w.gate, FLOAT32}, w.count, d, h.get(), b, s.get(), w.count, run);
    choose(s.get(), w.bias, b, w.count, w.chosen, w.groups, w.kept, w.normalise, w.factor, expert.get(),
           weight.get(), run);
    // SHARED expert, at full width
    mlp(w.shared_up, w.shared_down, w.shared_width, d, h.get(), b, delta, run);
    // ROUTED experts, in the latent width where there is one
    auto u = fresh(b * n), r = fresh(b * n), y = fresh(b * d);
    if (w.latent) linear(w.fc1, n, d, h.get(), b, u.get(), n, run);
    experts(w.up, w.down, 0, w.count, expert.get(), weight.get(), b, w.chosen, n, w.width,
            w.latent ? u.get() : h.get(), r.get(), run);
    if (w.latent) linear(w.fc2, d, n, r.get(), b, y.get(), d, run);
    // RETURN
    const float* routed = w.latent ? y.get() : r.get();
    for (i64 i = 0; i < b * d; i++) delta[i] += routed[i];
}

static void dense(const Dense& w, i64 b, float* x, const float* before, float* delta, const Run& run) {
    auto h = normed(w.norm, b, x, before, run);
    mlp(w.up, w.down, w.width, w.norm.d, h.get(), b, delta, run);
}

// Run the model on the positions of all sequences. x [rows][d] is the input of the layers; x and delta [rows][d] are
// overwritten.
// out: logits [rows][v], or null. hidden: the last norm [rows][d], or null. With `last` both have one row for each
// sequence, that of its last position.
// records: null, or for each layer with a state the memory for its record; the call then does not change the states.
// reduce: null, or a function that sums delta over ranks after each layer, and returns whether to stop.
// taken: null, or seconds by kind of layer and of the head, to which the call adds.
extern "C" void step(const Model& m, const Sequences& of, float* x, float* delta, const State* states,
                     float* const* records, int (*reduce)(int), int last, float* hidden, float* out, double* taken,
                     const Run& run) {
    using Clock = std::chrono::steady_clock;
    const float* before = nullptr;
    auto began = Clock::now();
    auto lap = [&](i64 kind) {
        auto now = Clock::now();
        if (taken) taken[kind] += std::chrono::duration<double>(now - began).count();
        began = now;
    };
    for (i64 i = 0; i < m.count; i++, before = delta) {
        const void* w = m.layers[i].weights;
        const i64 kind = m.layers[i].kind;
        float* record = records ? records[i] : nullptr;
        switch (kind) {
            case 'M': mamba2(*(const Mamba*)w, of, x, before, delta, states[i], record, run); break;
            case '*': attention(*(const Attention*)w, of, x, before, delta, *states[i].cache, record, run); break;
            case 'E': mixture(*(const Experts*)w, of.rows, x, before, delta, run); break;
            default: dense(*(const Dense*)w, of.rows, x, before, delta, run);
        }
        if (reduce && reduce((int)kind)) return;
        lap(kind);
    }
    auto h = normed(m.norm, of.rows, x, before, run);
    const i64 d = m.norm.d, rows = last ? of.b : of.rows;
    if (last) {
        auto all = std::move(h);
        h = fresh(rows * d);
        for (i64 s = 0, end = 0; s < of.b; s++) {
            end += of.count[s];
            if (of.count[s]) memcpy(&h[s * d], &all[(end - 1) * d], d * sizeof(float));
            else memset(&h[s * d], 0, d * sizeof(float));
        }
    }
    if (hidden) memcpy(hidden, h.get(), rows * d * sizeof(float));
    if (out) linear(m.head, m.vocabulary, d, h.get(), rows, out, m.vocabulary, run);
    lap(0);
}
