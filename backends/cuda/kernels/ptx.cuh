// Every PTX instruction of the backend, a wrapper each, with its meaning on a CPU (under CUDA_ON_CPU).
#pragma once

#define DEVICE __device__ __forceinline__

// The bits of the bfloat16 nearest to x, ties to even; a NaN stays a NaN.
DEVICE unsigned short bf16_bits(float x) {
#ifdef CUDA_ON_CPU
    unsigned bits = __float_as_uint(x);
    if (x != x) return 0x7fff;
    return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#else
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#endif
}

// Two at once: the bits of `low` in the lower half of the word.
DEVICE unsigned bf16_pair(float low, float high) {
#ifdef CUDA_ON_CPU
    return bf16_bits(low) | (unsigned)bf16_bits(high) << 16;
#else
    unsigned word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
#endif
}

// The bits of the float16 nearest to x, ties to even.
DEVICE unsigned short f16_bits(float x) {
#ifdef CUDA_ON_CPU
    _Float16 half = (_Float16)x;
    unsigned short bits;
    __builtin_memcpy(&bits, &half, 2);
    return bits;
#else
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#endif
}

// The value of a float16; exact.
DEVICE float f16_value(unsigned short bits) {
#ifdef CUDA_ON_CPU
    _Float16 half;
    __builtin_memcpy(&half, &bits, 2);
    return (float)half;
#else
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#endif
}

// sum += a b over 16 steps, by one warp, in float: a is 16 x 16 and b 16 x 8 of bfloat16, sum 16 x 8. With
// g = lane / 4 and t = lane % 4, a lane holds, two neighbours in a word (the earlier in the lower half):
//   a0, a1: rows g, g + 8 at steps 2t, 2t + 1;       a2, a3: the same rows at steps 2t + 8, 2t + 9
//   b0, b1: column g at steps 2t, 2t + 1 and at 2t + 8, 2t + 9
//   sum[0], sum[1]: row g at columns 2t, 2t + 1;     sum[2], sum[3]: row g + 8
DEVICE void mma_bf16(float (&sum)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0,
                     unsigned b1) {
#ifdef CUDA_ON_CPU
    struct {
        unsigned a[4], b[2];
    } mine = {{a0, a1, a2, a3}, {b0, b1}}, all[32];
    cuda_on_cpu::warp_gather(mine, all);
    int lane = threadIdx.x & 31;
    for (int t = 0; t < 4; t++)               // the lanes that hold a row, or a column
        for (int word = 0; word < 2; word++)  // their steps 2t, 2t + 1, then 2t + 8, 2t + 9
            for (int p = 0; p < 4; p++) {
                unsigned x = all[lane / 4 * 4 + t].a[2 * word + p / 2];
                unsigned y = all[4 * (lane % 4 * 2 + p % 2) + t].b[word];
                sum[p] += __uint_as_float(x << 16) * __uint_as_float(y << 16);
                sum[p] += __uint_as_float(x & 0xffff0000u) * __uint_as_float(y & 0xffff0000u);
            }
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// Copies from global to shared memory that go on while the thread computes. A thread starts some, closes them
// as a group, and waits for its older groups; then a barrier shows what was copied to the others. On a CPU
// odd threads copy at once, and the others when they wait: the first and the last moment that a GPU may take.
struct Copies {
#ifdef CUDA_ON_CPU
    struct Copy {
        void* to;
        const void* from;
        int bytes, group;

        void make() const {
            for (int i = 0; i < 16; i++)
                ((unsigned char*)to)[i] = i < bytes ? ((const unsigned char*)from)[i] : 0;
        }
    };
    Copy waiting[96];
    int first = 0, end = 0, group = 0;

    ~Copies() {
        if (first < end) ::cuda_on_cpu::fail("a thread ended while %d of its copies were under way", end - first);
    }
#endif

    // 16 bytes, both ends aligned to 16: the first `bytes` of them are copied, the others become 0.
    DEVICE void start(void* to, const void* from, int bytes) {
#ifdef CUDA_ON_CPU
        Copy copy = {to, from, bytes, group};
        if (threadIdx.x & 1) return copy.make();
        if (end - first == 96) __builtin_trap();
        waiting[end++ % 96] = copy;
#else
        unsigned at = (unsigned)__cvta_generic_to_shared(to);
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes)
                     : "memory");
#endif
    }

    DEVICE void close() {
#ifdef CUDA_ON_CPU
        group++;
#else
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }

    // Until at most `open` of the closed groups are still on their way.
    template <int open>
    DEVICE void wait() {
#ifdef CUDA_ON_CPU
        for (; first < end && waiting[first % 96].group < group - open; first++) waiting[first % 96].make();
#else
        asm volatile("cp.async.wait_group %0;" ::"n"(open) : "memory");
#endif
    }
};
