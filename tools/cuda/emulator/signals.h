// What a launch changes in its process and sets back at its end: the handlers of fatal signals, so that a wild
// pointer becomes a sentence, and in the perturbing mode the treatment of denormal numbers.
#pragma once
#include <signal.h>
#include <stdlib.h>
#ifdef __x86_64__
#include <xmmintrin.h>
#endif

namespace cuda_on_cpu {

[[noreturn]] void fail(const char* format, ...);

struct Surroundings {
#if !defined(CHECK_ADDRESS) && !defined(CHECK_THREAD)  // the sanitizers have their own handlers
    static constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
    struct sigaction before[5];
    stack_t stack_before;
    char* stack = static_cast<char*>(malloc(64 << 10));

    static void handle(int signal, siginfo_t*, void*) {
        fail("%s", signal == SIGFPE                       ? "a thread divided an integer by zero"
                   : signal == SIGILL || signal == SIGTRAP ? "a thread stopped at a trap"
                                                           : "a thread touched memory that is not there, or a vector that is not aligned");
    }

    Surroundings() {
        stack_t own = {};
        own.ss_sp = stack;
        own.ss_size = 64 << 10;
        sigaltstack(&own, &stack_before);
        struct sigaction action = {};
        action.sa_sigaction = handle;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler leaves by a change of fiber
        for (int i = 0; i < 5; i++) sigaction(SIGNALS[i], &action, &before[i]);
        flush(true);
    }

    ~Surroundings() {
        flush(false);
        for (int i = 0; i < 5; i++) sigaction(SIGNALS[i], &before[i], nullptr);
        sigaltstack(&stack_before, nullptr);
        free(stack);
    }
#else
    Surroundings() { flush(true); }
    ~Surroundings() { flush(false); }
#endif

    static void flush([[maybe_unused]] bool on) {
#if defined(PERTURB) && defined(__x86_64__)
        _mm_setcsr(on ? _mm_getcsr() | 0x8040 : _mm_getcsr() & ~0x8040u);  // flush results, and operands, to zero
#endif
    }
};

}  // namespace cuda_on_cpu
