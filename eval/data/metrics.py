"""What a task reports, in GLUE's own metrics: functions of numpy predictions and labels. Nothing needs the network."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    return float((predictions == labels).mean())


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1, as GLUE has it for paraphrases."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, zero_division=0.0))


def matthews_correlation(predictions: np.ndarray, labels: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """0 where either side is constant: there is nothing to correlate, and NaN would pass every comparison."""
    from scipy.stats import pearsonr

    return float(pearsonr(predictions, labels).statistic) if np.ptp(predictions) and np.ptp(labels) else 0.0


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """0 where either side is constant."""
    from scipy.stats import spearmanr

    return float(spearmanr(predictions, labels).statistic) if np.ptp(predictions) and np.ptp(labels) else 0.0


def words_of(answer: str) -> list[str]:
    """SQuAD's normalisation: lower case, no punctuation, no articles."""
    kept = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def exact_match(answer: str, truth: str) -> float:
    """1 where both are the same words, see `words_of`."""
    return float(words_of(answer) == words_of(truth))


def token_f1(answer: str, truth: str) -> float:
    """SQuAD's F1 of the words, counted as often as both have them; without any words, whether both have none."""
    said, right = words_of(answer), words_of(truth)
    common = (Counter(said) & Counter(right)).total()
    return 2 * common / (len(said) + len(right)) if said and right else float(said == right)


def rouge(summaries: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, with stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = RougeScorer(names, use_stemmer=True)
    scores = [scorer.score(truth, said) for truth, said in zip(references, summaries, strict=True)]
    return {name: float(np.mean([score[name].fmeasure for score in scores])) for name in names}


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    function.__name__: function for function in (accuracy, f1, matthews_correlation, pearson, spearman)
}


def score(names: Sequence[str], logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Each named metric of logits (N, classes) or regression values (N, 1) against labels (N,).

    NaN where a logit is not finite: the argmax of NaN is a class like any other and would hide a diverged model.
    """
    if not np.isfinite(logits).all():
        return dict.fromkeys(names, float("nan"))
    predictions = logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1)
    return {name: METRICS[name](predictions, labels) for name in names}


def perplexity(scores: np.ndarray) -> dict[str, float]:
    """Of `task_text.token_scores` (N, length, 2): exp of the mean over all tokens, whatever batches they came in."""
    losses, hits = scores[..., 0].astype(np.float64), scores[..., 1]
    counted = losses >= 0  # padding is marked with -1 by the Trainer's concatenation and -100
    return {"perplexity": float(np.exp(losses[counted].mean())), "accuracy": float(hits[counted].mean())}
