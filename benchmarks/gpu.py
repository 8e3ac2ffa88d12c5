"""Speed on a GPU: fake quantization as a share of the copy bandwidth, and search steps over float ones, in bfloat16.

    python -m benchmarks.gpu [--rounds 30] [--models bert-base,resnet50]

Times are the GPU's own (CUDA events). The floor of a pass is what it must move at least: forward, read x and write x^;
forward + backward, read x, write x^, read the gradient and x, write the gradient. Needs torch, triton, transformers,
timm and numpy alone. Without a GPU the same code runs, much smaller, on the CPU: that tells that it runs, no more.
"""

from __future__ import annotations

import argparse
import statistics

import torch

from benchmarks.kernels import FLOORS, measure
from benchmarks.step_time import make_step
from benchmarks.timing import ratio, take_turns
from quant.quant_utils import use_compiled

MODELS = ("bert-base", "resnet50")
METHODS = ("float", "uniform", "search", "reward")


def kernels_table(sizes: list[int], rounds: int, device: str) -> None:
    """Share of the copy bandwidth that each pass reaches, by granularity."""
    for dtype in (torch.bfloat16, torch.float32):
        for size in sizes:
            rows = measure(2**size, rounds, device, dtype)
            clone = next(iter(rows.values()))["clone"]
            rate = 2 * dtype.itemsize * 2**size / clone / 1e9
            print(f"\n{dtype}, 2^{size} elements: clone() moves {rate:.0f} GB/s; share of that, and time over clone()")
            for name, row in rows.items():
                told = (f"{step} {floor / row[step]:>5.0%} ({row[step]:.2f}x)" for step, floor in FLOORS.items())
                print(f"  {name:<12} " + "   ".join(told), flush=True)


def steps_table(models: list[str], rounds: int, device: str, shrunk: int) -> None:
    """Time of a bfloat16 autocast step over the float one's, and the peak memory."""
    print(f"\n{'model':<10} {'method':<9} {'step [ms]':>10} {'of float':>9} {'peak [MiB]':>11} {'of float':>9}")
    for name in models:
        steps = {method: make_step(name, method, device, autocast=True, shrunk=shrunk) for method in METHODS}
        seconds = take_turns(steps, rounds, device)
        del steps
        peaks = {method: _peak(name, method, device, shrunk) for method in METHODS}
        for method in METHODS:
            told = f"{name:<10} {method:<9} {statistics.median(seconds[method]) * 1e3:>10.2f} "
            told += f"{ratio(seconds, method, 'float'):>9.3f}"
            if peaks[method]:
                told += f" {peaks[method] / 2**20:>11.0f} {peaks[method] / peaks['float']:>9.3f}"
            print(told, flush=True)


def _peak(name: str, method: str, device: str, shrunk: int) -> int:
    """Bytes that were allocated at most; 0 on a CPU, where `benchmarks.step_time` tells."""
    if device == "cpu":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step = make_step(name, method, device, autocast=True, shrunk=shrunk)
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--elements", default="22,24,27", help="powers of two")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes, rounds, shrunk = [int(size) for size in arguments.elements.split(",")], arguments.rounds, 1
    if device == "cpu":
        print(
            "NO GPU HERE: a small version on the CPU, which shows that the code runs; its figures say nothing of GPUs"
        )
        sizes, rounds, shrunk = [16], 2, 32
    use_compiled("on", device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    place = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {place}, {rounds} rounds, medians")
    kernels_table(sizes, rounds, device)
    steps_table(arguments.models.split(","), rounds, device, shrunk)


if __name__ == "__main__":
    main()
