"""The table of engines: what each stores and runs, by kind of layer and formats, and where that is said.

`python -m quant.engines.table` prints it as Markdown, for docs/export.md. Everything else that knows formats of an
engine (flags, verdicts, errors) reads it from here.
"""

from __future__ import annotations

from quant.engines.rules import KINDS, Engine, Kind, Rule

INTS = tuple(f"int{width}" for width in range(2, 9))
GROUPS = tuple(f"int{width}gN" for width in range(2, 9))
POINTED_GROUPS = tuple(f"u{name}" for name in GROUPS)
ORT_WIDE = ("int16", "e4m3", "e5m2", "fp16", "bf16", "int4gN", "int8gN", "uint4gN", "uint8gN")
PRODUCTS: tuple[Kind, ...] = ("linear", "conv1d", "conv", "depthwise", "experts")
"""Kinds that multiply their input by a weight."""
LAYERS: tuple[Kind, ...] = (*PRODUCTS, "embedding")
CONVOLUTIONS: tuple[Kind, ...] = ("conv", "depthwise")
MATRICES: tuple[Kind, ...] = ("linear", "conv1d", "experts")

ORT_TYPES = "ONNX opset 21, QuantizeLinear and DequantizeLinear; tried with onnxruntime 1.31.1, CPU"
ORT_INTEGERS = "onnxruntime 1.31.1, MatMulInteger and QLinearConv, which reads bytes; tried on the CPU"
OV_INTEGERS = "openvino 2026.4.1, CPU: runtimePrecision u8 and i8, outputs as ONNX Runtime's (tried)"
OV_COMPRESSED = (
    "openvino 2026.4.1, CPU: runtimePrecision i4 and i8 (tried); without DYNAMIC_QUANTIZATION_GROUP_SIZE=0 it rounds "
    "inputs to 8 bits itself. Linear layers with int8 weights and int4 inputs crash it"
)
OV_FLOAT = "openvino 2026.4.1, CPU: runtimePrecision f32, outputs as ONNX Runtime's (tried)"
TRT = "TensorRT 11.3 documentation, Working with Quantized Types: symmetric INT8 and FP8 E4M3"
TRT_INT4 = "TensorRT 11.3 documentation, Working with Quantized Types: INT4 is for weights alone, in blocks"
VLLM_PARTS = "vLLM, quantization/compressed_tensors/compressed_tensors.py, _get_scheme_from_parts"
VLLM_WNA16 = "vLLM, compressed_tensors/schemes/compressed_tensors_wNa16.py: 4 and 8 bits; marlin_utils.py: group sizes"
VLLM_FP4 = "vLLM, compressed_tensors/schemes: W4A4 with float inputs (NVFP4A16), W4A16 MXFP4"
CT = "compressed-tensors 0.20.0 with transformers: from_pretrained unpacks the weights (tried)"
AO = "torchao 0.18.0, IntxUnpackedToInt8Tensor and Float8Tensor (tried)"
AO_DYNAMIC = "torchao 0.18.0, IntxUnpackedToInt8Tensor with int8_asym_per_token (tried)"
AO_CACHE = "the packed file keeps the formats of caches, whose values are rounded beside torchao"
GGUF = (
    "llama.cpp, ggml-common.h: block_q4_0, block_q4_1, block_q5_0, block_q5_1, block_q8_0, block_mxfp4; gguf 0.19.0, "
    "GGMLQuantizationType; logits compared with llama-cpp-python 0.3.36"
)
ET_STATIC = "torch.export, quantized_decomposed operations; ExecuTorch runs them by its portable kernels"
ET_DYNAMIC = "ExecuTorch documentation, XNNPACK Quantization: 8-bit dynamic inputs; the file holds weights in bytes"

_ENGINES = (
    Engine(
        "onnxruntime",
        "ONNX Runtime",
        "1.31.1",
        "onnx",
        (
            Rule(MATRICES, ("int4", "int8"), ("int4", "int8"), True, ORT_INTEGERS),
            Rule(CONVOLUTIONS, ("int4", "int8"), ("int8",), True, ORT_INTEGERS),
            Rule(CONVOLUTIONS, ("int4", "int8"), ("float", "int16", "e4m3", "e5m2"), False, ORT_TYPES),
            Rule(
                CONVOLUTIONS, ("float", *ORT_WIDE), ("float", "int4", "int8", "int16", "e4m3", "e5m2"), False, ORT_TYPES
            ),
            Rule(
                (*MATRICES, "embedding"),
                ("float", "int4", "int8", *ORT_WIDE),
                ("float", "int4", "int8", "int16", "e4m3", "e5m2"),
                False,
                ORT_TYPES,
            ),
        ),
        default_space="4,8",
        takes_factors=True,
        whole_groups=False,
        mixes=True,
    ),
    Engine(
        "openvino",
        "OpenVINO",
        "2026.4.1",
        "onnx",
        (
            Rule(MATRICES, ("int8",), ("int8",), True, OV_INTEGERS),
            Rule(CONVOLUTIONS, ("int8",), ("int4", "int8"), True, OV_INTEGERS),
            Rule(MATRICES, ("int4",), ("float", "int4", "int8"), True, OV_COMPRESSED),
            Rule(MATRICES, ("int8", "int4gN", "int8gN"), ("float",), True, OV_COMPRESSED),
            Rule(("embedding",), ("int4", "int8"), ("float",), True, OV_COMPRESSED),
            Rule(
                CONVOLUTIONS,
                ("int4", "int8", "int16"),
                ("float", "int4", "int8", "int16"),
                False,
                OV_FLOAT,
            ),
            Rule(LAYERS, ("int16", "e4m3"), ("float",), False, OV_FLOAT),
        ),
        default_space="4,8",
        takes_factors=True,
    ),
    Engine(
        "tensorrt",
        "TensorRT",
        "11.3",
        "onnx",
        (
            Rule(PRODUCTS, ("int8",), ("int8",), True, TRT),
            Rule(PRODUCTS, ("e4m3",), ("e4m3",), True, TRT),
            Rule(MATRICES, ("int4g64", "int4g128"), ("float",), True, TRT_INT4),
        ),
        default_space="int8,float",
        symmetric_weights=True,
        symmetric_inputs=True,
        takes_factors=True,
    ),
    Engine(
        "vllm",
        "vLLM",
        "source of commit 004dadbe",
        "compressed-tensors",
        (
            Rule(("linear",), ("int8",), ("int8",), True, VLLM_PARTS),
            Rule(("linear",), ("e4m3",), ("float", "e4m3"), True, VLLM_PARTS),
            Rule(("linear",), ("int4", "int8"), ("float",), True, VLLM_WNA16),
            Rule(
                ("linear",),
                tuple(f"int{width}g{size}" for width in (4, 8) for size in (32, 64, 128)),
                ("float",),
                True,
                VLLM_WNA16,
            ),
            Rule(("linear",), ("nvfp4", "mxfp4"), ("float",), True, VLLM_FP4),
        ),
        default_space="int4g128,int8",
        fuses=True,
        symmetric_weights=True,
        symmetric_inputs=False,
    ),
    Engine(
        "transformers",
        "transformers",
        "5.23 with compressed-tensors 0.20.0",
        "compressed-tensors",
        (
            Rule(("linear",), (*INTS, "e4m3"), ("float", *INTS, "e4m3"), False, CT),
            Rule(("linear",), (*GROUPS, "nvfp4", "mxfp4"), ("float",), False, CT),
        ),
        default_space="4,8",
        fuses=True,
        symmetric_weights=True,
        symmetric_inputs=False,
    ),
    Engine(
        "torchao",
        "torchao",
        "0.18.0",
        "torchao",
        (
            Rule(("linear",), (*INTS, "e4m3", *GROUPS, *POINTED_GROUPS), ("float",), False, AO),
            Rule(("linear",), INTS, ("int8",), False, AO_DYNAMIC, per_token=True),
            Rule(("cache",), (*INTS, "e4m3", "e5m2", "mxfp8", "mxfp4", "mxint8"), ("float",), False, AO_CACHE),
        ),
        default_space="4,8",
        symmetric_weights=True,
        symmetric_inputs=False,
    ),
    Engine(
        "llama.cpp",
        "llama.cpp",
        "gguf 0.19.0",
        "gguf",
        (
            Rule(
                ("linear", "embedding", "experts"),
                ("int4g32", "uint4g32", "int5g32", "uint5g32", "int8g32", "mxfp4"),
                ("float",),
                True,
                GGUF,
            ),
            Rule(("linear", "embedding", "experts"), ("fp16", "bf16"), ("float",), True, GGUF),
        ),
        default_space="int4g32,int5g32,int8g32",
        group_point_bits=16,
    ),
    Engine(
        "executorch",
        "ExecuTorch",
        "1.0",
        "executorch",
        (
            Rule(("linear", "conv", "depthwise"), ("int8",), ("int8",), False, ET_STATIC),
            Rule(("linear",), ("int8",), ("int8",), True, ET_DYNAMIC, per_token=True),
        ),
        default_space="int8,float",
        symmetric_weights=True,
    ),
)
ENGINES: dict[str, Engine] = {engine.name: engine for engine in _ENGINES}
"""Name -> engine."""


def markdown_table() -> str:
    """Return the table as Markdown: the part of docs/export.md between its marks."""
    lines = ["| engine | layers | weights | inputs | computes in | source |", "|---|---|---|---|---|---|"]
    for engine in ENGINES.values():
        for rule in engine.rules:
            kinds = "all" if set(rule.kinds) >= set(KINDS) - {"cache"} else ", ".join(rule.kinds)
            inputs = ", ".join(rule.inputs) + (", per token" if rule.per_token else "")
            computes = "these" if rule.native else "float"
            weights = ", ".join(rule.weights)
            cells = f"{engine.title} (`{engine.export}`)", kinds, weights, inputs, computes, rule.source
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
