// Loops of a Mamba-2 layer for training on a CPU: the convolution with SiLU, and the scan, each with its gradient.
//
// Rows hold packed documents: age[t] counts the tokens since the document of token t began, and neither the
// convolution nor the state crosses that border. Arrays are float32 and contiguous; one call handles all rows.
#include <cmath>
#include <cstring>
#include <vector>

namespace {
constexpr int P = 64;      // mamba_head_dim
constexpr int N = 32;      // ssm_state_size
constexpr int K = 4;       // conv_kernel
constexpr int CHUNK = 16;  // steps between kept states; the gradient repeats the steps of a chunk

// One step: S[n][p] = decay S[n][p] + (dt B[n]) x[p].
inline void advance(float* __restrict S, float decay, float dt, const float* __restrict x, const float* __restrict B) {
    for (int n = 0; n < N; ++n) {
        const float b = dt * B[n];
        for (int p = 0; p < P; ++p) S[n * P + p] = decay * S[n * P + p] + b * x[p];
    }
}
}  // namespace

extern "C" {

// y[t, c] = silu(bias[c] + sum over j of w[c, K-1-j] x[t-j, c]); pre keeps the argument of the SiLU.
void conv_forward(int rows, int length, int width, int stride, const float* x, const float* w, const float* bias,
                  const int* age, float* pre, float* y) {
    std::vector<float> wt(K * width);
    for (int c = 0; c < width; ++c)
        for (int j = 0; j < K; ++j) wt[j * width + c] = w[c * K + K - 1 - j];
    for (int r = 0; r < rows; ++r)
        for (int t = 0; t < length; ++t) {
            const long at = (long)r * length + t;
            float* __restrict out = pre + at * width;
            std::memcpy(out, bias, width * sizeof(float));
            for (int j = 0; j < K && j <= age[at]; ++j) {
                const float* __restrict in = x + (at - j) * stride;
                const float* __restrict wj = wt.data() + j * width;
                for (int c = 0; c < width; ++c) out[c] += wj[c] * in[c];
            }
            float* __restrict o = y + at * width;
            for (int c = 0; c < width; ++c) o[c] = out[c] / (1.0f + std::exp(-out[c]));
        }
}

// Gradients of conv_forward; gx (same stride as x) is set, gw and gbias are added to.
void conv_backward(int rows, int length, int width, int stride, const float* x, const float* w, const int* age,
                   const float* pre, const float* gy, float* gx, float* gw, float* gbias) {
    std::vector<float> wt(K * width), gwt(K * width, 0.0f), g(width);
    for (int c = 0; c < width; ++c)
        for (int j = 0; j < K; ++j) wt[j * width + c] = w[c * K + K - 1 - j];
    for (long at = 0; at < (long)rows * length; ++at) std::memset(gx + at * stride, 0, width * sizeof(float));
    for (int r = 0; r < rows; ++r)
        for (int t = 0; t < length; ++t) {
            const long at = (long)r * length + t;
            const float* __restrict a = pre + at * width;
            const float* __restrict up = gy + at * width;
            float* __restrict gg = g.data();
            for (int c = 0; c < width; ++c) {
                const float s = 1.0f / (1.0f + std::exp(-a[c]));
                gg[c] = up[c] * s * (1.0f + a[c] * (1.0f - s));
            }
            for (int c = 0; c < width; ++c) gbias[c] += gg[c];
            for (int j = 0; j < K && j <= age[at]; ++j) {
                const float* __restrict in = x + (at - j) * stride;
                float* __restrict gin = gx + (at - j) * stride;
                const float* __restrict wj = wt.data() + j * width;
                float* __restrict gwj = gwt.data() + j * width;
                for (int c = 0; c < width; ++c) {
                    gin[c] += wj[c] * gg[c];
                    gwj[c] += in[c] * gg[c];
                }
            }
        }
    for (int c = 0; c < width; ++c)
        for (int j = 0; j < K; ++j) gw[c * K + K - 1 - j] += gwt[j * width + c];
}

// S[t] = exp(dt[t] A) S[t-1] + dt[t] x[t] B[t]', y[t] = S[t] C[t] + D x[t]; xBC holds x (heads), B, C (groups) side
// by side. kept receives S before every CHUNK-th step: [rows, length / CHUNK, heads, N, P].
void scan_forward(int rows, int length, int heads, int groups, const float* xBC, const float* dt, const float* A,
                  const float* D, const int* age, float* kept, float* y) {
    const int inner = heads * P, width = inner + 2 * groups * N, each = heads / groups;
    alignas(64) float S[N * P], out[P];
    for (int r = 0; r < rows; ++r)
        for (int h = 0; h < heads; ++h) {
            std::memset(S, 0, sizeof S);
            for (int t = 0; t < length; ++t) {
                const long at = (long)r * length + t;
                const float* row = xBC + at * width;
                const float* __restrict x = row + h * P;
                const float* __restrict B = row + inner + (h / each) * N;
                const float* __restrict C = B + groups * N;
                if (t % CHUNK == 0)
                    std::memcpy(kept + (((long)r * (length / CHUNK) + t / CHUNK) * heads + h) * N * P, S, sizeof S);
                const float step = dt[at * heads + h], decay = age[at] ? std::exp(step * A[h]) : 0.0f;
                for (int p = 0; p < P; ++p) out[p] = D[h] * x[p];
                for (int n = 0; n < N; ++n) {
                    const float b = step * B[n], c = C[n];
                    float* __restrict s = S + n * P;
                    for (int p = 0; p < P; ++p) {
                        s[p] = decay * s[p] + b * x[p];
                        out[p] += c * s[p];
                    }
                }
                std::memcpy(y + at * inner + h * P, out, sizeof out);
            }
        }
}

// Gradients of scan_forward; gxBC and gdt are set, gA and gD are added to.
void scan_backward(int rows, int length, int heads, int groups, const float* xBC, const float* dt, const float* A,
                   const float* D, const int* age, const float* kept, const float* gy, float* gxBC, float* gdt,
                   float* gA, float* gD) {
    const int inner = heads * P, width = inner + 2 * groups * N, each = heads / groups;
    std::memset(gxBC, 0, (long)rows * length * width * sizeof(float));
    std::vector<float> states((CHUNK + 1) * N * P);
    alignas(64) float G[N * P], gx[P];
    for (int r = 0; r < rows; ++r)
        for (int h = 0; h < heads; ++h) {
            std::memset(G, 0, sizeof G);
            for (int chunk = length / CHUNK - 1; chunk >= 0; --chunk) {
                const long from = (long)r * length + chunk * CHUNK;
                std::memcpy(states.data(), kept + (((long)r * (length / CHUNK) + chunk) * heads + h) * N * P,
                            N * P * sizeof(float));
                for (int i = 0; i < CHUNK; ++i) {
                    const long at = from + i;
                    const float* row = xBC + at * width;
                    const float step = dt[at * heads + h], decay = age[at] ? std::exp(step * A[h]) : 0.0f;
                    float* S = states.data() + (i + 1) * N * P;
                    std::memcpy(S, S - N * P, N * P * sizeof(float));
                    advance(S, decay, step, row + h * P, row + inner + (h / each) * N);
                }
                for (int i = CHUNK - 1; i >= 0; --i) {
                    const long at = from + i;
                    const float* row = xBC + at * width;
                    const float* __restrict x = row + h * P;
                    const float* __restrict B = row + inner + (h / each) * N;
                    const float* __restrict C = B + groups * N;
                    const float* __restrict up = gy + at * inner + h * P;
                    float* grow = gxBC + at * width;
                    float* __restrict gB = grow + inner + (h / each) * N;
                    float* __restrict gC = gB + groups * N;
                    const float step = dt[at * heads + h], decay = age[at] ? std::exp(step * A[h]) : 0.0f;
                    float through = 0.0f, mix = 0.0f, skip = 0.0f;  // <G, S before>, x' G B, x' gy
                    std::memset(gx, 0, sizeof gx);
                    for (int n = 0; n < N; ++n) {
                        const float* __restrict before = states.data() + (long)i * N * P + n * P;
                        const float* __restrict after = before + N * P;
                        float* __restrict g = G + n * P;
                        const float b = B[n], c = C[n];
                        float gc = 0.0f, gb = 0.0f, old = 0.0f;
                        for (int p = 0; p < P; ++p) {
                            const float now = g[p] + c * up[p];
                            gc += after[p] * up[p];
                            gb += now * x[p];
                            old += now * before[p];
                            gx[p] += b * now;
                            g[p] = decay * now;
                        }
                        gC[n] += gc;
                        gB[n] += step * gb;
                        mix += b * gb;
                        through += old;
                    }
                    for (int p = 0; p < P; ++p) skip += x[p] * up[p];
                    for (int p = 0; p < P; ++p) grow[h * P + p] = step * gx[p] + D[h] * up[p];
                    gdt[at * heads + h] = mix + A[h] * decay * through;
                    gA[h] += step * decay * through;
                    gD[h] += skip;
                }
            }
        }
}
}
