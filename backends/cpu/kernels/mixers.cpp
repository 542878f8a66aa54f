// One position of a whole model on a CPU in one call: spec/mixers.py and spec/model.py again, in the loops of
// the other files.
//
//     x += delta      delta = mixer(rms_norm(x))      x, delta [b][d] float32
//
// Matrices are of any kind, small weights float32. What a layer remembers is changed in place. program.py fills
// the structures of structures.h.
#include <chrono>
#include <cstring>
#include <memory>

#include "cached.h"
#include "verbs.h"

static std::unique_ptr<float[]> fresh(i64 count) { return std::unique_ptr<float[]>(new float[count]); }

// rms_norm(x) after x += delta; delta is null before the first layer.
static std::unique_ptr<float[]> normed(const Norm& norm, i64 b, float* x, const float* delta,
                                       const Run& run) {
    auto h = fresh(b * norm.d);
    rms_norm(x, delta, norm.weight, norm.eps, h.get(), x, b, norm.d, run);
    return h;
}

static void mamba2(const Mamba& w, i64 b, float* x, const float* before, float* delta, State& state,
                   const Run& run) {
    float* tail = (float*)state.first;
    const i64 inner = w.heads * w.head_dim, shared = w.groups * w.state, c = inner + 2 * shared;
    const i64 wide = inner + c + w.heads;
    auto h = normed(w.norm, b, x, before, run);
    // PROJECT
    auto z = fresh(b * wide), y = fresh(b * inner), xBC = fresh(b * c);
    const float *in = z.get() + inner, *dt = in + c;
    linear(w.in_proj, wide, w.norm.d, h.get(), b, z.get(), wide, run);
    // CONVOLVE
    conv(in, wide, w.conv, w.conv_bias, tail, nullptr, xBC.get(), tail, b, 1, c, w.kernel, run);
    // SCAN
    float *B = xBC.get() + inner, *C = B + shared;
    scan(state.second, state.second, state.key, state.read, xBC.get(), c, dt, wide, w.A_log, B, c, C, c, w.D,
         w.dt_bias, nullptr, w.low, w.high, y.get(), b, 1, w.heads, w.head_dim, w.state, w.groups, 1, run);
    // GATE
    gated_rms_norm(y.get(), z.get(), wide, w.gate, w.norm.eps, y.get(), b, w.groups, inner / w.groups, run);
    // RETURN
    linear(w.out_proj, w.norm.d, inner, y.get(), b, delta, w.norm.d, run);
}

// length[b] positions are known
static void attention(const Attention& w, i64 b, float* x, const float* before, float* delta, State& state,
                      const i64* length, const Run& run) {
    const Cache& cache = *(const Cache*)state.first;
    const i64 e = w.head_dim, q_width = w.heads * e, kv_width = w.kv * e, d = w.norm.d;
    auto h = normed(w.norm, b, x, before, run);
    // PROJECT
    auto q = fresh(b * q_width), k = fresh(b * kv_width), v = fresh(b * kv_width), y = fresh(b * q_width);
    linear(w.q, q_width, d, h.get(), b, q.get(), q_width, run);
    linear(w.k, kv_width, d, h.get(), b, k.get(), kv_width, run);
    linear(w.v, kv_width, d, h.get(), b, v.get(), kv_width, run);
    // ATTEND
    for (i64 r = 0; r < b * w.kv; r++) {
        const i64 row = r / w.kv, at = length[row];
        const Page& page = cache.pages[row * cache.count + at / cache.each];
        const i64 to = r % w.kv * page.step + at % cache.each * e;
        keep(cache.kind, cache.k_scale, page.k, to, &k[r * e], e);
        keep(cache.kind, cache.v_scale, page.v, to, &v[r * e], e);
    }
    attend(q.get(), q_width, cache, length, w.scale, y.get(), b, 1, w.heads, w.kv, e, run);
    // RETURN
    linear(w.o, d, q_width, y.get(), b, delta, d, run);
}

static void mixture(const Experts& w, i64 b, float* x, const float* before, float* delta, const Run& run) {
    const i64 d = w.norm.d, n = w.latent ? w.latent : d;
    auto h = normed(w.norm, b, x, before, run);
    // ROUTE, by the full-width input
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

// out [b][v], logits after one more position of b sequences, of which length[b] are known; or, if there is no
// head, the last norm [b][d]. x [b][d] holds their embeddings; it is changed, and so is delta [b][d].
// reduce: null, or adds up delta over ranks after each layer, and says whether to stop.
// taken: null, or seconds by kind of layer, and of the head, to be added to.
extern "C" void step(const Model& m, i64 b, float* x, float* delta, State* states, const i64* length,
                     int (*reduce)(int), float* out, double* taken, const Run& run) {
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
        switch (kind) {
            case 'M': mamba2(*(const Mamba*)w, b, x, before, delta, states[i], run); break;
            case '*': attention(*(const Attention*)w, b, x, before, delta, states[i], length, run); break;
            case 'E': mixture(*(const Experts*)w, b, x, before, delta, run); break;
            default: dense(*(const Dense*)w, b, x, before, delta, run);
        }
        if (reduce && reduce((int)kind)) return;
        lap(kind);
    }
    auto h = normed(m.norm, b, x, before, run);
    if (m.head.at)
        linear(m.head, m.vocabulary, m.norm.d, h.get(), b, out, m.vocabulary, run);
    else
        memcpy(out, h.get(), b * m.norm.d * sizeof(float));
    lap(0);
}
