"""Prepares texts as a model's inputs: tokens, padded per batch to a multiple of 8 so that few shapes occur."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from eval.data.dataset import PreparedData, TaskData
from eval.modeling.bundle import ModelBundle
from quant.errors import UserError

IGNORED = -100
"""label of a token that is left out of the loss"""


@dataclass(frozen=True)
class PadCollator:
    """Pads token lists to tensors (B, length), or (B, candidates, length) if an item lists its candidates.

    The length is that of the longest item, rounded up to a multiple of `multiple`, but at most `max_length`.
    """

    pad_token_id: int
    max_length: int
    multiple: int = 8

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Batch items; labels are (B,), or (B, length) padded with `IGNORED` if there is one per token."""
        tokens = [key for key, value in items[0].items() if isinstance(value, list) and key != "labels"]
        candidates = isinstance(items[0]["input_ids"][0], list)
        rows = {key: [row for item in items for row in (item[key] if candidates else [item[key]])] for key in tokens}
        longest = max(map(len, rows["input_ids"]))
        length = max(longest, min(-(-longest // self.multiple) * self.multiple, self.max_length))
        batch = {}
        for key in tokens:
            fill = self.pad_token_id if key == "input_ids" else 0
            batch[key] = torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows[key]])
            if candidates:
                batch[key] = batch[key].view(len(items), -1, length)
        for key in items[0].keys() - set(tokens):
            values = [item[key] for item in items]
            if isinstance(values[0], list):  # a label per token
                values = [[*row, *[IGNORED] * (length - len(row))] for row in values]
            batch[key] = torch.tensor(values)
        return batch


class Encoder:
    """Converts the rows of a task to token lists, and counts the texts that were cut to `max_length`."""

    def __init__(self, data: TaskData, tokenizer: Any, max_length: int):
        self.task, self.tokenizer, self.max_length = data.task, tokenizer, max_length
        self.texts = self.truncated = 0

    def tokens(self, *columns: list[str]) -> dict[str, list[list[int]]]:
        """Tokenize one column of texts, or two columns as pairs."""
        encoded = self.tokenizer(*columns, truncation=True, max_length=self.max_length)
        self.texts += len(columns[0])
        self.truncated += sum(bool(text.overflowing) for text in encoded.encodings)
        return dict(encoded)

    def labels(self, values: list[Any]) -> list[Any]:
        """Convert labels to int, or to float for regression."""
        return [float(value) if self.task.regression else int(value) for value in values]

    def classes(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Encode rows of one or two texts with a label."""
        return {**self.tokens(*(rows[name] for name in self.task.inputs)), "labels": self.labels(rows[self.task.label])}

    def choices(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Encode rows as a question paired with each candidate answer; the label is the index of the right one."""
        question, *answers = self.task.inputs
        encoded = [self.tokens(rows[question], rows[answer]) for answer in answers]
        joined = {key: [list(row) for row in zip(*(part[key] for part in encoded), strict=True)] for key in encoded[0]}
        return {**joined, "labels": self.labels(rows[self.task.label])}

    def blocks(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Concatenate all texts and cut them into blocks of `max_length` tokens, whose labels are the tokens."""
        texts = self.tokenizer([text + "\n" for text in rows[self.task.inputs[0]]], add_special_tokens=False)
        stream = [token for text in texts["input_ids"] for token in text]
        blocks = [stream[start : start + self.max_length] for start in range(0, len(stream), self.max_length)]
        blocks = [block for block in blocks if len(block) > 1]  # a single token predicts nothing
        # Nothing predicts the first token. The models ignore its label, but the Trainer would count it as an item.
        labels = [[IGNORED, *block[1:]] for block in blocks]
        return {"input_ids": blocks, "attention_mask": [[1] * len(block) for block in blocks], "labels": labels}

    def encode(self, split: Any) -> Any:
        """Encode a split as a `datasets.Dataset` of tokens and labels."""
        function = self.blocks if self.task.kind == "lm" else self.choices if self.task.candidates else self.classes
        encoded = split.map(
            function,
            batched=True,
            remove_columns=split.column_names,
            keep_in_memory=True,
            new_fingerprint=f"encoded-{id(self):x}",  # else `datasets` pickles the function to hash it
        )
        if not len(encoded):
            raise UserError("no text to learn from: every row is empty")
        return encoded


def text_tokenizer(data: TaskData, bundle: ModelBundle, config: Any) -> tuple[Any, int, int]:
    """Return the model's tokenizer, the longest input in tokens, and the number of tokens that costs are based on."""
    import datasets

    datasets.disable_progress_bars()
    if bundle.tokenizer is None:
        raise ValueError(f"task {data.name} needs a model with a tokenizer")
    length = min(getattr(config, "max_length", None) or 128, bundle.max_length)
    return bundle.tokenizer, length, min(getattr(config, "cost_seq_len", None) or length, bundle.max_length)


def example_tokens(tokenizer: Any, shape: tuple[int, ...], columns: Iterable[str]) -> dict[str, Tensor]:
    """Build an example input of a shape.

    It ends with the end token, because some classifiers read their output at its position.

    Args:
        tokenizer: the model's tokenizer.
        shape: (B, length) or (B, candidates, length).
        columns: the columns of the encoded rows; decides whether the model gets token_type_ids.

    Returns:
        Input name -> int64 tensor of that shape.
    """
    tokens = torch.full(shape, tokenizer.pad_token_id + 1)
    end = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    if end is not None:
        tokens[..., -1] = end
    example = {"input_ids": tokens, "attention_mask": torch.ones(shape, dtype=torch.long)}
    if "token_type_ids" in columns:
        example["token_type_ids"] = torch.zeros(shape, dtype=torch.long)
    return example


def encoded_texts(tokenizer: Any, texts: list[str], length: int, target: bool = False) -> tuple[dict[str, Any], int]:
    """Tokenize texts, cut to `length` tokens.

    Args:
        tokenizer: the model's tokenizer.
        texts: the texts.
        length: most tokens of a text.
        target: tokenize as outputs of the model instead of inputs.

    Returns:
        The tokenizer's output, and the number of texts that were cut.
    """
    encoded = tokenizer(text_target=texts, truncation=True, max_length=length) if target else tokenizer(
        texts, truncation=True, max_length=length
    )  # fmt: skip
    return dict(encoded), sum(bool(text.overflowing) for text in encoded.encodings)


def prepare_text(data: TaskData, bundle: ModelBundle, config: Any) -> PreparedData:
    """Tokenize texts, cut to `config.max_length` tokens and to the positions that the model has."""
    tokenizer, length, charged = text_tokenizer(data, bundle, config)
    encoder = Encoder(data, tokenizer, length)
    train = encoder.encode(data.train)
    validation = {name: encoder.encode(split) for name, split in data.validation.items()}
    notes = []
    if encoder.truncated:
        notes.append(f"{encoder.truncated} of {encoder.texts} texts were cut to {length} tokens")
    collator = PadCollator(tokenizer.pad_token_id, length)
    shape = (1, data.task.candidates, charged) if data.task.candidates else (1, charged)
    example = example_tokens(tokenizer, shape, train.column_names)
    scores = token_scores if data.kind == "lm" else None
    return PreparedData(train, validation, collator, example, notes=notes, preprocess_logits=scores)


def token_scores(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Reduce a language model's logits to two scores per token, for the Trainer's evaluation.

    Args:
        logits: (B, length, vocabulary), or a tuple that starts with them.
        labels: (B, length).

    Returns:
        float32 (B, length - 1, 2): the negative log-likelihood in nats of each next token, -1 for padding; and 1 if it
        was the most likely token, else 0.
    """
    scores = (logits[0] if isinstance(logits, tuple) else logits)[:, :-1].float()
    targets = labels[:, 1:]
    losses = functional.cross_entropy(scores.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    hits = (scores.argmax(-1) == targets).float()
    return torch.stack([losses.masked_fill(targets == IGNORED, -1.0), hits], dim=-1)
