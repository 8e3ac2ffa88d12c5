"""GGUF: a decoder of transformers as a file for llama.cpp: tensors under llama.cpp's names, metadata, tokenizer.

What llama.cpp expects of each architecture is in `conversion/` and `src/models/` of its repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.export.gguf_tokenizer import add_tokenizer
from quant.errors import UserError
from quant.export.gguf_blocks import GgufTensor, float_tensor, gguf_verdict, weight_tensor
from quant.export.layer_report import LayerVerdict
from quant.export.weights import round_weight
from quant.quant_module import QuantModule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

SILU, GELU = ("silu", "swish"), ("gelu_pytorch_tanh",)


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes a model type of transformers."""

    name: str
    """Its name in GGUF."""
    rotates_pairs: bool = False
    """Whether rotary positions turn neighbouring values of a head; transformers turns its halves."""
    norm_offset: float = 0.0
    """What transformers adds to the weights of norms."""
    activations: tuple[str, ...] = SILU
    period: int = 0
    """Every layer of this number attends to the whole text, the others to a window; 0: all layers are alike."""
    large: int = 0
    """Number of layers from which llama.cpp takes that attention is scaled by another size than a head's."""
    read_as: str = ""
    """Model type of transformers that computes the same and that its reader knows, if that is another one."""


ARCHITECTURES = {
    "llama": Architecture("llama", rotates_pairs=True),
    "mistral": Architecture("llama", rotates_pairs=True, read_as="llama"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "phi3": Architecture("phi3"),
    "gemma2": Architecture("gemma2", norm_offset=1.0, activations=GELU, period=2, large=46),
    "gemma3_text": Architecture("gemma3", norm_offset=1.0, activations=GELU, period=6, large=62),
}
"""model_type of transformers -> what llama.cpp makes of it."""
SCALINGS = ("linear", "yarn")
"""Stretched rotary positions that GGUF's metadata describe."""


@dataclass
class GgufContents:
    """Tensors of a file by name, and how its layers are held."""

    tensors: dict[str, GgufTensor] = field(default_factory=dict)
    layers: dict[str, LayerVerdict] = field(default_factory=dict)
    weights: set[str] = field(default_factory=set)
    """Names of the layers' weights among `tensors`."""
    notes: list[str] = field(default_factory=list)


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Return how llama.cpp computes a model.

    Args:
        config: The model's configuration.

    Raises:
        UserError: llama.cpp, or the reader of transformers, computes something else for it.
    """
    if (found := ARCHITECTURES.get(config.model_type)) is None:
        raise UserError(
            f"--format gguf: is written for decoders of the types {', '.join(ARCHITECTURES)}, this model is a "
            f"{config.model_type}; choose packed or onnx"
        )
    if reason := _unlike(config, found):
        raise UserError(f"--format gguf: llama.cpp's {found.name} {reason}; choose packed or onnx")
    return found


def _unlike(config: Any, architecture: Architecture) -> str | None:
    """Return what llama.cpp computes otherwise than the model; None if nothing."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in architecture.activations:
        return f"has the activation {architecture.activations[0]}, this model {activation}"
    kinds = getattr(config, "layer_types", None) or []
    expected = [_kind_of_layer(place, architecture.period) for place in range(config.num_hidden_layers)]
    if kinds and list(kinds) != expected:
        return "attends to windows of the text in other layers than this model"
    if (scalar := getattr(config, "query_pre_attn_scalar", None)) is not None:
        whole = config.num_hidden_layers == architecture.large
        own = config.hidden_size // config.num_attention_heads if whole else config.head_dim
        if scalar != own:
            return f"scales attention by {own}, this model by {scalar}"
    for rope in _ropes(config).values():
        kind = rope.get("rope_type", "default")
        if kind not in ("default", *SCALINGS) and not (kind == "llama3" and architecture.rotates_pairs):
            return f"has no rotary positions of the type {kind}"
    return None


def _kind_of_layer(place: int, period: int) -> str:
    return "sliding_attention" if period and (place + 1) % period else "full_attention"


def _ropes(config: Any) -> dict[str, dict[str, Any]]:
    """Return the parameters of rotary positions by the kind of layer; '' for models with one kind."""
    parameters = dict(config.rope_parameters)
    return parameters if "full_attention" in parameters else {"": parameters}


def gguf_contents(model: nn.Module, modules: Mapping[str, QuantModule]) -> GgufContents:
    """Turn the tensors of a model into those of a GGUF file, weights with the codes of the run.

    Args:
        model: A decoder of transformers with quantized layers.
        modules: Its quantized layers by name, in their formats.

    Raises:
        UserError: GGUF has no place for a tensor.
    """
    import gguf

    config: Any = model.config
    architecture = architecture_of(config)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    contents = GgufContents()
    tensors = {k: tensor for k, tensor in model.state_dict(keep_vars=True).items() if "_quantizer." not in k}
    table = _weight_key(model, "get_input_embeddings")
    for key, tensor in tensors.items():
        layer = modules.get(key.removesuffix(".weight"))
        stored = _tensor(key, tensor, layer, architecture)
        if layer is not None and key.endswith(".weight"):
            contents.layers[key.removesuffix(".weight")] = gguf_verdict(*layer.formats, stored.type)
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if key != table and tensor is tensors[table]:  # the head of tied embeddings
            shared = _tensor(table, tensor, modules.get(table.removesuffix(".weight")), architecture)
            if _same(shared, stored):
                continue  # llama.cpp reads it from the table
            if name is None:
                name = names.get_name(table, try_suffixes=(".weight",))
                contents.notes.append(f"{table} holds the rounded weights of the head, which llama.cpp reads from it")
        if name is None:
            raise UserError(f"--format gguf: llama.cpp's {architecture.name} has no place for {key}; choose packed")
        if architecture.rotates_pairs and (heads := _heads(key, config)):
            stored = stored.rows(pair_order(stored.data.shape[0], heads))
        contents.tensors[name] = stored
        if layer is not None and key.endswith(".weight"):
            contents.weights.add(name)
    if (factors := _rope_factors(model, architecture)) is not None:
        contents.tensors["rope_freqs.weight"] = float_tensor(factors, "F32")
    return contents


def _weight_key(model: Any, getter: str) -> str:
    layer = getattr(model, getter)()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is layer)


def _tensor(key: str, tensor: Tensor, layer: QuantModule | None, architecture: Architecture) -> GgufTensor:
    """Store a tensor: weights of layers in their formats, other matrices in fp16, vectors in float32."""
    name = key.removesuffix(".weight")
    if layer is not None and name != key and (rounded := round_weight(name, layer)) is not None:
        return weight_tensor(rounded)
    if tensor.dim() > 1:
        return float_tensor(tensor)
    offset = architecture.norm_offset if key.endswith("norm.weight") else 0.0
    return float_tensor(tensor + offset, "F32")


def _same(one: GgufTensor, other: GgufTensor) -> bool:
    return one.type == other.type and np.array_equal(one.data, other.data)


def _heads(key: str, config: Any) -> int:
    """Return the number of heads that a tensor's rows belong to, if it gives queries or keys; otherwise 0."""
    part = key.rsplit(".", 2)[-2]
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(part, 0)


def pair_order(rows: int, heads: int) -> np.ndarray:
    """Return the order of rows in which rotary positions turn neighbours instead of the halves of a head.

    Args:
        rows: Rows of all heads.
        heads: Number of heads.
    """
    return np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _rope_factors(model: nn.Module, architecture: Architecture) -> Tensor | None:
    """Return by how much the frequencies of rotary positions are divided; None if the metadata say it."""
    config: Any = model.config
    rope = _ropes(config).get("", {})
    if rope.get("rope_type") != "llama3":
        return None
    rotary = next(module for module in model.modules() if hasattr(module, "inv_freq"))
    used: Any = rotary.inv_freq
    size = 2 * len(used)
    plain = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / used.double()).float()


def write_gguf(
    path: Path, model: nn.Module, contents: GgufContents, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """Write a GGUF file.

    Args:
        path: The file.
        model: The model of the contents.
        contents: What `gguf_contents` returned.
        tokenizer: The model's tokenizer.
        name: Name of the model in the metadata.

    Raises:
        UserError: llama.cpp has no tokenizer of this kind.
    """
    import gguf

    config: Any = model.config
    writer = gguf.GGUFWriter(path, architecture_of(config).name)
    try:
        _add_metadata(writer, config, contents, name)
        add_tokenizer(writer, tokenizer, config)
        for key, tensor in contents.tensors.items():
            type = gguf.GGMLQuantizationType[tensor.type]
            data = tensor.data if tensor.type != "BF16" else tensor.data.view(np.uint8)
            writer.add_tensor(key, data, raw_dtype=None if tensor.type in ("F16", "F32") else type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_metadata(writer: Any, config: Any, contents: GgufContents, name: str) -> None:
    import gguf

    architecture = architecture_of(config)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ropes = _ropes(config)
    rope = ropes.get("") or ropes["full_attention"]
    window = getattr(config, "sliding_window", None)
    length = config.max_position_embeddings
    if window and not architecture.period:  # llama.cpp attends to the whole text, which is the same up to the window
        contents.notes += [f"texts of at most {window} tokens: the model attends to such a window, llama.cpp to all"]
        length = min(length, window)
    writer.add_name(name)
    writer.add_context_length(length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if (scaling := rope.get("rope_type")) in SCALINGS:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
        writer.add_rope_scaling_factor(rope["factor"])
        if "original_max_position_embeddings" in rope:
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if window and architecture.period:
        writer.add_sliding_window(window)
        writer.add_rope_freq_base_swa(ropes.get("sliding_attention", rope)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if cap := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(cap)
    if cap := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(cap)
    writer.add_vocab_size(config.vocab_size)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(_file_type(contents))


def _file_type(contents: GgufContents) -> int:
    """Return the number of the type that most weights have."""
    import gguf

    sizes: dict[str, int] = {}
    for tensor in contents.tensors.values():
        if tensor.data.ndim > 1:
            sizes[tensor.type] = sizes.get(tensor.type, 0) + tensor.data.shape[0]
    most = max(sizes, key=lambda type: sizes[type])
    names = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"}
    return int(gguf.LlamaFileType[names.get(most, f"MOSTLY_{most}")])


def reader_config(config: dict[str, Any], contents: GgufContents) -> dict[str, Any]:
    """Return the config.json with which transformers reads a file: it takes less from GGUF's metadata than llama.cpp.

    Args:
        config: The model's own config.json.
        contents: What `gguf_contents` returned.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = ARCHITECTURES[config["model_type"]].read_as or config["model_type"]
    own = {"model_type": kind, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]}
    return config | own | {"tie_word_embeddings": "output.weight" not in contents.tensors}
