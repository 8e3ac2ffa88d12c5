"""A module that runs an ONNX file on the CPU with the interface of the original model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from eval.export.onnx_timing import session


class OnnxModel(nn.Module):
    """Runs an ONNX file on ONNX Runtime.

    Args:
        path: The ONNX file.
        kind: Kind of the task, 'image', 'text' or 'lm', which selects the loss.
    """

    def __init__(self, path: Path, kind: str) -> None:
        super().__init__()
        self.session = session(path)
        self.kind = kind
        self.names = [entry.name for entry in self.session.get_inputs()]
        self.outputs = [entry.name for entry in self.session.get_outputs()]

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        """Compute the logits, and the loss if `labels` are given.

        Args:
            labels: Classes (N,), values (N,) for a regression, or token ids (N, length) for a language model.
            **inputs: Inputs of the ONNX file by name.

        Returns:
            The outputs of the file by name, such as 'logits', float32 (N, classes) or (N, length, vocabulary), and
            'loss', a scalar, if there are labels.
        """
        found = self.run(inputs)
        return found if labels is None else {"loss": self._loss(found["logits"], labels), **found}

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the outputs of the file by name."""
        feed = {name: inputs[name].cpu().numpy() for name in self.names}
        arrays = zip(self.outputs, self.session.run(None, feed), strict=True)
        return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays}

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.kind == "lm":
            return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if labels.is_floating_point():
            return functional.mse_loss(logits.squeeze(-1), labels)
        return functional.cross_entropy(logits, labels)


class OnnxModelForQuestionAnswering(OnnxModel):
    """Runs an ONNX file that finds answers; transformers knows its labels by the name of the class."""

    def forward(  # type: ignore[override]
        self, start_positions: Tensor | None = None, end_positions: Tensor | None = None, **inputs: Tensor
    ) -> dict[str, Tensor]:
        """Compute the logits of both ends, and the loss if they are given, as transformers' models do.

        Args:
            start_positions: Tokens that answers start with (N,).
            end_positions: Tokens that answers end with (N,).
            **inputs: Inputs of the ONNX file by name.

        Returns:
            'start_logits' and 'end_logits', float32 (N, length), and 'loss', a scalar, if there are labels.
        """
        found = self.run(inputs)
        if start_positions is None or end_positions is None:
            return found
        ends = ((found["start_logits"], start_positions), (found["end_logits"], end_positions))
        losses = [
            functional.cross_entropy(logits, at.clamp(0, logits.shape[1]), ignore_index=logits.shape[1])
            for logits, at in ends
        ]
        return {"loss": torch.stack(losses).mean(), **found}


def load_onnx_model(path: Path, kind: str) -> OnnxModel:
    """Load an ONNX file as the module for a kind of task."""
    return (OnnxModelForQuestionAnswering if kind == "qa" else OnnxModel)(path, kind)
