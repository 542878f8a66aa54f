"""The command line imports no slow module before its first token unless it needs it."""

import subprocess
import sys

import pytest

from refengine.backends.cpu import native

LONG = (
    "jaxtyping",
    "jinja2",
    "asyncio",
    "tqdm",
    "unittest",
    "importlib.metadata",
    "concurrent",
    "torch",
    "safetensors",
    "statistics",
    "refengine.checkpoint.gguf",
)
SCRIPT = """
import sys
from refengine.cli import main
try:
    main(["generate", "Once", "-n", "1", "--no-echo", "--backend", {backend!r}])
except SystemExit as done:
    assert not done.code
print(*(name for name in {long!r} if name in sys.modules))
"""


@pytest.mark.parametrize("name", ["auto", "numpy"])
def test_the_first_token_needs_no_long_import(name):
    native.load()  # where it is compiled, its compiler needs more
    script = SCRIPT.format(backend=name, long=LONG)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "", done.stdout


def test_names_of_shapes_are_arrays_where_nothing_checks_them():
    script = (
        "import numpy as np, typing\n"
        "from refengine.spec import norm, scan\n"
        "assert typing.get_type_hints(norm.rms_norm)['weight'] is np.ndarray\n"
        "assert typing.get_type_hints(scan.ssd_scan)['lengths'] == typing.Optional[np.ndarray]\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
