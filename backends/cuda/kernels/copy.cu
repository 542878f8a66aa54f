// Elements from one place to another, whatever they are: -DBYTES_1, _2, _4 or _8 says how large.
#include "common.cuh"

#if defined(BYTES_1)
typedef unsigned char Word;
#elif defined(BYTES_2)
typedef unsigned short Word;
#elif defined(BYTES_4)
typedef unsigned Word;
#else
typedef unsigned long long Word;
#endif

// to[i] = from[i] for all i within the sizes d0 .. d4; f0 .. f4 and t0 .. t4 are the strides in elements.
extern "C" __global__ void copy(const Word* from, Word* to, long long size, long long d1, long long d2,
                                long long d3, long long d4, long long f0, long long f1, long long f2,
                                long long f3, long long f4, long long t0, long long t1, long long t2,
                                long long t3, long long t4) {
    for (long long i = first_element(); i < size; i += next_element()) {
        long long rest = i, i4 = rest % d4;
        rest /= d4;
        long long i3 = rest % d3;
        rest /= d3;
        long long i2 = rest % d2;
        rest /= d2;
        long long i1 = rest % d1, i0 = rest / d1;
        long long at = i0 * f0 + i1 * f1 + i2 * f2 + i3 * f3 + i4 * f4;
        to[i0 * t0 + i1 * t1 + i2 * t2 + i3 * t3 + i4 * t4] = from[at];
    }
}

// to[r] = from[row[r]], rows of `width` elements; row holds where each begins, in elements.
extern "C" __global__ void gather(const Word* from, const long long* row, Word* to, long long size,
                                  long long width) {
    for (long long i = first_element(); i < size; i += next_element())
        to[i] = from[row[i / width] + i % width];
}

// to[row[r]] = from[r]
extern "C" __global__ void scatter(const Word* from, const long long* row, Word* to, long long size,
                                   long long width) {
    for (long long i = first_element(); i < size; i += next_element())
        to[row[i / width] + i % width] = from[i];
}
