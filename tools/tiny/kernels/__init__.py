"""Compiled loops for training on a CPU: the convolution and the scan of a Mamba-2 layer, with their
gradients.

`load` compiles them once for this processor and keeps the library in the user's cache. Without a
compiler, or for shapes other than those it is compiled for, the layer uses its form in PyTorch
(tools/tiny/model.py), which also is the definition that the tests compare with.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fPIC", "-shared")
HEAD_DIM, STATE, CONV, CHUNK = 64, 32, 4, 16  # the shapes that mamba.cpp is compiled for
ATTENTION_DIM = 32  # and attention.cpp


def _processor():
    """Return a text that differs between processors for which -march=native compiles differently."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else [platform.processor()]
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))


@functools.cache
def load():
    """Return the compiled library; None without a compiler, or where REFENGINE_TINY_EAGER is set."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not compiler or os.environ.get("REFENGINE_TINY_EAGER"):
        return None
    texts = [source.read_text() for source in SOURCES]
    key = hashlib.sha256("\0".join((*texts, *FLAGS, compiler, _processor())).encode()).hexdigest()
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refengine"
    path = base / f"tiny-{key[:16]}.so"
    if not path.exists():
        base.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [compiler, *FLAGS, "-o", str(part), *map(str, SOURCES)], check=True, capture_output=True
        )
        part.rename(path)
    return ctypes.CDLL(str(path))


def fits(cfg, length):
    """Return whether the compiled loops serve this configuration and row length."""
    shape = (cfg["mamba_head_dim"], cfg["ssm_state_size"], cfg["conv_kernel"])
    return shape == (HEAD_DIM, STATE, CONV) and length % CHUNK == 0 and load() is not None


def _call(name, numbers, tensors):
    """Call a loop with int arguments, then the pointers of tensors."""
    function = getattr(load(), name)
    function.restype = None
    function(*(ctypes.c_int(n) for n in numbers), *(ctypes.c_void_p(t.data_ptr()) for t in tensors))


class ConvSilu(torch.autograd.Function):
    """silu(causal convolution) over packed rows: x b l c, weight c k, bias c, age b l (int32) -> b l c."""

    @staticmethod
    def forward(ctx, x, weight, bias, age):
        """Return silu(conv(x)); x may be a slice of wider rows."""
        b, length, width = x.shape
        pre, y = x.new_empty(b, length, width), x.new_empty(b, length, width)
        shape = (b, length, width, x.stride(1))
        weight = weight.contiguous()
        _call("conv_forward", shape, (x, weight, bias, age, pre, y))
        ctx.save_for_backward(x, weight, age, pre)
        return y

    @staticmethod
    def backward(ctx, gy):
        """Return the gradients of x, weight and bias."""
        x, weight, age, pre = ctx.saved_tensors
        b, length, width = x.shape
        gx = x.new_empty(b, length, x.stride(1))[..., :width]
        gw, gbias = torch.zeros_like(weight), weight.new_zeros(width)
        shape = (b, length, width, x.stride(1))
        _call("conv_backward", shape, (x, weight, age, pre, gy.contiguous(), gx, gw, gbias))
        return gx, gw, gbias, None


class Scan(torch.autograd.Function):
    """The scan with its skip: xBC b l (inner + 2 g n), dt b l h, A h, D h, age b l (int32) -> y b l inner."""

    @staticmethod
    def forward(ctx, xBC, dt, A, D, age, groups):
        """Return y of the recurrence; states before every 16th step are kept for the gradient."""
        b, length, _ = xBC.shape
        h = A.shape[0]
        xBC, dt = xBC.contiguous(), dt.contiguous()
        kept = xBC.new_empty(b, length // CHUNK, h, STATE * HEAD_DIM)
        y = xBC.new_empty(b, length, h * HEAD_DIM)
        ctx.numbers = (b, length, h, groups)
        _call("scan_forward", ctx.numbers, (xBC, dt, A, D, age, kept, y))
        ctx.save_for_backward(xBC, dt, A, D, age, kept)
        return y

    @staticmethod
    def backward(ctx, gy):
        """Return the gradients of xBC, dt, A and D."""
        xBC, dt, A, D, age, kept = ctx.saved_tensors
        gx, gdt, gA, gD = (torch.zeros_like(t) for t in (xBC, dt, A, D))
        _call("scan_backward", ctx.numbers, (xBC, dt, A, D, age, kept, gy.contiguous(), gx, gdt, gA, gD))
        return gx, gdt, gA, gD, None, None


class Attention(torch.autograd.Function):
    """Causal attention within documents: q b l h 32, k and v b l g 32, age b l (int32) -> b l h 32."""

    @staticmethod
    def forward(ctx, q, k, v, age):
        """Return the attended values."""
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        b, length, heads, _ = q.shape
        out, total = torch.empty_like(q), q.new_empty(b, length, heads)
        ctx.numbers = (b, length, heads, k.shape[2])
        _call("attention_forward", ctx.numbers, (q, k, v, age, out, total))
        ctx.save_for_backward(q, k, v, age, out, total)
        return out

    @staticmethod
    def backward(ctx, gout):
        """Return the gradients of q, k and v."""
        q, k, v, age, out, total = ctx.saved_tensors
        gq, gk, gv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        tensors = (q, k, v, age, out, total, gout.contiguous(), gq, gk, gv)
        _call("attention_backward", ctx.numbers, tensors)
        return gq, gk, gv, None
