"""Summarization: trains on reference summaries, and evaluates the summaries that the model generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eval.data.dataset import PreparedData, TaskData
from eval.data.metrics import rouge
from eval.data.text import PadCollator, encoded_texts, example_tokens, text_tokenizer
from eval.modeling.bundle import ModelBundle
from quant.module_utils import evaluating


@dataclass(frozen=True)
class SummaryCollator:
    """Pads inputs and summaries separately, each to its own length."""

    inputs: PadCollator
    targets: PadCollator

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Batch items with token lists: inputs (B, length) and labels (B, target length)."""
        sources = [{key: value for key, value in item.items() if key != "labels"} for item in items]
        targets = [{"input_ids": item["labels"], "labels": item["labels"]} for item in items]
        return {**self.inputs(sources), "labels": self.targets(targets)["labels"]}


@dataclass(frozen=True)
class Writer:
    """Generates a summary of every text of a split, and compares the summaries with the references."""

    tokenizer: Any
    references: dict[str, Sequence[str]]
    max_length: int
    num_beams: int | None
    """None: as in the model's own generation config"""

    @torch.no_grad()
    def __call__(self, name: str, model: nn.Module, batches: Any) -> dict[str, float]:
        """Compute ROUGE of a split; the model runs in eval mode.

        Args:
            name: the split.
            model: the model.
            batches: the batches of the split, in order.
        """
        texts: list[str] = []
        with evaluating(model):
            for batch in batches:
                texts += self.write(model, batch)
        return rouge(texts, self.references[name])

    def write(self, model: Any, batch: dict[str, Tensor]) -> list[str]:
        """Generate a summary of each input of a batch."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        beams = {} if self.num_beams is None else {"num_beams": self.num_beams}
        # The model's own length limits belong to its published task; the user's `max_length` replaces them.
        limits = {"max_new_tokens": self.max_length, "max_length": None, "min_length": 0}
        written = model.generate(**inputs, **limits, **beams, use_cache=True, do_sample=False)
        return self.tokenizer.batch_decode(written, skip_special_tokens=True)


def prepare_summaries(data: TaskData, bundle: ModelBundle, config: Any) -> PreparedData:
    """Tokenize texts, cut to `config.max_length` tokens, and summaries, cut to `config.max_target_length`."""
    tokenizer, length, charged = text_tokenizer(data, bundle, config)
    longest = min(getattr(config, "max_target_length", None) or 128, bundle.max_length)
    (source,), label = data.task.inputs, data.task.label
    cut = 0

    def encode(split: Any) -> Any:
        nonlocal cut
        inputs, over = encoded_texts(tokenizer, split[source][:], length)
        targets, _ = encoded_texts(tokenizer, split[label][:], longest, target=True)
        cut += over
        from datasets import Dataset

        inputs.pop("token_type_ids", None)
        return Dataset.from_dict({**inputs, "labels": targets["input_ids"]})

    train = encode(data.train)
    validation = {name: encode(split) for name, split in data.validation.items()}
    example = example_tokens(tokenizer, (1, charged), train.column_names)
    example["decoder_input_ids"] = torch.full((1, longest), tokenizer.pad_token_id + 1)
    writer = Writer(
        tokenizer,
        {name: split[label][:] for name, split in data.validation.items()},
        longest,
        getattr(config, "num_beams", None),
    )
    return PreparedData(
        train,
        validation,
        SummaryCollator(PadCollator(tokenizer.pad_token_id, length), PadCollator(tokenizer.pad_token_id, longest)),
        example,
        writer=writer,
        notes=[f"{cut} texts were cut to {length} tokens"] if cut else [],
    )
