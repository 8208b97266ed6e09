"""Flags with a controlled share of false ones, from calibration rows known to be unremarkable."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from memjax._core.errors import InputError
from memjax.evaluate.intervals import check_open_unit

# p-values are quotients of integers: a product that equals its bound must not miss it by rounding.
_SLACK = 1 + 1e-12


class FlagResult(NamedTuple):
    """Conformal p-values of n rows, and the rows flagged under false-discovery control.

    Attributes:
        p_value: one per row; NaN where the score is NaN.
        flagged: True for flagged rows, never for a NaN score.
        smallest_p: the smallest attainable p-value, 1/(c + 1) for c calibration rows.
        resolvable: whether any row could be flagged at all. If False, the calibration set is too
            small for this false-discovery rate.
        fewest: the smallest number of rows that can be flagged, ceil(m smallest_p / fdr) for m
            tested rows: if fewer stand out, even above every calibration row, none is flagged.
        excluded: rows and calibration rows left out because their score is NaN.
    """

    p_value: Float[np.ndarray, "n"]
    flagged: Bool[np.ndarray, "n"]
    smallest_p: float
    resolvable: bool
    fewest: int
    excluded: tuple[int, int]


def flag(
    scores: Float[np.ndarray, "n"], calibration: Float[np.ndarray, "c"], fdr: float = 0.1
) -> FlagResult:
    """Flag rows that score higher than calibration rows explain, with bounded false discoveries.

    Conformal p-values (`conformal_p_values`) under the Benjamini-Hochberg procedure
    (`benjamini_hochberg`). What a flag means is what the calibration rows are *not*: with unseen
    images it is membership, with training images that stand there once it is duplication.

    Guarantee: if the calibration rows and the unremarkable tested rows are independent draws from
    one distribution, and the calibration rows were used for nothing else (not for training,
    tuning or choosing the score), then the expected share of unremarkable rows among the flagged
    ones is at most ``fdr`` times the share of unremarkable rows among the tested. The expectation
    is also over the draw of the calibration rows; with one unlucky set the share can be larger.

    Args:
        scores: larger means more suspicious; NaN rows are never flagged and do not count.
        calibration: scores of the calibration rows; NaN are left out.
        fdr: the false-discovery rate allowed, in (0, 1).

    Returns:
        A `FlagResult`.

    Raises:
        InputError: ``fdr`` out of range, or no calibration score.

    Example:
        >>> import numpy as np
        >>> from memjax.evaluate.conformal import flag
        >>> result = flag(np.array([9.0, 0.5]), np.arange(9) / 9, fdr=0.2)
        >>> result.p_value.tolist(), result.flagged.tolist()
        ([0.1, 0.5], [True, False])

    References:
        Bates, Candes, Lei, Romano, Sesia (2023), "Testing for outliers with conformal p-values",
        Annals of Statistics 51, arXiv:2104.08279, theorem 2 (conformal p-values are positively
        dependent, so Benjamini-Hochberg holds). Stated there for scores without ties; ties only
        make our p-values larger.
    """
    p_value = conformal_p_values(scores, calibration)
    flagged = benjamini_hochberg(p_value, fdr)
    excluded = (int(np.isnan(scores).sum()), int(np.isnan(calibration).sum()))
    smallest_p = 1 / (len(calibration) - excluded[1] + 1)
    tested = len(scores) - excluded[0]
    return FlagResult(
        p_value=p_value,
        flagged=flagged,
        smallest_p=smallest_p,
        resolvable=smallest_p <= fdr * _SLACK,
        fewest=max(1, math.ceil(tested * smallest_p / (fdr * _SLACK))),
        excluded=excluded,
    )


def conformal_p_values(
    scores: Float[np.ndarray, "n"], calibration: Float[np.ndarray, "c"]
) -> Float[np.ndarray, "n"]:
    """How unusually high each score is among calibration scores.

        p_i = (1 + number of calibration scores >= score_i) / (c + 1)

    If row i and the calibration rows are exchangeable, P(p_i <= u) <= u for every u. Ties count
    against the row, which keeps this true.

    Args:
        scores: larger means more suspicious.
        calibration: NaN entries are left out, and c is the number of the others.

    Returns:
        p-values in [1/(c+1), 1], NaN where the score is NaN. O((n + c) log c).

    Raises:
        InputError: no calibration score.

    References:
        Vovk, Gammerman, Shafer (2005), "Algorithmic learning in a random world"; Bates et al.
        (2023), arXiv:2104.08279, equation 2.
    """
    ordered = np.sort(calibration[~np.isnan(calibration)].astype(np.float64))
    if not len(ordered):
        raise InputError("calibration: expected at least one score that is not NaN, found none")
    values = scores.astype(np.float64)
    at_least = len(ordered) - np.searchsorted(ordered, values, side="left")
    return np.where(np.isnan(values), np.nan, (1 + at_least) / (len(ordered) + 1))


def benjamini_hochberg(p_values: Float[np.ndarray, "n"], fdr: float) -> Bool[np.ndarray, "n"]:
    """Reject the k smallest p-values, k the largest with p_(k) <= k fdr / m.

    Controls the expected share of false rejections at ``fdr`` for independent or positively
    regression-dependent p-values.

    Args:
        p_values: NaN entries are not tested: they are not rejected and do not count in m.
        fdr: level in (0, 1).

    Returns:
        True for the rejected. O(n log n).

    Raises:
        InputError: ``fdr`` out of range.

    References:
        Benjamini, Hochberg (1995), JRSS B 57; Benjamini, Yekutieli (2001), Annals of Statistics
        29, theorem 1.2.
    """
    check_open_unit("fdr", fdr)
    ordered = np.sort(p_values[~np.isnan(p_values)])
    m = len(ordered)
    passing = np.flatnonzero(ordered * m <= np.arange(1, m + 1) * fdr * _SLACK)
    if not len(passing):
        return np.zeros(len(p_values), bool)
    # Equal p-values stand or fall together, so comparing with the k-th is enough (NaN is False).
    return p_values <= ordered[passing[-1]]
