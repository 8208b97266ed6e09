"""Whether a classifier's probabilities mean what they say: calibration error and temperature."""

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Float, Integer, Shaped

from memjax._core.errors import InputError

_MAX_TEMPERATURE = 20.0


def calibration_error(
    probs: Float[np.ndarray, "n c"], labels: Integer[np.ndarray, "n"], *, num_bins: int = 15
) -> float:
    """Expected calibration error: how far confidence and accuracy are apart, on average.

        ECE = sum_b (n_b/n) |accuracy_b - confidence_b|

    over ``num_bins`` bins of equal width in the largest probability of a row, each closed on its
    right; confidence_b is the mean of that probability in the bin, accuracy_b the share of the
    rows whose most probable class (the first, at ties) is the label.

    Args:
        probs: probabilities of the classes per row.
        labels: the true classes, 0..c - 1.
        num_bins: number of bins.

    Returns:
        A number in [0, 1]; NaN if a probability is. It is biased upwards where rows are few: for
        a perfectly calibrated classifier it falls like the square root of num_bins/n, not to zero.

    Raises:
        InputError: no rows, labels that do not fit, or no bins.

    >>> import numpy as np
    >>> probs = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    >>> round(calibration_error(probs, np.array([0, 1, 1, 1]), num_bins=5), 6)  # (|.5-.9|+|1-.6|)/2
    0.4

    References:
        Guo, Pleiss, Sun, Weinberger (2017), arXiv:1706.04599, equation 3.
    """
    _check(probs, labels)
    if num_bins < 1:
        raise InputError(f"num_bins: expected at least 1, got {num_bins}")
    confidence = probs.max(axis=1).astype(np.float64)
    if np.isnan(confidence).any():
        return float("nan")
    excess = confidence - (probs.argmax(axis=1) == labels)
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    return float(np.abs(np.bincount(bins, excess, num_bins)).sum() / len(probs))


def fit_temperature(logits: Float[np.ndarray, "n c"], labels: Integer[np.ndarray, "n"]) -> float:
    """The temperature of maximum likelihood: argmin over T of the cross-entropy of z/T.

    In b = 1/T the loss mean_i [log sum_c exp(b z_ic) - b z_{i y_i}] is convex; its derivative, the
    mean logit under the classifier less that of the label, is brought to zero by Brent's method.

    Args:
        logits: z, one row per sample, finite.
        labels: y, the true classes, 0..c - 1.

    Returns:
        T, within 1/20..20: an end of this range where the minimum is beyond it, as for logits
        that never err (T = 0) or know nothing (T = infinity). 1 for logits that are all equal in
        every row. NaN if a logit is.

    Raises:
        InputError: no rows, or labels that do not fit.

    >>> import numpy as np
    >>> logits = np.array([[2.0, 0.0]] * 4)  # 3 of 4 right: log 3 would be the right logit
    >>> round(fit_temperature(logits, np.array([0, 0, 0, 1])) * float(np.log(3)), 4)
    2.0

    References:
        Guo, Pleiss, Sun, Weinberger (2017), arXiv:1706.04599, section 4.2.
    """
    _check(logits, labels)
    z = logits.astype(np.float64)
    if not np.isfinite(z).all():
        return float("nan")
    z = z - z[np.arange(len(z)), labels][:, None]

    def slope(log_b: float) -> float:
        return float((scipy.special.softmax(np.exp(log_b) * z, axis=1) * z).sum(axis=1).mean())

    high = float(np.log(_MAX_TEMPERATURE))
    if not z.any():
        return 1.0
    if slope(-high) >= 0:
        return _MAX_TEMPERATURE
    if slope(high) <= 0:
        return 1 / _MAX_TEMPERATURE
    root = scipy.optimize.root_scalar(slope, bracket=(-high, high), xtol=1e-9).root
    return float(np.exp(-root))


def _check(scores: Shaped[np.ndarray, "n c"], labels: Shaped[np.ndarray, "n"]) -> None:
    if not scores.size:
        raise InputError(f"labels: expected at least one row and class, got {list(scores.shape)}")
    if labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise InputError(
            f"labels: expected 0..{scores.shape[1] - 1}, found {labels.min()}..{labels.max()}"
        )
