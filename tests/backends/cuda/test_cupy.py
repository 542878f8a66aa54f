"""device.py without a device: CuPy has every name that it uses, and a missing part is a one-line error."""

import ast
import inspect
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from refengine.backends.cuda import device as module
from refengine.backends.cuda import requirements
from refengine.backends.cuda.array import DeviceArray
from refengine.backends.cuda.kernel import KERNELS
from refengine.spec.config import InputError


def chains(tree, start: str):
    """Return every a.b.c in the source that begins with the name `start` (or self.`start`)."""
    for node in ast.walk(tree):
        names, inner = [], node
        while isinstance(inner, ast.Attribute):
            names.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            names.append(inner.id)
            names = [name for name in reversed(names) if name != "self"]
            if names[:1] == [start] and len(names) > 1:
                yield names[1:]


def test_every_name_of_cupy_that_is_used_exists():
    cupy = pytest.importorskip("cupy")
    tree = ast.parse(inspect.getsource(module))
    starts = {
        "cupy": cupy,
        "runtime": cupy.cuda.runtime,
        "stream": cupy.cuda.Stream.null,
        "pool": cupy.cuda.MemoryPool,
        "handle": cupy.cuda.Device,
        "graph": cupy.cuda.Graph,
        "function": cupy.RawKernel,
        "cublas": None,
    }
    seen = 0
    for start, value in starts.items():
        for names in chains(tree, start):
            if value is None or names[:2] == ["cuda", "cublas"]:
                continue  # which needs a library that is not part of CuPy
            found = value
            for name in names:
                if inspect.isgetsetdescriptor(found):
                    break  # an attribute of an object that only a machine with a device can make
                assert hasattr(found, name), f"CuPy has no {start}.{'.'.join(names)}"
                found = getattr(found, name)
            seen += 1
    assert seen > 25
    for kind, names in [
        (cupy.cuda.Event, "record synchronize"),
        (cupy.RawModule, "get_function"),
        (cupy.cuda.MemoryPointer, "ptr"),
        (cupy.cuda.PinnedMemoryPointer, "ptr size"),
    ]:
        assert all(hasattr(kind, name) for name in names.split())


def test_the_cublas_that_cupy_finds_has_what_is_used():
    cupy = pytest.importorskip("cupy")
    try:
        cublas = cupy.cuda.cublas
    except ImportError as error:
        pytest.skip(str(error).splitlines()[0])
    assert module.GEMM == {"compute": cublas.CUBLAS_COMPUTE_32F, "algorithm": cublas.CUBLAS_GEMM_DEFAULT}
    wanted = "handle transa transb m n k alpha A Atype lda B Btype ldb beta C Ctype ldc computeType algo"
    given = cublas.gemmEx.__doc__.split("(")[1].split(")")[0].split(", ")
    assert [part.split()[-1] for part in given] == wanted.split()
    assert cublas.CUBLAS_OP_T == 1 and cublas.CUBLAS_OP_N == 0


def test_dtypes_have_the_numbers_that_cuda_gives_them():
    runtime = pytest.importorskip("cupy").cuda.runtime
    names = {"float32": "CUDA_R_32F", "float16": "CUDA_R_16F", "bfloat16": "CUDA_R_16BF"}
    assert {name: getattr(runtime, names[name]) for name in names} == module.CUDA_DTYPES


def compiled(nvrtc, code: str, options) -> tuple[bytes, str]:
    """Return the result of CuPy's NVRTC for a source, without a device, or its log of errors."""
    program = nvrtc.createProgram(code, "source.cu", (), ())
    try:
        nvrtc.compileProgram(program, (*options, "-arch=sm_90", "-ftz=true"))
        return nvrtc.getCUBIN(program), ""
    except nvrtc.NVRTCError:
        return b"", nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


@pytest.mark.parametrize("file, defines", [("rms_norm", ()), ("embed", ("REAL_BF16",))])
def test_the_compiler_that_cupy_calls_takes_a_kernel_as_it_is_given(file, defines):
    """The compiler finds the headers, and an error names the line in the kernel file."""
    try:
        nvrtc = pytest.importorskip("cupy").cuda.nvrtc
        nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error).splitlines()[0])
    code, options = module.source(KERNELS, file, defines)
    binary, log = compiled(nvrtc, code, options)
    assert binary[:4] == b"\x7fELF" and file.encode() in binary, log
    lines = (KERNELS / f"{file}.cu").read_text().count("\n")
    assert f"{file}.cu({lines + 1}): error" in compiled(nvrtc, code + "wrong;", options)[1]


def test_a_changed_header_is_another_module(tmp_path):
    (tmp_path / "k.cu").write_text('#include "h.cuh"\n')
    (tmp_path / "h.cuh").write_text("// one\n")
    before = module.source(tmp_path, "k", ())
    (tmp_path / "h.cuh").write_text("// two\n")
    assert module.source(tmp_path, "k", ()) != before


# ---- What a machine may lack ----


def test_without_cupy_there_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(InputError, match=r"needs CuPy: pip install 'refengine\[cuda\]'$"):
        module.CupyDevice()


def test_without_a_device_there_is_one_sentence():
    cupy = pytest.importorskip("cupy")
    try:
        if cupy.cuda.runtime.getDeviceCount():
            pytest.skip("there is a device")
    except cupy.cuda.runtime.CUDARuntimeError:
        pass
    with pytest.raises(InputError) as error:
        module.CupyDevice()
    assert "\n" not in str(error.value) and "driver" in str(error.value)


def test_without_cublas_or_nvrtc_there_is_one_sentence():
    """CuPy is installed without these libraries."""
    cupy = pytest.importorskip("cupy")
    try:
        assert cupy.cuda.cublas.CUBLAS_OP_N == 0 and cupy.cuda.nvrtc.getVersion() >= (12, 0)
    except (ImportError, RuntimeError):
        with pytest.raises(InputError, match=r"pip install 'cupy-cuda13x\[ctk\]'$"):
            requirements.check_libraries(cupy)
    else:
        requirements.check_libraries(cupy)


@pytest.mark.parametrize(
    "have, sentence",
    [
        (0, "needs an NVIDIA driver, and this machine has none"),
        (12040, "made for CUDA 12.4, and this CuPy for CUDA 13: a newer driver is needed, or cupy-cuda12x"),
    ],
)
def test_an_old_driver_is_one_sentence(have, sentence):
    versions = SimpleNamespace(driverGetVersion=lambda: have, runtimeGetVersion=lambda: 13020)
    with pytest.raises(InputError, match=sentence):
        requirements.check_driver(versions)


def test_an_old_architecture_is_one_sentence():
    with pytest.raises(InputError, match=r"V100 is of architecture sm_70, and the kernels need sm_80"):
        requirements.check_capability("Tesla V100", "70")
    for capability in ("80", "90", "100", "120"):
        requirements.check_capability("a GPU", capability)


def test_a_device_is_called_cuda_or_cuda_and_a_number():
    assert [requirements.find_index(name) for name in ("cuda", "cuda:3", "auto")] == [0, 3, 0]
    for wrong in ("cpu", "cuda:", "cuda:x", "gpu"):
        with pytest.raises(InputError, match="runs on cuda or cuda:N, not on"):
            requirements.find_index(wrong)


def test_arguments_have_exactly_the_bytes_that_a_kernel_reads():
    array = DeviceArray(None, SimpleNamespace(ptr=2**40), 3, (2,), (1,), "bfloat16")
    assert module.plain(array) == np.uint64(2**40 + 6) and module.plain(None) == np.uint64(0)
    for value in (array, None, np.int32(1), np.int64(1), np.uint64(1), np.float32(1)):
        plain = module.plain(value)
        assert plain.nbytes == (4 if isinstance(value, (np.int32, np.float32)) else 8)
