// Included after a kernel file: entry points that take their arguments as cuLaunchKernel does.
#pragma once
#include <utility>

#include "runtime.h"

namespace cuda_on_cpu {

template <class... A, size_t... I>
void call_with(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*static_cast<A*>(arguments[I])...);
}

template <class... A>
void call_with(void (*kernel)(A...), void** arguments) {
    call_with(kernel, arguments, std::index_sequence_for<A...>());
}

template <auto kernel>
void call(void** arguments) {
    call_with(kernel, arguments);
}

extern const Entry entries[];
extern const int entry_count;

}  // namespace cuda_on_cpu
