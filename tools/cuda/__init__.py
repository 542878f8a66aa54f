"""Check the CUDA kernels without a GPU: emulator, compiler, rooflines; the suite for a machine with one."""
