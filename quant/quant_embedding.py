"""QuantEmbedding: an embedding table whose rows are rounded; its input is indices, which stay as they are."""

from __future__ import annotations

import inspect

import torch.nn.functional as F
from torch import Tensor, nn

from quant.formats import Format
from quant.quant_module import QuantModule
from quant.quantizers.quantizer import Quantizer, QuantizerConfig


def is_table(module: nn.Module) -> bool:
    """Whether a module is an embedding that can be quantized: it is called with indices alone.

    Tables that compute their indices (learned positions of OPT or BART) or clip their rows' norms stay in float.
    """
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    return len(inspect.signature(type(module).forward).parameters) == 2  # self and the indices


class Indices(Quantizer):
    """The quantizer of indices, which are in no format: it stays in float."""

    def prepare(self, format: Format) -> None:
        """Create nothing."""

    def set_format(self, format: Format) -> None:
        """Stay in float."""


class QuantEmbedding(QuantModule, nn.Embedding):
    """Row i of Q(W) for each index i; W (num_embeddings, embedding_dim), whose rows are its output channels.

    A table tied to a linear head shares its weight's quantizer: both have the weight (out_features, in_features).
    """

    reach = "looked_up"

    def add_quantizers(self, weight: QuantizerConfig, activation: QuantizerConfig) -> None:
        """See `QuantModule.add_quantizers`."""
        super().add_quantizers(weight, activation)
        self.input_quantizer = Indices(activation, device=self.weight.device)

    @property
    def input_channels(self) -> int:
        """1: indices have no channels."""
        return 1

    def columns(self, input: Tensor) -> None:
        """Return None: indices choose rows, whose values count alike. See `QuantModule.columns`."""

    def compute(self, input: Tensor, weight: Tensor) -> Tensor:
        """Return the rows: (...) -> (..., embedding_dim)."""
        return F.embedding(input, weight, self.padding_idx)
