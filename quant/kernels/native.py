"""Kernels in C++ for CPUs (`native.cpp`): compiled once per machine, then called through ctypes.

On CPUs the code of torch.compile takes two to five times as long, and its guards alone take longer than the arithmetic
of a small layer (benchmarks/SPEED.md).
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

from quant.formats import NVFP4_SCALE, BlockFormat, ByteGrid, mx_element
from quant.kernels import onednn
from quant.kernels.eager import EAGER, Gradients, Operands, rounding_params
from quant.kernels.layout import GroupLayout, Layout, layout_of

SOURCE = Path(__file__).with_suffix(".cpp")
# No contraction to fused multiply-adds and no -ffast-math: values would differ from those of the eager kernels.
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
if platform.machine() in ("x86_64", "AMD64"):
    # With 512-bit vectors, stores of whole cache lines need not read them first (benchmarks/SPEED.md).
    FLAGS.append("-mprefer-vector-width=512")
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
PLAIN = {Tensor, nn.Parameter}

_GRID = (c_void_p, c_float, c_void_p, *[c_int64] * 6, c_int)
"""scale, least_scale, params, stride, step, outer, groups, inner, length, threads"""
_BLOCKS = (*[c_int64] * 4, c_void_p, c_int64, c_int64, c_float, c_float, c_void_p, c_int)
"""outer, length, inner, block, params, two_level, largest_exponent, unit, largest_element, scale_params, threads"""


def cache_folder() -> Path:
    """Return the folder of compiled kernels: MPQ_CACHE_DIR, or mpq-search in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MPQ_CACHE_DIR") or Path(base) / "mpq-search")


@cache
def library() -> ctypes.CDLL:
    """Compile the kernels, unless a cached file exists, and load them.

    Raises:
        RuntimeError: With the compiler's first error, or if there is no compiler.
    """
    found = (shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++"))
    compiler = next((path for path in found if path), None)
    if compiler is None:
        raise RuntimeError("no C++ compiler found (c++, g++, clang++ or what CXX names)")
    # The predefined macros identify compiler version and CPU instructions: several machines may share a home folder.
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
    """See `dispatch.Kernels`. What C++ cannot handle runs eager: other devices and dtypes, tensors without memory.

    Args:
        compiled: The library that `library` returns.
    """

    def __init__(self, compiled: ctypes.CDLL) -> None:
        self._library = compiled
        self.makes_codes = onednn.exact()  # nothing else reads codes
        self._plans: dict[Any, Plan | None] = {}

    @staticmethod
    @cache
    def load() -> NativeKernels:
        """Return the kernels, compiled if needed; one instance per process.

        Raises:
            RuntimeError: If they cannot be compiled.
        """
        return NativeKernels(library())

    def round(self, on: Operands) -> Tensor:
        """Fake-quantize x."""
        plan = self._plan(on)
        if plan is None:
            return EAGER.round(on)
        x = on.x if plan.dense else on.x.contiguous()
        out = torch.empty_like(x)
        scale, params = plan.pack(on)
        plan.round(
            *(x.data_ptr(), out.data_ptr(), scale.data_ptr(), on.least_scale or -inf, params.data_ptr()),
            *(*plan.sizes, torch.get_num_threads()),
        )
        return out

    def codes(self, on: Operands, grid: ByteGrid, dtype: torch.dtype) -> Tensor | None:
        """Return x rounded, as codes; None if x holds NaN or is not a float32 tensor of a CPU."""
        plan = self._plan(on) if on.x.dtype == torch.float32 and on.params.dim() == 1 else None
        if plan is None:
            return None
        x = on.x if plan.dense else on.x.contiguous()
        out = torch.empty_like(x, dtype=dtype)
        scale, params = plan.pack(on)
        shift = 0.0 if dtype == torch.int8 else float(grid.zero_point)
        has_nan = self._library.codes_float32(
            *(x.data_ptr(), out.data_ptr(), scale.data_ptr(), on.least_scale or -inf, params.data_ptr()),
            *(1 / grid.step, shift, *plan.sizes[2:5], torch.get_num_threads()),
        )
        return None if has_nan else out

    def gradients(
        self, grad: Tensor, on: Operands, *, learned: bool, again: bool = False, reuse: bool = False
    ) -> Gradients:
        """Return the gradients w.r.t. x and scale."""
        # With gradients enabled, this backward pass will be differentiated again.
        plan = None if torch.is_grad_enabled() else self._plan(on)
        if plan is None:
            return EAGER.gradients(grad, on, learned=learned, again=again)
        x = on.x if plan.dense else on.x.contiguous()
        same = grad.dtype == x.dtype and grad.stride() == x.stride()
        g = grad if same else torch.empty_like(x).copy_(grad)
        dx = g if reuse or not same else torch.empty_like(x)
        out = torch.empty_like(x) if again else None
        dscale = torch.empty(plan.groups) if learned else None
        scale, params = plan.pack(on)
        plan.gradients(
            *(g.data_ptr(), x.data_ptr(), dx.data_ptr(), None if out is None else out.data_ptr()),
            *(None if dscale is None else dscale.data_ptr(), scale.data_ptr(), on.least_scale or -inf),
            *(params.data_ptr(), *plan.sizes, torch.get_num_threads()),
        )
        if dscale is not None:
            dscale = dscale.view(on.scale.shape) if plan.plain_scale else plan.layout.unpack_scale_gradient(dscale)
        return Gradients(dx, dscale, out)

    def mx_scale(self, blocks: Tensor, largest_exponent: Tensor, unit: Tensor) -> Tensor:
        """Return the scales of MX blocks, by the eager kernel."""
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
        """Round in blocks and compute the gradient in a single pass; None for tensors that C++ cannot handle."""
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
        params, scale_params = rounding_params(format.element), rounding_params(NVFP4_SCALE)
        exponent, unit = mx_element(format)
        getattr(self._library, name)(
            *(None if tensor is None else tensor.data_ptr() for tensor in (g, x, dx, out)),
            *(*sizes, format.block_size, params.data_ptr(), int(format.two_level), exponent, unit),
            *(format.element.qmax, scale_params.data_ptr(), torch.get_num_threads()),
        )
        return dx, out

    def _plan(self, on: Operands) -> Plan | None:
        """Return the plan for operands of this kind, cached: a training run meets the same few shapes at every step."""
        x, scale, params, _, group_size = on
        if not (type(x) in PLAIN and type(scale) in PLAIN and type(params) in PLAIN) or torch.compiler.is_compiling():
            return None  # subclasses and tensors of a graph hold no memory of their own
        own = scale.dtype, scale.shape, scale.stride(), params.dtype, params.shape, group_size
        key = x.dtype, x.shape, x.stride(), *own
        if not (x.is_cpu and scale.is_cpu and params.is_cpu):
            return None
        try:
            return self._plans[key]
        except KeyError:
            self._plans[key] = plan = self._new_plan(x, scale, params, group_size)
            return plan

    def _new_plan(self, x: Tensor, scale: Tensor, params: Tensor, group_size: int) -> Plan | None:
        name = DTYPES.get(x.dtype)
        if not hasattr(self._library, f"round_{name}") or {scale.dtype, params.dtype} != {torch.float32}:
            return None
        layout: Layout | GroupLayout
        if group_size:
            layout, dense, plain = GroupLayout(x.shape, group_size), x.is_contiguous(), True
            outer, groups, inner, length = 1, scale.numel(), group_size, layout.length
        else:
            dense = layout_of(x, scale).dense
            layout = layout_of(x if dense else x.contiguous(), scale)
            outer, groups, inner = layout.shape
            length, plain = inner, layout.plain_scale
        stride, step = (1, 0) if params.dim() == 1 else (groups, int(groups > 1))
        return Plan(
            getattr(self._library, f"round_{name}"),
            getattr(self._library, f"gradients_{name}"),
            layout,
            dense,
            plain and scale.is_contiguous(),
            groups,
            (stride, step, outer, groups, inner, length),
        )


class Plan(NamedTuple):
    """The C++ functions and sizes for tensors of one dtype, shape and memory order."""

    round: Callable[..., None]
    gradients: Callable[..., None]
    layout: Layout | GroupLayout
    dense: bool
    """Whether x can be rounded in place, without a contiguous copy."""
    plain_scale: bool
    """Whether the scale is (groups,) in memory."""
    groups: int
    sizes: tuple[int, ...]
    """stride, step, outer, groups, inner, length"""

    def pack(self, on: Operands) -> tuple[Tensor, Tensor]:
        """Return scale (groups,) and params (5, groups) or (5,). Keep them alive while the functions run."""
        scale = on.scale if self.plain_scale else self.layout.pack_scale(on.scale)
        return scale, self.layout.pack_params(on.params)


def _block_sizes(x: Tensor, dim: int | None) -> tuple[int, int, int] | None:
    """Return x's sizes as (outer, length, inner) around the blocks' axis; None if x's memory order does not allow it.

    dim=None: blocks run along all axes but the first.
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
