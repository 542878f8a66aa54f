// Causal attention over packed rows for training on a CPU, with its gradient: a token sees the tokens of its own
// document only, so the work is that of the documents, not of the whole row.
//
// q is [rows, length, heads, D], k and v [rows, length, kv, D], age [rows, length]; float32, contiguous.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace {
constexpr int D = 32;  // head_dim

// Transpose one head of [length, kv, D] to [D][length].
void transpose(const float* in, int length, int stride, std::vector<float>& out) {
    out.resize((size_t)D * length);
    for (int t = 0; t < length; ++t)
        for (int d = 0; d < D; ++d) out[(size_t)d * length + t] = in[(size_t)t * stride + d];
}

// out[j] = scale * sum over d of a[d] rows[d][j], for j < n.
void products(const float* __restrict a, const float* __restrict rows, int length, int n, float scale,
              float* __restrict out) {
    for (int j = 0; j < n; ++j) out[j] = 0.0f;
    for (int d = 0; d < D; d += 4) {
        const float a0 = scale * a[d], a1 = scale * a[d + 1], a2 = scale * a[d + 2], a3 = scale * a[d + 3];
        const float* __restrict r0 = rows + (size_t)d * length;
        const float *__restrict r1 = r0 + length, *__restrict r2 = r1 + length, *__restrict r3 = r2 + length;
        for (int j = 0; j < n; ++j) out[j] += a0 * r0[j] + a1 * r1[j] + a2 * r2[j] + a3 * r3[j];
    }
}

// out[d] = sum over j of p[j] rows[j][d].
void weighted(const float* __restrict p, const float* __restrict rows, int stride, int n, float* __restrict out) {
    float even[D] = {}, odd[D] = {};
    int j = 0;
    for (; j + 1 < n; j += 2) {
        const float* __restrict a = rows + (size_t)j * stride;
        const float* __restrict b = a + stride;
        for (int d = 0; d < D; ++d) even[d] += p[j] * a[d];
        for (int d = 0; d < D; ++d) odd[d] += p[j + 1] * b[d];
    }
    if (j < n)
        for (int d = 0; d < D; ++d) even[d] += p[j] * rows[(size_t)j * stride + d];
    for (int d = 0; d < D; ++d) out[d] = even[d] + odd[d];
}
}  // namespace

extern "C" {

// total [rows, length, heads] keeps the logarithm of the sum of exponentials.
void attention_forward(int rows, int length, int heads, int kv, const float* q, const float* k, const float* v,
                       const int* age, float* out, float* total) {
    const float scale = 1.0f / std::sqrt((float)D);
    std::vector<float> kt, p(length);
    for (int r = 0; r < rows; ++r)
        for (int g = 0; g < kv; ++g) {
            const size_t base = (size_t)r * length;
            transpose(k + (base * kv + g) * D, length, kv * D, kt);
            for (int h = g * (heads / kv); h < (g + 1) * (heads / kv); ++h)
                for (int t = 0; t < length; ++t) {
                    const int start = t - age[base + t], n = age[base + t] + 1;
                    products(q + ((base + t) * heads + h) * D, kt.data() + start, length, n, scale, p.data());
                    float most = p[0], sum = 0.0f;
                    for (int j = 1; j < n; ++j) most = std::max(most, p[j]);
                    for (int j = 0; j < n; ++j) p[j] = std::exp(p[j] - most);
                    for (int j = 0; j < n; ++j) sum += p[j];
                    for (int j = 0; j < n; ++j) p[j] /= sum;
                    total[(base + t) * heads + h] = most + std::log(sum);
                    weighted(p.data(), v + ((base + start) * kv + g) * D, kv * D, n,
                             out + ((base + t) * heads + h) * D);
                }
        }
}

// gq, gk and gv are set.
void attention_backward(int rows, int length, int heads, int kv, const float* q, const float* k, const float* v,
                        const int* age, const float* out, const float* total, const float* gout, float* gq, float* gk,
                        float* gv) {
    const float scale = 1.0f / std::sqrt((float)D);
    std::vector<float> kt, vt, p(length), s(length);
    std::memset(gk, 0, (size_t)rows * length * kv * D * sizeof(float));
    std::memset(gv, 0, (size_t)rows * length * kv * D * sizeof(float));
    for (int r = 0; r < rows; ++r)
        for (int g = 0; g < kv; ++g) {
            const size_t base = (size_t)r * length;
            transpose(k + (base * kv + g) * D, length, kv * D, kt);
            transpose(v + (base * kv + g) * D, length, kv * D, vt);
            for (int h = g * (heads / kv); h < (g + 1) * (heads / kv); ++h)
                for (int t = 0; t < length; ++t) {
                    const int start = t - age[base + t], n = age[base + t] + 1;
                    const size_t at = ((base + t) * heads + h) * D, first = ((base + start) * kv + g) * D;
                    const float *__restrict qt = q + at, *__restrict up = gout + at;
                    const float sum = total[(base + t) * heads + h];
                    float dot = 0.0f;
                    for (int d = 0; d < D; ++d) dot += up[d] * out[at + d];
                    products(qt, kt.data() + start, length, n, scale, p.data());
                    products(up, vt.data() + start, length, n, 1.0f, s.data());
                    for (int j = 0; j < n; ++j) p[j] = std::exp(p[j] - sum);
                    for (int j = 0; j < n; ++j) s[j] = scale * p[j] * (s[j] - dot);
                    weighted(s.data(), k + first, kv * D, n, gq + at);
                    for (int j = 0; j < n; ++j) {
                        float* __restrict a = gk + first + (size_t)j * kv * D;
                        float* __restrict b = gv + first + (size_t)j * kv * D;
                        for (int d = 0; d < D; ++d) a[d] += s[j] * qt[d];
                        for (int d = 0; d < D; ++d) b[d] += p[j] * up[d];
                    }
                }
        }
}
}
