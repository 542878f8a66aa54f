"""Registers and shared memory of the CUDA kernels, compiled without a GPU, do not spill, exceed or drift."""

import re

import pytest

from refengine.spec.config import InputError
from tools.cuda import compile as cuda_compile
from tools.cuda import resources as cuda_resources
from tools.cuda.compile import Use, all_uses, nvrtc_version
from tools.cuda.paper import Block
from tools.cuda.resources import PAGE, SHARED, drift, excesses, faults, page

SPILLS = """extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* x) {
    float a[96];
    for (int i = 0; i < 96; i++) a[i] = x[i * 1024 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 96; i++) x[i * 1024 + threadIdx.x] = a[95 - i] + a[(i + 37) % 96] * a[(i + 7) % 96];
}
"""
FITS = """extern "C" __global__ void __launch_bounds__(128) fits(float* x) {
    __shared__ float kept[128];
    kept[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = kept[127 - threadIdx.x];
}
"""
TWO_BUILDS = 2 * len(SHARED)


@pytest.fixture(scope="module")
def nvrtc():
    try:
        return nvrtc_version()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture
def planted(tmp_path, nvrtc):
    """Return the compiler's report on a file."""

    def compiled(source):
        (tmp_path / "planted.cu").write_text(source)
        return all_uses(tmp_path)

    return compiled


@pytest.mark.thorough
def test_the_page_says_what_the_compiler_says(nvrtc, pytestconfig):
    """The page lists every kernel, build and architecture, without a spill or an impossible block."""
    text = PAGE.read_text()
    if f"with NVRTC {nvrtc}." not in text:
        pytest.skip(f"docs/cuda_resources.md was not written with NVRTC {nvrtc}, which is installed")
    cache = getattr(pytestconfig, "cache", None)
    wrong = faults(text, cache and cache.mkdir("cuda_resources"))
    assert not wrong, "\n".join(wrong)


def test_a_spill_is_named(planted):
    found, broken = planted(SPILLS)
    said = list(excesses(found, {}))
    assert not broken and len(said) == len(found) == TWO_BUILDS
    assert all(re.match(r"spills of planted.cu \(.*\) spills \d+ bytes of registers", line) for line in said)


def test_a_line_that_drifted_is_named(planted):
    found, broken = planted(FITS)
    blocks = {("planted", "fits", "float32"): Block(128, 1000)}
    text = page(found, blocks)
    assert not broken and not list(excesses(found, blocks)) and not list(drift(found, blocks, text))
    assert {(use.bound, use.shared, use.spills) for use in found} == {(128, 512, 0)}
    assert "| planted | fits | float32 | 128 | 128 | 512 | 1000 | 0 | 0 | " in text
    assert len(list(drift(found, blocks, text.replace("| 512 |", "| 516 |", 1)))) == 2, "was so, is so"
    assert len(list(drift(found, {}, text))) == 2, "it is no longer launched so"
    assert len(list(drift(found[: len(SHARED)], blocks, text))) == 1, "a build that is gone"
    assert len(list(drift(found, blocks, ""))) == 2, "no page"


def test_what_does_not_compile_is_one_sentence(planted):
    found, broken = planted(FITS.replace("kept[127", "lost[127"))
    assert not found and len(broken) == TWO_BUILDS
    assert all("planted.cu" in line and '"lost" is undefined' in line and "\n" not in line for line in broken)


def test_a_result_is_kept_until_something_changes(nvrtc, tmp_path, monkeypatch):
    (tmp_path / "planted.cu").write_text(f'#include "planted.cuh"\n{FITS}')
    (tmp_path / "planted.cuh").write_text('#include "deeper.cuh"\n')
    (tmp_path / "deeper.cuh").write_text("// one version\n")
    found = all_uses(tmp_path, cache=tmp_path)
    assert len(found[0]) == len(list(tmp_path.glob("*.json"))) == TWO_BUILDS
    with monkeypatch.context() as patch:
        patch.setattr(cuda_compile, "uses", None)
        assert all_uses(tmp_path, cache=tmp_path) == found
    (tmp_path / "deeper.cuh").write_text("// another\n")
    all_uses(tmp_path, cache=tmp_path)
    assert len(list(tmp_path.glob("*.json"))) == 2 * TWO_BUILDS


def test_without_the_compiler_a_sentence_says_what_to_install(monkeypatch):
    def missing(name):
        raise cuda_compile.PackageNotFoundError(name)

    monkeypatch.setattr(cuda_compile, "version", missing)
    with pytest.raises(SystemExit, match="cuda-core is not installed: pip install"):
        cuda_resources.main(["--check"])


@pytest.mark.parametrize("arch", SHARED)
def test_a_block_that_no_multiprocessor_holds_is_named(arch):
    """Registers are allocated in units of eight per thread."""

    def said(bound, registers, shared, *block):
        use = Use("file", "kernel", "float32", arch, bound, registers, shared, 0, 0)
        return list(excesses([use], {("file", "kernel", "float32"): Block(*block)} if block else {}))

    assert not said(256, 249, SHARED[arch]) and not said(None, 64, 0) and not said(None, 65, 0, 900, 0)
    assert "takes 73728 registers for 1024 threads" in said(1024, 65, 0)[0]
    assert "takes 73728 registers for 1024 threads" in said(None, 65, 0)[0], "any launch might ask for 1024"
    assert "is launched with 257 threads, and compiled for 256" in said(256, 32, 0, 257, 0)[0]
    assert "bytes of shared memory" in said(256, 32, 1, 256, SHARED[arch])[0]
