"""Loads a packed export as a module, in plain PyTorch or with torchao's weights, without the run it came from."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from eval.saved_model import build_architecture
from quant.export import LayerVerdict, read_packed, restore
from quant.quant_module import QuantModule

PACKED = "model.safetensors"


def load_packed(folder: str | Path) -> nn.Module:
    """Load the model of a packed export in eval mode.

    Its weights are float32 values of their formats, and its activations are rounded in the formats that the run chose.
    Its logits equal those of the run's model up to float32 rounding.

    Args:
        folder: the folder of the export.

    Raises:
        UserError: if the folder holds no packed checkpoint, or a damaged one.
    """
    return _load(Path(folder))[0]


def load_torchao(folder: str | Path) -> tuple[nn.Module, dict[str, LayerVerdict]]:
    """Load the model of a torchao export in eval mode.

    Layers for which torchao has an equivalent configuration use its kernels, with the packed codes and scales.

    Args:
        folder: the folder of the export.

    Returns:
        The model, and for each layer the chosen formats and the types that it runs with.
    """
    from quant.export.torchao import to_torchao

    model, modules = _load(Path(folder))
    return model, to_torchao(model, modules)


def _load(folder: Path) -> tuple[nn.Module, dict[str, QuantModule]]:
    description, tensors = read_packed(folder / PACKED)
    model = build_architecture(folder, description)
    modules = restore(model, description, tensors)
    return model.eval(), modules
