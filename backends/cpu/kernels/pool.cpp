// The threads of pool.h. Each thread has a range of the pieces, so that its cache has the results of the call before,
// and weights are read in order. A thread that has finished its range takes pieces from other ranges. An atomic counter
// hands out pieces, so a thread that the system suspends delays one piece. A worker without work spins for a moment,
// because a step is a hundred calls in short succession, and then sleeps: threads that spin for long occupy processors
// that other threads need.
#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#include <signal.h>
#endif

typedef std::chrono::steady_clock Clock;
constexpr auto SPIN = std::chrono::microseconds(50);
constexpr uint64_t CLOSED = 0xffffffff;  // instead of a piece's number while the job is being written
constexpr int RANGES = 64;               // at most

static inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Return whether `done()` became true within SPIN.
template <class Done>
static bool spun(Done done) {
    for (auto end = Clock::now() + SPIN;;) {
        for (int i = 0; i < 32; i++) {
            if (done()) return true;
            relax();
        }
        if (Clock::now() > end) return false;
    }
}

struct Pool {
    std::mutex turn;  // held by the thread whose job it is
    int workers = 0;  // workers that were started
    // The job. The `next` of each range has the number of the job in its upper half, and the number of the range's next
    // piece in its lower half. The other fields are read before a piece is taken; they are valid only if `next` has not
    // changed since.
    struct alignas(64) Range { std::atomic<uint64_t> next{CLOSED}; };
    Range range[RANGES];
    int opened = 0;  // ranges that any job has used
    std::atomic<void (*)(const void*, i64)> f{nullptr};
    std::atomic<const void*> what{nullptr};
    std::atomic<i64> count{0}, done{0};
    std::atomic<int> limit{0}, ranges{1};  // workers that may take part
    // Sleep
    std::mutex lock;
    std::condition_variable wake, finished;
    std::atomic<int> asleep{0}, waiting{0};

    bool is_new(uint64_t seen) const {
        const uint64_t at = range[0].next.load();
        return at >> 32 != seen && (at & CLOSED) != CLOSED;
    }

    static uint64_t begin(i64 r, i64 all, i64 ranges) { return r * all / ranges; }

    // Run pieces of job number `job` until none is left, those of range `mine` first.
    void work(uint64_t job, int mine) {
        for (int i = 0, all = ranges.load(); i < all; i++) work(job, range[(mine + i) % all].next, (mine + i) % all);
    }

    void work(uint64_t job, std::atomic<uint64_t>& next, int r) {
        for (uint64_t at = next.load(); at >> 32 == job;) {
            const auto call = f.load();
            const void* with = what.load();
            const i64 all = count.load();
            const uint64_t piece = at & CLOSED;
            if (piece >= begin(r + 1, all, ranges.load())) return;
            if (!next.compare_exchange_weak(at, at + 1)) continue;
            call(with, piece);
            if (done.fetch_add(1) + 1 == all && waiting.load()) {
                std::lock_guard<std::mutex> held(lock);
                finished.notify_all();
            }
            at = next.load();
        }
    }

    void worker(int id) {
        for (uint64_t seen = 0;;) {
            if (!spun([&] { return is_new(seen); })) {
                std::unique_lock<std::mutex> held(lock);
                asleep++;
                wake.wait(held, [&] { return is_new(seen); });
                asleep--;
            }
            const uint64_t at = range[0].next.load();
            if ((at & CLOSED) == CLOSED) continue;
            seen = at >> 32;
            if (id < limit.load()) work(seen, id + 1);
        }
    }

    void start(int wanted) {
#ifndef _WIN32
        sigset_t all, before;  // workers block signals: the caller's threads get them
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
        try {
            for (; workers < wanted; workers++) std::thread(&Pool::worker, this, workers).detach();
        } catch (const std::system_error&) {  // the system has no more threads: continue with those that were started
        }
#ifndef _WIN32
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
    }

    void share(int threads, i64 pieces, void (*call)(const void*, i64), const void* with) {
        start(threads - 1);
        const uint64_t job = ((range[0].next.load() >> 32) + 1) & CLOSED;
        const int some = std::min(threads, RANGES);
        opened = std::max(opened, some);
        for (int r = 0; r < opened; r++) range[r].next.store(job << 32 | CLOSED);
        f.store(call), what.store(with), count.store(pieces), done.store(0);
        limit.store(threads - 1), ranges.store(some);
        for (int r = some; r-- > 0;) range[r].next.store(job << 32 | begin(r, pieces, some));
        if (asleep.load()) {
            { std::lock_guard<std::mutex> held(lock); }
            wake.notify_all();
        }
        work(job, 0);
        auto all_done = [&] { return done.load() == pieces; };
        if (!spun(all_done)) {
            std::unique_lock<std::mutex> held(lock);
            waiting.store(1);
            finished.wait(held, all_done);
            waiting.store(0);
        }
    }
};

// Never deleted: workers may be running when the process ends.
static std::atomic<Pool*> pool{nullptr};

static Pool& the_pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        pool.store(new Pool);
#ifndef _WIN32
        pthread_atfork(nullptr, nullptr, [] { pool.store(new Pool); });  // a forked child has none of the threads
#endif
    });
    return *pool.load();
}

void share_out(int threads, i64 count, void (*f)(const void*, i64), const void* what) {
    Pool& mine = the_pool();
    std::unique_lock<std::mutex> turn(mine.turn, std::try_to_lock);
    if (turn.owns_lock())
        mine.share(threads, count, f, what);
    else
        for (i64 i = 0; i < count; i++) f(what, i);
}
