"""Conformal p-values and false-discovery control: flags with a stated error rate."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from memjax._core.errors import InputError


class FlagResult(NamedTuple):
    """Flags of n rows.

    Attributes:
        p_value: conformal p-value per row; NaN where the score is.
        flagged: True where the row is rejected at the false-discovery rate.
        smallest_p: 1 / (calibration rows + 1): no p-value can be smaller.
        resolvable: whether any row could be flagged at all, that is, whether ``smallest_p`` for
            all rows at once would pass. If False, the calibration set is too small.
        excluded: rows and calibration rows left out because their score is NaN.
    """

    p_value: Float[np.ndarray, "n"]
    flagged: Bool[np.ndarray, "n"]
    smallest_p: float
    resolvable: bool
    excluded: tuple[int, int]


def conformal_p_values(
    scores: Float[np.ndarray, "n"], calibration: Float[np.ndarray, "c"]
) -> Float[np.ndarray, "n"]:
    """How unusual each score is among calibration scores; larger scores are more suspicious.

    p_i = (1 + #{j : calibration_j >= score_i}) / (c + 1)

    If row i is exchangeable with the calibration rows, P(p_i <= a) <= a for every a. Ties count
    against the row, so p is never too small.

    Args:
        scores: one per row; NaN gives NaN.
        calibration: scores of unremarkable rows, none of them NaN, at least one.

    Returns:
        p-values in [1/(c+1), 1].

    Raises:
        InputError: no calibration score, or one that is NaN.

    >>> import numpy as np
    >>> conformal_p_values(np.array([9.0, 0.0]), np.array([1.0, 2.0, 3.0])).tolist()
    [0.25, 1.0]

    References:
        Vovk, Gammerman and Shafer, 2005; Bates et al., 2023, arXiv:2104.08279, equation 2.
    """
    if calibration.size == 0 or np.isnan(calibration).any():
        raise InputError("calibration: expected at least one score and no NaN")
    above = calibration.size - np.searchsorted(np.sort(calibration), scores, side="left")
    return np.where(np.isnan(scores), np.nan, (1 + above) / (calibration.size + 1))


def benjamini_hochberg(p_values: Float[np.ndarray, "n"], fdr: float) -> Bool[np.ndarray, "n"]:
    """Reject the hypotheses whose p-values pass the Benjamini-Hochberg line.

    With p_(1) <= ... <= p_(n), the k smallest are rejected for the largest k with
    p_(k) <= k fdr / n.

    Args:
        p_values: none of them NaN.
        fdr: wanted expected share of false rejections among the rejections, in (0, 1).

    Returns:
        True where rejected.

    Raises:
        InputError: fdr outside (0, 1), or a NaN.

    References:
        Benjamini and Hochberg, 1995.
    """
    if not 0 < fdr < 1:
        raise InputError(f"fdr: expected a rate between 0 and 1, got {fdr}")
    if np.isnan(p_values).any():
        raise InputError("p_values: expected no NaN")
    n = p_values.size
    if n == 0:
        return np.zeros(0, bool)
    ordered = np.sort(p_values)
    passing = np.flatnonzero(ordered <= fdr * np.arange(1, n + 1) / n)
    return p_values <= (ordered[passing[-1]] if passing.size else -1.0)


def flag(
    scores: Float[np.ndarray, "n"], calibration: Float[np.ndarray, "c"], fdr: float
) -> FlagResult:
    """Flag rows that stand out from calibration rows, at a false-discovery rate.

    Conformal p-values with Benjamini-Hochberg. If the unremarkable rows among the tested ones
    are exchangeable with the calibration rows, the expected share of them among the flags is at
    most ``fdr`` (p-values that share one calibration set are positively dependent, which the
    procedure tolerates). What a flag *means* follows from what the calibration rows are.

    Args:
        scores: larger = more suspicious; NaN rows are never flagged and do not count.
        calibration: scores of the calibration rows; NaN are left out.
        fdr: in (0, 1).

    Returns:
        A ``FlagResult``.

    Raises:
        InputError: fdr outside (0, 1), or no usable calibration score.

    References:
        Bates, Candes, Lei, Romano and Sesia, 2023, arXiv:2104.08279, theorem 2.
    """
    usable = calibration[~np.isnan(calibration)]
    p_value = conformal_p_values(scores, usable)
    tested = ~np.isnan(scores)
    flagged = np.zeros(scores.shape, bool)
    flagged[tested] = benjamini_hochberg(p_value[tested], fdr)
    smallest = 1 / (usable.size + 1)
    return FlagResult(
        p_value,
        flagged,
        smallest,
        bool(smallest <= fdr),
        (int(np.sum(~tested)), int(calibration.size - usable.size)),
    )
