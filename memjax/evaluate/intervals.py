"""Confidence intervals for proportions."""

from memjax._core.errors import InputError


def proportion_interval(
    successes: float | int, trials: float | int, *, confidence: float = 0.95
) -> tuple[float, float]:
    """Clopper-Pearson interval for the success probability p of a binomial count k of n.

    The limits are the values of p at which k or more, or k or fewer, successes would have
    probability (1 - ``confidence``) / 2:

        low = BetaQuantile((1 - c)/2; k, n - k + 1),  high = BetaQuantile((1 + c)/2; k + 1, n - k)

    Args:
        successes: k in [0, n]. Fractions are allowed, for effective sample sizes.
        trials: n >= 0; with n = 0 the interval is [0, 1].
        confidence: c in (0, 1).

    Returns:
        (low, high) in [0, 1].

    Raises:
        InputError: an argument out of range.

    Accuracy and cost:
        Covers p with at least the stated probability, for every p and n (usually more).

    Example:
        >>> from memjax.evaluate.intervals import proportion_interval
        >>> low, high = proportion_interval(16, 16)
        >>> round(low, 3), high
        (0.794, 1.0)

    References:
        Clopper, Pearson (1934), "The use of confidence or fiducial limits illustrated in the case
        of the binomial", Biometrika 26.
    """
    from scipy.special import betaincinv

    if not 0 <= successes <= trials:
        raise InputError(f"successes: expected 0..{trials} (trials), got {successes}")
    check_open_unit("confidence", confidence)
    tail = (1 - confidence) / 2
    k, n = successes, trials
    low = float(betaincinv(k, n - k + 1, tail)) if k > 0 else 0.0
    high = float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    return low, high


def check_open_unit(name: str, value: float) -> None:
    """Raise an `InputError` unless ``value`` lies strictly between 0 and 1."""
    if not 0 < value < 1:
        raise InputError(f"{name}: expected a number between 0 and 1, got {value}")
