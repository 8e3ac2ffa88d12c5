"""ExecuTorch: a graph of core ATen operations as a program for phones and other devices, and how to run it here."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eval.export.onnx_model import OnnxModel
from quant.errors import UserError

MOST_ROWS = 64
"""Largest batch that memory is planned for; lowering may leave less."""


class ExecutorchModel(OnnxModel):
    """Runs a .pte file with the interface of the original model.

    Args:
        path: The .pte file.
        kind: Kind of the task, see `OnnxModel`.
        names: Names of its inputs, in order.
    """

    def __init__(self, path: Path, kind: str, names: Sequence[str]) -> None:
        from executorch.runtime import Runtime

        nn.Module.__init__(self)
        self.program = Runtime.get().load_program(path)  # methods read its memory
        self.method = self.program.load_method("forward")
        self.rows = self.method.metadata.input_tensor_meta(0).sizes()[0]  # what its memory is planned for
        self.kind, self.names = kind, list(names)

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the logits, computed for as many rows at a time as the program takes."""
        parts = zip(*(inputs[name].split(self.rows) for name in self.names), strict=True)
        return {"logits": torch.cat([self.method.execute(part)[0].clone() for part in parts])}


def dynamic_shapes(inputs: Mapping[str, Tensor], length: int | None) -> list[dict[int, Any]]:
    """Return which axes of the inputs vary, for torch.export: rows, and the length of texts.

    Args:
        inputs: Example inputs by name.
        length: Largest length of a text; None if the last axis is fixed.
    """
    rows = torch.export.Dim("rows", min=1, max=MOST_ROWS)
    if length is None:
        return [{0: rows} for _ in inputs]
    words = torch.export.Dim("length", min=2, max=length)
    return [{0: rows, x.dim() - 1: words} for x in inputs.values()]


def lower(program: torch.export.ExportedProgram, path: Path) -> int:
    """Write a program of ExecuTorch.

    Args:
        program: A graph of core ATen operations.
        path: The .pte file.

    Returns:
        How many quantized weights are left to ExecuTorch's portable kernels; XNNPACK multiplies by the others.

    Raises:
        UserError: ExecuTorch lacks an operation.
    """
    with _quiet():
        import executorch.kernels.quantized  # noqa: F401  registers what writes torch's quantize operations
        from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        # XNNPACK 1.5 computes wrong values for a Relu in front of a rounding if it gets the rounding without a layer.
        alone = ("QuantizedPerTensorConfig", "DeQuantizedPerTensorConfig")
        configs = [config for config in ALL_PARTITIONER_CONFIGS if config.__name__ not in alone]
        try:
            edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner(configs=configs)])
            path.write_bytes(edge.to_executorch().buffer)
        except (RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--format executorch: ExecuTorch cannot run the model: {reason}") from None
    nodes = edge.exported_program().graph.nodes
    return sum("dequantize_per_channel" in str(node.target) for node in nodes if node.op == "call_function")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress what ExecuTorch logs; failures are exceptions."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
