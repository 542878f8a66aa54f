// A thread pool that shares pieces of work, one for the process. A thread that finds it in use runs its pieces itself,
// so any number of threads may call. A forked process starts its own pool.
#pragma once
#include <algorithm>

#include "structures.h"

// Call f(what, i) for each i below count, on at most `threads` threads including this one.
void share_out(int threads, i64 count, void (*f)(const void*, i64), const void* what);

constexpr i64 PIECE_WORK = 200000, LEAST_WORK = 600000;  // multiply-adds of a piece; least work for a second thread

// Call f(i) for each i below count; each call takes about `work` multiply-adds. Results do not depend on the number of
// threads if no two calls write to the same place.
template <class F>
static inline void parallel(const Run& run, i64 count, i64 work, const F& f) {
    const i64 each = std::max<i64>(1, PIECE_WORK / std::max<i64>(1, work)), pieces = (count + each - 1) / each;
    auto piece = [&](i64 at) {
        for (i64 i = at * each; i < std::min(count, (at + 1) * each); i++) f(i);
    };
    if (run.threads < 2 || pieces < 2 || count * work < LEAST_WORK)
        for (i64 i = 0; i < count; i++) f(i);
    else
        share_out(run.threads, pieces, [](const void* p, i64 at) { (*(const decltype(piece)*)p)(at); }, &piece);
}
