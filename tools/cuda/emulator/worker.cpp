// A program with kernels in it, for the sanitizers: it reads one launch and its memory, runs it, and writes the
// memory back. A sanitizer ends it with its report on stderr.
//
//   in   kernel's name (64 bytes), 6 sizes (u32), shared bytes, seed, buffers, arguments (u64), then
//        of each buffer its bytes (u64) and contents, of each argument a buffer's number or -1 (i64) and an
//        offset in bytes, or its value (8 bytes)
//   out  the length of a message (u64), the message; if there is none, the contents of all buffers
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "entries.h"

using namespace cuda_on_cpu;

static void get(void* to, size_t n) {
    if (fread(to, 1, n, stdin) != n) exit(3);
}

static uint64_t number() {
    uint64_t n;
    get(&n, sizeof n);
    return n;
}

int main() {
    char name[64], message[512] = "";
    uint32_t sizes[6];
    get(name, sizeof name);
    get(sizes, sizeof sizes);
    uint64_t shared_bytes = number(), seed = number();
    struct Buffer {
        void* memory;
        uint64_t size;
    };
    std::vector<Buffer> buffers(number());
    std::vector<uint64_t> values(number());
    for (Buffer& b : buffers) {
        b.size = number();
        if (posix_memalign(&b.memory, 256, b.size)) exit(3);
        get(b.memory, b.size);
    }
    std::vector<void*> arguments;
    for (uint64_t& value : values) {
        int64_t buffer = int64_t(number());
        value = number();
        if (buffer >= 0) value += reinterpret_cast<uint64_t>(buffers[buffer].memory);
        arguments.push_back(&value);
    }
    Launch how{{sizes[0], sizes[1], sizes[2]}, {sizes[3], sizes[4], sizes[5]}, shared_bytes, seed, arguments.data()};
    for (int i = 0; i < entry_count; i++)
        if (!strcmp(entries[i].name, name)) launch(entries[i], how, message, sizeof message);
    uint64_t length = strlen(message);
    fwrite(&length, sizeof length, 1, stdout);
    fwrite(message, 1, length, stdout);
    if (!length)
        for (Buffer& b : buffers) fwrite(b.memory, 1, b.size, stdout);
    _Exit(fflush(stdout) ? 3 : 0);  // without destructors, which would look at what abandoned threads have written
}
