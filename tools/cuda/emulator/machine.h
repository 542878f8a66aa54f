// The state of the machine while it runs a kernel. Shared by the files of the runtime alone.
#pragma once
#include <stdint.h>

#include <utility>
#include <vector>

#include "fibers.h"
#include "runtime.h"

namespace cuda_on_cpu {

constexpr unsigned WARP = 32;

enum State { READY, AT_BARRIER, IN_WARP, ENDED };

struct Place {  // in the source: what a thread waits in
    const char* name = nullptr;
    const char* file = nullptr;
    int line = 0;
    bool operator==(const Place& other) const {
        return line == other.line && name == other.name && file == other.file;
    }
};

struct Thread {
    Fiber fiber;
    uint3 index;
    unsigned number;  // within the block
    State state;
    Place place;
    int counted;  // what a barrier that counts returns
    Meeting meeting;
    unsigned mask, source;  // the lane it reads
    unsigned long long value, result;
    const void* mine;
    char* all;
    size_t size;
    unsigned met;  // how often it has been in __syncwarp
};

struct Warp {
    unsigned ready = 0;    // lanes that can go on
    unsigned waiting = 0;  // lanes that wait in a meeting
    bool mixed = false;    // not all of them in the same
    Meeting meeting;
    unsigned mask;
};

struct Array {  // shared memory; the dynamic one has no key
    const void* key;
    char* memory;
    size_t size;
};

extern std::vector<Thread> threads;  // of the block that runs
extern std::vector<Warp> warps;
extern std::vector<Array> arrays;
extern std::vector<unsigned> ready;  // numbers of the warps with threads that can go on
extern unsigned count;               // threads of a block
extern Thread* current;
extern const Entry* kernel;
extern bool failed;

uint64_t draw();
inline size_t below(size_t n) { return size_t((draw() >> 32) * n >> 32); }

// Memory access that no sanitizer sees.
void fill(char* p, size_t n);
void copy(char* to, const char* from, size_t n);

inline void wake(Thread& t) {
    Warp& warp = warps[t.number / WARP];
    if (!warp.ready) {
        ready.push_back(t.number / WARP);
        std::swap(ready[below(ready.size())], ready.back());
    }
    warp.ready |= 1u << t.number % WARP;
    t.state = READY;
}

// The thread that runs stops, for another that can go on.
void stop(State state);

inline Thread* lane_of(const Thread& t, unsigned lane) {
    unsigned number = t.number / WARP * WARP + lane;
    return number < count ? &threads[number] : nullptr;
}

// Shared memory of the block that runs.
Array& allocate(const void* key, size_t size, size_t alignment);
void free_arrays();

// Errors: the first one counts.
void set_message(char* text, size_t room);
void report(const char* format, ...);
void report_deadlock();
struct Text {
    char text[160];
};
Text who(const Thread& t);
Text where(const Place& place);

}  // namespace cuda_on_cpu
