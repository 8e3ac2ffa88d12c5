"""A module that runs an ONNX file on the CPU with the interface of the original model."""

from __future__ import annotations

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

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        """Compute the logits, and the loss if `labels` are given.

        Args:
            labels: Classes (N,), values (N,) for a regression, or token ids (N, length) for a language model.
            **inputs: Inputs of the ONNX file by name.

        Returns:
            'logits', float32 (N, classes) or (N, length, vocabulary), and 'loss', a scalar, if there are labels.
        """
        feed = {name: inputs[name].cpu().numpy() for name in self.names}
        logits = torch.from_numpy(np.asarray(self.session.run(None, feed)[0]))
        return {"logits": logits} if labels is None else {"loss": self._loss(logits, labels), "logits": logits}

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.kind == "lm":
            return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if labels.is_floating_point():
            return functional.mse_loss(logits.squeeze(-1), labels)
        return functional.cross_entropy(logits, labels)
