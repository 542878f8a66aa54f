// Attention of one position on a CPU: one pass over the keys and values, which all query heads of a key head
// read together, by the product of vectors.h: numbers of K times the heads of q, numbers of V times the
// weights of the heads. The context is cut into pieces, whatever the number of threads, and what they say is
// put together in order. Compiled on first use by native.py; attention.py says the same in PyTorch.
#include <algorithm>
#include <memory>
#include <vector>

#include "vectors.h"
#include "verbs.h"

constexpr i64 PIECE = 480, BLOCK = 24576;  // keys; bytes of float32 keys that are scored, then weighed
constexpr int FAR = 8;  // octaves by which a score may pass the one that weights relate to

// Scores [keys][width], in octaves, become weights. known: the score that weights relate to [width], their
// sum [width], y [e][width]; all of it is moved to the greatest score when that has gone far beyond.
static void weigh(float* scores, i64 keys, i64 width, i64 e, float* known) {
    for (i64 w = 0; w < width; w += LANES) {
        vec base = load<vec>(known + w), most = base, sum = {};
        for (i64 j = 0; j < keys; j++) {
            vec s = load<vec>(scores + j * width + w);
            most = s > most ? s : most;
        }
        bool far = false;
        for (int i = 0; i < LANES; i++) far |= most[i] > base[i] + FAR;
        if (far) {
            vec shrink = exp2_of<FAR>(base - most);
            store(known + w, base = most);
            for (i64 i = 1; i < 2 + e; i++) {
                float* to = known + i * width + w;
                store(to, load<vec>(to) * shrink);
            }
        }
        for (i64 j = 0; j < keys; j++) {
            vec p = exp2_of<FAR>(load<vec>(scores + j * width + w) - base);
            store(scores + j * width + w, p);
            sum += p;
        }
        store(known + width + w, load<vec>(known + width + w) + sum);
    }
}

// What one piece says: `keys` of a key head, read by the heads of q [e][width].
template <class T>
static void piece(const float* q, const T* K, const T* V, i64 keys, i64 width, i64 e, float* known) {
    static thread_local std::vector<float> room, scores;
    i64 block = std::max<i64>(1, BLOCK / (4 * e) / ROWS) * ROWS, each = sizeof(T);
    room.resize(block * e);
    scores.resize(block * width);
    std::fill(known, known + width, -3e38f);
    std::fill(known + width, known + (2 + e) * width, 0.f);
    for (i64 at = 0; at < keys; at += block, K += block * e, V += block * e) {
        i64 here = std::min(block, keys - at);
        std::fill(scores.begin(), scores.end(), 0.f);
        Next values{(const char*)V, each}, keys_after{(const char*)(K + here * e), each};
        const float* k = widened(K, here * e, room.data());
        product(k, e, 1, here, q, width, e, scores.data(), values);
        weigh(scores.data(), here, width, e, known);
        const float* v = widened(V, here * e, room.data());
        product(v, 1, e, e, scores.data(), width, here, known + 2 * width, keys_after);
    }
}

// y [r][e] of one key head, from what its pieces say.
static void together(const float* known, i64 pieces, i64 width, i64 r, i64 e, float* y) {
    i64 size = (2 + e) * width;
    std::vector<float> most(width, -3e38f), all((1 + e) * width, 0.f);  // all: the sum of weights, and y
    for (i64 p = 0; p < pieces; p++)
        for (i64 w = 0; w < width; w++) most[w] = std::max(most[w], known[p * size + w]);
    for (i64 p = 0; p < pieces; p++, known += size)
        for (i64 w = 0; w < width; w += LANES) {
            vec share = exp2_of<FAR>(load<vec>(known + w) - load<vec>(&most[w]));
            for (i64 i = 0; i < 1 + e; i++) {
                float* to = &all[i * width + w];
                store(to, load<vec>(to) + share * load<vec>(known + (1 + i) * width + w));
            }
        }
    for (i64 head = 0; head < r; head++)
        for (i64 i = 0; i < e; i++) y[head * e + i] = all[(1 + i) * width + head] / all[head];
}

// y [b][h][e] = softmax(q K' scale) V, of the first length[b] + 1 of the t keys: K, V [b][kv][t][e]. Scores
// are in octaves: the scale is log2(e) times the model's.
template <class T>
static void attend(const float* q, const T* K, const T* V, const i64* length, float scale, float* y, i64 b,
                   i64 h, i64 kv, i64 t, i64 e, int threads) {
    i64 r = h / kv, width = (r + LANES - 1) / LANES * LANES, size = (2 + e) * width;
    std::vector<i64> first(b * kv + 1, 0), of;  // the first piece of a key head; the key head of a piece
    for (i64 g = 0; g < b * kv; g++) {
        first[g + 1] = first[g] + length[g / kv] / PIECE + 1;
        of.resize(first[g + 1], g);
    }
    std::vector<float> turned(b * kv * e * width, 0.f);  // q, with its heads side by side
    for (i64 g = 0; g < b * kv; g++)
        for (i64 head = 0; head < r; head++)
            for (i64 i = 0; i < e; i++)
                turned[(g * e + i) * width + head] = q[(g * r + head) * e + i] * scale;
    std::unique_ptr<float[]> known(new float[of.size() * size]);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic)
        for (i64 p = 0; p < (i64)of.size(); p++) {
            i64 g = of[p], at = (p - first[g]) * PIECE, from = (g * t + at) * e;
            i64 keys = std::min(PIECE, length[g / kv] + 1 - at);
            piece(&turned[g * e * width], K + from, V + from, keys, width, e, &known[p * size]);
        }
#pragma omp for schedule(dynamic)
        for (i64 g = 0; g < b * kv; g++)
            together(&known[first[g] * size], first[g + 1] - first[g], width, r, e, y + g * r * e);
    }
}

extern "C" {

void attend_float32(const float* q, const float* K, const float* V, const i64* length, float scale, float* y,
                    i64 b, i64 h, i64 kv, i64 t, i64 e, int threads) {
    attend(q, K, V, length, scale, y, b, h, kv, t, e, threads);
}

void attend_bfloat16(const float* q, const uint16_t* K, const uint16_t* V, const i64* length, float scale,
                     float* y, i64 b, i64 h, i64 kv, i64 t, i64 e, int threads) {
    attend(q, K, V, length, scale, y, b, h, kv, t, e, threads);
}
}
