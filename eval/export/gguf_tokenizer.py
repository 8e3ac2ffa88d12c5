"""The tokenizer of a GGUF file: vocabulary, merges, special tokens, and how llama.cpp splits text before the merges."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from quant.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GPT2_SPLIT = "ByteLevel"
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
SPACE = "\u2581"
IGNORES_MERGES = ("llama-bpe", "tekken")
"""Pre-tokenizers with which llama.cpp takes words that are tokens before it merges."""
KEEPS_MERGES = {"llama-bpe": "smaug-bpe"}
"""The same split of text for a tokenizer that always merges."""


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Add a tokenizer to a file.

    Args:
        writer: A writer of the package gguf.
        tokenizer: A fast tokenizer of transformers.
        config: The model's configuration, for the size of the vocabulary.

    Raises:
        UserError: llama.cpp has no tokenizer of this kind.
    """
    described = described_tokenizer(tokenizer)
    model = described["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    tokens, kinds = _vocabulary(tokenizer, described, config.vocab_size)
    if model.get("byte_fallback"):
        _check_sentencepiece(described)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_adds_space(described))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(described))
        writer.add_token_list(tokens)
        writer.add_token_merges(merges)
    writer.add_token_types(kinds)
    _add_special(writer, tokenizer)


def described_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Return the content of a tokenizer's tokenizer.json.

    Raises:
        UserError: llama.cpp has no tokenizer of this kind.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        _refuse(f"{type(tokenizer).__name__}, which has no tokenizer.json")
    described: dict[str, Any] = json.loads(backend.to_str())
    if (kind := described["model"]["type"]) != "BPE":
        _refuse(kind)
    return described


def _refuse(kind: str) -> Any:
    raise UserError(f"--format gguf: llama.cpp has no tokenizer like this run's: {kind}; choose packed or onnx")


def _vocabulary(
    tokenizer: PreTrainedTokenizerBase, described: dict[str, Any], size: int
) -> tuple[list[str], list[int]]:
    """Return the tokens in the order of their numbers, and their types; unused rows of the embeddings are padded."""
    import gguf

    vocabulary = tokenizer.get_vocab()
    by_number = {number: token for token, number in vocabulary.items()}
    if by_number and max(by_number) >= size:
        raise UserError(
            f"--format gguf: the tokenizer has the token {max(by_number)}, the model a vocabulary of {size}"
        )
    added = {token["id"]: token["special"] for token in described["added_tokens"]}
    unknown, types = described["model"].get("unk_token"), gguf.TokenType
    tokens, kinds = [], []
    for number in range(size):
        token = by_number.get(number)
        if token is None:
            kind = types.UNUSED
        elif described["model"].get("byte_fallback") and token == unknown:
            kind = types.UNKNOWN
        elif number in added:
            kind = types.CONTROL if added[number] else types.USER_DEFINED
        elif described["model"].get("byte_fallback") and BYTE.fullmatch(token):
            kind = types.BYTE
        else:
            kind = types.NORMAL
        tokens.append(f"[PAD{number}]" if token is None else token)
        kinds.append(int(kind))
    return tokens, kinds


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return scores by which llama.cpp merges pieces in the order of the merges: it takes the best piece first."""
    rank: dict[str, int] = {}
    for place, pair in enumerate(merges):
        rank.setdefault("".join(pair.split(" ")), place)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _steps(part: dict[str, Any] | None, plural: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or a pre-tokenizer, which may be a sequence."""
    if part is None:
        return []
    return list(part[plural]) if part["type"] == "Sequence" else [part]


def pre_tokenizer(described: dict[str, Any]) -> str:
    """Return llama.cpp's name for the way in which a byte-level BPE splits text.

    Args:
        described: The content of tokenizer.json.

    Raises:
        UserError: llama.cpp has no such way.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    normalizers = [step["type"] for step in _steps(described["normalizer"], "normalizers")]
    if set(normalizers) - {"NFC"}:
        _refuse(f"BPE behind the normalizer {normalizers[0]}")
    steps = _steps(described["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    if not steps or kinds[-1] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        _refuse(f"BPE behind the pre-tokenizer {kinds[-1] if steps else None}")
    own_split = steps[-1]["use_regex"]
    if kinds == ["ByteLevel"] and own_split:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and own_split:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not own_split and "Regex" in steps[0]["pattern"]:
        split = steps[0]["pattern"]["Regex"]
        names = [name for name, regex in GGUF_PRE_TOKENIZER_SPLITS.items() if regex == split]
        preferred = sorted(names, key=lambda name: name not in (*IGNORES_MERGES, "qwen2", "qwen35", "gpt-4o"))
        if preferred:
            merges_all = not described["model"].get("ignore_merges")
            return KEEPS_MERGES.get(preferred[0], preferred[0]) if merges_all else preferred[0]
    return str(_refuse(f"BPE that splits text by {', '.join(kinds)}"))


def _check_sentencepiece(described: dict[str, Any]) -> None:
    """Check that text is prepared as SentencePiece does: spaces become a visible character, nothing else changes."""
    steps = _steps(described["normalizer"], "normalizers") + _steps(described["pre_tokenizer"], "pretokenizers")
    for step in steps:
        spaces = step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE
        prefix = step["type"] == "Prepend" and step["prepend"] == SPACE
        marks = step["type"] == "Metaspace" and step["replacement"] == SPACE and not step.get("split", True)
        # a split at spaces that keeps them with the word behind changes nothing where no piece spans words
        whole = step["type"] == "Split" and step["pattern"] == {"String": " "}
        if not (spaces or prefix or marks or whole):
            _refuse(f"SentencePiece with the step {step['type']}")


def _adds_space(described: dict[str, Any]) -> bool:
    """Whether a space is put in front of a text."""
    steps = _steps(described["normalizer"], "normalizers") + _steps(described["pre_tokenizer"], "pretokenizers")
    schemes = [step.get("prepend_scheme") for step in steps if step["type"] == "Metaspace"]
    return any(step["type"] == "Prepend" for step in steps) or any(scheme in ("first", "always") for scheme in schemes)


def _add_special(writer: Any, tokenizer: Any) -> None:
    """Add the numbers of special tokens, whether texts begin and end with them, and the template of chats."""
    handlers = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    numbers = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in handlers}
    for kind, number in numbers.items():
        if number is not None:
            handlers[kind](number)
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    writer.add_add_bos_token(whole[: len(whole) - len(bare)][:1] == [numbers["bos"]] and whole != bare)
    writer.add_add_eos_token(whole[-1:] == [numbers["eos"]] and whole[-len(bare) :] != bare)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
