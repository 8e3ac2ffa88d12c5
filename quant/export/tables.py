"""Embeddings that a run left in float, rounded for the time of an export."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from quant.convert import from_float, set_formats
from quant.formats import FLOAT, Format
from quant.quant_embedding import is_table
from quant.quant_module import QuantModule
from quant.quantizers.quantizer import QuantizerConfig

BY_ROW = QuantizerConfig(range="dynamic", granularity="channel", observer="minmax")
"""A scale for each row, from its largest value."""


def float_tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """Return the embeddings in float that share their weight with no other module, by name."""
    holders = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and not isinstance(module, QuantModule)
        and is_table(module)
        and holders[id(module.weight)] == 1
    }


@contextmanager
def rounded_tables(model: nn.Module, format: Format | None) -> Iterator[dict[str, QuantModule]]:
    """Within, the embeddings of `float_tables` are in a format; yields them by name.

    Args:
        model: The model; restored on exit.
        format: The format, whose scales are the rows' own; None: yield nothing.
    """
    found = {} if format is None else float_tables(model)
    tables = {name: from_float(table, BY_ROW) for name, table in found.items()}
    if format is not None:
        set_formats(tables, dict.fromkeys(tables, (format, FLOAT)))
    for name, table in tables.items():
        model.set_submodule(name, table)
    try:
        yield tables
    finally:
        for name, plain in found.items():
            model.set_submodule(name, plain)
