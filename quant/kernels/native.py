"""The kernels in C++ for CPUs (`native.cpp`): compiled once for a machine, then called through ctypes.

On CPUs torch.compile's own code takes two to five times as long, and its guards more than a small layer's arithmetic
(benchmarks/SPEED.md).
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from functools import cache, lru_cache
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from quant.formats import BlockFormat, ByteGrid
from quant.kernels import onednn
from quant.kernels.block_formats import NVFP4_SCALE, mx_element
from quant.kernels.eager import EAGER, rounding_row
from quant.kernels.layout import Layout, layout_of

SOURCE = Path(__file__).with_suffix(".cpp")
# No contraction to fused multiply-adds: they would round otherwise than the eager kernels. No -ffast-math for the same.
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
if platform.machine() in ("x86_64", "AMD64"):
    # Where there are vectors of 512 bits: stores of whole cache lines need not read them first (benchmarks/SPEED.md).
    FLAGS.append("-mprefer-vector-width=512")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
PLAIN = {Tensor, nn.Parameter}

_GRID = (c_void_p, c_float, c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64, c_int)
"""scale, least, numbers, stride, step, outer, groups, inner, threads"""
_BLOCKS = (*[c_int64] * 4, c_void_p, c_int64, c_int64, c_float, c_float, c_void_p, c_int)
"""outer, length, inner, block, row, two_level, largest_exponent, unit, largest_element, scale_row, threads"""


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
    loaded.codes_float32.argtypes = (*[c_void_p] * 3, c_float, c_void_p, c_float, c_float, *[c_int64] * 3, c_int)
    for dtype in DTYPES.values():
        if hasattr(loaded, f"round_{dtype}"):  # float16 is missing where the processor lacks it
            getattr(loaded, f"round_{dtype}").argtypes = (c_void_p, c_void_p, *_GRID)
            getattr(loaded, f"gradients_{dtype}").argtypes = (*[c_void_p] * 5, *_GRID)
            getattr(loaded, f"blocks_{dtype}").argtypes = (*[c_void_p] * 4, *_BLOCKS)
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
        self._library = compiled
        self.makes_codes = onednn.exact()  # nothing else reads them
        self._plans: dict[Any, Plan | None] = {}

    @staticmethod
    @cache
    def load() -> NativeKernels:
        """Compiles them if this machine has not yet. Raises RuntimeError where that fails."""
        return NativeKernels(library())

    def round(self, x: Tensor, scale: Tensor, row: Tensor, least: float = 0.0) -> Tensor:
        plan = self._plan(x, scale, row)
        if plan is None:
            return EAGER.round(x, scale, row, least)
        x = x if plan.dense else x.contiguous()
        out = torch.empty_like(x)
        scale, row = plan.pack(scale, row)
        plan.round(
            *(x.data_ptr(), out.data_ptr(), scale.data_ptr(), least or -inf, row.data_ptr()),
            *(*plan.sizes, torch.get_num_threads()),
        )
        return out

    def codes(
        self, x: Tensor, scale: Tensor, row: Tensor, least: float, grid: ByteGrid, dtype: torch.dtype
    ) -> Tensor | None:
        plan = self._plan(x, scale, row) if x.dtype == torch.float32 and row.dim() == 1 else None
        if plan is None:
            return None
        x = x if plan.dense else x.contiguous()
        out = torch.empty_like(x, dtype=dtype)
        scale, row = plan.pack(scale, row)
        shift = 0.0 if dtype == torch.int8 else float(grid.zero_point)
        missing = self._library.codes_float32(
            *(x.data_ptr(), out.data_ptr(), scale.data_ptr(), least or -inf, row.data_ptr(), 1 / grid.step, shift),
            *(*plan.sizes[2:], torch.get_num_threads()),
        )
        return None if missing else out

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
        # With gradients enabled, this backward pass will be differentiated again.
        plan = None if torch.is_grad_enabled() else self._plan(x, scale, row)
        if plan is None:
            return EAGER.gradients(grad, x, scale, row, least, learned=learned, again=again)
        x = x if plan.dense else x.contiguous()
        same = grad.dtype == x.dtype and grad.stride() == x.stride()
        g = grad if same else torch.empty_like(x).copy_(grad)
        dx = g if reuse or not same else torch.empty_like(x)
        out = torch.empty_like(x) if again else None
        dscale = torch.empty(plan.groups) if learned else None
        packed, row = plan.pack(scale, row)
        plan.gradients(
            *(g.data_ptr(), x.data_ptr(), dx.data_ptr(), None if out is None else out.data_ptr()),
            *(None if dscale is None else dscale.data_ptr(), packed.data_ptr(), least or -inf, row.data_ptr()),
            *(*plan.sizes, torch.get_num_threads()),
        )
        if dscale is not None:
            dscale = dscale.view(scale.shape) if plan.plain_scale else plan.layout.unpack_scale_gradient(dscale)
        return dx, dscale, out

    def mx_scale(self, blocks: Tensor, largest_exponent: Tensor, unit: Tensor) -> Tensor:
        return EAGER.mx_scale(blocks, largest_exponent, unit)

    def blocks(
        self,
        grad: Tensor | None,
        x: Tensor,
        format: BlockFormat,
        dim: int | None,
        *,
        again: bool = False,
        reuse: bool = False,
    ) -> tuple[Any, Any] | None:
        name = f"blocks_{DTYPES.get(x.dtype)}"
        if type(x) not in PLAIN or not x.is_cpu or not hasattr(self._library, name) or torch.compiler.is_compiling():
            return None
        sizes = _block_sizes(x, dim)
        if sizes is None:
            plain = None if grad is None else grad.contiguous()
            found = self.blocks(plain, x.contiguous(), format, dim, again=again)
            return None if found is None else (_laid_like(x, found[0]), _laid_like(x, found[1]))
        same = grad is not None and grad.dtype == x.dtype and grad.stride() == x.stride()
        g = grad if grad is None or same else torch.empty_like(x).copy_(grad)
        dx = None if g is None else g if reuse or not same else torch.empty_like(x)
        out = torch.empty_like(x) if again else None
        row, scale_row = rounding_row(format.element), rounding_row(NVFP4_SCALE)
        exponent, unit = mx_element(format)
        getattr(self._library, name)(
            *(None if tensor is None else tensor.data_ptr() for tensor in (g, x, dx, out)),
            *(*sizes, format.block_size, row.data_ptr(), int(format.two_level), exponent, unit, format.element.qmax),
            *(scale_row.data_ptr(), torch.get_num_threads()),
        )
        return dx, out

    def _plan(self, x: Tensor, scale: Tensor, row: Tensor) -> Plan | None:
        """A training run meets the same few shapes at every step: what follows from them is found once."""
        if not (type(x) in PLAIN and type(scale) in PLAIN and type(row) in PLAIN) or torch.compiler.is_compiling():
            return None  # tensors that only stand for others hold no memory
        key = x.dtype, x.shape, x.stride(), scale.dtype, scale.shape, scale.stride(), row.dtype, row.shape
        if not (x.is_cpu and scale.is_cpu and row.is_cpu):
            return None
        try:
            return self._plans[key]
        except KeyError:
            self._plans[key] = plan = self._new_plan(x, scale, row)
            return plan

    def _new_plan(self, x: Tensor, scale: Tensor, row: Tensor) -> Plan | None:
        name = DTYPES.get(x.dtype)
        if not hasattr(self._library, f"round_{name}") or scale.dtype != torch.float32 or row.dtype != torch.float32:
            return None
        dense = layout_of(x, scale).dense
        layout = layout_of(x if dense else x.contiguous(), scale)
        outer, groups, inner = layout.shape
        stride, step = (1, 0) if row.dim() == 1 else (groups, int(groups > 1))
        return Plan(
            getattr(self._library, f"round_{name}"),
            getattr(self._library, f"gradients_{name}"),
            layout,
            dense,
            layout.plain_scale and scale.is_contiguous(),
            groups,
            (stride, step, outer, groups, inner),
        )


class Plan(NamedTuple):
    """How tensors of certain shapes and memory orders are rounded."""

    round: Callable[..., None]
    gradients: Callable[..., None]
    layout: Layout
    dense: bool
    """whether x is rounded as it lies in memory"""
    plain_scale: bool
    groups: int
    sizes: tuple[int, ...]
    """stride, step, outer, groups, inner"""

    def pack(self, scale: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """As the functions read them; to be held while these run."""
        return scale if self.plain_scale else self.layout.pack_scale(scale), self.layout.pack_row(row)


def _block_sizes(x: Tensor, dim: int | None) -> tuple[int, int, int] | None:
    """Elements outside the axis of the blocks, along it and inside it; None where they do not lie in memory like this.

    dim=None: along all axes but the first.
    """
    if dim is not None and x.dim():
        return _around(x.shape, x.stride(), dim % x.dim())
    outer = x.shape[0] if x.dim() else 1
    return (outer, x.numel() // outer, 1) if x.is_contiguous() else None


@lru_cache(maxsize=4096)
def _around(shape: torch.Size, strides: tuple[int, ...], axis: int) -> tuple[int, int, int] | None:
    scale = torch.Size(size if d == axis else 1 for d, size in enumerate(shape))
    layout = Layout(shape, strides, scale)
    if not layout.dense:
        return None
    outer = math.prod(shape[d] for d in layout.order[: layout.order.index(axis)])
    return outer, shape[axis], math.prod(shape) // (outer * shape[axis])


def _laid_like(x: Tensor, values: Tensor | None) -> Tensor | None:
    return None if values is None else torch.empty_like(x).copy_(values)
