// Stacks that can be left and entered again, and what the sanitizers must be told when that happens.
#pragma once
#include <stddef.h>

#ifdef CHECK_ADDRESS
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef CHECK_THREAD
#include <sanitizer/tsan_interface.h>
#endif

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace cuda_on_cpu {

struct Fiber {
    char* stack = nullptr;  // lowest address; nullptr: the stack of the caller of launch()
    size_t size = 0;
#ifdef __x86_64__
    void* top = nullptr;  // the stack pointer while the fiber does not run
#else
    ucontext_t context;
#endif
    void* fake_stack = nullptr;  // ASan's
    void* tsan = nullptr;        // TSan's idea of the fiber
};

#ifdef __x86_64__
// Saves what a call must keep, and the stack pointer at `save`; goes on where `load` was saved.
__attribute__((naked, noinline)) inline void switch_stacks(void** /* rdi: save */, void* /* rsi: load */) {
    asm(R"(
        pushq %rbp
        pushq %rbx
        pushq %r12
        pushq %r13
        pushq %r14
        pushq %r15
        movq %rsp, (%rdi)
        movq %rsi, %rsp
        popq %r15
        popq %r14
        popq %r13
        popq %r12
        popq %rbx
        popq %rbp
        ret
    )");
}
#endif

// The fiber's next switch begins `body`, which must not return.
inline void prepare(Fiber& fiber, void (*body)()) {
#ifdef __x86_64__
    void** top = reinterpret_cast<void**>(fiber.stack + fiber.size) - 1;
    *top = nullptr;                                // where body would return to: unwinding ends here
    *--top = reinterpret_cast<void*>(body);        // popped by ret
    for (int i = 0; i < 6; i++) *--top = nullptr;  // the registers that switch pops
    fiber.top = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = fiber.size;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, body, 0);
#endif
    fiber.fake_stack = nullptr;
}

// The first thing that a fiber does after it got the processor.
inline void arrived([[maybe_unused]] Fiber& fiber) {
#ifdef CHECK_ADDRESS
    __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

// From one fiber to another. `last`: the first will not run again.
inline void change(Fiber& from, Fiber& to, [[maybe_unused]] bool last = false) {
#ifdef CHECK_ADDRESS
    __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.stack, to.size);
#endif
#ifdef CHECK_THREAD
    __tsan_switch_to_fiber(to.tsan, __tsan_switch_to_fiber_no_sync);  // nothing is ordered by the switch itself
#endif
#ifdef __x86_64__
    switch_stacks(&from.top, to.top);
#else
    swapcontext(&from.context, &to.context);
#endif
    arrived(from);
}

}  // namespace cuda_on_cpu
