// s = sigmoid(logits);   the k largest of s + bias;   w = s[chosen] / (sum of s[chosen] + 1e-20) * scale.
//
// A warp chooses for a token, one expert after another; the logits are those of router.cu. Equal ones go to
// the lowest index, and NaN counts as the least of all.
#include "common.cuh"

constexpr int CHOICES = 1024;  // experts at most
static_assert(CHOICES <= 32 * 32, "a bit for each expert that a lane looks at");

// Whether v at i is chosen before w at j; an index of -1 is nothing.
DEVICE bool before(float v, int i, float w, int j) { return i >= 0 && (j < 0 || v > w || (v == w && i < j)); }

// The best of what is left of c[0 .. m), one after another, by a whole warp.
struct Picker {
    const float* c;
    int m, lane, index;  // this lane looks at c[lane], c[lane + 32], ...; the best that it has left
    unsigned taken;
    float value;

    DEVICE Picker(const float* c, int m) : c(c), m(m), lane(threadIdx.x & 31), taken(0) { look(); }

    DEVICE void look() {
        index = -1, value = 0.0f;
        for (int i = lane; i < m; i += 32)
            if (!(taken >> (i >> 5) & 1) && before(c[i], i, value, index)) value = c[i], index = i;
    }

    DEVICE int next() {
        float v = value;
        int i = index;
#pragma unroll
        for (int other = 16; other > 0; other >>= 1) {
            float w = __shfl_xor_sync(WARP, v, other);
            int j = __shfl_xor_sync(WARP, i, other);
            if (before(w, j, v, i)) v = w, i = j;
        }
        if (i == index && i >= 0) {  // it was this lane's
            taken |= 1u << (i >> 5);
            look();
        }
        return i;
    }
};

// All but the `keep` best groups leave the choice; a group scores the sum of its two best. `score`: [groups].
DEVICE void only_best_groups(float* c, float* score, int experts, int groups, int keep) {
    int lane = threadIdx.x & 31, width = experts / groups;
    for (int g = lane; g < groups; g += 32) {
        float best = -INFINITE, second = -INFINITE;
        for (int i = g * width; i < (g + 1) * width; i++) {
            second = fmaxf(second, fminf(best, c[i]));
            best = fmaxf(best, c[i]);
        }
        score[g] = width > 1 ? best + second : best;
    }
    Picker pick(score, groups);  // a lane looks at the scores that it wrote
    unsigned kept = 0;           // by the lane that looks at the group
    for (int i = 0; i < keep; i++) {
        int g = pick.next();
        if ((g & 31) == lane) kept |= 1u << (g >> 5);
    }
    for (int g = lane; g < groups; g += 32)
        if (!(kept >> (g >> 5) & 1))
            for (int i = g * width; i < (g + 1) * width; i++) c[i] = -INFINITE;
    __syncwarp();
}

// expert, weight [tokens, k], k <= 32, best first. A warp for each token, with shared memory for
// 2 experts + groups floats.
extern "C" __global__ void __launch_bounds__(128)
    choose(const float* logits, const float* bias, int* expert, float* weight, int tokens, int experts, int k,
           int groups, int keep, int normalise, float scale) {
    SHARED(float, shared);
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int token = blockIdx.x * (blockDim.x >> 5) + warp;
    if (token >= tokens) return;
    float* s = shared + warp * (2 * experts + groups);
    float* c = s + experts;
    for (int i = lane; i < experts; i += 32) {
        s[i] = sigmoid(logits[(long long)token * experts + i]);
        float choice = s[i] + bias[i];
        c[i] = choice == choice ? choice : -INFINITE;
    }
    __syncwarp();
    if (groups > 1) only_best_groups(c, c + experts, experts, groups, keep);
    Picker pick(c, experts);
    int mine = 0;
    for (int i = 0; i < k; i++) {
        int chosen = pick.next();
        if (i == lane) mine = chosen;
    }
    float w = lane < k ? s[mine] : 0.0f, sum = warp_sum(w);
    if (normalise) w /= sum + 1e-20f;
    if (lane < k) {
        expert[(long long)token * k + lane] = mine;
        weight[(long long)token * k + lane] = w * scale;
    }
}
