"""`load_packed`: a packed export as a module again, without the run it came from."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from eval.saved_model import build_architecture
from quant.export import read_packed, restore

PACKED = "model.safetensors"


def load_packed(folder: str | Path) -> nn.Module:
    """The model of a packed export, in eval mode: float32 weights on their formats' grids, activations rounded as
    the run chose. Its logits are those of the run's model, to float32 rounding.

    Raises UserError if the folder holds no packed checkpoint, or a damaged one.
    """
    folder = Path(folder)
    description, tensors = read_packed(folder / PACKED)
    model = build_architecture(folder, description)
    restore(model, description, tensors)
    return model.eval()
