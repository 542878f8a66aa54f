// The `keep` largest of each row of numbers, largest first, of equal ones that with the lowest index first.
//
//   candidates_begin    the largest of each piece of WIDTH logits
//   candidates_next     the largest of each piece of WIDTH candidates; repeated until a row has one piece
//   candidates_end      their values and indices
//
// A candidate is one 64-bit key: the value above, as an unsigned number of the same order, and the complement
// of its index below; so the order of keys is that of candidates, and no two are equal. NaN comes before all.
#include "common.cuh"

constexpr int WIDTH = 1024;

DEVICE unsigned long long key_of(float value, int index) {
    unsigned bits = __float_as_uint(value == 0.0f ? 0.0f : value);  // -0 is equal to 0
    if (value != value) bits = 0x7fffffffu;
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (unsigned long long)bits << 32 | ~(unsigned)index;
}

// Sorts WIDTH keys, largest first: a bitonic network.
DEVICE void sort(unsigned long long* key) {
    for (int size = 2; size <= WIDTH; size *= 2)
        for (int apart = size / 2; apart > 0; apart /= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < WIDTH / 2; i += blockDim.x) {
                int low = 2 * i - (i & (apart - 1)), high = low + apart;
                bool rising = low & size;
                unsigned long long a = key[low], b = key[high];
                if (rising == (a > b)) key[low] = b, key[high] = a;
            }
        }
    __syncthreads();
}

DEVICE void write_largest(unsigned long long* key, unsigned long long* best, int keep) {
    sort(key);
    best += ((long long)blockIdx.y * gridDim.x + blockIdx.x) * keep;
    for (int i = threadIdx.x; i < keep; i += blockDim.x) best[i] = key[i];
}

// logits [rows, width], best [rows, pieces, keep]; a place beyond the end of a row is a key below all others.
// Grid (pieces, rows).
extern "C" __global__ void candidates_begin(const float* logits, long long* best, int width, int keep) {
    __shared__ unsigned long long key[WIDTH];
    for (int i = threadIdx.x; i < WIDTH; i += blockDim.x) {
        int index = blockIdx.x * WIDTH + i;
        key[i] = index < width ? key_of(logits[(long long)blockIdx.y * width + index], index) : 0;
    }
    write_largest(key, reinterpret_cast<unsigned long long*>(best), keep);
}

// many [rows, count] keys.
extern "C" __global__ void candidates_next(const long long* many, long long* best, int count, int keep) {
    __shared__ unsigned long long key[WIDTH];
    for (int i = threadIdx.x; i < WIDTH; i += blockDim.x) {
        int index = blockIdx.x * WIDTH + i;
        key[i] = index < count ? (unsigned long long)many[(long long)blockIdx.y * count + index] : 0;
    }
    write_largest(key, reinterpret_cast<unsigned long long*>(best), keep);
}

extern "C" __global__ void candidates_end(const long long* best, float* value, int* index, int count) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    unsigned long long key = (unsigned long long)best[i];
    unsigned bits = (unsigned)(key >> 32);
    value[i] = __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
    index[i] = (int)~(unsigned)key;
}
