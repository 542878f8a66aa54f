// Products of rows x [rows][n] float32 with weights w [outs][n] of any kind: y[r][o] = x[r] . w[o].
//
// A tile of rows and outputs shares its loads and keeps its sums in registers. One row reads a weight once, from
// memory, and is as fast as that. More rows go by blocks: a strip of outputs and BLOCK rows at a time, DEPTH deep, so
// that what is read again is in cache; MANY rows by panels (panels.h), except in the steady mode, in which the order
// of a sum does not depend on the number of rows. Products are as exact as float32 products.
#include <algorithm>
#include <cstring>
#include <vector>

#include "numbers.h"
#include "panels.h"
#include "pool.h"
#include "verbs.h"

constexpr i64 STRIP = 24;                            // outputs of a piece of work, of few rows
constexpr i64 BLOCK = 64, DEPTH = 512;               // rows; positions of a row, a multiple of PAIR
constexpr i64 SHARE = 128;                           // rows of a piece of work
constexpr i64 MANY = 48;                             // rows from which products go by panels
constexpr i64 FEW = 8;                               // rows that are multiplied over their whole depth at once
static i64 strip_of(i64 rows) { return rows > FEW ? WIDE_STRIP : STRIP; }
constexpr i64 AHEAD = 1280;                          // bytes: how far ahead of its use a stream is asked for

// Rows of `n` positions as the tiles read them: in their places, and zeros up to a multiple of PAIR.
template <class T>
static void laid_out(const float* from, float* to, i64 n) {
    const i64 np = padded(n), whole = n / PAIR * PAIR;
    if (!Two<T>::apart)
        memcpy(to, from, n * sizeof(float));
    else {
        for (i64 j = 0; j < whole; j += PAIR)
            for (i64 i = 0; i < LANES; i++)
                to[j + i] = from[j + 2 * i], to[j + LANES + i] = from[j + 2 * i + 1];
        for (i64 j = whole; j < np; j++) to[j] = 0;
        for (i64 j = whole; j < n; j++) to[place<T>(j)] = from[j];
    }
    if (!Two<T>::apart)
        for (i64 j = n; j < np; j++) to[j] = 0;
}

template <class T>
static const float* rows_laid_out(const float* x, i64 rows, i64 n, const Run& run) {
    static thread_local std::vector<float> kept;
    const i64 np = padded(n);
    if (!Two<T>::apart && np == n) return x;
    if ((i64)kept.size() < rows * np) kept.resize(rows * np);
    float* to = kept.data();
    parallel(run, rows, n / 2, [=](i64 r) { laid_out<T>(x + r * n, to + r * np, n); });
    return to;
}

// x . w: a stream of weights, asked for in time and summed in eight chains, so that only memory holds it up.
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

// `v` in a register: a compiler would rather load it again for each product, and loads are what is scarce.
static inline vec held(vec v) {
#if defined(__AVX2__) && !defined(WIDE)
    asm("" : "+v"(v));
#endif
    return v;
}

// out[r][o] += x[r] . w[o] from position `from` to `to`, for R rows and O outputs; rows of out are `step` apart.
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

// put(r, o, x[r] . w[o]) for rows at x, `step` apart, by all threads.
template <class T, class Put>
static void all_products(const T* w, i64 outs, i64 n, const float* x, i64 step, i64 rows, const Run& run,
                         Put put) {
    std::vector<const float*> row(rows);
    for (i64 r = 0; r < rows; r++) row[r] = x + r * step;
    const i64 shares = (rows + SHARE - 1) / SHARE, each = std::min(SHARE, rows);
    const i64 wide = strip_of(rows);
    parallel(run, (outs + wide - 1) / wide * shares, wide * n * each, [&](i64 job) {
        const i64 first = job / shares * wide, at = job % shares * SHARE;
        const i64 width = std::min(wide, outs - first), here = std::min(SHARE, rows - at);
        float sums[SHARE * WIDE_STRIP];
        products(w + first * n, n, row.data() + at, here, width, run.steady, sums);
        for (i64 r = 0; r < here; r++)
            for (i64 o = 0; o < width; o++) put(at + r, first + o, sums[r * width + o]);
    });
}

// All products of rows in panels, by all threads; put(row, rows, output, outputs, sums) takes them.
template <class T, class Put>
static void all_panels(const T* w, i64 outs, i64 n, const float* panels, i64 rows, const Run& run, Put put) {
    const i64 shares = (rows + PANEL_SHARE - 1) / PANEL_SHARE, each = panels_of((rows + shares - 1) / shares) * PANEL;
    const i64 strips = (outs + WIDE_STRIP - 1) / WIDE_STRIP;
    parallel(run, strips * shares, WIDE_STRIP * n * each, [&](i64 job) {  // a share of rows stays in cache
        const i64 first = job % strips * WIDE_STRIP, at = job / strips * each;
        const i64 width = std::min(WIDE_STRIP, outs - first), here = std::min(each, rows - at);
        if (here <= 0) return;
        alignas(64) float sums[PANEL_SHARE * WIDE_STRIP];
        panel_products(w + first * n, n, panels + at * n, here, width, sums);
        put(at, here, first, width, sums);
    });
}

// Rows as panels, kept until the next call.
static const float* in_panels(const float* x, i64 rows, i64 n, const Run& run) {
    static thread_local std::vector<float> kept;
    float* to = aligned(kept, panels_of(rows) * PANEL * n);
    parallel(run, panels_of(rows), n * PANEL, [=](i64 p) {
        const float* row[PANEL];
        const i64 here = std::min(PANEL, rows - p * PANEL);
        for (i64 r = 0; r < here; r++) row[r] = x + (p * PANEL + r) * n;
        into_panel(row, here, n, to + p * PANEL * n);
    });
    return to;
}

static inline float relu2(float v) { return v > 0 ? v * v : 0; }

// A row of T's zeros beyond `width`, for inner rows that are laid out by `place`.
template <class T>
static void pad(float* row, i64 width) {
    for (i64 j = width / PAIR * PAIR; j < padded(width); j++) row[j] = 0;
}

// y = relu(h up')^2 down' of many rows: what is between the two products stays in panels.
static void mlp_of_many(const Matrix& up, const Matrix& down, i64 width, i64 d, const float* h, i64 rows, float* y,
                        const Run& run) {
    static thread_local std::vector<float> kept;
    float* inner = aligned(kept, panels_of(rows) * PANEL * width);
    of_kind(up.kind, [&](auto* kind) {
        all_panels((decltype(kind))up.at, width, d, in_panels(h, rows, d, run), rows, run, ToPanels{inner, width});
    });
    of_kind(down.kind, [&](auto* kind) {
        all_panels((decltype(kind))down.at, d, width, inner, rows, run, ToRows{y, d});
    });
}

extern "C" {

// y[r][o] = x[r] . w[o]; rows of y are y_step apart
void linear(const Matrix& w, i64 outs, i64 n, const float* x, i64 rows, float* y, i64 y_step, const Run& run) {
    of_kind(w.kind, [&](auto* kind) {
        typedef std::remove_const_t<std::remove_pointer_t<decltype(kind)>> T;
        if (rows >= MANY && !run.steady)
            return all_panels((const T*)w.at, outs, n, in_panels(x, rows, n, run), rows, run, ToRows{y, y_step});
        const float* laid = rows_laid_out<T>(x, rows, n, run);
        all_products((const T*)w.at, outs, n, laid, padded(n), rows, run,
                     [=](i64 r, i64 o, float v) { y[r * y_step + o] = v; });
    });
}

// y = relu(h up')^2 down'
void mlp(const Matrix& up, const Matrix& down, i64 width, i64 d, const float* h, i64 rows, float* y,
         const Run& run) {
    if (rows >= MANY && !run.steady) return mlp_of_many(up, down, width, d, h, rows, y, run);
    static thread_local std::vector<float> kept;
    of_kind(down.kind, [&](auto* kind) {
        typedef std::remove_const_t<std::remove_pointer_t<decltype(kind)>> T;
        const i64 step = padded(width);
        if ((i64)kept.size() < rows * step) kept.resize(rows * step);
        float* inner = kept.data();
        for (i64 r = 0; r < rows; r++) pad<T>(inner + r * step, width);
        of_kind(up.kind, [&](auto* kind) {
            typedef std::remove_const_t<std::remove_pointer_t<decltype(kind)>> U;
            const float* laid = rows_laid_out<U>(h, rows, d, run);
            all_products((const U*)up.at, width, d, laid, padded(d), rows, run,
                         [=](i64 r, i64 o, float v) { inner[r * step + place<T>(o)] = relu2(v); });
        });
        all_products((const T*)down.at, d, width, inner, step, rows, run,
                     [=](i64 r, i64 o, float v) { y[r * d + o] = v; });
    });
}
}

template <class T>
static void all_experts(const T* const* up, const T* const* down, i64 base, i64 count, const i64* expert,
                        const float* weight, i64 tokens, i64 k, i64 n, i64 width, const float* u, float* y,
                        const Run& run) {
    // HITS sorted by expert, so that a matrix is read once, from its beginning to its end
    auto here = [&](i64 e) { return e < base || e >= base + count ? count : e - base; };
    std::vector<i64> begin(count + 2, 0), hit, place_of(tokens * k), token(tokens * k);
    for (i64 j = 0; j < tokens * k; j++) begin[here(expert[j]) + 1]++;
    for (i64 e = 0; e < count; e++) {
        if (begin[e + 1]) hit.push_back(e);
        begin[e + 1] += begin[e];
    }
    std::vector<i64> next(begin);
    for (i64 j = 0; j < tokens * k; j++) place_of[j] = next[here(expert[j])]++, token[place_of[j]] = j / k;
    const i64 hits = begin[count], np = padded(n), step = padded(width);
    static thread_local std::vector<float> kept;
    if ((i64)kept.size() < hits * (step + n)) kept.resize(hits * (step + n));
    float *inner = kept.data(), *out = inner + hits * step;
    for (i64 j = 0; j < hits; j++) pad<T>(inner + j * step, width);
    const float* given = u;
    u = rows_laid_out<T>(u, tokens, n, run);
    std::vector<const float*> row(hits);

    // put(hit, output, value) of each matrix [outs][ins], of the rows in `row`. Jobs: an expert's share of rows,
    // times strips of outputs.
    // Many rows of an expert go by panels, at `panels` of the room for them.
    struct Part { i64 expert, first, rows; bool many; i64 panels; };
    std::vector<Part> parts;
    i64 room = 0;
    for (i64 e : hit)
        for (i64 j = begin[e]; j < begin[e + 1]; j += SHARE) {
            const i64 rows = std::min(SHARE, begin[e + 1] - j);
            parts.push_back({e, j, rows, rows >= MANY && !run.steady, room});
            if (parts.back().many) room += panels_of(rows) * PANEL * (n + width);
        }
    static thread_local std::vector<float> kept_panels;
    float* panels = room ? aligned(kept_panels, room) : nullptr;
    auto inner_of = [=](const Part& p) { return panels + p.panels + panels_of(p.rows) * PANEL * n; };
    auto each = [&](const T* const* matrices, i64 outs, i64 ins, auto put, auto many) {
        const i64 rows = std::max<i64>(1, hits / (i64)parts.size()), wide = strip_of(rows);
        const i64 strips = (outs + wide - 1) / wide;
        parallel(run, (i64)parts.size() * strips, wide * ins * rows, [&](i64 job) {
            const Part& p = parts[job / strips];
            const i64 first = job % strips * wide, width = std::min(wide, outs - first);
            const T* matrix = matrices[p.expert] + first * ins;
            alignas(64) float sums[SHARE * WIDE_STRIP];
            if (p.many) return many(p, matrix, first, width, sums);
            products(matrix, ins, row.data() + p.first, p.rows, width, run.steady, sums);
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
    if (hits) {
        for (i64 j = 0; j < hits; j++) row[j] = u + token[j] * np;
        each(
            up, width, n, [&](i64 j, i64 o, float v) { inner[j * step + place<T>(o)] = relu2(v); },
            [&](const Part& p, const T* matrix, i64 first, i64 outs, float* sums) {
                panel_products(matrix, n, panels + p.panels, p.rows, outs, sums);
                ToPanels{inner_of(p), width}(0, p.rows, first, outs, sums);
            });
        for (i64 j = 0; j < hits; j++) row[j] = inner + j * step;
        each(
            down, n, width, [&](i64 j, i64 o, float v) { out[j * n + o] = v; },
            [&](const Part& p, const T* matrix, i64 first, i64 outs, float* sums) {
                panel_products(matrix, width, inner_of(p), p.rows, outs, sums);
                ToRows{out, n}(p.first, p.rows, first, outs, sums);
            });
    }
    // TOGETHER, in the order in which the token's experts were chosen
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

// y[t] = sum over the k experts of token t of  weight relu(u[t] up')^2 down', of those that are here: the
// `count` from `base`.
extern "C" void experts(const void* const* up, const void* const* down, i64 kind, i64 base, i64 count,
                        const i64* expert, const float* weight, i64 tokens, i64 k, i64 n, i64 width,
                        const float* u, float* y, const Run& run) {
    of_kind(kind, [&](auto* kind) {
        typedef std::remove_const_t<std::remove_pointer_t<decltype(kind)>> T;
        all_experts((const T* const*)up, (const T* const*)down, base, count, expert, weight, tokens, k, n,
                    width, u, y, run);
    });
}
