// Attention on a CPU: one pass over the keys and values, which all query heads of a key head, and of several
// positions, read together, as products of numbers of the cache and vectors of queries or weights side by side. The
// context is cut into pieces, whatever the number of threads and of positions, and their sums are added in order.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cached.h"
#include "pool.h"
#include "verbs.h"

constexpr i64 PIECE = 480, MOST_PIECES = 128;  // keys; pieces of a step, which has longer ones beyond
constexpr i64 BLOCK = 24576;                   // bytes of keys, widened, that are scored, then weighed
constexpr i64 QUERIES = 64;                    // side by side, about
constexpr int FAR = 8;  // octaves by which a score may pass the one that weights relate to

// Queries side by side, of the positions from `first` on: column c is of position first + c / heads, and sees the
// keys up to that one.
struct Queries {
    const float* q;  // [e][width]
    i64 width, heads, first;
};

// Scores [keys][width], in octaves, of the keys from `at` on, become weights; 0 for a key that a column does not
// see. known: the score that weights relate to [width], their sum [width], y [e][width]; a column is moved to its
// greatest score when that has gone far beyond. No column depends on another.
static void weigh(float* scores, i64 at, i64 keys, const Queries& of, i64 e, float* known) {
    const i64 width = of.width;
    for (i64 w = 0; w < width; w += LANES) {
        ints seen;  // keys of these that each column sees
        bool all = true;
        for (int i = 0; i < LANES; i++) {
            seen[i] = (int32_t)std::clamp<i64>(of.first + (w + i) / of.heads + 1 - at, 0, keys);
            all &= seen[i] == keys;
        }
        const vec base = load<vec>(known + w);
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
            store(known + w, now);
            for (i64 i = 1; i < 2 + e; i++) {
                float* to = known + i * width + w;
                store(to, load<vec>(to) * shrink);
            }
        }
        for (i64 j = 0; j < keys; j++) {
            vec p = exp2_of<FAR>(load<vec>(scores + j * width + w) - now);
            if (!all) p = seen > (int32_t)j ? p : vec{};
            store(scores + j * width + w, p);
            sum += p;
        }
        store(known + width + w, load<vec>(known + width + w) + sum);
    }
}

// The keys and values of a key head of one sequence.
struct Context {
    const Page* pages;
    i64 each, head;  // keys of a page
};

// The sums of one piece: the `keys` keys from `at` on.
template <class T>
static void piece(const Queries& of, const Context& context, i64 at, i64 keys, i64 e, float* known) {
    static thread_local std::vector<float> room, scores;
    const i64 width = of.width, block = std::max<i64>(1, BLOCK / (4 * e) / ROWS) * ROWS;
    if ((i64)room.size() < block * e) room.resize(block * e);
    if ((i64)scores.size() < block * width) scores.resize(block * width);
    std::fill(known, known + width, -3e38f);
    std::fill(known + width, known + (2 + e) * width, 0.f);
    for (const i64 end = at + keys; at < end;) {
        const Page& page = context.pages[at / context.each];
        const i64 from = at % context.each, here = std::min({block, end - at, context.each - from});
        const i64 place = context.head * page.step + from * e;
        const T *K = (const T*)page.k + place, *V = (const T*)page.v + place;
        const Next values{(const char*)V, sizeof(T)}, keys_after{(const char*)(K + here * e), sizeof(T)};
        std::fill(scores.begin(), scores.begin() + here * width, 0.f);
        product(widened(K, here * e, room.data()), e, 1, here, of.q, width, e, scores.data(), values);
        weigh(scores.data(), at, here, of, e, known);
        product(widened(V, here * e, room.data()), 1, e, e, scores.data(), width, here, known + 2 * width, keys_after);
        at += here;
    }
}

// all [1 + e][width]: the sum of weights, and y, over all pieces.
static void together(const float* known, i64 pieces, i64 width, i64 e, std::vector<float>& all) {
    const i64 size = (2 + e) * width;
    std::vector<float> most(width, -3e38f);
    all.assign((1 + e) * width, 0.f);
    for (i64 p = 0; p < pieces; p++)
        for (i64 w = 0; w < width; w++) most[w] = std::max(most[w], known[p * size + w]);
    for (i64 p = 0; p < pieces; p++, known += size)
        for (i64 w = 0; w < width; w += LANES) {
            const vec share = exp2_of<FAR>(load<vec>(known + w) - load<vec>(&most[w]));
            for (i64 i = 0; i < 1 + e; i++) {
                float* to = &all[i * width + w];
                store(to, load<vec>(to) + share * load<vec>(known + (1 + i) * width + w));
            }
        }
}

// Scores are in octaves: the scale is log2(e) times the model's.
template <class T>
static void attend_to(const float* q, i64 q_step, const Cache& cache, const i64* length, float scale, float* y, i64 b,
                      i64 l, i64 h, i64 kv, i64 e, const Run& run) {
    const i64 r = h / kv, most = std::min(l, std::max<i64>(1, QUERIES / r)), blocks = (l + most - 1) / most;
    const i64 width = (r * most + LANES - 1) / LANES * LANES, size = (2 + e) * width;
    struct Block { i64 row, group, first, positions, each, pieces, at; };  // keys of a piece; its first among all
    std::vector<Block> listed;
    std::vector<i64> of;  // the block of each piece
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
    auto turned = [&](const Block& block, std::vector<float>& to) {  // its queries, side by side
        to.assign(e * width, 0.f);
        for (i64 c = 0; c < block.positions * r; c++) {
            const float* from =
                q + (block.row * l + block.first + c / r) * q_step + (block.group * r + c % r) * e;
            for (i64 i = 0; i < e; i++) to[i * width + c] = from[i] * by;
        }
        return Queries{to.data(), width, r, length[block.row] + block.first};
    };
    auto read = [&](const Block& block, const Queries& queries, i64 p, float* known) {
        const i64 at = p * block.each, keys = std::min(block.each, queries.first + block.positions - at);
        piece<T>(queries, {cache.pages + block.row * cache.count, cache.each, block.group}, at, keys, e, known);
    };
    auto told = [&](const Block& block, const float* known) {
        static thread_local std::vector<float> all;
        together(known, block.pieces, width, e, all);
        for (i64 c = 0; c < block.positions * r; c++) {
            float* to = y + ((block.row * l + block.first + c / r) * h + block.group * r + c % r) * e;
            for (i64 i = 0; i < e; i++) to[i] = all[(1 + i) * width + c] / all[c] * cache.v_scale;
        }
    };
    if (l == 1) {  // few blocks of many pieces: the pieces are shared out
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
