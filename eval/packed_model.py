"""A packed export as a module again, without the run it came from: plain, or with torchao's weights."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from eval.saved_model import build_architecture
from quant.export import LayerVerdict, read_packed, restore
from quant.quant_module import QuantModule

PACKED = "model.safetensors"


def load_packed(folder: str | Path) -> nn.Module:
    """The model of a packed export, in eval mode: float32 weights on their formats' grids, activations rounded as
    the run chose. Its logits are those of the run's model, to float32 rounding.

    Raises UserError if the folder holds no packed checkpoint, or a damaged one.
    """
    return _load(Path(folder))[0]


def load_torchao(folder: str | Path) -> tuple[nn.Module, dict[str, LayerVerdict]]:
    """The model of a torchao export, in eval mode, and what became of each layer: the packed weights, handed to torchao
    with their own codes and scales wherever it has a configuration that computes the same."""
    from quant.export.torchao import to_torchao

    model, modules = _load(Path(folder))
    return model, to_torchao(model, modules)


def _load(folder: Path) -> tuple[nn.Module, dict[str, QuantModule]]:
    description, tensors = read_packed(folder / PACKED)
    model = build_architecture(folder, description)
    modules = restore(model, description, tensors)
    return model.eval(), modules
