// What ThreadSanitizer must know: which thread has waited for which. Nothing in the other modes.
#pragma once
#include "machine.h"

#ifdef CHECK_THREAD
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif

namespace cuda_on_cpu {

// A point of order: who acquires it comes after all who have released it.
struct Order {
    char here = 0;
    void release() {
#ifdef CHECK_THREAD
        __tsan_release(&here);
#endif
    }
    void acquire() {
#ifdef CHECK_THREAD
        __tsan_acquire(&here);
#endif
    }
};

extern Order end_order;  // the end of a kernel comes after all its threads

// While one lives, memory is allocated or freed, which counts as no thread's write.
struct Unseen {
#ifdef CHECK_THREAD
    Unseen() { AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
    ~Unseen() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__); }
#else
    ~Unseen() {}
#endif
};

}  // namespace cuda_on_cpu
