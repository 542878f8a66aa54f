// Products of rows x [rows][n] float32 with weights w [outs][n] of any kind: y[r][o] = x[r] . w[o].
//
// A tile of rows and outputs shares its loads and keeps its sums in registers. With one row, each weight is read once
// from memory, and memory bandwidth limits the speed. More rows are computed in blocks: a strip of outputs and BLOCK
// rows at a time, DEPTH deep, so that data that is read again is in cache. From MANY rows on, rows lie in panels
// (panels.h), except in the steady mode, in which the order of a sum does not depend on the number of rows. Packed
// weights (packed.h) are multiplied directly with few rows; with more rows, and in the steady mode, they are first
// dequantized in tiles of float32. Products are as exact as float32 products.
#include <algorithm>
#include <cstring>
#include <vector>

#include "numbers.h"
#include "packed.h"
#include "panels.h"
#include "pool.h"
#include "verbs.h"

constexpr i64 STRIP = 24;                            // outputs of a piece of work with few rows
constexpr i64 BLOCK = 64, DEPTH = 512;               // rows; positions of a row, a multiple of PAIR
constexpr i64 SHARE = 128;                           // rows of a piece of work
constexpr i64 MANY = 48, MANY_PACKED = MOST_DIRECT + 1;  // rows from which products use panels
constexpr i64 FEW = 8;                               // rows that are multiplied over their whole depth at once
static bool many(const Matrix& w, i64 rows, const Run& run) {
    return rows >= (w.kind >= MXFP8 ? MANY_PACKED : MANY) && !run.steady;
}
static i64 strip_of(i64 rows) { return rows > FEW ? WIDE_STRIP : STRIP; }
constexpr i64 AHEAD = 1280;                          // bytes: prefetch distance

// x . w, with prefetched weights and eight chains of sums, so that only memory limits the speed.
template <class T>
static inline float dot(const T* w, i64 n, const float* x) {
    vec low[4] = {}, high[4] = {};
    auto add = [&](Two<T> two, i64 k, int chain) {
        low[chain] = fused(load<vec>(x + k), two.low(), low[chain]);
        high[chain] = fused(load<vec>(x + k + LANES), two.high(), high[chain]);
    };
    i64 k = 0;
    for (; k + 4 * PAIR <= n; k += 4 * PAIR) {
        for (i64 at = 0; at < 4 * PAIR * (i64)sizeof(T); at += 64)
            __builtin_prefetch((const char*)(w + k) + AHEAD + at);
        for (int chain = 0; chain < 4; chain++) add(Two<T>(w + k + PAIR * chain), k + PAIR * chain, chain);
    }
    for (; k + PAIR <= n; k += PAIR) add(Two<T>(w + k), k, 0);
    if (k < n) add(rest(w + k, n - k), k, 1);
    return sum((low[0] + high[0]) + (low[1] + high[1]) + ((low[2] + high[2]) + (low[3] + high[3])));
}

// Keep `v` in a register: the compiler would load it again for each product, and loads are the bottleneck.
static inline vec held(vec v) {
#if defined(__AVX2__) && !defined(WIDE)
    asm("" : "+v"(v));
#endif
    return v;
}

// out[r][o] += x[r] . w[o], positions `from` to `to`, for R rows and O outputs; rows of out are `step` apart.
template <class T, int R, int O>
static inline void tile(const T* w, i64 n, i64 from, i64 to, const float* const* x, float* out, i64 step) {
    vec acc[R][O] = {};
    auto add = [&](i64 k, auto two_of) {
        vec low[O], high[O];
        for (int o = 0; o < O; o++) {
            const Two<T> two = two_of(o);
            low[o] = two.low(), high[o] = two.high();
        }
        for (int r = 0; r < R; r++) {
            const vec a = held(load<vec>(x[r] + k));
            for (int o = 0; o < O; o++) acc[r][o] = fused(a, low[o], acc[r][o]);
            const vec b = held(load<vec>(x[r] + k + LANES));
            for (int o = 0; o < O; o++) acc[r][o] = fused(b, high[o], acc[r][o]);
        }
    };
    i64 k = from;
    for (; k + PAIR <= to; k += PAIR) {
        for (int o = 0; o < O; o++) __builtin_prefetch(w + (O + o) * n + k);
        add(k, [&](int o) { return Two<T>(w + o * n + k); });
    }
    if (k < to) add(k, [&](int o) { return rest(w + o * n + k, to - k); });
    for (int r = 0; r < R; r++)
        for (int o = 0; o < O; o++) out[r * step + o] += sum(acc[r][o]);
}

// The same for any number of outputs.
template <class T, int R, int O = 2>
static inline void strip(const T* w, i64 n, i64 from, i64 to, const float* const* x, i64 outs, float* out,
                         i64 step) {
    for (; outs >= O; outs -= O, w += O * n, out += O) tile<T, R, O>(w, n, from, to, x, out, step);
    if (O > 1 && outs) strip<T, R, 1>(w, n, from, to, x, outs, out, step);
}

// sums[r][o] = x[r] . w[o] for up to SHARE rows and up to WIDE_STRIP outputs. Rows are as rows_laid_out makes them.
template <class T>
__attribute__((noinline)) static void products(const T* w, i64 n, const float* const* x, i64 rows, i64 outs,
                                               bool steady, float* sums) {
    if (rows == 1 && !steady) {
        for (i64 o = 0; o < outs; o++) sums[o] = dot(w + o * n, n, x[0]);
        return;
    }
    std::fill(sums, sums + rows * outs, 0.f);
    const i64 depth = steady || rows > FEW ? DEPTH : padded(n);
    for (i64 block = 0; block < rows; block += BLOCK) {
        const i64 here = std::min(BLOCK, rows - block);
        for (i64 from = 0; from < n; from += depth) {
            const i64 to = std::min(n, from + depth);
            for (i64 at = 0; at < here;) {
                const i64 left = here - at, take = left == 6 ? 3 : std::min<i64>(left, left == 8 ? 4 : 5);
                const float* const* rs = x + block + at;
                float* out = sums + (block + at) * outs;
                switch (take) {
                    case 1: strip<T, 1, 4>(w, n, from, to, rs, outs, out, outs); break;
                    case 2: strip<T, 2>(w, n, from, to, rs, outs, out, outs); break;
                    case 3: strip<T, 3>(w, n, from, to, rs, outs, out, outs); break;
                    case 4: strip<T, 4>(w, n, from, to, rs, outs, out, outs); break;
                    default: strip<T, 5>(w, n, from, to, rs, outs, out, outs);
                }
                at += take;
            }
        }
    }
}

// Prefetch rows of packed weights, which are contiguous, before tiles read them in pieces.
static void ask_for(const Matrix& w, i64 n, i64 first, i64 outs) {
    const i64 row = packed_row(w.kind, n), scales = w.scale ? n / 16 : 0;
    const char *at = (const char*)w.at + first * row, *scale = (const char*)w.scale + first * scales;
    for (i64 i = 0; i < outs * row; i += 64) __builtin_prefetch(at + i, 0, 2);
    for (i64 i = 0; i < outs * scales; i += 64) __builtin_prefetch(scale + i, 0, 2);
}

// The same with packed weights, dequantized tile by tile. In the steady mode each sum has one order.
template <int R>
static void tile_strip(const float* tile, i64 deep, i64 depth, const float* const* x, i64 from, i64 outs, float* sums,
                       i64 step) {
    const float* rows[R];
    for (int r = 0; r < R; r++) rows[r] = x[r] + from;
    strip<float, R, R == 1 ? 4 : 2>(tile, deep, 0, depth, rows, outs, sums, step);
}
__attribute__((noinline)) static void tiled_products(const Matrix& w, i64 n, i64 first, const float* const* x,
                                                     i64 rows, i64 outs, bool steady, float* sums) {
    alignas(64) float tile[STRIP * TILE];  // stays in the L1 cache
    ask_for(w, n, first, outs);
    const i64 deep = steady || rows > FEW ? TILE : 4 * TILE, some = STRIP * TILE / deep;
    std::fill(sums, sums + rows * outs, 0.f);
    for (i64 o = 0; o < outs; o += some)
        for (i64 from = 0; from < n; from += deep) {
            const i64 depth = std::min(deep, n - from), width = std::min(some, outs - o);
            for (i64 i = 0; i < width; i++) dequantize(w, n, first + o + i, from, depth, tile + i * deep);
            for (i64 at = 0; at < rows;) {
                const i64 left = rows - at, take = left == 6 ? 3 : std::min<i64>(left, left == 8 ? 4 : 5);
                const float* const* rs = x + at;
                float* out = sums + at * outs + o;
                switch (take) {
                    case 1: tile_strip<1>(tile, deep, depth, rs, from, width, out, outs); break;
                    case 2: tile_strip<2>(tile, deep, depth, rs, from, width, out, outs); break;
                    case 3: tile_strip<3>(tile, deep, depth, rs, from, width, out, outs); break;
                    case 4: tile_strip<4>(tile, deep, depth, rs, from, width, out, outs); break;
                    default: tile_strip<5>(tile, deep, depth, rs, from, width, out, outs);
                }
                at += take;
            }
        }
}

// Packed weights from row `first` on, in the form that panel_products takes.
struct Tiles {
    static constexpr i64 deep = TILE;
    const Matrix& w;
    i64 n, first;
    i64 row() const { return packed_row(w.kind, n); }
    const char* at(i64 from) const { return (const char*)w.at + first * row() + from * row() / n; }
    void widen(i64 o, i64 from, i64 count, float* to) const { dequantize(w, n, first + o, from, count, to); }
};

// The products of a kind of weights; rows of x are as Layout::rows makes them.
struct Loops {
    bool apart;  // even and odd positions of each PAIR are apart (numbers.h)
    // sums[r][o] = x[r] . w[first + o], for up to SHARE rows and up to WIDE_STRIP outputs
    void (*few)(const Matrix& w, i64 n, i64 first, const float* const* x, i64 rows, i64 outs, bool steady,
                int planes, float* sums);
    // sums [panel][outs][PANEL], of rows in panels
    void (*many)(const Matrix& w, i64 n, i64 first, const float* panels, i64 rows, i64 outs, float* sums);
};

template <class T>
static void few_plain(const Matrix& w, i64 n, i64 first, const float* const* x, i64 rows, i64 outs, bool steady, int,
                      float* sums) {
    products((const T*)w.at + first * n, n, x, rows, outs, steady, sums);
    if (w.kind == FLOAT8)  // the factor is for 2^-8 of the values
        for (i64 i = 0; i < rows * outs; i++) sums[i] *= w.factor * (DOWN / 256);
}
template <class T>
static void many_plain(const Matrix& w, i64 n, i64 first, const float* panels, i64 rows, i64 outs, float* sums) {
    panel_products(Plain<T>{(const T*)w.at + first * n, n}, n, panels, rows, outs, sums);
    if (w.kind == FLOAT8)
        for (i64 i = 0; i < panels_of(rows) * outs * PANEL; i++) sums[i] *= w.factor;
}
static void few_packed(const Matrix& w, i64 n, i64 first, const float* const* x, i64 rows, i64 outs, bool steady,
                       int planes, float* sums) {
    const bool direct = !steady && rows <= MOST_DIRECT;
    if (direct && !planes && float_products(w, n, first, outs, x, rows, sums)) return;
    if (!direct || !planes) return tiled_products(w, n, first, x, rows, outs, steady, sums);
    const float* whole[MOST_DIRECT];
    for (i64 r = 0; r < rows; r++) whole[r] = x[r] + padded(n);
    integer_products(w, n, first, outs, whole, rows, planes, sums);
}
static void many_packed(const Matrix& w, i64 n, i64 first, const float* panels, i64 rows, i64 outs, float* sums) {
    ask_for(w, n, first, outs);
    panel_products(Tiles{w, n, first}, n, panels, rows, outs, sums);
}

static Loops loops_of(i64 kind) {
    if (kind >= MXFP8) return {false, few_packed, many_packed};
    Loops found;
    of_kind(kind, [&](auto* kind) {
        typedef std::remove_const_t<std::remove_pointer_t<decltype(kind)>> T;
        found = {Two<T>::apart, few_plain<T>, many_plain<T>};
    });
    return found;
}

// The layout of rows for Loops::few: n numbers times `up` at place(j), zeros up to a multiple of PAIR, then integers.
struct Layout {
    i64 kind, n;
    bool apart;
    int planes;  // of the integers; 0: there are none
    float up;
    Layout(i64 kind, i64 n, int planes)
        : kind(kind), n(n), apart(loops_of(kind).apart),
          planes(kind >= MXFP8 && planes && integers_room(kind, n, planes) ? planes : 0),
          up(kind == FLOAT8 ? UP : 1) {}
    i64 step() const { return padded(n) + (planes ? integers_room(kind, n, planes) : 0); }
    bool as_it_is() const { return !apart && !planes && padded(n) == n; }
    i64 place(i64 j) const { return apart ? place_apart(j) : j; }
    // Write the rest of a row whose n numbers are at their places.
    void finish(float* row) const {
        for (i64 j = n / PAIR * PAIR; j < padded(n); j++)
            if (j >= n) row[place(j)] = 0;
        if (planes) to_integers(kind, row, n, planes, row + padded(n));
    }
    void lay(const float* from, float* to) const {
        const i64 whole = n / PAIR * PAIR;
        if (!apart)
            memcpy(to, from, n * sizeof(float));
        else {
            for (i64 j = 0; j < whole; j += PAIR)
                for (i64 i = 0; i < LANES; i++)
                    to[j + i] = up * from[j + 2 * i], to[j + LANES + i] = up * from[j + 2 * i + 1];
            for (i64 j = whole; j < n; j++) to[place(j)] = up * from[j];
        }
        finish(to);
    }
    // Return rows [rows][n] in this layout, step() apart; valid until the next call.
    const float* rows(const float* x, i64 rows, const Run& run) const {
        static thread_local std::vector<float> kept;
        if (as_it_is()) return x;
        if ((i64)kept.size() < rows * step()) kept.resize(rows * step());
        float* to = kept.data();
        parallel(run, rows, n / 2, [&, to](i64 r) { lay(x + r * n, to + r * step()); });
        return to;
    }
};

// Call put(r, o, x[r] . w[o]) for rows in the layout, `step` apart; on all threads.
template <class Put>
static void all_products(const Matrix& w, i64 outs, const Layout& layout, const float* x, i64 rows, const Run& run,
                         Put put) {
    const Loops loops = loops_of(w.kind);
    const i64 n = layout.n, step = layout.step();
    std::vector<const float*> row(rows);
    for (i64 r = 0; r < rows; r++) row[r] = x + r * step;
    const i64 shares = (rows + SHARE - 1) / SHARE, each = std::min(SHARE, rows);
    const i64 wide = strip_of(rows);
    parallel(run, (outs + wide - 1) / wide * shares, wide * n * each, [&](i64 job) {
        const i64 first = job / shares * wide, at = job % shares * SHARE;
        const i64 width = std::min(wide, outs - first), here = std::min(SHARE, rows - at);
        float* sums = room_for_sums();
        loops.few(w, n, first, row.data() + at, here, width, run.steady, layout.planes, sums);
        for (i64 r = 0; r < here; r++)
            for (i64 o = 0; o < width; o++) put(at + r, first + o, sums[r * width + o]);
    });
}

// Compute all products of rows in panels, on all threads; put(row, rows, output, outputs, sums) receives them.
template <class Put>
static void all_panels(const Matrix& w, i64 outs, i64 n, const float* panels, i64 rows, const Run& run, Put put) {
    const Loops loops = loops_of(w.kind);
    const i64 shares = (rows + PANEL_SHARE - 1) / PANEL_SHARE, each = panels_of((rows + shares - 1) / shares) * PANEL;
    const i64 strips = (outs + WIDE_STRIP - 1) / WIDE_STRIP;
    parallel(run, strips * shares, WIDE_STRIP * n * each, [&](i64 job) {  // a share of rows stays in cache
        const i64 first = job % strips * WIDE_STRIP, at = job / strips * each;
        const i64 width = std::min(WIDE_STRIP, outs - first), here = std::min(each, rows - at);
        if (here <= 0) return;
        float* sums = room_for_sums();
        loops.many(w, n, first, panels + at * n, here, width, sums);
        put(at, here, first, width, sums);
    });
}

// Return rows as panels, valid until the next call.
static const float* in_panels(const float* x, i64 rows, i64 n, const Run& run) {
    static thread_local std::vector<float> kept;
    float* to = aligned(kept, panels_of(rows) * PANEL * n);
    parallel(run, panels_of(rows), 8 * n * PANEL, [=](i64 p) {
        const float* row[PANEL];
        const i64 here = std::min(PANEL, rows - p * PANEL);
        for (i64 r = 0; r < here; r++) row[r] = x + (p * PANEL + r) * n;
        into_panel(row, here, n, to + p * PANEL * n);
    });
    return to;
}

static inline float relu2(float v) { return v > 0 ? v * v : 0; }

// y = relu(h up')^2 down' for many rows; the intermediate result stays in panels.
static void mlp_of_many(const Matrix& up, const Matrix& down, i64 width, i64 d, const float* h, i64 rows, float* y,
                        const Run& run) {
    static thread_local std::vector<float> kept;
    float* inner = aligned(kept, panels_of(rows) * PANEL * width);
    all_panels(up, width, d, in_panels(h, rows, d, run), rows, run, ToPanels{inner, width});
    all_panels(down, d, width, inner, rows, run, ToRows{y, d});
}

extern "C" {

// y[r][o] = x[r] . w[o]; rows of y are y_step apart
void linear(const Matrix& w, i64 outs, i64 n, const float* x, i64 rows, float* y, i64 y_step, const Run& run) {
    if (many(w, rows, run))
        return all_panels(w, outs, n, in_panels(x, rows, n, run), rows, run, ToRows{y, y_step});
    const Layout layout(w.kind, n, rows <= MOST_DIRECT && !run.steady ? run.planes : 0);
    all_products(w, outs, layout, layout.rows(x, rows, run), rows, run,
                 [=](i64 r, i64 o, float v) { y[r * y_step + o] = v; });
}

// y = relu(h up')^2 down'
void mlp(const Matrix& up, const Matrix& down, i64 width, i64 d, const float* h, i64 rows, float* y,
         const Run& run) {
    if (many(up, rows, run) && many(down, rows, run)) return mlp_of_many(up, down, width, d, h, rows, y, run);
    static thread_local std::vector<float> kept;
    const int planes = rows <= MOST_DIRECT && !run.steady ? run.planes : 0;
    const Layout outer(up.kind, d, planes), inner(down.kind, width, planes);
    const i64 step = inner.step();
    if ((i64)kept.size() < rows * step) kept.resize(rows * step);
    float* between = kept.data();
    all_products(up, width, outer, outer.rows(h, rows, run), rows, run,
                 [=, &inner](i64 r, i64 o, float v) { between[r * step + inner.place(o)] = inner.up * relu2(v); });
    for (i64 r = 0; r < rows; r++) inner.finish(between + r * step);
    all_products(down, d, inner, between, rows, run, [=](i64 r, i64 o, float v) { y[r * d + o] = v; });
}

// y[t] = sum of  weight relu(u[t] up')^2 down'  over those of the k experts of token t that this rank has: the `count`
// experts from `base` on.
void experts(const Matrix* up, const Matrix* down, i64 base, i64 count, const i64* expert, const float* weight,
             i64 tokens, i64 k, i64 n, i64 width, const float* u, float* y, const Run& run) {
    // HITS: (token, expert) pairs sorted by expert, so that each matrix is read once, in order
    auto here = [&](i64 e) { return e < base || e >= base + count ? count : e - base; };
    std::vector<i64> begin(count + 2, 0), hit, place_of(tokens * k), token(tokens * k);
    for (i64 j = 0; j < tokens * k; j++) begin[here(expert[j]) + 1]++;
    for (i64 e = 0; e < count; e++) {
        if (begin[e + 1]) hit.push_back(e);
        begin[e + 1] += begin[e];
    }
    std::vector<i64> next(begin);
    for (i64 j = 0; j < tokens * k; j++) place_of[j] = next[here(expert[j])]++, token[place_of[j]] = j / k;
    const i64 hits = begin[count];
    if (!hits) return std::fill(y, y + tokens * n, 0.f);
    const int planes = run.steady ? 0 : run.planes;
    const Layout outer(up->kind, n, planes), between(down->kind, width, planes);
    const i64 step = between.step();
    static thread_local std::vector<float> kept;
    if ((i64)kept.size() < hits * (step + n)) kept.resize(hits * (step + n));
    float *inner = kept.data(), *out = inner + hits * step;
    const float *given = u, *laid = outer.rows(u, tokens, run);
    std::vector<const float*> row(hits);

    // Call put(hit, output, value) for each matrix [outs][ins] and the rows in `row`. A job is a share of an expert's
    // rows and a strip of outputs. Many rows of an expert use panels, which begin at number `panels`.
    struct Part { i64 expert, first, rows; bool many; i64 panels; };
    std::vector<Part> parts;
    i64 room = 0;
    for (i64 e : hit)
        for (i64 j = begin[e]; j < begin[e + 1]; j += SHARE) {
            const i64 rows = std::min(SHARE, begin[e + 1] - j);
            parts.push_back({e, j, rows, many(*up, rows, run) && many(*down, rows, run), room});
            if (parts.back().many) room += panels_of(rows) * PANEL * (n + width);
        }
    static thread_local std::vector<float> kept_panels;
    float* panels = room ? aligned(kept_panels, room) : nullptr;
    auto inner_of = [=](const Part& p) { return panels + p.panels + panels_of(p.rows) * PANEL * n; };
    auto each = [&](const Matrix* matrices, i64 outs, const Layout& layout, auto put, auto many) {
        const Loops loops = loops_of(matrices->kind);
        const i64 rows = std::max<i64>(1, hits / (i64)parts.size()), wide = strip_of(rows), ins = layout.n;
        const i64 strips = (outs + wide - 1) / wide;
        parallel(run, (i64)parts.size() * strips, wide * ins * rows, [&](i64 job) {
            const Part& p = parts[job / strips];
            const i64 first = job % strips * wide, width = std::min(wide, outs - first);
            const Matrix& matrix = matrices[p.expert];
            float* sums = room_for_sums();
            if (p.many) return many(loops, p, matrix, first, width, sums);
            loops.few(matrix, ins, first, row.data() + p.first, p.rows, width, run.steady, layout.planes, sums);
            for (i64 r = 0; r < p.rows; r++)
                for (i64 o = 0; o < width; o++) put(p.first + r, first + o, sums[r * width + o]);
        });
    };
    if (room)
        parallel(run, parts.size(), SHARE * n, [&](i64 i) {
            const Part& p = parts[i];
            for (i64 at = 0; p.many && at < p.rows; at += PANEL) {
                const float* rows[PANEL];
                const i64 here = std::min(PANEL, p.rows - at);
                for (i64 r = 0; r < here; r++) rows[r] = given + token[p.first + at + r] * n;
                into_panel(rows, here, n, panels + p.panels + at * n);
            }
        });
    for (i64 j = 0; j < hits; j++) row[j] = laid + token[j] * outer.step();
    each(
        up, width, outer, [&](i64 j, i64 o, float v) { inner[j * step + between.place(o)] = between.up * relu2(v); },
        [&](const Loops& loops, const Part& p, const Matrix& matrix, i64 first, i64 outs, float* sums) {
            loops.many(matrix, n, first, panels + p.panels, p.rows, outs, sums);
            ToPanels{inner_of(p), width}(0, p.rows, first, outs, sums);
        });
    parallel(run, hits, width, [&](i64 j) { between.finish(inner + j * step); });
    for (i64 j = 0; j < hits; j++) row[j] = inner + j * step;
    each(
        down, n, between, [&](i64 j, i64 o, float v) { out[j * n + o] = v; },
        [&](const Loops& loops, const Part& p, const Matrix& matrix, i64 first, i64 outs, float* sums) {
            loops.many(matrix, width, first, inner_of(p), p.rows, outs, sums);
            ToRows{out, n}(p.first, p.rows, first, outs, sums);
        });
    // TOGETHER: the sum, in the order in which the token's experts were chosen
    parallel(run, tokens, k * n, [&](i64 t) {
        float* to = y + t * n;
        std::fill(to, to + n, 0.f);
        for (i64 j = t * k; j < (t + 1) * k; j++) {
            if (place_of[j] >= hits) continue;
            const float *from = out + place_of[j] * n, share = weight[j];
            for (i64 o = 0; o < n; o++) to[o] += share * from[o];
        }
    });
}
}
