"""What a detector is: it declares evaluations of a score, and finishes from their results.

A detector never calls a model. It lists the evaluations it needs (``needs``), the runner in
``memjax.detect.evaluate`` makes the union of all detectors' needs once, and each detector turns
the evidence into one number (``finish``), a pure function that runs under ``jit`` and ``vmap``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.status import finite_status
from memjax.calculus.linearization import Linearization


@dataclasses.dataclass(frozen=True)
class Point:
    """One evaluation of a score, relative to an image x0 of d numbers.

    ``kind`` says where: ``"clean"`` at x0, ``"noised"`` at x0 + sigma n with n ~ N(0, I),
    ``"sphere"`` at x0 + radius u with u uniform on the unit sphere. Draw j is the same n (u)
    for every image, noise level and detector: common random numbers make differences between
    images far more precise than the values themselves.

    Attributes:
        sigma: noise level announced to the score, in the score's units.
        kind: where the score is evaluated.
        draw: index of the random draw.
        sign: +1, or -1 for the antithetic partner of the same draw.
        radius: distance from x0, for ``"sphere"``.
        condition: ``"given"`` (the row's own) or ``"null"``.
        model: ``"target"`` or the ``"baseline"`` it is compared with.
    """

    sigma: float
    kind: Literal["clean", "noised", "sphere"] = "clean"
    draw: int = 0
    sign: int = 1
    radius: float = 0.0
    condition: Literal["given", "null"] = "given"
    model: Literal["target", "baseline"] = "target"


@runtime_checkable
class Product(Protocol):
    """A number (or array) computed from the linearised score at a point; hashable."""

    def __call__(self, linearization: Linearization) -> Any:
        """Compute the product."""
        ...

    def cost(self, d: int) -> Cost:
        """Network products used, beyond the linearisation itself."""
        ...


@dataclasses.dataclass(frozen=True)
class Trace:
    """tr H, the exact divergence of the score: d Jacobian products."""

    chunk_size: int | None = 256

    def __call__(self, linearization: Linearization) -> Float[Array, ""]:
        """Compute tr H."""
        return linearization.trace(chunk_size=self.chunk_size)

    def cost(self, d: int) -> Cost:
        """``d`` jvps."""
        return Cost(jvp=d)


class Need(NamedTuple):
    """A point, and the products wanted there; the score itself always comes with it."""

    point: Point
    products: tuple[Product, ...] = ()


class Evaluation(NamedTuple):
    """What the runner found at one point.

    Attributes:
        displacement: x - x0.
        score: s(x, sigma).
        products: result of each product asked for at this point, by product.
    """

    displacement: Float[Array, "..."]
    score: Float[Array, "..."]
    products: Mapping[Product, Any]


Evidence = Mapping[Point, Evaluation]


class Finding(NamedTuple):
    """One detector's answer for one image.

    Attributes:
        value: dimensionless, oriented: larger = more memorized.
        raw: the same statistic in the units and with the sign of its paper.
        standard_error: of ``value``, over the random draws; 0 where nothing is random.
        status: a ``memjax.Status`` code; ``value`` and ``raw`` are NaN unless it is ``OK``.
    """

    value: Float[Array, ""]
    raw: Float[Array, ""]
    standard_error: Float[Array, ""]
    status: Int[Array, ""]


def finding(
    value: Float[Array, ""],
    raw: Float[Array, ""],
    standard_error: Float[Array, ""] | None = None,
    *,
    score: Float[Array, "..."] | None = None,
) -> Finding:
    """Build a ``Finding`` whose status follows from its numbers.

    Args:
        value: oriented, dimensionless.
        raw: the paper's scaling.
        standard_error: of ``value``; ``None`` for a deterministic statistic.
        score: the score at the evaluated points, for a statistic that does not contain it (a
            trace can be finite where the score is not).

    Returns:
        The finding; a non-finite number makes all of it NaN with status ``NONFINITE``.
    """
    error = jnp.zeros_like(value) if standard_error is None else standard_error
    status = finite_status(value, raw, *(() if score is None else (score,)))
    keep = status == 0
    nan = jnp.full_like(value, jnp.nan)
    return Finding(
        jnp.where(keep, value, nan),
        jnp.where(keep, raw, nan),
        jnp.where(keep, error, nan),
        status,
    )


@runtime_checkable
class Detector(Protocol):
    """A memorization statistic of one image under one model. Implementations are frozen.

    Attributes:
        name: what it is called on the command line and in tables.
        title: for figures and reports.
        statement: one sentence on what the number is and why it tells memorization.
        raw_name: what the ``raw`` column holds, with its unit.
        default_level: noise level an audit uses unless told otherwise, as a multiple of the
            data's standard deviation.
        sigma: noise level in the score's units.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    statement: ClassVar[str]
    raw_name: ClassVar[str]
    default_level: ClassVar[float]

    @property
    def sigma(self) -> float:
        """Noise level in the score's units."""
        ...

    def needs(self, d: int) -> tuple[Need, ...]:
        """Evaluations wanted for an image of d numbers."""
        ...

    def finish(self, evidence: Evidence) -> Finding:
        """The statistic, from exactly those evaluations."""
        ...


def merge_needs(detectors: tuple[Detector, ...], d: int) -> dict[Point, tuple[Product, ...]]:
    """Union of what several detectors need: each point once, each product at it once.

    Args:
        detectors: any number of detectors.
        d: numbers in one image.

    Returns:
        Products by point, in order of first mention.
    """
    union: dict[Point, dict[Product, None]] = {}
    for detector in detectors:
        for point, products in detector.needs(d):
            union.setdefault(point, {}).update(dict.fromkeys(products))
    return {point: tuple(products) for point, products in union.items()}


def cost(detectors: tuple[Detector, ...], d: int) -> Cost:
    """Network products one image costs when these detectors run together.

    Args:
        detectors: any number of detectors; shared evaluations count once.
        d: numbers in one image.

    Returns:
        The exact number of products made by ``evaluate_detectors``.
    """
    total = Cost()
    for products in merge_needs(detectors, d).values():
        total = total.plus(Cost(forward=1))
        for product in products:
            total = total.plus(product.cost(d))
    return total


def check_sigma(sigma: float) -> None:
    """Raise unless a detector's noise level is a positive finite number.

    Args:
        sigma: the noise level.

    Raises:
        InputError: otherwise.
    """
    if not 0.0 < sigma < float("inf"):
        raise InputError(f"sigma: expected a positive finite noise level, got {sigma}")
