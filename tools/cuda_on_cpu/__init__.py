"""CUDA kernels on a CPU: an emulated device that checks what a GPU does not. README.md says how."""

from tools.cuda_on_cpu.build import BuildError, compiler
from tools.cuda_on_cpu.emulated import EmulatedDevice, EmulationError

__all__ = ["BuildError", "EmulatedDevice", "EmulationError", "compiler"]
