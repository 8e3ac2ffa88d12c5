"""Fake quantization over `clone()` of the same tensor: forward, and forward + backward with a learned scale.

    python -m benchmarks.kernels [--elements 20,22,24] [--rounds 21] [--compiler native|inductor|eager]

One run, medians of ratios. A tensor of 2^20 elements is (1024, 1024). Per token and block formats have no learned
scale: their scales follow from the tensor, which is part of what is timed. bytes: what the pass must move at least
(read x, write x^; backward: read the gradient and x, write dx), over what `clone()` moves.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.timing import ratio, take_turns, with_allocator
from quant.formats import GroupFormat, parse_format
from quant.kernels.groups import scale_shape
from quant.quant_utils import fake_quantize, fake_quantize_with_params, rounding_params, use_compiled
from quant.quantizers.quantizer import Quantizer, QuantizerConfig

FLOORS = {"forward": 1.0, "forward+backward": 2.5}


def roundings(x: Tensor, format_name: str = "int4") -> dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]]:
    """What is timed, by granularity: the rounding of x, and its learned scales."""
    format = parse_format(format_name)
    row = rounding_params(format, device=x.device)
    whole = nn.Parameter(x.float().abs().mean() / 4)
    channels = nn.Parameter(x.float().abs().mean(dim=1, keepdim=True) / 4)
    token = Quantizer(QuantizerConfig(range="dynamic", granularity="token", observer="minmax"), device=x.device)
    token.set_format(format)
    plain: dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]] = {
        "per tensor": (lambda x: fake_quantize_with_params(x, whole, row), [whole]),
        "per channel": (lambda x: fake_quantize_with_params(x, channels, row), [channels]),
        "per token": (token, []),
    }
    for size in (128, 32):
        group = GroupFormat(4, size)
        groups = nn.Parameter(torch.full(scale_shape(x.shape, size, -1), float(whole.detach()), device=x.device))
        plain[f"groups of {size}"] = (lambda x, f=group, s=groups: fake_quantize(x, f, s), [groups])
    for name in ("mxfp8", "mxfp4", "mxint8", "nvfp4"):
        block = parse_format(name)
        plain[name] = (lambda x, block=block: fake_quantize(x, block), [])
    return plain


def measure(elements: int, rounds: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, dict]:
    """{granularity: {pass: time over that of clone(), "seconds": of the forward pass}} for a tensor of that size."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, elements // 1024, generator=generator).to(device, dtype)
    grad, leaf = torch.randn_like(x), x.clone().requires_grad_()
    functions: dict[str, Callable[[], object]] = {"clone": x.clone}
    cases = roundings(x)
    for name, (rounding, learned) in cases.items():

        def forward(rounding=rounding):
            with torch.no_grad():
                return rounding(x)

        def both(rounding=rounding, learned=learned):
            torch.autograd.grad(rounding(leaf), [leaf, *learned], grad)

        functions |= {f"{name} forward": forward, f"{name} forward+backward": both}
    seconds = take_turns(functions, rounds, device)
    clone = sorted(seconds["clone"])[rounds // 2]
    return {
        name: {step: ratio(seconds, f"{name} {step}", "clone") for step in FLOORS} | {"clone": clone} for name in cases
    }


def table(sizes: list[int], rounds: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Print what `measure` gives for tensors of 2^size elements."""
    found = {size: measure(2**size, rounds, device, dtype) for size in sizes}
    print("fake_quantize over clone()" + "".join(f"{f'2^{size}':>16}" for size in sizes))
    clones = (next(iter(rows.values()))["clone"] for rows in found.values())
    print(f"{'clone() [GB/s]':<26}" + "".join(f"{g:>16.1f}" for g in _bandwidths(sizes, clones, dtype)))
    for name in found[sizes[0]]:
        for step in FLOORS:
            ratios = "".join(f"{found[size][name][step]:>16.2f}" for size in sizes)
            print(f"{f'{name}, {step}':<26}" + ratios)


def _bandwidths(sizes: list[int], clones, dtype: torch.dtype) -> list[float]:
    return [2 * dtype.itemsize * 2**size / seconds / 1e9 for size, seconds in zip(sizes, clones, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", default="20,22,24", help="powers of two")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--compiler", default="native", choices=["native", "inductor", "eager"])
    arguments = parser.parse_args()
    with_allocator("benchmarks.kernels")
    if arguments.compiler != "eager":
        use_compiled("on", compiler=arguments.compiler)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.compiler}, int4 and block formats")
    table([int(size) for size in arguments.elements.split(",")], arguments.rounds)


if __name__ == "__main__":
    main()
