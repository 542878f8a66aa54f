"""Build the compiled loops of the CPU backend into the wheel, where there is a compiler.

REFENGINE_LEVELS names the levels of x86-64 for which they are built; empty: for any machine, without them.
"""

import os
import platform
import runpy
import shutil
import subprocess
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent / "refengine"  # a source distribution has no links: its backends are here alone
BUILD = runpy.run_path(str(ROOT / "backends" / "cpu" / "build.py"))
X86 = platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64")
LEVELS = os.environ.get("REFENGINE_LEVELS", " ".join(BUILD["LEVELS"]) if X86 else "").split()
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


class WithLoops(build_py):
    """Copies the packages, and compiles the loops beside them."""

    def run(self):
        """Run the command; without a compiler, or where it fails, the wheel has no loops."""
        super().run()
        if self.editable_mode or not COMPILER:
            return
        folder = Path(self.build_lib, "refengine", "backends", "cpu", "built")
        folder.mkdir(parents=True, exist_ok=True)
        for level in LEVELS:
            try:
                BUILD["compiled"](COMPILER, [f"-march={level}"], folder / f"{level}.so")
            except (OSError, subprocess.SubprocessError) as error:
                print(f"the loops for {level} cannot be compiled: {error}")


class Wheel(bdist_wheel):
    """Writes a wheel for any Python; with compiled loops it is for one kind of machine."""

    def get_tag(self):
        """Return the tags of the wheel."""
        _, _, machine = super().get_tag()
        return "py3", "none", machine


class WithLibraries(Distribution):
    """Describes a distribution that is for one kind of machine if it has compiled loops."""

    def has_ext_modules(self):
        """Return whether there are compiled loops."""
        return bool(LEVELS and COMPILER)


setup(cmdclass={"build_py": WithLoops, "bdist_wheel": Wheel}, distclass=WithLibraries)
