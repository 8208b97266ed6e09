"""What the row's condition adds to the score: its gap to the null condition, and related norms."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax._core.checks import check_count, check_positive
from memjax._core.errors import InputError
from memjax.calculus.p_laplace import ROUNDINGS
from memjax.detect._draws import Draws
from memjax.detect.products import AlongGap
from memjax.detect.protocol import (
    Evidence,
    Finding,
    Need,
    Point,
    check_sigma,
    finding,
    undefined_if,
)

# Every class below has the fields of Draws first; only their defaults differ.


def _norm(v: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.sqrt(jnp.sum(v * v))


def _both(draws: Draws) -> tuple[tuple[Point, Point], ...]:
    """The score under either condition at every draw."""
    return tuple(zip(draws.points(), draws.points("null"), strict=True))


@dataclasses.dataclass(frozen=True)
class ScoreGap(Draws):
    """How far the condition moves the predicted noise.

    With s_c the score under the row's condition and s_null that under the null condition::

        raw = mean_j sigma |s_c(x_j, sigma) - s_null(x_j, sigma)| = mean_j |eps_c - eps_null|
        value = raw / sqrt(d)

    A condition that stands for one stored image pulls every point towards it, one that stands
    for many pulls weakly. The predicted noise is the same in variance-preserving coordinates,
    and so is ``raw``.

    Kinds of points: ``"pure"`` (x = sigma n) needs no image and tells conditions apart. At the
    model's largest sigma it is the first sampling step, which the paper uses. There ``raw`` is
    |E[x0 | c] - E[x0]| / sigma, which knows how far the mean under the condition lies from that
    of all data, and not how much the condition leaves open; below the spread of the data, at
    the default level, it also finds conditions that store a part of the image. ``"noised"`` and
    ``"clean"`` ask about the image under its condition; at low noise the image alone tells where
    it belongs, the condition adds nothing, and a stored image has the *smaller* gap.

    Args:
        sigma: noise level, in the score's units.
        kind: ``"pure"``, ``"noised"`` or ``"clean"``.
        num_draws: noises averaged, common to all images; none at the clean image.

    Raises:
        InputError: an argument out of range.

    Without raising: a row without a condition has no gap, and reads 0.

    Cost: two forward evaluations a draw. ``standard_error`` is over draws, infinite for one.

    References:
        Wen et al. (2024), Detecting, explaining, and mitigating memorization in diffusion models,
        section 3.
    """

    kind: str = "pure"
    num_draws: int = 4
    name: ClassVar[str] = "score_gap"
    title: ClassVar[str] = "Score gap"
    raw_name: ClassVar[str] = "|eps_c - eps_null|"
    default_level: ClassVar[float] = 0.25
    statement: ClassVar[str] = (
        "How strongly the condition pulls: much where it stands for one stored image."
    )

    def needs(self, d: int) -> tuple[Need, ...]:
        """The score under both conditions at every draw."""
        return tuple(Need(point) for pair in _both(self) for point in pair)

    def finish(self, evidence: Evidence) -> Finding:
        """Mean of ``sigma |s_c - s_null|``."""
        gaps = [evidence[given].score - evidence[null].score for given, null in _both(self)]
        mean, error = self.mean(self.sigma * jnp.stack([_norm(gap) for gap in gaps]))
        unit = gaps[0].size ** 0.5
        return finding(mean / unit, mean, error / unit)


@dataclasses.dataclass(frozen=True)
class GapSharpness(Draws):
    """How sharply the condition bends the density: the gap's Jacobian along the gap.

    With s_gap = s_c - s_null (row's condition minus null condition) and H_gap its Jacobian::

        norm = "l2":       raw = mean_j |H_gap s_gap|,    value = sigma^3 raw / sqrt(d)
        norm = "squared":  raw = mean_j |H_gap s_gap|^2,  value = sigma^6 raw / d

    at the points x_j. It weighs the gap by the curvature that the condition adds along it.
    ``raw`` is in the coordinates x0 + sigma n. In those of a variance-preserving process with
    signal alpha, theirs = ours / alpha^3, and ours / alpha^6 for ``"squared"``; ``value`` is the
    same in both.

    Args:
        sigma: noise level, in the score's units.
        kind: ``"pure"``, ``"noised"`` or ``"clean"``, as for ``ScoreGap``; the paper takes the
            first sampling step, ``"pure"`` at the largest sigma.
        num_draws: noises averaged, common to all images; none at the clean image.
        norm: ``"squared"`` is the paper's text, ``"l2"`` its published code. They differ only in
            how draws are averaged.

    Raises:
        InputError: an argument out of range.

    Without raising: a row without a condition has no gap, and reads 0.

    Cost: per draw one linearization under either condition, two forward evaluations and two
    jvps in all. ``standard_error`` is over draws, infinite for one.

    References:
        Jeon, Kim and No (2025), arXiv:2412.04140, section 4.3. For Gaussians of covariance S_c
        (given) and S (null), means m_c and m, with P = S^-1 - S_c^-1, its expectation over
        N(m_c, S_c) is |P S^-1 (m_c - m)|^2 + tr(P^4 S_c), and that of |s_gap|^2 is
        |S^-1 (m_c - m)|^2 + tr(P^2 S_c), where the paper's lemma 4.2 prints a Hessian, of the
        opposite sign, for S_c^-1.
    """

    kind: str = "pure"
    num_draws: int = 4
    norm: str = "l2"
    name: ClassVar[str] = "gap_sharpness"
    title: ClassVar[str] = "Gap sharpness"
    raw_name: ClassVar[str] = "|H_gap s_gap|, per data unit^3"
    default_level: ClassVar[float] = 0.25
    statement: ClassVar[str] = (
        "How sharply the condition bends the density: most where it stands for one stored image."
    )

    def __post_init__(self):
        super().__post_init__()
        if self.norm not in ("l2", "squared"):
            raise InputError(f"norm: expected 'l2' or 'squared', got {self.norm!r}")

    def needs(self, d: int) -> tuple[Need, ...]:
        """``H_gap s_gap`` at every draw."""
        return tuple(Need(point, (AlongGap(),)) for point in self.points())

    def finish(self, evidence: Evidence) -> Finding:
        """Mean of ``sigma^3 |H_gap s_gap|``, or of its square."""
        evaluations = [evidence[point] for point in self.points()]
        power, d = 1 if self.norm == "l2" else 2, evaluations[0].score.size
        # Scaled before it is squared: at small sigma the product is large.
        along = [self.sigma**3 * e.products[AlongGap()] for e in evaluations]
        mean, error = self.mean(jnp.stack([_norm(v) for v in along]) ** power)
        unit = d ** (power / 2)
        score = jnp.stack([e.score for e in evaluations])
        raw = mean / self.sigma ** (3 * power)
        return finding(mean / unit, raw, error / unit, score=score)


@dataclasses.dataclass(frozen=True)
class Anisotropy(Draws):
    """The gap's length at high noise and its alignment with the null score at low noise.

    With s_gap = s_c - s_null::

        value = raw = mean_j  norm_weight sigma |s_gap(x_j, sigma)|
                            + cosine_weight cos(s_gap, s_null)(y_j, sigma_low)

    ``kind="pure"``: x_j = sigma n_j is the first sampling step, and y_j = sqrt(1 + sigma_low^2)
    n_j is the *same noise* n_j announced at sigma_low: what a variance-preserving network sees
    when the last time is announced for the first step's input, as the paper does on purpose.
    ``"noised"`` takes each term at its own noise level, x0 + sigma n_j and x0 + sigma_low n_j,
    ``"clean"`` both at x0. Both terms are the same numbers in variance-preserving coordinates.

    The cosine is that of whole images; the paper's is taken over channels at every pixel and
    averaged, which for one channel would be a sign.

    Args:
        sigma: the high noise level, in the score's units.
        kind: ``"clean"``, ``"noised"`` or ``"pure"``.
        num_draws: noises averaged, common to all images; none at the clean image.
        sigma_low: the low noise level.
        norm_weight: of the norm, which grows as sqrt(d) where the cosine does not; the published
            code has norm : cosine 1 : 2, 1 : 0.1 and 2 : 1 for three models of 64 x 64 x 4
            latents, fitted on 20 prompts. Fit them anew.
        cosine_weight: of the cosine.

    Raises:
        InputError: an argument out of range.

    Without raising: UNDEFINED where the gap at sigma_low is no larger than its rounding (a row
    without a condition) or the null score is zero: there is no angle.

    Cost: four forward evaluations a draw. ``standard_error`` is over draws, infinite for one.

    References:
        Asthana and Belagiannis (2026), Detecting memorization through the anisotropy of score
        differences.
    """

    kind: str = "pure"
    num_draws: int = 4
    sigma_low: float = 0.05
    norm_weight: float | int = 1.0
    cosine_weight: float | int = 2.0
    name: ClassVar[str] = "anisotropy"
    title: ClassVar[str] = "Anisotropy"
    raw_name: ClassVar[str] = "weighted |eps_gap| + cosine"
    default_level: ClassVar[float] = 25.0
    statement: ClassVar[str] = (
        "Whether the condition pulls hard at high noise, and along the score at low noise."
    )

    def __post_init__(self):
        super().__post_init__()
        check_positive("sigma_low", self.sigma_low)

    def _low(self) -> tuple[tuple[Point, Point], ...]:
        """The points of the cosine."""
        pairs = _both(Draws(self.sigma_low, self.kind, self.num_draws))
        if self.kind != "pure":
            return pairs
        radius = (1 + self.sigma_low**2) ** 0.5
        return tuple(
            (dataclasses.replace(given, radius=radius), dataclasses.replace(null, radius=radius))
            for given, null in pairs
        )

    def needs(self, d: int) -> tuple[Need, ...]:
        """The score under both conditions at both noise levels."""
        pairs = dict.fromkeys((*_both(self), *self._low()))
        return tuple(Need(point) for pair in pairs for point in pair)

    def finish(self, evidence: Evidence) -> Finding:
        """The weighted sum of norm and cosine."""
        values, undefined = [], []
        for high, low in zip(_both(self), self._low(), strict=True):
            given, null = (evidence[point].score for point in high)
            norm = self.sigma * _norm(given - null)
            given, null = (evidence[point].score for point in low)
            gap, length = given - null, _norm(null)
            noise = ROUNDINGS * float(jnp.finfo(null.dtype).eps) * (length + _norm(given))
            known = _norm(gap) > noise
            # Unit vectors first: the product of two lengths may overflow.
            product = jnp.sum((gap / _norm(gap)) * (null / length))
            cosine = jnp.where(known & (length > 0), product, 0)
            undefined.append(~known & jnp.isfinite(noise) | (length == 0))
            values.append(self.norm_weight * norm + self.cosine_weight * cosine)
        scores = jnp.stack(
            [evidence[p].score for pair in (*_both(self), *self._low()) for p in pair]
        )
        mean, error = self.mean(jnp.stack(values))
        status = undefined_if(jnp.any(jnp.stack(undefined)))
        return finding(mean, mean, error, score=scores, status=status)


@dataclasses.dataclass(frozen=True)
class DenoisedNorm:
    """How much of an image the model draws from pure noise: its norm.

    With D(x) = x + sigma^2 s_c(x, sigma) = E[x0 | x, c] the denoiser under the row's condition,
    at antithetic pairs of pure noises::

        raw = |mean_j [D(sigma n_j) + D(-sigma n_j)] / 2|,  value = raw / (sigma sqrt(d))

    By the law of total variance ``|E[x0 | c]|^2 = E[|x0|^2 | c] - tr Cov[x0 | c]``: among images
    of equal energy |x0|^2 the norm of the mean tells how little a condition leaves open. A
    stored image is drawn in full contrast, the mean of many is a blur. ``ScoreGap`` from pure
    noise is the same with the mean of all data for an origin, from which images lie at more
    unequal distances.

    The two ends of a pair cancel everything odd in the noise, the input itself included; what is
    left of a linear denoiser is its value at zero noise. No image and no null condition is
    needed, but without a condition all rows read the same. In variance-preserving coordinates
    both numbers are the same.

    At the model's largest sigma it is the first sampling step; below the spread of the data, at
    the default level, it also finds conditions that store a part of the image.

    It fails where energies differ more than variances do: dark and bright images, or an encoding
    whose origin lies at the edge of the data ([0, 1] instead of [-1, 1]).

    Args:
        sigma: noise level, in the score's units.
        num_pairs: antithetic pairs n, -n, at least 1, common to all rows.

    Raises:
        InputError: an argument out of range.

    Cost: two forward evaluations a pair. ``standard_error`` is over pairs, to first order,
    infinite for one.

    References:
        Ours; the posterior mean is that of Tweedie's formula.
    """

    sigma: float
    num_pairs: int = 1
    name: ClassVar[str] = "denoised_norm"
    title: ClassVar[str] = "Denoised norm"
    raw_name: ClassVar[str] = "|E[x0 | noise, c]|, data units"
    default_level: ClassVar[float] = 0.25
    statement: ClassVar[str] = (
        "How much of an image the condition draws from pure noise: all of a stored one, a blur "
        "of many."
    )

    def __post_init__(self):
        check_sigma(self.sigma)
        check_count("num_pairs", self.num_pairs, 1)

    def _pairs(self) -> tuple[tuple[Point, Point], ...]:
        def point(j: int, sign: int) -> Point:
            return Point(self.sigma, "pure", draw=j, sign=sign, radius=self.sigma)

        return tuple((point(j, 1), point(j, -1)) for j in range(self.num_pairs))

    def needs(self, d: int) -> tuple[Need, ...]:
        """The score at both ends of every pair."""
        return tuple(Need(point) for pair in self._pairs() for point in pair)

    def finish(self, evidence: Evidence) -> Finding:
        """``sigma^2 |mean of the scores|``: the points themselves cancel."""
        pairs = [tuple(evidence[point].score for point in pair) for pair in self._pairs()]
        denoised = jnp.stack([self.sigma**2 * (plus + minus) / 2 for plus, minus in pairs])
        mean = jnp.mean(denoised, axis=0)
        norm, unit = _norm(mean), 1 / (self.sigma * mean.size**0.5)
        if self.num_pairs == 1:
            error = jnp.full_like(norm, jnp.inf)
        else:
            direction = mean / jnp.where(norm > 0, norm, 1)
            along = jnp.sum(denoised * direction[None], axis=tuple(range(1, denoised.ndim)))
            error = unit * jnp.std(along, ddof=1) / self.num_pairs**0.5
        return finding(unit * norm, norm, error)
