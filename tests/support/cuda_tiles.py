"""Read the sizes of tiles from a kernel file, for tests that compare them with Python."""

import re

from refengine.backends.cuda.kernel import KERNELS

EITHER = re.compile(r"#ifdef REAL_BF16\n(.*?)#else\n(.*?)#endif", re.DOTALL)


def sizes(file: str, build) -> dict[str, int]:
    """Return every `NAME = number`; between #ifdef REAL_BF16, #else and #endif only those of this build."""
    chosen = EITHER.sub(r"\1" if build.defines else r"\2", (KERNELS / file).read_text())
    return {name: int(value) for name, value in re.findall(r"\b([A-Z_0-9]+) = (\d+)\b", chosen)}
