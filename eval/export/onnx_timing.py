"""Measures latencies of ONNX files on ONNX Runtime, in a separate process.

The files of a group are called in turn, so that other load on the machine affects all of them equally. The request and
the answer are JSON on stdin and stdout; the inputs are passed as an .npz file.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from quant.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

REPEATS = 30
"""Default number of timed calls."""
WARM_UP = 5
"""Number of untimed calls before them."""
ROOT = Path(__file__).resolve().parents[2]


def session(path: Path, threads: int | None = None) -> Any:
    """Create an ONNX Runtime session on the CPU, with the settings in the metadata of the file.

    Args:
        path: The ONNX file.
        threads: Number of threads; None for the default of ONNX Runtime.

    Raises:
        UserError: ONNX Runtime cannot run the file.
    """
    import onnxruntime

    def start(settings: Mapping[str, str]) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        for name, value in settings.items():
            options.add_session_config_entry(name, value)
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    try:
        made = start({})
        settings = metadata_settings(made)
        return start(settings) if settings else made
    except Exception as error:  # the errors of ONNX Runtime share no base class
        raise UserError(f"{path}: ONNX Runtime cannot run it: {' '.join(str(error).split())[:300]}") from None


def metadata_settings(session: Any) -> dict[str, str]:
    """Return the session settings in the metadata of the file of `session`."""
    metadata = session.get_modelmeta().custom_metadata_map
    return {name: value for name, value in metadata.items() if name.startswith("session.")}


def settings_of(path: Path) -> dict[str, str]:
    """Return the session settings in the metadata of an ONNX file."""
    return metadata_settings(session(path))


def latencies(
    groups: Sequence[tuple[Sequence[Path], Mapping[str, Tensor]]], repeats: int = REPEATS, threads: int = 1
) -> list[list[float]]:
    """Measure the latency of one call of each file in a separate process.

    Args:
        groups: Groups of files to compare with each other, each with the inputs of the calls by name.
        repeats: Number of timed calls per file, after WARM_UP untimed ones.
        threads: Threads of ONNX Runtime.

    Returns:
        For each group, the median latency of each file in milliseconds.

    Raises:
        UserError: The measurement failed.
    """
    with TemporaryDirectory() as folder:
        request = []
        for place, (files, inputs) in enumerate(groups):
            feed = Path(folder) / f"{place}.npz"
            arrays: dict[str, Any] = {name: x.numpy() for name, x in inputs.items()}
            np.savez(feed, **arrays)
            request.append({"files": [str(Path(file).absolute()) for file in files], "inputs": str(feed)})
        message = json.dumps({"groups": request, "repeats": repeats, "threads": threads})
        command = [sys.executable, "-m", "eval.export.onnx_timing"]
        done = subprocess.run(command, input=message, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"measuring latencies failed: {reason}")
    answer: list[list[float]] = json.loads(done.stdout)
    return answer


def measure(files: Sequence[str], inputs: str, repeats: int, threads: int) -> list[float]:
    """Measure a group of files in this process.

    Args:
        files: The ONNX files.
        inputs: .npz file with the inputs by name.
        repeats: Number of timed calls per file, after WARM_UP untimed ones.
        threads: Threads of ONNX Runtime.

    Returns:
        The median latency of each file in milliseconds.
    """
    sessions = [session(Path(file), threads) for file in files]
    with np.load(inputs) as arrays:
        feed = dict(arrays)
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(WARM_UP + repeats):
        for running, taken in zip(sessions, times, strict=True):
            wanted = {entry.name: feed[entry.name] for entry in running.get_inputs()}
            start = time.perf_counter()
            running.run(None, wanted)
            taken.append(time.perf_counter() - start)
    return [1e3 * statistics.median(taken[WARM_UP:]) for taken in times]


def main() -> int:
    """Read the request from stdin and print the answer. Returns the exit code."""
    request = json.load(sys.stdin)
    repeats, threads = request["repeats"], request["threads"]
    print(json.dumps([measure(group["files"], group["inputs"], repeats, threads) for group in request["groups"]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
