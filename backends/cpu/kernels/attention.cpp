// Attention on a CPU: one pass over the keys and values, which all query heads of a key head, and of several
// positions, read together, by the product of vectors.h: numbers of K times the queries side by side, numbers of V
// times their weights. The context is cut into pieces, whatever the number of threads and of positions, and what
// they say is put together in order.
#include <algorithm>
#include <cmath>
#include <vector>

#include "pool.h"
#include "vectors.h"
#include "verbs.h"

constexpr i64 PIECE = 480, BLOCK = 24576;  // keys; bytes of float32 keys that are scored, then weighed
constexpr i64 QUERIES = 64;                // side by side, about
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

// What one piece says: the `keys` of a key head from `at` on.
template <class T>
static void piece(const Queries& of, const T* K, const T* V, i64 at, i64 keys, i64 e, float* known) {
    static thread_local std::vector<float> room, scores;
    const i64 block = std::max<i64>(1, BLOCK / (4 * e) / ROWS) * ROWS, each = sizeof(T), width = of.width;
    if ((i64)room.size() < block * e) room.resize(block * e);
    if ((i64)scores.size() < block * width) scores.resize(block * width);
    std::fill(known, known + width, -3e38f);
    std::fill(known + width, known + (2 + e) * width, 0.f);
    for (const i64 end = at + keys; at < end; at += block, K += block * e, V += block * e) {
        const i64 here = std::min(block, end - at);
        std::fill(scores.begin(), scores.begin() + here * width, 0.f);
        Next values{(const char*)V, each}, keys_after{(const char*)(K + here * e), each};
        const float* k = widened(K, here * e, room.data());
        product(k, e, 1, here, of.q, width, e, scores.data(), values);
        weigh(scores.data(), at, here, of, e, known);
        const float* v = widened(V, here * e, room.data());
        product(v, 1, e, e, scores.data(), width, here, known + 2 * width, keys_after);
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
static void attend_to(const float* q, i64 q_step, const T* K, const T* V, const i64* length, float scale, float* y,
                      i64 b, i64 l, i64 h, i64 kv, i64 t, i64 e, const Run& run) {
    const i64 r = h / kv, most = std::min(l, std::max<i64>(1, QUERIES / r)), blocks = (l + most - 1) / most;
    const i64 width = (r * most + LANES - 1) / LANES * LANES, size = (2 + e) * width;
    struct Block { i64 row, group, first, positions, pieces, at; };  // at: of its first piece among all
    std::vector<Block> listed;
    std::vector<i64> of;  // the block of each piece
    for (i64 s = 0; s < b; s++)
        for (i64 g = 0; g < kv; g++)
            for (i64 i = 0; i < blocks; i++) {
                const i64 first = i * most, positions = std::min(most, l - first);
                const i64 pieces = (length[s] + first + positions - 1) / PIECE + 1;
                listed.push_back({s, g, first, positions, pieces, (i64)of.size()});
                of.resize(of.size() + pieces, (i64)listed.size() - 1);
            }
    auto turned = [&](const Block& block, std::vector<float>& to) {  // its queries, side by side
        to.assign(e * width, 0.f);
        for (i64 c = 0; c < block.positions * r; c++) {
            const float* from =
                q + (block.row * l + block.first + c / r) * q_step + (block.group * r + c % r) * e;
            for (i64 i = 0; i < e; i++) to[i * width + c] = from[i] * scale;
        }
        return Queries{to.data(), width, r, length[block.row] + block.first};
    };
    auto read = [&](const Block& block, const Queries& queries, i64 p, float* known) {
        const i64 at = p * PIECE, keys = std::min(PIECE, queries.first + block.positions - at);
        const i64 from = ((block.row * kv + block.group) * t + at) * e;
        piece(queries, K + from, V + from, at, keys, e, known);
    };
    auto told = [&](const Block& block, const float* known) {
        static thread_local std::vector<float> all;
        together(known, block.pieces, width, e, all);
        for (i64 c = 0; c < block.positions * r; c++) {
            float* to = y + ((block.row * l + block.first + c / r) * h + block.group * r + c % r) * e;
            for (i64 i = 0; i < e; i++) to[i] = all[(1 + i) * width + c] / all[c];
        }
    };
    if (l == 1) {  // few blocks of many pieces: the pieces are shared out
        static thread_local std::vector<float> kept;
        if (kept.size() < of.size() * size) kept.resize(of.size() * size);
        float* known = kept.data();
        std::vector<std::vector<float>> rows(listed.size());
        std::vector<Queries> queries;
        for (size_t i = 0; i < listed.size(); i++) queries.push_back(turned(listed[i], rows[i]));
        parallel(run, of.size(), std::min(t, PIECE) * width * e, [&](i64 p) {
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

// y [b][l][h][e] = softmax(q K' scale) V, where position i of row s sees the first length[s] + i + 1 of the t keys:
// K, V [b][kv][t][e], bfloat16 if `narrow`. Positions of q are q_step apart.
extern "C" void attend(const float* q, i64 q_step, const void* K, const void* V, int narrow, const i64* length,
                       float scale, float* y, i64 b, i64 l, i64 h, i64 kv, i64 t, i64 e, const Run& run) {
    if (narrow)
        attend_to(q, q_step, (const uint16_t*)K, (const uint16_t*)V, length, scale, y, b, l, h, kv, t, e, run);
    else
        attend_to(q, q_step, (const float*)K, (const float*)V, length, scale, y, b, l, h, kv, t, e, run);
}
