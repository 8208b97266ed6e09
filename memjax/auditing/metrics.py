"""What scores, flags and samples are worth against known truth, with intervals."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from memjax.auditing.findings import Copies, Flags
from memjax.auditing.plan import PlannedDetector
from memjax.evaluate.intervals import proportion_interval
from memjax.evaluate.roc import auroc, average_precision, tpr_at_fpr

FALSE_POSITIVE_RATES = (0.01, 0.05)
CONFIDENCE = 0.95
"""Coverage aimed at by every interval."""


class Truth(NamedTuple):
    """What is known about the audited rows.

    Attributes:
        multiplicity: how often each row stands in the training set, 0 for unseen rows.
        extracted: rows that samples reproduce, by an earlier count.
        split: ``"train"`` or ``"heldout"`` per row.
    """

    multiplicity: Int[np.ndarray, "n"]
    extracted: Bool[np.ndarray, "n"]
    split: tuple[str, ...]


class Contrast(NamedTuple):
    """Two groups of rows that a detector should tell apart.

    Attributes:
        positives: name of the rows that should score higher.
        negatives: name of the others.
        positive: mask of the former.
        negative: mask of the latter.
    """

    positives: str
    negatives: str
    positive: Bool[np.ndarray, "n"]
    negative: Bool[np.ndarray, "n"]


def contrasts(multiplicity: Int[np.ndarray, "n"]) -> list[Contrast]:
    """The questions that known multiplicities let one ask.

    Args:
        multiplicity: how often each row stands in the training set, 0 for unseen rows.

    Returns:
        Rows repeated at least 4 times against rows seen once; rows seen once against unseen rows;
        and rows of each multiplicity against rows seen once. Contrasts with an empty side are
        left out.
    """
    once = multiplicity == 1
    repeated = sorted(set(multiplicity[multiplicity > 1].tolist()))
    found = [Contrast("repeated 4 times or more", "seen once", multiplicity >= 4, once)]
    found += [
        Contrast(f"repeated {m} times", "seen once", multiplicity == m, once) for m in repeated
    ]
    found.append(Contrast("seen once", "never seen", once, multiplicity == 0))
    return [c for c in found if c.positive.any() and c.negative.any()]


def score_metrics(
    planned: Sequence[PlannedDetector],
    value: Float[np.ndarray, "n k"],
    truth: Truth,
) -> list[dict[str, Any]]:
    """Ranking quality of every detector on every contrast.

    Args:
        planned: the detectors.
        value: their values on the data rows.
        truth: what is known.

    Returns:
        One record per contrast and detector: AUROC, average precision and TPR at fixed FPR, each
        with its 95 % interval, and the rows left out because they have no score.
    """
    records = []
    for contrast in contrasts(truth.multiplicity):
        rows = contrast.positive | contrast.negative
        labels = contrast.positive[rows]
        for k, entry in enumerate(planned):
            scores = value[rows, k]
            area = auroc(scores, labels, confidence=CONFIDENCE)
            precision = average_precision(scores, labels, confidence=CONFIDENCE)
            rates = [
                tpr_at_fpr(scores, labels, fpr=fpr, confidence=CONFIDENCE)
                for fpr in FALSE_POSITIVE_RATES
            ]
            records.append(
                {
                    "detector": entry.label,
                    "positives": contrast.positives,
                    "negatives": contrast.negatives,
                    "n_positive": area.num_positive,
                    "n_negative": area.num_negative,
                    "excluded": area.excluded,
                    "auroc": {"value": area.value, "low": area.low, "high": area.high},
                    "average_precision": {
                        "value": precision.value,
                        "low": precision.low,
                        "high": precision.high,
                    },
                    "tpr_at_fpr": [
                        {
                            "fpr": rate.fpr,
                            "resolvable": rate.resolvable,
                            "value": rate.value,
                            "low": rate.low,
                            "high": rate.high,
                        }
                        for rate in rates
                    ],
                }
            )
    return records


def flag_metrics(
    flags: Sequence[Flags], fdr: float, truth: Truth | None, num_data: int
) -> list[dict[str, Any]]:
    """How many rows each calibration flagged and, where the truth is known, how many rightly.

    Args:
        flags: one per calibration and detector.
        fdr: the false-discovery rate asked for.
        truth: what is known of the data rows.
        num_data: how many rows of the table are data.

    Returns:
        One record per calibration and detector. A membership flag is right on a row of the
        training set, a duplication flag on one that stands there more than once.
    """
    records = []
    for flag in flags:
        flagged = flag.flagged[:num_data]
        right = None
        if truth is not None:
            threshold = 0 if flag.meaning == "membership" else 1
            right = int(np.sum(flagged & (truth.multiplicity > threshold)))
        count = int(np.sum(flagged))
        records.append(
            {
                "meaning": flag.meaning,
                "detector": flag.label,
                "fdr": fdr,
                "tested": int(np.sum(np.isfinite(flag.p_value))),
                "flagged": count,
                "true": right,
                "false": None if right is None else count - right,
                "resolvable": flag.resolvable,
            }
        )
    return records


def stored_metrics(
    copies: Copies | None, sha256: Sequence[str], truth: Truth | None
) -> dict[str, Any] | None:
    """How many images the samples reproduce.

    Args:
        copies: what was found; ``None`` if no samples were drawn.
        sha256: content hashes of the data rows, so that equal images count once.
        truth: what is known of the data rows.

    Returns:
        Counts of rows, distinct images and copying samples (with a 95 % interval of their
        share), and hit rows by multiplicity where that is known; ``None`` without samples.
    """
    if copies is None:
        return None
    stored = copies.hits > 0
    drawn = len(copies.samples)
    low, high = (
        proportion_interval(copies.copying, drawn, confidence=CONFIDENCE) if drawn else (0.0, 1.0)
    )
    record: dict[str, Any] = {
        "rows": int(stored.sum()),
        "images": len({digest for digest, hit in zip(sha256, stored, strict=True) if hit}),
        "tested": int(copies.tested.sum()),
        "samples": drawn,
        "copying_samples": copies.copying,
        "copying_share": {
            "value": copies.copying / drawn if drawn else None,
            "low": low,
            "high": high,
        },
    }
    if truth is not None:
        record["by_multiplicity"] = {
            str(m): [
                int(np.sum(stored & copies.tested & (truth.multiplicity == m))),
                int(np.sum(copies.tested & (truth.multiplicity == m))),
            ]
            for m in sorted(set(truth.multiplicity[copies.tested].tolist()))
        }
    return record
