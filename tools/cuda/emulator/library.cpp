// The door of a shared library with kernels in it, for ctypes.
#include <string.h>

#include "entries.h"

extern "C" __attribute__((visibility("default"))) int cuda_on_cpu_launch(
    const char* kernel, const unsigned* sizes, unsigned long long shared_bytes, unsigned long long seed,
    void** arguments, char* message, unsigned long long room) {
    using namespace cuda_on_cpu;
    for (int i = 0; i < entry_count; i++)
        if (!strcmp(entries[i].name, kernel)) {
            Launch how{{sizes[0], sizes[1], sizes[2]}, {sizes[3], sizes[4], sizes[5]}, shared_bytes, seed, arguments};
            return launch(entries[i], how, message, room) ? 0 : 1;
        }
    return 2;
}
