"""Latencies of ONNX files on ONNX Runtime, measured in a process that does nothing else.

There, the files of a group take turns call by call, so that whatever else the machine does disturbs all of them alike.
The parent sends a request and reads the answer as JSON; the inputs travel as an .npz file.
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
WARM_UP = 5
ROOT = Path(__file__).resolve().parents[2]


def session(path: Path, threads: int | None = None) -> Any:
    """An ONNX Runtime session on the CPU, with the settings that the file asks for in its metadata.

    Raises UserError for a file that it cannot run.
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
        settings = asked_for(made)
        return start(settings) if settings else made
    except Exception as error:  # its errors share no base class
        raise UserError(f"{path}: ONNX Runtime cannot run it: {' '.join(str(error).split())[:300]}") from None


def asked_for(session: Any) -> dict[str, str]:
    """The settings that a session's file notes in its metadata."""
    noted = session.get_modelmeta().custom_metadata_map
    return {name: value for name, value in noted.items() if name.startswith("session.")}


def settings_of(path: Path) -> dict[str, str]:
    """The settings of sessions that a file asks for."""
    return asked_for(session(path))


def latencies(
    groups: Sequence[tuple[Sequence[Path], Mapping[str, Tensor]]], repeats: int = REPEATS, threads: int = 1
) -> list[list[float]]:
    """Milliseconds of one call of each file: medians over `repeats`, after a few calls that do not count.

    Args:
        groups: files to compare with each other, and the inputs by name that they are called with.
    """
    with TemporaryDirectory() as folder:
        request = []
        for place, (files, inputs) in enumerate(groups):
            feed = Path(folder) / f"{place}.npz"
            arrays: dict[str, Any] = {name: x.numpy() for name, x in inputs.items()}
            np.savez(feed, **arrays)
            request.append({"files": [str(Path(file).absolute()) for file in files], "inputs": str(feed)})
        asked = json.dumps({"groups": request, "repeats": repeats, "threads": threads})
        command = [sys.executable, "-m", "eval.export.onnx_timing"]
        done = subprocess.run(command, input=asked, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"measuring latencies failed: {reason}")
    answer: list[list[float]] = json.loads(done.stdout)
    return answer


def measure(files: Sequence[str], inputs: str, repeats: int, threads: int) -> list[float]:
    """Milliseconds of each of a group's files, in this process."""
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
    """Answer the request on stdin."""
    asked = json.load(sys.stdin)
    repeats, threads = asked["repeats"], asked["threads"]
    print(json.dumps([measure(group["files"], group["inputs"], repeats, threads) for group in asked["groups"]]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
