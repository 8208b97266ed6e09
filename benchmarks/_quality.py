"""What a table of detectors says: quality over training seeds, with intervals, and what was chosen.

A training seed redraws which rows are repeated, seen once and held out, and trains anew. Some
seeds choose (noise level, radius, threshold), others score. An interval is the wider, on either
side, of two: Student's t over the scoring seeds, whose spread holds seed and rows, and one for the
rows alone, all seeds' rows together, which stays sound where the seeds happen to agree. The rows'
interval is Newcombe's for an AUROC and Clopper and Pearson's for a rate or an average precision
(a mean over positives of numbers in [0, 1], which vary most if they are 0 or 1).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from memjax.evaluate.intervals import proportion_interval
from memjax.evaluate.roc import auroc, average_precision, tpr_at_fpr

FPR = 0.01
CONFIDENCE = 0.95
Z = 1.959964


class Question(NamedTuple):
    """Rows that should score higher, and those they are told apart from, as masks."""

    positive: np.ndarray
    negative: np.ndarray


class Quality(NamedTuple):
    """Answers to one question on one seed's rows.

    Attributes:
        auroc: area under the curve.
        average_precision: with the share of positives at hand.
        tpr: true-positive rate at 1 % false positives, NaN with fewer than 100 negatives.
        positives: rows that ranked.
        negatives: likewise.
        excluded: rows without a value.
    """

    auroc: float
    average_precision: float
    tpr: float
    positives: int
    negatives: int
    excluded: int


METRICS = ("auroc", "average_precision", "tpr")


def quality(values: np.ndarray, question: Question) -> Quality:
    """How well values answer a question."""
    rows = question.positive | question.negative
    scores, labels = np.asarray(values, np.float64)[rows], question.positive[rows]
    area = auroc(scores, labels)
    precision = average_precision(scores, labels, num_resamples=2).value
    rate = tpr_at_fpr(scores, labels, fpr=FPR).value
    counts = area.num_positive, area.num_negative, area.excluded
    return Quality(area.value, precision, rate, *counts)


def pooled(metric: str, found: Sequence[Quality]) -> tuple[float, float, float]:
    """Mean over seeds and its interval, as the module says; NaN where a seed has none."""
    values = np.array([getattr(q, metric) for q in found])
    mean = float(values.mean())
    if not np.isfinite(mean):
        return math.nan, math.nan, math.nan
    m, n = sum(q.positives for q in found), sum(q.negatives for q in found)
    if metric == "auroc":
        low, high = newcombe(mean, m, n), 1 - newcombe(1 - mean, m, n)
    else:
        low, high = proportion_interval(mean * m, m, confidence=CONFIDENCE)
    if len(values) > 1:
        from scipy.special import stdtrit

        half = stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2) * values.std(ddof=1)
        half /= math.sqrt(len(values))
        low, high = min(low, mean - half), max(high, mean + half)
    return mean, max(0.0, float(low)), min(1.0, float(high))


def newcombe(value: float, m: int, n: int) -> float:
    """Lower limit of an AUROC by Newcombe's (2006) method 5, also where it is 1.

    The smallest A with value - A <= z sqrt(V(A)), V being Hanley and McNeil's variance with both
    group sizes replaced by their mean in the terms that weigh them.
    """
    weight = (m + n) / 2 - 1

    def beyond(a: float) -> bool:
        shape = 1 + weight * ((1 - a) / (2 - a) + a / (1 + a))
        return value - a > Z * math.sqrt(a * (1 - a) * shape / (m * n))

    low, high = 0.0, value
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if beyond(middle) else (low, middle)
    return low


def merit(found: Sequence[Quality]) -> float:
    """What choices maximize: means over seeds of the AUROC and, where resolved, the rate at 1 %."""
    if not found:
        return -math.inf
    rates = [q.tpr for q in found if np.isfinite(q.tpr)]
    area = float(np.mean([q.auroc for q in found]))
    total = area + (float(np.mean(rates)) if rates else 0.0)
    return total if np.isfinite(total) else -math.inf


def transferred(
    tuning: Sequence[np.ndarray],
    tuning_questions: Sequence[Question],
    scoring: Sequence[np.ndarray],
    scoring_questions: Sequence[Question],
) -> dict[str, float]:
    """What a threshold set on other models does.

    The threshold lets 1 % of the tuning seeds' negatives pass, all seeds together.

    Returns:
        Share of the scoring seeds' negatives and positives above it, means over seeds.
    """
    negatives = np.concatenate(
        [v[q.negative] for v, q in zip(tuning, tuning_questions, strict=True)]
    )
    falling = -np.sort(-negatives[np.isfinite(negatives)])
    if not len(falling):
        return {"fpr": math.nan, "tpr": math.nan}
    threshold = falling[math.floor(FPR * len(falling))]
    shares = [
        (above(v[q.negative], threshold), above(v[q.positive], threshold))
        for v, q in zip(scoring, scoring_questions, strict=True)
    ]
    fpr, tpr = np.mean(shares, axis=0)
    return {"fpr": short(fpr), "tpr": short(tpr)}  # type: ignore[dict-item]


def above(values: np.ndarray, threshold: float) -> float:
    """Share of the values that lie above; those without a value do not."""
    return float(np.mean(np.nan_to_num(values, nan=-np.inf) > threshold))


def short(x: float) -> float | None:
    """Four digits after the point; None for what is not a number."""
    return round(float(x), 4) if np.isfinite(x) else None


def record(seeds: Sequence[Quality]) -> dict[str, Any]:
    """Each metric's mean, low, high, and values by seed; rows counted over all seeds."""
    out: dict[str, Any] = {}
    for metric in METRICS:
        value, low, high = map(short, pooled(metric, seeds))
        out[metric] = {"value": value, "low": low, "high": high}
        if metric != "average_precision":
            out[metric]["seeds"] = [short(getattr(q, metric)) for q in seeds]
    return out | {k: sum(getattr(q, k) for q in seeds) for k in Quality._fields[3:]}
