"""CUDA kernels on a CPU: an emulated device that checks what a GPU does not. README.md says how."""

from tools.cuda.emulator.build import BuildError, compiler
from tools.cuda.emulator.emulated import EmulatedDevice, EmulationError

__all__ = ["BuildError", "EmulatedDevice", "EmulationError", "compiler"]
