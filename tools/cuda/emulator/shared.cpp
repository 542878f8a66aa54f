// Shared memory of a block: had when it is first named, full of 0xFF, given back when the block ends.
#include <stdlib.h>

#include "order.h"

namespace cuda_on_cpu {

constexpr size_t STATIC_LIMIT = 48 << 10;  // bytes of static arrays that a block may have
#if defined(CHECK_ADDRESS) || defined(CHECK_THREAD)
constexpr size_t MARGIN = 0;  // the sanitizer has its own
#else
constexpr size_t MARGIN = 128;  // of poison on both sides
#endif

void fill(char* p, size_t n) {
    for (size_t i = 0; i < n; i++) p[i] = char(0xff);
}

void copy(char* to, const char* from, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] = from[i];
}

Array& allocate(const void* key, size_t size, size_t alignment) {
    void* memory = nullptr;
    Unseen unseen;
    if (posix_memalign(&memory, alignment < 16 ? 16 : alignment, size + 2 * MARGIN)) abort();
    fill(static_cast<char*>(memory), size + 2 * MARGIN);
    arrays.push_back({key, static_cast<char*>(memory) + MARGIN, size});
    return arrays.back();
}

void free_arrays() {
    for (const Array& a : arrays) {
        for (size_t i = 1; i <= MARGIN; i++)
            if (a.memory[-ptrdiff_t(i)] != char(0xff) || a.memory[a.size + i - 1] != char(0xff))
                report("a thread of block (%u,%u,%u) wrote outside of %zu bytes of shared memory", block_index.x,
                       block_index.y, block_index.z, a.size);
        Unseen unseen;
        free(a.memory - MARGIN);
    }
    arrays.clear();
}

void* dynamic_shared(const char* file, int line) {
    if (arrays.empty() || arrays[0].key)
        fail("%s uses dynamic shared memory at line %d, and the launch declared none", who(*current).text, line);
    return arrays[0].memory;
}

void* static_shared(const void* key, size_t size, size_t alignment) {
    size_t total = size;
    for (const Array& a : arrays) {
        if (a.key == key) return a.memory;
        if (a.key) total += a.size;
    }
    if (total > STATIC_LIMIT) fail("%zu bytes of static shared memory, and 48 KB are the most", total);
    return allocate(key, size, alignment).memory;
}

}  // namespace cuda_on_cpu
