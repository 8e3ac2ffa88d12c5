"""Times as ratios: what is compared takes turns, so that a drift of the machine's speed meets all of it.

Each round has an order of its own: what runs after a large result was freed gets memory that is still in the caches.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping

import torch

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}
"""without these, page faults drown every ratio on a CPU"""


def with_allocator(module: str) -> None:
    """Start this benchmark again with `ALLOCATOR` in the environment, unless it is there."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], os.environ | ALLOCATOR)


def take_turns(
    functions: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu", warm_up: int = 3
) -> dict[str, list[float]]:
    """Seconds of each round by function: of the device's own clock (CUDA events) on a GPU."""
    for _ in range(warm_up):
        for function in functions.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    order, drawn = list(functions), random.Random(0)
    for _ in range(rounds):
        drawn.shuffle(order)
        for name in order:
            seconds[name].append(_seconds(functions[name], device))
    return seconds


def _seconds(function: Callable[[], object], device: str) -> float:
    if device == "cpu":
        started = time.perf_counter()
        function()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """The median over rounds of name's time over base's."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))
