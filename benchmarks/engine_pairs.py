"""Tries pairs of formats in ONNX Runtime and OpenVINO, one layer each: what quant/engines/table.py says is tried here.

    python -m benchmarks.engine_pairs [--engine openvino] [--all]

A layer of each kind is written as ONNX in each pair (weights, inputs), with a scale per output channel, run by the
engine in a process of its own, and compared with the reference implementation of the package onnx. `--all` also tries
pairs that the table does not have. OpenVINO runs with INFERENCE_PRECISION_HINT=f32 and
DYNAMIC_QUANTIZATION_GROUP_SIZE=0, ONNX Runtime with session.qdq_matmulnbits_accuracy_level=1: neither then rounds
float inputs by itself. Pairs with float8 run with session.disable_quant_qdq=1, since ONNX Runtime's integer products
of float8 do not load (exports avoid them).
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from quant.engines.rules import Kind
from quant.engines.table import ENGINES
from quant.formats import parse_format

TYPES: dict[str, tuple[int, Any]] = {
    "int4": (TensorProto.INT4, ml_dtypes.int4),
    "int8": (TensorProto.INT8, np.int8),
    "int16": (TensorProto.INT16, np.int16),
    "e4m3": (TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
    "e5m2": (TensorProto.FLOAT8E5M2, ml_dtypes.float8_e5m2),
}
SHAPES: dict[Kind, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "linear": ((32, 64), (2, 32)),
    "conv": ((16, 8, 3, 3), (1, 8, 8, 8)),
    "depthwise": ((8, 1, 3, 3), (1, 8, 8, 8)),
    "embedding": ((50, 16), (2, 5)),
}
"""Kind -> shapes of the weight (for MatMul: (in, out)) and of the input."""
CLOSE = 1e-3
"""Largest difference, as a share of the largest output, that counts as the same result."""


def layer(kind: Kind, weight: str, activation: str) -> tuple[bytes, np.ndarray]:
    """Return a model of one layer in a pair of formats, and an input for it."""
    random = np.random.default_rng(0)
    shape, input_shape = SHAPES[kind]
    values = random.normal(size=shape).astype(np.float32)
    nodes, tensors, names = [], [], {"x": "x", "w": "w"}
    if weight == "float":
        tensors.append(onnx.numpy_helper.from_array(values, "w"))
    else:
        axis = 1 if kind == "linear" else 0
        others = tuple(dim for dim in range(values.ndim) if dim != axis)
        scale = np.abs(values).max(others) / parse_format(weight).qmax  # type: ignore[union-attr]
        codes = values / np.expand_dims(scale, others)
        tensors += [tensor("codes", codes, weight), onnx.numpy_helper.from_array(scale.astype(np.float32), "scales")]
        nodes.append(helper.make_node("DequantizeLinear", ["codes", "scales"], ["w"], axis=axis))
    if activation != "float":
        tensors.append(onnx.numpy_helper.from_array(np.float32(4 / parse_format(activation).qmax), "scale"))  # type: ignore[union-attr]
        tensors.append(tensor("point", np.zeros(()), activation))
        nodes.append(helper.make_node("QuantizeLinear", ["x", "scale", "point"], ["q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "scale", "point"], ["xd"]))
        names["x"] = "xd"
    operation = {"linear": "MatMul", "embedding": "Gather"}.get(kind, "Conv")
    inputs = [names["w"], names["x"]] if kind == "embedding" else [names["x"], names["w"]]
    settings: dict[str, Any] = (
        {"pads": [1] * 4, "group": 8 if kind == "depthwise" else 1} if operation == "Conv" else {}
    )
    nodes.append(helper.make_node(operation, inputs, ["y"], **settings))
    type = TensorProto.INT64 if kind == "embedding" else TensorProto.FLOAT
    ends = (
        [helper.make_tensor_value_info("x", type, input_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    graph = helper.make_graph(nodes, "layer", *ends, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = random.integers(0, 50, input_shape) if kind == "embedding" else random.normal(size=input_shape)
    return model.SerializeToString(), x if kind == "embedding" else x.astype(np.float32)


def tensor(name: str, values: np.ndarray, format: str) -> onnx.TensorProto:
    """Round values to the codes of a format."""
    type, dtype = TYPES[format]
    rounded = np.round(values) if format.startswith("int") else values
    stored = rounded.astype(np.float32).astype(dtype)
    return helper.make_tensor(name, type, values.shape, stored.astype(np.float32).flatten().tolist())


def run(engine: str, kind: Kind, weight: str, activation: str) -> dict[str, Any]:
    """Run one layer in this process; the difference from the reference, and the precision that OpenVINO tells."""
    from onnx.reference import ReferenceEvaluator

    model, x = layer(kind, weight, activation)
    (expected,) = ReferenceEvaluator(onnx.load_from_string(model)).run(None, {"x": x})
    precision = ""
    if engine == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if not {"e4m3", "e5m2"}.isdisjoint((weight, activation)):
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {"x": x})
    else:
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        core = openvino.Core()
        compiled = core.compile_model(core.read_model(model), "CPU", settings)
        found = compiled({"x": x})[0]
        told = [operation.get_rt_info() for operation in compiled.get_runtime_model().get_ops()]
        kinds = ("FullyConnected", "MatMul", "Convolution", "Gather")
        precision = next(i["runtimePrecision"].astype(str) for i in told if i["layerType"].astype(str) in kinds)
    return {"difference": float(np.abs(found - expected).max() / np.abs(expected).max()), "precision": precision}


def main(argv: Sequence[str]) -> int:
    """Try the pairs and print a row for each. Returns 1 if a pair of the table fails or differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["onnxruntime", "openvino"], help="default: both")
    parser.add_argument("--all", action="store_true", help="also pairs that the table does not have")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    flags = parser.parse_args(argv)
    if flags.one:
        print(json.dumps(run(*flags.one)))
        return 0
    failed = 0
    for engine in [flags.engine] if flags.engine else ["onnxruntime", "openvino"]:
        for kind, weight, activation in itertools.product(SHAPES, TYPES, ("float", *TYPES)):
            if kind == "embedding" and activation != "float":
                continue
            listed = ENGINES[engine].keeps(kind, (parse_format(weight), parse_format(activation)))
            if not (listed or flags.all):
                continue
            command = [sys.executable, "-m", "benchmarks.engine_pairs", "--one", engine, kind, weight, activation]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            told = {"difference": None, "precision": f"exit code {done.returncode}"}
            told = json.loads(done.stdout) if done.returncode == 0 else told
            wrong = told["difference"] is None or told["difference"] > CLOSE
            failed += listed and wrong
            row = f"{engine:12} {kind:10} {weight:6} {activation:6} {'in the table' if listed else '':12}"
            print(
                f"{row} {told['precision']:14} {told['difference']}{'  <-- differs' if listed and wrong else ''}",
                flush=True,
            )
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
