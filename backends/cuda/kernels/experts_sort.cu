// The choices of all tokens in the order of their experts, so that each expert is read once.
//
//   order    a stable sort: the choice (token k + slot) at each place, those of one expert side by side
//   place    its inverse: the place of each choice; -1 if its expert is not in first .. first + count - 1
//   tiles    (expert - first, first place, places) of pieces of at most `rows` places; after them, 0 places
//
// A warp reads CHOICES choices in order. It counts them by expert (experts_count); where each warp begins in
// each expert is a sum over the warps before it and the experts before that (experts_offsets); then each warp
// places its own (experts_order). Nothing depends on timing, so the result is the same on every run.
#include "common.cuh"

constexpr int CHOICES = 1024;  // of one warp
constexpr int EXPERTS = 1024;  // the most: a thread each in experts_offsets
constexpr int AHEAD = 8;       // loads under way at once

// A warp's choices, AHEAD times 32 of them at a time: those from `begin` on, by expert - first; -1: not here.
DEVICE void choices_from(int (&e)[AHEAD], const int* expert, int begin, int choices, int first, int count) {
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
        int choice = begin + 32 * i + threadIdx.x;
        e[i] = choice < choices ? expert[choice] - first : -1;
        if (e[i] >= count) e[i] = -1;
    }
}

// The lanes whose expert is the same as this lane's, none for a lane without one.
DEVICE unsigned peers(int expert, int count) {
    unsigned same = __ballot_sync(WARP, expert >= 0);
    for (int bit = 1; bit < count; bit <<= 1) {
        unsigned set = __ballot_sync(WARP, expert & bit);
        same &= expert & bit ? set : ~set;
    }
    return expert >= 0 ? same : 0;
}

DEVICE void add_peers(int* counter, int expert, unsigned same) {
    if (same && threadIdx.x == __ffs(same) - 1) counter[expert] += __popc(same);
    __syncwarp();
}

// counts [warps, count]. One warp a block.
extern "C" __global__ void experts_count(const int* expert, int* counts, int choices, int first, int count) {
    SHARED(int, seen);
    for (int e = threadIdx.x; e < count; e += 32) seen[e] = 0;
    __syncwarp();
    int end = min((int)(blockIdx.x + 1) * CHOICES, choices);
    for (int begin = blockIdx.x * CHOICES; begin < end; begin += 32 * AHEAD) {
        int e[AHEAD];
        choices_from(e, expert, begin, choices, first, count);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) add_peers(seen, e[i], peers(e[i], count));
    }
    for (int e = threadIdx.x; e < count; e += 32) counts[(long long)blockIdx.x * count + e] = seen[e];
}

// One warp a block, over the same choices, with counts as experts_offsets left them.
extern "C" __global__ void experts_order(const int* expert, const int* counts, int* order, int* place,
                                         int choices, int first, int count) {
    SHARED(int, next);
    for (int e = threadIdx.x; e < count; e += 32) next[e] = counts[(long long)blockIdx.x * count + e];
    __syncwarp();
    int end = min((int)(blockIdx.x + 1) * CHOICES, choices);
    for (int begin = blockIdx.x * CHOICES; begin < end; begin += 32 * AHEAD) {
        int e[AHEAD];
        choices_from(e, expert, begin, choices, first, count);
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            unsigned same = peers(e[i], count);
            int at = same ? next[e[i]] + __popc(same & ((1u << threadIdx.x) - 1)) : -1;
            __syncwarp();
            add_peers(next, e[i], same);
            int choice = begin + 32 * i + threadIdx.x;
            if (at >= 0) order[at] = choice;
            if (choice < choices) place[choice] = at;
        }
    }
}

// The sum of x over the threads before this one; `sums` is shared memory for 32 values.
DEVICE int sum_before(int x, int* sums) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, upto = x;
    for (int d = 1; d < 32; d <<= 1) {
        int other = __shfl_up_sync(WARP, upto, d);
        if (lane >= d) upto += other;
    }
    if (lane == 31) sums[warp] = upto;
    __syncthreads();
    int before = 0;
    for (int w = 0; w < warp; w++) before += sums[w];
    __syncthreads();  // sums may be used again
    return before + upto - x;
}

// Replaces the counts of one expert by running sums that begin with `place`; returns the sum of all.
DEVICE int running(int* counts, int warps, int count, int place, bool keep) {
    for (int w = 0; w < warps; w += AHEAD) {
        int n[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) n[i] = w + i < warps ? counts[(long long)(w + i) * count] : 0;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            if (keep && w + i < warps) counts[(long long)(w + i) * count] = place;
            place += n[i];
        }
    }
    return place;
}

// counts become the first places; `most` is the room in tiles. One block, a thread for each expert.
extern "C" __global__ void __launch_bounds__(EXPERTS)
    experts_offsets(int* counts, int* tiles, int warps, int count, int rows, int most) {
    __shared__ int sums[32];
    __shared__ int used;
    int e = threadIdx.x;
    int total = e < count ? running(counts + e, warps, count, 0, false) : 0;
    int begin = sum_before(total, sums);
    int tile = sum_before((total + rows - 1) / rows, sums);
    if (e < count) running(counts + e, warps, count, begin, true);
    for (int done = 0; done < total; done += rows, tile++) {
        tiles[3 * tile] = e;
        tiles[3 * tile + 1] = begin + done;
        tiles[3 * tile + 2] = min(rows, total - done);
    }
    if (e == blockDim.x - 1) used = tile;
    __syncthreads();
    for (int i = used + e; i < most; i += blockDim.x) tiles[3 * i + 2] = 0;
}
