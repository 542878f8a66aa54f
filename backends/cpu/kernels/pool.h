// Threads that share out pieces of work. One pool for the process; a thread that finds it in use does its pieces
// itself, so any number of threads may call. A process that was forked starts its own.
#pragma once
#include <algorithm>

#include "structures.h"

// Call f(what, i) for each i below count, by `threads` threads at most, this one among them.
void share_out(int threads, i64 count, void (*f)(const void*, i64), const void* what);

constexpr i64 PIECE_WORK = 200000, LEAST_WORK = 600000;  // multiply-adds of a piece; worth a second thread

// Call f(i) for each i below count, each of about `work` multiply-adds. Results do not depend on the number of
// threads if each f(i) writes what no other does.
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
