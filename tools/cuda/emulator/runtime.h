// What kernels compiled for the CPU ask of the runtime (runtime.cpp). The language itself is in cuda.h.
//
// Every CUDA thread is a fiber. Fibers change over only where threads wait for each other: in a barrier, in an
// exchange between the lanes of a warp, and at their end.
#pragma once
#include <stddef.h>

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};

namespace cuda_on_cpu {

// The kernel of an extern "C" entry point, callable with pointers to its arguments as cuLaunchKernel gets them.
struct Entry {
    const char* name;
    void (*call)(void** arguments);
    unsigned threads;  // of a block, at most: its __launch_bounds__
};

struct Launch {
    dim3 grid, block;
    size_t shared_bytes;  // of dynamic shared memory
    unsigned long long seed;
    void** arguments;
};

extern uint3 thread_index, block_index;  // of the fiber that runs
extern dim3 block_size, grid_size;

enum Count { COUNT_NONE, COUNT_SUM, COUNT_AND, COUNT_OR };
enum Meeting { SYNCWARP, SHUFFLE_IDX, SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR, BALLOT, GATHER };

// __syncthreads: all threads of the block, at one place in the source.
int barrier(Count how, int value, const char* name, const char* file, int line);

// A meeting of the lanes named by `mask`; returns what this lane gets: the bits of another's value, or a ballot.
unsigned long long meet(Meeting kind, unsigned mask, unsigned long long value, int lane, int width,
                        const char* name, const char* file, int line);

constexpr size_t MOST_GATHERED = 64;  // bytes of a lane
// Every lane's `size` bytes at `mine`, one after another, to `all` of every lane of a whole warp.
void gather(const void* mine, void* all, size_t size, const char* file, int line);

// Shared memory, poisoned with 0xFF when the block begins. A static array is known by the address of its key.
void* dynamic_shared(const char* file, int line);
void* static_shared(const void* key, size_t size, size_t alignment);

[[noreturn]] void fail(const char* format, ...);

// Run a kernel. True, or false and a sentence in `message`.
bool launch(const Entry& entry, const Launch& how, char* message, size_t room);

}  // namespace cuda_on_cpu
