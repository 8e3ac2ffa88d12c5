"""Extractive question answering: finds the span of a context that answers a question.

A context longer than the model's input is split into overlapping pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.data.dataset import PreparedData, TaskData
from eval.data.metrics import exact_match, token_f1
from eval.data.text import PadCollator, example_tokens, text_tokenizer
from eval.modeling.bundle import ModelBundle

if TYPE_CHECKING:
    from transformers import EvalPrediction

LONGEST_ANSWER = 30
"""most tokens of an answer, as in the published evaluations of SQuAD"""
OVERLAP = 0.35
"""share of a piece that overlaps with the next one; close to the published 128 of 384 tokens"""


@dataclass(frozen=True)
class Pieces:
    """Where the pieces of a split come from; each list has one entry per piece."""

    row: list[int]
    """row of the question"""
    offsets: list[np.ndarray]
    """(tokens, 2): first and last character in the context; (-1, -1) for tokens outside of the context"""


@dataclass(frozen=True)
class SpanMetrics:
    """Computes exact match and F1 of the best span of each question, as SQuAD's official script does."""

    contexts: Sequence[str]
    answers: Sequence[list[str]]
    """accepted answers of each question; an empty list for an unanswerable one (SQuAD 2.0)"""
    pieces: Pieces

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Compute the metrics of (start, end) logits, each (pieces, tokens); NaN if a logit is not finite."""
        starts, ends = (np.asarray(logits) for logits in prediction.predictions[:2])
        if not (np.isfinite(starts).all() and np.isfinite(ends).all()):
            return {"f1": float("nan"), "exact_match": float("nan")}
        texts = self.texts(starts, ends)
        pairs = [(text, truths or [""]) for text, truths in zip(texts, self.answers, strict=True)]
        return {
            "f1": float(np.mean([max(token_f1(text, truth) for truth in truths) for text, truths in pairs])),
            "exact_match": float(
                np.mean([max(exact_match(text, truth) for truth in truths) for text, truths in pairs])
            ),
        }

    def texts(self, starts: np.ndarray, ends: np.ndarray) -> list[str]:
        """Return the best answer of each question as text.

        If the split has unanswerable questions, the answer is '' where the first token's score (start + end), which
        stands for "no answer", exceeds that of the best span.

        Args:
            starts: logits (pieces, tokens) of the first token.
            ends: logits (pieces, tokens) of the last token.
        """
        best = [(-np.inf, "")] * len(self.contexts)
        nothing = np.full(len(self.contexts), np.inf)
        for piece, (row, offsets) in enumerate(zip(self.pieces.row, self.pieces.offsets, strict=True)):
            start, end = starts[piece, : len(offsets)], ends[piece, : len(offsets)]
            nothing[row] = min(nothing[row], float(start[0] + end[0]))
            score, first, last = best_span(start, end, offsets[:, 0] >= 0)
            if score > best[row][0]:
                best[row] = score, self.contexts[row][offsets[first, 0] : offsets[last, 1]]
        answerable = all(self.answers)
        return [text if answerable or score > none else "" for (score, text), none in zip(best, nothing, strict=True)]


def best_span(start: np.ndarray, end: np.ndarray, allowed: np.ndarray) -> tuple[float, int, int]:
    """Find the span of at most `LONGEST_ANSWER` tokens with the largest sum of start and end logits.

    Args:
        start: logits (tokens,) of the first token.
        end: logits (tokens,) of the last token.
        allowed: bool (tokens,), which tokens a span may consist of.

    Returns:
        (score, first token, last token); the score is -inf if no token is allowed.
    """
    scores = start[:, None].astype(np.float64) + end[None, :]
    length = np.arange(len(end))[None, :] - np.arange(len(start))[:, None]
    fits = (length >= 0) & (length < LONGEST_ANSWER) & allowed[:, None] & allowed[None, :]
    scores[~fits] = -np.inf
    first, last = np.unravel_index(int(scores.argmax()), scores.shape)
    return float(scores[first, last]), int(first), int(last)


def prepare_questions(data: TaskData, bundle: ModelBundle, config: Any) -> PreparedData:
    """Split questions and contexts into pieces of at most `config.max_length` tokens.

    The labels of a piece are the first and last token of its answer; both are 0 if the piece does not hold the answer.
    """
    tokenizer, length, charged = text_tokenizer(data, bundle, config)
    train, _ = encode(data, data.train, tokenizer, length)
    validation, split_metrics = {}, {}
    for name, split in data.validation.items():
        validation[name], pieces = encode(data, split, tokenizer, length)
        split_metrics[name] = SpanMetrics(
            split[data.task.inputs[1]][:], [answers["text"] for answers in split[data.task.label]], pieces
        )
    notes = [f"{len(data.train)} training questions make {len(train)} pieces of at most {length} tokens"]
    return PreparedData(
        train,
        validation,
        PadCollator(tokenizer.pad_token_id, length),
        example_tokens(tokenizer, (1, charged), train.column_names),
        split_metrics=split_metrics,
        notes=notes if len(train) > len(data.train) else [],
    )


def encode(data: TaskData, split: Any, tokenizer: Any, length: int) -> tuple[Any, Pieces]:
    """Tokenize a split into pieces, and find the answer in each.

    Args:
        data: the task's data, for the names of its columns.
        split: the rows to encode.
        tokenizer: the model's tokenizer.
        length: most tokens of a piece.

    Returns:
        A `datasets.Dataset` with one row per piece, and where the pieces come from.
    """
    from datasets import Dataset

    question, context = data.task.inputs
    encoded = tokenizer(
        [text.strip() for text in split[question]],
        split[context][:],
        truncation="only_second",
        max_length=length,
        stride=int(length * OVERLAP),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    rows = encoded.pop("overflow_to_sample_mapping")
    pieces = Pieces(rows, [])
    answers = split[data.task.label][:]
    spans = []
    for piece, offsets in enumerate(encoded.pop("offset_mapping")):
        inside = np.array([side == 1 for side in encoded.sequence_ids(piece)])
        pieces.offsets.append(np.where(inside[:, None], np.asarray(offsets), -1))
        spans.append(span_of(answers[rows[piece]], pieces.offsets[-1]))
    columns = {name: encoded[name] for name in encoded}
    starts, ends = zip(*spans, strict=True)
    return Dataset.from_dict({**columns, "start_positions": list(starts), "end_positions": list(ends)}), pieces


def span_of(answers: dict[str, list[Any]], offsets: np.ndarray) -> tuple[int, int]:
    """Find the first accepted answer in a piece.

    Args:
        answers: SQuAD's {text: [...], answer_start: [...]}.
        offsets: (tokens, 2), see `Pieces`.

    Returns:
        Its first and last token; (0, 0) if the piece does not hold all of it.
    """
    if not answers["text"]:
        return 0, 0
    low = answers["answer_start"][0]
    high = low + len(answers["text"][0])
    own = np.flatnonzero((offsets[:, 0] >= 0) & (offsets[:, 0] < high) & (offsets[:, 1] > low))
    whole = len(own) and offsets[own[0], 0] <= low and offsets[own[-1], 1] >= high
    return (int(own[0]), int(own[-1])) if whole else (0, 0)
