"""The kernels in C++ for CPUs (`native.cpp`): compiled once for a machine, then called through ctypes.

On CPUs torch.compile's own code takes two to five times as long, and its guards more than a small layer's arithmetic
(benchmarks/SPEED.md).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from quant.kernels import EAGER
from quant.layout import Layout, layout_of

SOURCE = Path(__file__).with_suffix(".cpp")
# No contraction to fused multiply-adds: they would round otherwise than the eager kernels. No -ffast-math for the same.
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

_GRID = (c_void_p, c_float, c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64, c_int)
"""scale, least, numbers, stride, step, outer, groups, inner, threads"""


def cache_folder() -> Path:
    """Where compiled kernels are kept: MPQ_CACHE_DIR, or the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MPQ_CACHE_DIR") or Path(base) / "mpq-search")


@cache
def library() -> ctypes.CDLL:
    """The compiled kernels. Raises RuntimeError with the compiler's first error, or if there is no compiler."""
    found = (shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++"))
    compiler = next((path for path in found if path), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler found (c++, g++, clang++ or what CXX names)")
    # What the compiler defines tells its version and this processor's instructions: a shared home may serve several.
    machine = _run([compiler, *FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    name = hashlib.sha256(SOURCE.read_bytes() + machine.encode() + repr(FLAGS).encode()).hexdigest()[:16]
    path = cache_folder() / f"kernels-{name}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder) / path.name
            _run([compiler, *FLAGS, "-shared", "-fPIC", str(SOURCE), "-o", str(made)])
            made.replace(path)  # several processes may get here at once
    loaded = ctypes.CDLL(str(path))
    for dtype in DTYPES.values():
        if hasattr(loaded, f"round_{dtype}"):  # float16 is missing where the processor lacks it
            getattr(loaded, f"round_{dtype}").argtypes = (c_void_p, c_void_p, *_GRID)
            getattr(loaded, f"gradients_{dtype}").argtypes = (*[c_void_p] * 5, *_GRID)
    return loaded


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(next((line for line in lines if "error" in line), f"{command[0]} failed"))
    return done.stdout


class NativeKernels:
    """Kernels in C++; what they do not take (other devices and dtypes, tensors without memory) runs eager."""

    def __init__(self, compiled: ctypes.CDLL) -> None:
        named = {dtype: name for dtype, name in DTYPES.items() if hasattr(compiled, f"round_{name}")}
        self._round = {dtype: getattr(compiled, f"round_{name}") for dtype, name in named.items()}
        self._gradients = {dtype: getattr(compiled, f"gradients_{name}") for dtype, name in named.items()}

    @staticmethod
    @cache
    def load() -> NativeKernels:
        """Compiles them if this machine has not yet. Raises RuntimeError where that fails."""
        return NativeKernels(library())

    def round(self, x: Tensor, scale: Tensor, row: Tensor, least: float = 0.0) -> Tensor:
        if not self._takes(x, scale, row) or torch.compiler.is_compiling():
            return EAGER.round(x, scale, row, least)
        x, layout = _dense(x, scale)
        out = torch.empty_like(x)
        _held, grid = _grid(layout, scale, row, least)
        self._round[x.dtype](x.data_ptr(), out.data_ptr(), *grid)
        return out

    def gradients(
        self,
        grad: Tensor,
        x: Tensor,
        scale: Tensor,
        row: Tensor,
        least: float = 0.0,
        *,
        learned: bool,
        again: bool = False,
        reuse: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        differentiable = torch.is_grad_enabled()  # in a backward pass that will be differentiated again
        if not self._takes(x, scale, row) or differentiable or torch.compiler.is_compiling():
            return EAGER.gradients(grad, x, scale, row, least, learned=learned, again=again)
        x, layout = _dense(x, scale)
        same = grad.dtype == x.dtype and grad.stride() == x.stride()
        g = grad if same else torch.empty_like(x).copy_(grad)
        dx = g if reuse or not same else torch.empty_like(x)
        out = torch.empty_like(x) if again else None
        dscale = torch.empty(layout.shape[1]) if learned else None
        _held, grid = _grid(layout, scale, row, least)
        pointers = (None if tensor is None else tensor.data_ptr() for tensor in (g, x, dx, out, dscale))
        self._gradients[x.dtype](*pointers, *grid)
        return dx, None if dscale is None else layout.unpack_scale_gradient(dscale), out

    def mx_scale(self, blocks: Tensor, largest_exponent: Tensor, unit: Tensor) -> Tensor:
        return EAGER.mx_scale(blocks, largest_exponent, unit)

    def _takes(self, x: Tensor, scale: Tensor, row: Tensor) -> bool:
        return (
            x.dtype in self._round
            and x.device.type == scale.device.type == row.device.type == "cpu"
            and scale.dtype == row.dtype == torch.float32
            and all(type(tensor) in (Tensor, nn.Parameter) for tensor in (x, scale, row))  # fake ones hold no memory
        )


def _dense(x: Tensor, scale: Tensor) -> tuple[Tensor, Layout]:
    layout = layout_of(x, scale)
    if layout.dense:
        return x, layout
    x = x.contiguous()
    return x, layout_of(x, scale)


def _grid(layout: Layout, scale: Tensor, row: Tensor, least: float) -> tuple[list[Tensor], tuple[float | int, ...]]:
    """The arguments of `_GRID`, and the tensors that must live as long as their pointers are used."""
    outer, groups, inner = layout.shape
    packed = scale if layout.plain_scale and scale.is_contiguous() else layout.pack_scale(scale)
    numbers, stride, step = row, 1, 0
    if row.dim() > 1:
        numbers, stride, step = layout.pack_row(row), groups, int(groups > 1)
    least = least if least > 0 else -torch.inf
    return [packed, numbers], (
        *(packed.data_ptr(), least, numbers.data_ptr(), stride, step, outer, groups, inner),
        torch.get_num_threads(),
    )
