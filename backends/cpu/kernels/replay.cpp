// Compute the states after some positions of a recorded call (mixers.cpp). Each number of S is read and written once,
// for any number of positions, and the terms are those of single steps, added in the same order.
#include <cmath>
#include <cstring>
#include <vector>

#include "cached.h"
#include "half.h"
#include "pool.h"
#include "scan.h"
#include "verbs.h"

// The change of a head's S by one position: S = decay S + added B', where added = dt x of the channel
struct Change { float decay, step; const float *x, *B; float added; };

// Update the row of S of the i-th channel, n numbers.
static void change(float* S, std::vector<Change>& changes, i64 i, i64 n) {
    const i64 count = changes.size();
    for (Change& to : changes) to.added = to.step * to.x[i];
    i64 j = 0;
    for (; j + LANES <= n; j += LANES) {
        vec v = load<vec>(S + j);
        for (i64 t = 0; t < count; t++) {
            v = fused(vec{} + changes[t].added, load<vec>(changes[t].B + j), changes[t].decay * v);
        }
        store(S + j, v);
    }
    for (; j < n; j++)
        for (const Change& to : changes) S[j] = to.decay * S[j] + to.added * to.B[j];
}

// Apply the first l recorded positions of one sequence.
static void mamba2(const Mamba& w, const float* record, i64 l, const State& state, i64 s, const Run& run) {
    const i64 p = w.head_dim, n = w.state, inner = w.heads * p, c = inner + 2 * w.groups * n, wide = 2 * c + w.heads;
    float* tail = state.tail[s];
    for (i64 j = 0; j < w.kernel - 1; j++) {  // in place: each row is copied from further on
        const i64 at = l + j - (w.kernel - 1);
        const float* from = at < 0 ? tail + (l + j) * c : record + at * wide;
        memmove(tail + j * c, from, c * sizeof(float));
    }
    parallel(run, w.heads, l * p * n * 2, [&](i64 head) {
        static thread_local std::vector<Change> changes;
        static thread_local std::vector<float> widened;
        changes.resize(l);
        const float A = -expf(w.A_log[head]);
        for (i64 t = 0; t < l; t++) {
            const float *at = record + t * wide, *x = at + c + w.heads;
            const float step = time_step(at[c + head] + w.dt_bias[head], w.low, w.high);
            changes[t] = {expf(step * A), step, x + head * p, x + inner + head / (w.heads / w.groups) * n, 0};
        }
        if (!state.key) {
            float* S = (float*)state.S[s] + head * p * n;
            for (i64 i = 0; i < p; i++) change(S + i * n, changes, i, n);
            return;
        }
        uint16_t* S = (uint16_t*)state.S[s] + head * p * n;
        widened.resize(p * n);
        widened_halves(S, p * n, widened.data());
        for (i64 i = 0; i < p; i++) change(&widened[i * n], changes, i, n);
        Random(state.key[s], state.read[s] + l).store(widened.data(), head * p * n, p * n, S);
    });
}

// Advance the states by the first kept[b] positions of each sequence of a recorded call.
extern "C" void replay(const Model& m, const Sequences& of, const i64* kept, const float* const* records,
                       const State* states, const Run& run) {
    for (i64 i = 0; i < m.count; i++) {
        const Layer& layer = m.layers[i];
        i64 at = 0;
        for (i64 s = 0; s < of.b; at += of.count[s++]) {
            if (!kept[s]) continue;
            if (layer.kind == 'M') {
                const Mamba& w = *(const Mamba*)layer.weights;
                const i64 c = w.heads * w.head_dim + 2 * w.groups * w.state;
                mamba2(w, records[i] + at * (2 * c + w.heads), kept[s], states[i], s, run);
            } else if (layer.kind == '*') {
                const Attention& w = *(const Attention*)layer.weights;
                const i64 wide = w.kv * w.head_dim;
                const float* k = records[i] + at * 2 * wide;
                append(*states[i].cache, s, of.length[s], kept[s], w.kv, w.head_dim, k, k + wide, 2 * wide);
            }
        }
    }
}
