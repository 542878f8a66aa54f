"""Python and C++ declare the same functions and structures; a difference is a one-line error at loading."""

import shutil

import pytest

from refengine.spec.config import InputError
from tests.support.torch_benches import torch  # noqa: F401  (skips where there is no PyTorch)

from refengine.backends.cpu import build, interface, native  # isort: skip
from refengine.backends.pytorch import torch_backend  # isort: skip

COMPILER = shutil.which("c++")
needs_compiler = pytest.mark.skipif(not COMPILER, reason="there is no compiler for the loops")


def said(changed: dict) -> str:
    return "".join("|".join([name, *items]) + "\n" for name, items in changed.items())


@needs_compiler
def test_where_there_is_a_compiler_the_loops_compile():
    assert native.library(COMPILER).exists()


@pytest.mark.parametrize("name", interface.described())
def test_one_argument_or_field_more_on_one_side_is_a_sentence(name):
    """One more in C++, one less, and one in another place are refused; equal declarations are accepted."""
    ours = interface.described()
    interface.compare(said(ours), ours)
    for items in ([*ours[name], "int"], ours[name][:-1], ["extra float at 0", *ours[name]]):
        with pytest.raises(InputError, match=f"{name}, item") as raised:
            interface.compare(said(ours | {name: items}), ours)
        assert "\n" not in str(raised.value)


def test_a_function_that_one_side_lacks_is_a_sentence():
    ours = interface.described()
    less = {name: items for name, items in ours.items() if name != "function choose"}
    for cpp, python in ((ours, less), (less, ours)):
        with pytest.raises(InputError, match="function choose"):
            interface.compare(said(cpp), python)


@needs_compiler
@pytest.mark.thorough
@pytest.mark.parametrize(
    "file, old, new, named",
    [
        # 4 bytes fill the padding at the end, so the size of the structure does not change
        (
            "structures.h",
            "FIELD(float, scale)",
            "FIELD(float, scale) FIELD(float, more)",
            "structure Attention",
        ),
        ("mixers.cpp", "double* taken,", "double* taken, int more,", "function step"),
    ],
)
def test_the_user_gets_the_sentence(file, old, new, named, tmp_path, monkeypatch):
    kernels = tmp_path / "kernels"
    shutil.copytree(build.KERNELS, kernels)
    for path in {kernels / file, kernels / "verbs.h"}:
        path.write_text(path.read_text().replace(old, new))
    monkeypatch.setattr(build, "KERNELS", kernels)
    monkeypatch.setattr(build, "FLAGS", ("-std=c++17", "-O0", "-fPIC", "-pthread"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.load.cache_clear()
    try:
        with pytest.raises(InputError, match=named):
            torch_backend("bfloat16")
        assert torch_backend("bfloat16", compiled=False).step is None
    finally:
        native.load.cache_clear()


def test_a_structure_is_filled_whole():
    with pytest.raises(TypeError, match="structure Layer has 2 fields, not 1"):
        interface.filled("Layer", 77)
