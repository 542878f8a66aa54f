// Products of many rows. Rows lie in panels: PANEL rows side by side, [panel][n][PANEL], zeros beyond the last row.
// For each position, a tile of outputs and rows adds a weight times vectors of rows. Its sums stay in registers, and
// no horizontal sum is needed. A strip of weights is widened to float32 once for PANEL_SHARE rows, in pieces that stay
// in cache.
#pragma once
#include <algorithm>
#include <vector>

#include "numbers.h"
#include "pool.h"
#include "transpose.h"

constexpr i64 PANEL = 2 * LANES;                     // rows of a panel
constexpr i64 PANEL_SHARE = 256;                     // rows of a piece of work, a multiple of PANEL
constexpr i64 WIDE_STRIP = 96;                       // outputs of a piece of work
constexpr i64 DEEP = 336;                            // positions of a piece of weights

// Return memory for `count` floats, aligned to 64 bytes; a later call reuses it.
static inline float* aligned(std::vector<float>& kept, i64 count) {
    if ((i64)kept.size() < count + 16) kept.resize(count + 16);
    return (float*)(((uintptr_t)kept.data() + 63) & ~(uintptr_t)63);
}

// Return memory for the sums of a piece of work; not on the stack, which may be small in a thread.
static inline float* room_for_sums() {
    static thread_local std::vector<float> kept;
    return aligned(kept, PANEL_SHARE * WIDE_STRIP);
}

static inline i64 panels_of(i64 rows) { return (rows + PANEL - 1) / PANEL; }

constexpr i64 COLUMNS = 16;  // columns transposed at a time

// Copy rows, at any addresses, into one panel [n][PANEL].
static inline void into_panel(const float* const* row, i64 rows, i64 n, float* to) {
    for (i64 k = 0; k < n; k += COLUMNS) {
        const i64 some = std::min(COLUMNS, n - k);
        const float* from[PANEL];
        float* at[COLUMNS];
        for (i64 r = 0; r < rows; r++) from[r] = row[r] + k;
        for (i64 i = 0; i < some; i++) at[i] = to + (k + i) * PANEL;
        transpose(from, rows, some, at);
        for (i64 i = 0; i < some; i++)
            for (i64 r = rows; r < PANEL; r++) at[i][r] = 0;
    }
}

// sums[o] += w[o] . rows for O outputs and W vectors of rows, `depth` positions deep
template <int O, int W>
static inline void panel_tile(const float* w, const float* rs, i64 depth, float* sums) {
    vec acc[O][W] = {};
#pragma GCC unroll 4
    for (i64 k = 0; k < depth; k++, rs += PANEL) {
        vec row[W];
#pragma GCC unroll 2
        for (int i = 0; i < W; i++) row[i] = load<vec>(rs + i * LANES);
#pragma GCC unroll 12
        for (int o = 0; o < O; o++) {
            const vec weight = vec{} + w[o * DEEP + k];
#pragma GCC unroll 2
            for (int i = 0; i < W; i++) acc[o][i] = fused(weight, row[i], acc[o][i]);
        }
    }
#pragma GCC unroll 12
    for (int o = 0; o < O; o++)
#pragma GCC unroll 2
        for (int i = 0; i < W; i++) {
            float* to = sums + o * PANEL + i * LANES;
            store(to, load<vec>(to) + acc[o][i]);
        }
}

// Prefetches the data that is read next, a part before each tile: rows of `bytes`, `step` apart.
struct Ahead {
    const char* row;
    i64 step, bytes, rows, lines;  // cache lines of 64 bytes per tile
    i64 at = 0;
    void ask() {
        for (i64 i = 0; i < lines && rows > 0; i++, at += 64) {
            if (at >= bytes) at = 0, row += step, rows--;
            __builtin_prefetch(row + at, 0, 2);
        }
    }
};

// The same for any number of outputs.
template <int W, int O = ROWS / W>
static inline void panel_strip(const float* w, i64 outs, const float* rs, i64 depth, float* sums, Ahead& weights,
                               Ahead& panel) {
    for (; outs >= O; outs -= O, w += O * DEEP, sums += O * PANEL) {
        weights.ask(), panel.ask();
        panel_tile<O, W>(w, rs, depth, sums);
    }
    if constexpr (O > 1)
        if (outs) panel_strip<W, O - 1>(w, outs, rs, depth, sums, weights, panel);
}

// Weights [outs][n] that are widened: where a row begins, and how far it is to the next.
template <class T>
struct Plain {
    static constexpr i64 deep = DEEP;
    const T* w;
    i64 n;
    i64 row() const { return n * sizeof(T); }
    const char* at(i64 from) const { return (const char*)(w + from); }
    void widen(i64 o, i64 from, i64 count, float* to) const { widen_to(w + o * n + from, count, to); }
};

// sums [panel][outs][PANEL] of up to PANEL_SHARE rows and up to WIDE_STRIP outputs
template <class Weights>
__attribute__((noinline)) static void panel_products(const Weights& w, i64 n, const float* x, i64 rows, i64 outs,
                                                     float* sums) {
    static thread_local std::vector<float> kept;
    float* wide = aligned(kept, WIDE_STRIP * DEEP);
    std::fill(sums, sums + panels_of(rows) * outs * PANEL, 0.f);
    for (i64 from = 0; from < n; from += Weights::deep) {
        const i64 depth = std::min(Weights::deep, n - from);
        for (i64 o = 0; o < outs; o++) w.widen(o, from, depth, wide + o * DEEP);
        const i64 panels = panels_of(rows), after = std::min(Weights::deep, n - from - depth);
        const i64 tiles = outs / (ROWS / 2) + 1, each = after * w.row() / n;
        const i64 lines = outs * (each / 64 + 1) / (tiles * panels) + 1;
        Ahead weights{w.at(from + depth), w.row(), each, after > 0 ? outs : 0, lines};
        for (i64 p = 0; p < panels; p++) {
            const float* rs = x + (p * n + from) * PANEL;
            float* out = sums + p * outs * PANEL;
            const bool last = p + 1 == panels;
            const float* next = last ? x + (from + depth) * PANEL : rs + n * PANEL;
            const i64 size = (last ? after : depth) * PANEL * 4;
            Ahead panel{(const char*)next, 0, size, size > 0, size / 64 / tiles + 1};
            if (rows - p * PANEL > LANES)
                panel_strip<2>(wide, outs, rs, depth, out, weights, panel);
            else
                panel_strip<1>(wide, outs, rs, depth, out, weights, panel);
        }
    }
}

// Stores a product into rows of y, `step` apart.
struct ToRows {
    float* y;
    i64 step;
    void operator()(i64 at, i64 rows, i64 first, i64 outs, const float* sums) const {
        const float* from[WIDE_STRIP];
        float* to[PANEL];
        for (i64 p = 0; p < panels_of(rows); p++) {
            const i64 here = std::min(PANEL, rows - p * PANEL);
            for (i64 o = 0; o < outs; o++) from[o] = sums + (p * outs + o) * PANEL;
            for (i64 r = 0; r < here; r++) to[r] = y + (at + p * PANEL + r) * step + first;
            transpose(from, outs, here, to);
        }
    }
};

// Stores relu(product)^2 into panels of `width` positions.
struct ToPanels {
    float* y;
    i64 width;
    void operator()(i64 at, i64 rows, i64 first, i64 outs, const float* sums) const {
        for (i64 p = 0; p < panels_of(rows); p++) {
            float* to = y + ((at / PANEL + p) * width + first) * PANEL;
            const float* from = sums + p * outs * PANEL;
            for (i64 i = 0; i < outs * PANEL; i++) to[i] = from[i] > 0 ? from[i] * from[i] : 0;
        }
    }
};
