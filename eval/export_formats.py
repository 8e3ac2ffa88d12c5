"""The export formats: how each writes a run's model into a folder, and how what it wrote is run again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from eval.export_run import FinishedRun
    from quant.export import LayerVerdict

SIDE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
"""what a text model's folder holds beside its weights"""


@dataclass(frozen=True)
class Written:
    """What an export wrote."""

    layers: dict[str, LayerVerdict]
    sizes: dict[str, int]
    """bytes of the model's file by what they hold; their sum is the file's size"""
    weight_bytes: int
    """bytes of the searched layers' weights, their block scales included, other scales not"""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ExportFormat:
    """One format: write(run, folder) and load(run, folder) -> a module with the run's inputs and outputs."""

    write: Callable[[FinishedRun, Path], Written]
    load: Callable[[FinishedRun, Path], nn.Module]
    usage: str
    """how to run the export, in Python, for the model card"""


def copy_side_files(run: FinishedRun, folder: Path) -> None:
    """Configuration and tokenizer of a model of transformers."""
    for name in SIDE_FILES:
        if (source := run.folder / "model" / name).is_file():
            shutil.copy(source, folder / name)


def write_packed(run: FinishedRun, folder: Path) -> Written:
    import json

    from eval.packed_model import PACKED
    from eval.saved_model import QUANTIZATION
    from quant.export import packed_sizes
    from quant.export import write_packed as write

    saved = json.loads((run.folder / "model" / QUANTIZATION).read_text())
    extra = {"build": saved["build"], "num_labels": saved["num_labels"], "metrics": run.record["metrics"]}
    layers = write(folder / PACKED, run.model, run.modules, extra)
    copy_side_files(run, folder)
    sizes = packed_sizes(folder / PACKED)
    return Written(layers, sizes, sizes["codes"] + sizes["block_scales"] + sizes["float_weights"])


def load_packed(run: FinishedRun, folder: Path) -> nn.Module:
    from eval.packed_model import load_packed as load

    return load(folder)


PACKED_USAGE = """\
from eval.packed_model import load_packed

model = load_packed("{folder}")  # a torch.nn.Module in eval mode
logits = model({inputs}).logits"""

EXPORT_FORMATS: dict[str, ExportFormat] = {
    "packed": ExportFormat(write_packed, load_packed, PACKED_USAGE),
}
