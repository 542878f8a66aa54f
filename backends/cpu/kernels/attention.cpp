// Attention on a CPU, in one pass over keys and values. All query heads of a key head, and the queries of several
// positions, lie side by side in vectors, and each number of the cache is multiplied with these vectors. The context is
// cut into pieces that depend on neither threads nor positions, and the sums of the pieces are added in order.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cached.h"
#include "panels.h"
#include "pool.h"
#include "verbs.h"

constexpr i64 PIECE = 480, MOST_PIECES = 128;  // keys of a piece; most pieces of a decoding step (longer pieces beyond)
constexpr i64 BLOCK = 24576;                   // bytes of keys that are scored before their values are added
constexpr i64 QUERIES = 64;                    // columns side by side, about
constexpr i64 KEYS = ROWS / 2;                 // keys of a tile that is two vectors wide
constexpr int FAR = 8;  // octaves by which a score may exceed the reference score of the weights

// Return whether the cache is bfloat16 whose pairs are widened in registers. Then q and y have the even and the odd
// elements of each PAIR apart (numbers.h).
template <class T>
static inline bool by_pairs(i64 e) { return sizeof(T) == 2 && e % PAIR == 0; }
template <class T>
static inline i64 place_of(i64 i, i64 e) { return by_pairs<T>(e) ? place_apart(i) : i; }

// Queries side by side, of the positions from `first` on: column c belongs to position first + c / heads and sees the
// keys up to that position.
struct Queries {
    const float* q;  // [e][width]
    i64 width, columns, heads, first;
};

// The sums of a piece: the reference score of the weights [width], the sum of weights [width], and y [e][width], or
// [width][e] for bfloat16 pairs.
struct Sums {
    float* most;
    i64 width, e;
    bool pairs;
    float* sum() const { return most + width; }
    float* y() const { return most + 2 * width; }
    i64 of_number() const { return pairs ? 1 : width; }
    i64 of_column() const { return pairs ? e : 1; }
    // Call f(vector of y, vector of its columns' factors) for LANES columns from w on.
    template <class F>
    void each(i64 w, vec by, F f) const {
        if (!pairs)
            for (i64 i = 0; i < e; i++) f(y() + i * width + w, by);
        else
            for (int c = 0; c < LANES; c++)
                for (i64 i = 0; i < e; i += LANES) f(y() + (w + c) * e + i, vec{} + by[c]);
    }
};

// Turn scores [keys][width], in octaves, of the keys from `at` on into weights; 0 for a key that a column does not
// see. If a score exceeds a column's reference by more than FAR, the greatest score becomes the reference. Columns are
// independent of each other.
static void weigh(float* scores, i64 at, i64 keys, const Queries& of, const Sums& known) {
    const i64 width = of.width;
    for (i64 w = 0; w < width; w += LANES) {
        ints seen;  // how many of these keys each column sees
        bool all = true;
        for (int i = 0; i < LANES; i++) {
            seen[i] = (int32_t)std::clamp<i64>(of.first + (w + i) / of.heads + 1 - at, 0, keys);
            all &= seen[i] == keys;
        }
        const vec base = load<vec>(known.most + w);
        vec most = base, sum = {};
        for (i64 j = 0; j < keys; j++) {
            const vec s = load<vec>(scores + j * width + w);
            const vec higher = s > most ? s : most;
            most = all ? higher : (seen > (int32_t)j ? higher : most);
        }
        const vec now = most > base + FAR ? most : base;
        bool far = false;
        for (int i = 0; i < LANES; i++) far |= now[i] > base[i];
        if (far) {
            const vec shrink = exp2_of<FAR>(base - now);
            auto shrunk = [](float* at, vec by) { store(at, load<vec>(at) * by); };
            store(known.most + w, now);
            shrunk(known.sum() + w, shrink);
            known.each(w, shrink, shrunk);
        }
        for (i64 j = 0; j < keys; j++) {
            vec p = exp2_of<FAR>(load<vec>(scores + j * width + w) - now);
            if (!all) p = seen > (int32_t)j ? p : vec{};
            store(scores + j * width + w, p);
            sum += p;
        }
        store(known.sum() + w, load<vec>(known.sum() + w) + sum);
    }
}

// Prefetch a cache line.
static inline void ask(const void* at) { __builtin_prefetch(at, 0, 2); }

// Return keys as float32, in place or widened into `room`, with elements in the order of q.
template <class T>
static inline const float* wide_keys(const T* K, i64 count, i64 e, float* room) {
    if constexpr (sizeof(T) == 2)
        if (by_pairs<T>(e)) {
            for (i64 i = 0; i < count; i += PAIR) {
                const Two<bf16> two((const bf16*)K + i);
                store(room + i, two.low()), store(room + i + LANES, two.high());
            }
            return room;
        }
    return widened(K, count, room);
}

// scores [KEYS][2 LANES] = keys q, of depth e. Meanwhile, widen the `more` keys at `next` (KEYS at most) into `room`
// and prefetch as many values.
static inline void scored_beside(const float* keys, const float* q, i64 e, float* scores, const uint16_t* next, i64 more,
                                 float* room, const uint16_t* values) {
    vec sum[KEYS][2] = {};
    auto step = [&](i64 k) {
        const vec first = load<vec>(q + k * PAIR), second = load<vec>(q + k * PAIR + LANES);
        for (int m = 0; m < KEYS; m++) {
            const vec key = vec{} + keys[m * e + k];
            sum[m][0] = fused(key, first, sum[m][0]), sum[m][1] = fused(key, second, sum[m][1]);
        }
    };
    i64 k = 0;
    for (; k < more * e / PAIR; k++) {
        ask(values + k * PAIR);
        wide_keys(next + k * PAIR, PAIR, PAIR, room + k * PAIR);
        step(k);
    }
    for (; k < e; k++) step(k);
#pragma GCC unroll 24
    for (int m = 0; m < KEYS; m++) store(scores + m * PAIR, sum[m][0]), store(scores + m * PAIR + LANES, sum[m][1]);
}

// Compute scores [keys][width] of a block of keys, and prefetch its values meanwhile.
template <class T>
static void score(const T* K, i64 keys, const Queries& of, i64 e, float* scores, const T* V) {
    static thread_local std::vector<float> kept;
    const i64 many = 4 * ROWS;  // keys that are widened at once
    float* room = aligned(kept, many * e);
    i64 done = 0;
    if constexpr (sizeof(T) == 2)
        if (of.width == PAIR && by_pairs<T>(e)) {  // each key is used once: widened while earlier ones are scored
            float *now = room, *then = room + KEYS * e;
            if (keys >= KEYS) wide_keys(K, KEYS * e, e, now);
            for (; done + KEYS <= keys; done += KEYS, std::swap(now, then))
                scored_beside(now, of.q, e, scores + done * PAIR, K + (done + KEYS) * e,
                              done + 2 * KEYS <= keys ? KEYS : 0, then, V + done * e);
        }
    for (i64 here; done < keys; done += here) {
        here = std::min(many, keys - done);
        float* to = scores + done * of.width;
        std::fill(to, to + here * of.width, 0.f);
        product(wide_keys(K + done * e, here * e, e, room), e, 1, here, of.q, of.width, e, to,
                Next{(const char*)(V + done * e), sizeof(T)});
    }
}

// y [M][e] += p' V of M columns, for a PAIR of elements of V; p [keys][width]. Keys at `next` are prefetched.
template <int M>
static inline void valued(const float* p, i64 width, const bf16* V, i64 e, i64 keys, float* y, const bf16* next) {
    vec low[M], high[M];
    for (int m = 0; m < M; m++) low[m] = load<vec>(y + m * e), high[m] = load<vec>(y + m * e + LANES);
    for (i64 j = 0; j < keys; j++, p += width, V += e, next += PAIR) {
        ask(next);
        const Two<bf16> two(V);
        const vec first = two.low(), second = two.high();
        for (int m = 0; m < M; m++) {
            const vec weight = vec{} + p[m];
            low[m] = fused(weight, first, low[m]), high[m] = fused(weight, second, high[m]);
        }
    }
#pragma GCC unroll 12
    for (int m = 0; m < M; m++) store(y + m * e, low[m]), store(y + m * e + LANES, high[m]);
}

template <int M = KEYS>
static inline void valued_columns(const float* p, i64 width, i64 columns, const bf16* V, i64 e, i64 keys, float* y,
                                  const bf16* next) {
    for (; columns >= M; columns -= M, p += M, y += M * e) valued<M>(p, width, V, e, keys, y, next);
    if constexpr (M > 1)
        if (columns) valued_columns<M - 1>(p, width, columns, V, e, keys, y, next);
}

// The keys and values of a key head of one sequence.
struct Context {
    const Page* pages;
    i64 each, head;  // keys of a page
};

// Compute the sums of one piece: the `keys` keys from `at` on.
template <class T>
static void piece(const Queries& of, const Context& context, i64 at, i64 keys, i64 e, float* to) {
    static thread_local std::vector<float> room, kept;
    const bool pairs = by_pairs<T>(e);
    const Sums known{to, of.width, e, pairs};
    const i64 width = of.width, size = pairs ? sizeof(T) : sizeof(float);
    const i64 block = std::max<i64>(1, BLOCK / (size * e) / ROWS) * ROWS;
    float* scores = aligned(kept, block * width);
    if ((i64)room.size() < block * e) room.resize(block * e);
    std::fill(to, to + width, -3e38f);
    std::fill(to + width, to + (2 + e) * width, 0.f);
    for (const i64 end = at + keys; at < end;) {
        const Page& page = context.pages[at / context.each];
        const i64 from = at % context.each, here = std::min({block, end - at, context.each - from});
        const i64 place = context.head * page.step + from * e;
        const T *K = (const T*)page.k + place, *V = (const T*)page.v + place, *next = K + here * e;
        score(K, here, of, e, scores, V);
        weigh(scores, at, here, of, known);
        if (pairs)
            for (i64 i = 0; i < e; i += PAIR)
                valued_columns(scores, width, of.columns, (const bf16*)V + i, e, here, known.y() + i,
                               (const bf16*)next + i * here);
        else
            product(widened(V, here * e, room.data()), 1, e, e, scores, width, here, known.y(),
                    Next{(const char*)next, sizeof(T)});
        at += here;
    }
}

// Merge the sums of all pieces into the first; each piece has a reference score of its own.
static void together(const Sums& first, i64 pieces) {
    const i64 size = (2 + first.e) * first.width;
    for (i64 w = 0; w < first.width; w += LANES) {
        vec most = load<vec>(first.most + w);
        for (i64 p = 1; p < pieces; p++) {
            const vec other = load<vec>(first.most + p * size + w);
            most = other > most ? other : most;
        }
        for (i64 p = 0; p < pieces; p++) {
            const i64 at = p * size;
            const vec share = exp2_of<FAR>(load<vec>(first.most + at + w) - most);
            auto add = [=](float* to, vec by) {
                const vec part = load<vec>(to + at) * by;
                store(to, p ? load<vec>(to) + part : part);
            };
            add(first.sum() + w, share);
            first.each(w, share, add);
        }
    }
}

// Scores are in octaves: the scale is log2(e) times the model's.
template <class T>
static void attend_to(const float* q, i64 q_step, const Cache& cache, const i64* length, float scale, float* y, i64 b,
                      i64 l, i64 h, i64 kv, i64 e, const Run& run) {
    const i64 r = h / kv, most = std::min(l, std::max<i64>(1, QUERIES / r)), blocks = (l + most - 1) / most;
    const i64 width = (r * most + LANES - 1) / LANES * LANES, size = (2 + e) * width;
    struct Block { i64 row, group, first, positions, each, pieces, at; };  // each: keys of a piece; at: its first
    std::vector<Block> listed;
    std::vector<i64> of;  // of[i]: the block of piece i
    i64 longest = 0;
    for (i64 s = 0; s < b; s++)
        for (i64 g = 0; g < kv; g++)
            for (i64 i = 0; i < blocks; i++) {
                const i64 first = i * most, positions = std::min(most, l - first);
                const i64 keys = length[s] + first + positions, least = (keys - 1) / PIECE + 1;
                const i64 each = l > 1 ? PIECE : PIECE * ((least - 1) / MOST_PIECES + 1);
                const i64 pieces = (keys - 1) / each + 1;
                listed.push_back({s, g, first, positions, each, pieces, (i64)of.size()});
                of.resize(of.size() + pieces, (i64)listed.size() - 1);
                longest = std::max(longest, std::min(keys, each));
            }
    const float by = scale * cache.k_scale;
    auto turned = [&](const Block& block, std::vector<float>& to) {  // the queries of a block, side by side
        to.assign(e * width, 0.f);
        for (i64 c = 0; c < block.positions * r; c++) {
            const float* from =
                q + (block.row * l + block.first + c / r) * q_step + (block.group * r + c % r) * e;
            for (i64 i = 0; i < e; i++) to[place_of<T>(i, e) * width + c] = from[i] * by;
        }
        return Queries{to.data(), width, block.positions * r, r, length[block.row] + block.first};
    };
    auto read = [&](const Block& block, const Queries& queries, i64 p, float* known) {
        const i64 at = p * block.each, keys = std::min(block.each, queries.first + block.positions - at);
        piece<T>(queries, {cache.pages + block.row * cache.count, cache.each, block.group}, at, keys, e, known);
    };
    auto told = [&](const Block& block, float* known) {
        const Sums all{known, width, e, by_pairs<T>(e)};
        together(all, block.pieces);
        for (i64 c = 0; c < block.positions * r; c++) {
            float* to = y + ((block.row * l + block.first + c / r) * h + block.group * r + c % r) * e;
            const float* from = all.y() + c * all.of_column();
            for (i64 i = 0; i < e; i++)
                to[i] = from[place_of<T>(i, e) * all.of_number()] / all.sum()[c] * cache.v_scale;
        }
    };
    if (l == 1) {  // few blocks of many pieces: threads share the pieces
        static thread_local std::vector<float> kept;
        if (kept.size() < of.size() * size) kept.resize(of.size() * size);
        float* known = kept.data();
        std::vector<std::vector<float>> rows(listed.size());
        std::vector<Queries> queries;
        for (size_t i = 0; i < listed.size(); i++) queries.push_back(turned(listed[i], rows[i]));
        parallel(run, of.size(), longest * width * e, [&](i64 p) {
            const Block& block = listed[of[p]];
            read(block, queries[of[p]], p - block.at, known + p * size);
        });
        parallel(run, listed.size(), size * 4, [&](i64 i) { told(listed[i], known + listed[i].at * size); });
        return;
    }
    parallel(run, listed.size(), (length[0] + l) * width * e, [&](i64 i) {
        static thread_local std::vector<float> kept, row;
        const Block& block = listed[listed.size() - 1 - i];  // the longest first
        if ((i64)kept.size() < block.pieces * size) kept.resize(block.pieces * size);
        const Queries queries = turned(block, row);
        for (i64 p = 0; p < block.pieces; p++) read(block, queries, p, kept.data() + p * size);
        told(block, kept.data());
    });
}

// y [b][l][h][e] = softmax(q K' scale) V, where position i of row s sees the first length[s] + i + 1 keys of the
// cache. Positions of q are q_step apart.
extern "C" void attend(const float* q, i64 q_step, const Cache& cache, const i64* length, float scale, float* y, i64 b,
                       i64 l, i64 h, i64 kv, i64 e, const Run& run) {
    if (cache.kind == BFLOAT16)
        attend_to<uint16_t>(q, q_step, cache, length, scale, y, b, l, h, kv, e, run);
    else if (cache.kind == E4M3)
        attend_to<uint8_t>(q, q_step, cache, length, scale, y, b, l, h, kv, e, run);
    else
        attend_to<float>(q, q_step, cache, length, scale, y, b, l, h, kv, e, run);
}
