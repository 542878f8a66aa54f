// The machine that runs a kernel: blocks one after another, the threads of a block as fibers, both in an order
// that the seed decides. See README.md.
//
// The files of the runtime are compiled without sanitizers: what they write and read is seen by none of them.
#include "runtime.h"

#include <pthread.h>
#include <sys/mman.h>

#include "order.h"
#include "signals.h"

namespace cuda_on_cpu {

uint3 thread_index, block_index;
dim3 block_size, grid_size;
std::vector<Thread> threads;
std::vector<Warp> warps;
std::vector<Array> arrays;
std::vector<unsigned> ready;
unsigned count;
Thread* current;
const Entry* kernel;
bool failed;
Order end_order;

#if defined(CHECK_ADDRESS) || defined(CHECK_THREAD)
constexpr size_t STACK = 256 << 10;
#else
constexpr size_t STACK = 64 << 10;
#endif
constexpr size_t PAGE = 4096, LINE = 64;

static Fiber host;  // the caller of launch()
static void** arguments;
static uint64_t random_state;

void begin_meetings();

uint64_t draw() {  // splitmix64
    uint64_t z = random_state += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// The fiber that runs next: of any thread that can go on; the host's where there is none. A warp goes on until
// all its lanes wait, so that their stacks stay in the processor's caches.
static Fiber& next() {
    if (ready.empty() || failed) {
        current = nullptr;
        return host;
    }
    Warp& warp = warps[ready.back()];
    unsigned lanes = warp.ready;
    for (size_t skip = below(__builtin_popcount(lanes)); skip; skip--) lanes &= lanes - 1;
    current = &threads[ready.back() * WARP + __builtin_ctz(lanes)];
    warp.ready &= ~(lanes & -lanes);
    if (!warp.ready) ready.pop_back();
    thread_index = current->index;
    return current->fiber;
}

void stop(State state) {
    Thread& self = *current;
    self.state = state;
    Fiber& to = next();
    if (&to != &self.fiber) change(self.fiber, to, state == ENDED);
}

static void body() {
    arrived(current->fiber);
    kernel->call(arguments);
    end_order.release();
    stop(ENDED);
}

static char* stacks(size_t n) {
    static char* memory = nullptr;
    static size_t have = 0;
#ifdef CHECK_THREAD  // fresh for each block: memory that another fiber has used would look like a race
    if (memory) munmap(memory, have);
    have = 0;
#endif
    if (have < n * STACK) {
        if (have) munmap(memory, have);
        have = n * STACK;
        constexpr int kind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        memory = static_cast<char*>(mmap(nullptr, have, PROT_READ | PROT_WRITE, kind, -1, 0));
#ifndef CHECK_THREAD
        for (size_t i = 0; i < n; i++) mprotect(memory + i * STACK, PAGE, PROT_NONE);  // against overflow
#endif
    }
    return memory;
}

static void begin_block(size_t shared_bytes) {
    char* stack = stacks(count);
    ready.clear();
    begin_meetings();
    for (unsigned i = 0; i < count; i++) {
        Thread& t = threads[i];
        t.number = i;
        t.index = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
        t.met = 0;
        t.place = Place();
        t.fiber.stack = stack + i * STACK;
        t.fiber.size = STACK - i % 64 * 5 * LINE;  // tops at different places of the processor's caches
        prepare(t.fiber, body);
#ifdef CHECK_THREAD
        t.fiber.tsan = __tsan_create_fiber(0);
#endif
        wake(t);
    }
    if (shared_bytes) allocate(nullptr, shared_bytes, 16);
}

static void end_block() {
    bool stuck = false;
    for (const Thread& t : threads) stuck |= t.state != ENDED;
    if (stuck && !failed) report_deadlock();
#ifdef CHECK_THREAD
    for (const Thread& t : threads) __tsan_destroy_fiber(t.fiber.tsan);
#endif
    free_arrays();
}

static void know_host() {
#ifdef CHECK_ADDRESS
    pthread_attr_t attributes;
    void* lowest;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &lowest, &host.size);
    pthread_attr_destroy(&attributes);
    host.stack = static_cast<char*>(lowest);
#endif
#ifdef CHECK_THREAD
    host.tsan = __tsan_get_current_fiber();
#endif
}

static std::vector<uint64_t> shuffled(uint64_t n) {
    std::vector<uint64_t> order(n);
    for (uint64_t i = 0; i < n; i++) {
        uint64_t j = draw() % (i + 1);
        order[i] = order[j];
        order[j] = i;
    }
    return order;
}

bool launch(const Entry& entry, const Launch& how, char* message, size_t room) {
    kernel = &entry;
    arguments = how.arguments;
    random_state = how.seed;
    block_size = how.block;
    grid_size = how.grid;
    count = how.block.x * how.block.y * how.block.z;
    threads.resize(count);
    set_message(message, room);
    if (count > entry.threads) report("a block of %u threads, and its launch bounds are %u", count, entry.threads);
    if (failed) return false;
    know_host();
    Surroundings surroundings;  // signals and rounding, until the end of this function
    for (uint64_t i : shuffled(uint64_t(how.grid.x) * how.grid.y * how.grid.z)) {
        block_index = {unsigned(i % how.grid.x), unsigned(i / how.grid.x % how.grid.y),
                       unsigned(i / how.grid.x / how.grid.y)};
        begin_block(how.shared_bytes);
        change(host, next());
        end_block();
        if (failed) break;
    }
    end_order.acquire();
    return !failed;
}

}  // namespace cuda_on_cpu
