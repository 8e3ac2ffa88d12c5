"""The metrics of GLUE, SQuAD and ROUGE as functions of numpy arrays or texts; none needs the network."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Share of predictions (N,) that equal the labels (N,)."""
    return float((predictions == labels).mean())


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1, as GLUE defines it for MRPC and QQP; 0 if it is undefined."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))


def matthews_correlation(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation coefficient, GLUE's metric of CoLA."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation; 0 instead of NaN if either side is constant."""
    from scipy.stats import pearsonr

    return float(pearsonr(predictions, labels).statistic) if np.ptp(predictions) and np.ptp(labels) else 0.0


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Spearman rank correlation; 0 instead of NaN if either side is constant."""
    from scipy.stats import spearmanr

    return float(spearmanr(predictions, labels).statistic) if np.ptp(predictions) and np.ptp(labels) else 0.0


def words_of(answer: str) -> list[str]:
    """Split an answer into words after SQuAD's normalisation: lower case, no punctuation, no articles."""
    kept = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def exact_match(answer: str, truth: str) -> float:
    """1 if both answers have the same words (see `words_of`), else 0."""
    return float(words_of(answer) == words_of(truth))


def token_f1(answer: str, truth: str) -> float:
    """SQuAD's F1 over the multisets of words; if either answer has no words, 1 if both have none, else 0."""
    said, right = words_of(answer), words_of(truth)
    common = (Counter(said) & Counter(right)).total()
    return 2 * common / (len(said) + len(right)) if said and right else float(said == right)


def rouge(summaries: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Compute the mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, with stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(truth, said) for truth, said in zip(references, summaries, strict=True)]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in names}


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    function.__name__: function for function in (accuracy, f1, matthews_correlation, pearson, spearman)
}


def score(names: Sequence[str], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute metrics of logits.

    Args:
        names: names of `METRICS`.
        logits: (N, classes), or (N, 1) for regression.
        labels: (N,).

    Returns:
        Metric name -> value; all NaN if any logit is not finite, because argmax would hide that the model diverged.
    """
    if not np.isfinite(logits).all():
        return dict.fromkeys(names, float("nan"))
    predictions = logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1)
    return {name: METRICS[name](predictions, labels) for name in names}


def perplexity(scores: np.ndarray) -> dict[str, float]:
    """Compute perplexity and next-token accuracy, averaged over all tokens rather than over batches.

    Args:
        scores: (N, length, 2), see `eval.data.text.token_scores`.
    """
    losses, hits = scores[..., 0].astype(np.float64), scores[..., 1]
    counted = losses >= 0  # padding is -1 from `token_scores`, and -100 where the Trainer concatenates batches
    return {"perplexity": float(np.exp(losses[counted].mean())), "accuracy": float(hits[counted].mean())}
