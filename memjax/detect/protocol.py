"""What a detector is: it declares evaluations of a score, and finishes from their results.

A detector never calls a model. It lists what it needs (``needs``): the score at points, products
with its Jacobian there, flows. The runner in ``memjax.detect.evaluate`` makes the union of all
detectors' needs once, and each detector turns the evidence into one number (``finish``), a pure
function that runs under ``jit`` and ``vmap``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.status import Status, finite_status
from memjax.calculus.linearization import Linearization

Kind = Literal["clean", "noised", "sphere", "pure"]


@runtime_checkable
class Neighbor(Protocol):
    """Makes of an image one near it, such as ``memjax.detect.Blurred``.

    Implementations are frozen and hashable: detectors that look at the same neighbor share it.

    Attributes:
        name: as it stands in a detector's name, such as ``"blurred"``.
        needs_image: whether it takes images [height, width, channels] only.
    """

    name: ClassVar[str]
    needs_image: ClassVar[bool]

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The neighbor of an image, of its shape and dtype; traceable."""
        ...


class Branch(NamedTuple):
    """Which score is evaluated.

    Attributes:
        model: ``"target"`` or the ``"baseline"`` it is compared with.
        condition: ``"given"`` (the row's own) or ``"null"``.
    """

    model: Literal["target", "baseline"] = "target"
    condition: Literal["given", "null"] = "given"


class Place(NamedTuple):
    """Where, and at which noise level: the part of a ``Point`` that branches share."""

    sigma: float
    kind: Kind
    draw: int
    sign: int
    radius: float
    neighbor: Neighbor | None


@dataclasses.dataclass(frozen=True)
class Point:
    """One evaluation of a score, relative to an image x0 of d numbers.

    ``kind`` says where: ``"clean"`` at x0, ``"noised"`` at x0 + sigma n with n ~ N(0, I),
    ``"sphere"`` at x0 + radius u with u uniform on the unit sphere, ``"pure"`` at radius n
    wherever x0 lies (the noise that sampling starts from: nothing but the condition tells rows
    apart). Draw j is the same n (u) for every image, noise level and detector: common random
    numbers make differences between images far more precise than the values themselves.

    Attributes:
        sigma: noise level announced to the score, in the score's units.
        kind: where the score is evaluated.
        draw: index of the random draw.
        sign: +1, or -1 for the antithetic partner of the same draw.
        radius: distance from x0 for ``"sphere"``, standard deviation of the noise for ``"pure"``.
        condition: ``"given"`` (the row's own) or ``"null"``.
        model: ``"target"`` or the ``"baseline"`` it is compared with.
        neighbor: what is made of the image first; x0 is then that neighbor. ``None`` for the
            image itself.
    """

    sigma: float
    kind: Kind = "clean"
    draw: int = 0
    sign: int = 1
    radius: float = 0.0
    condition: Literal["given", "null"] = "given"
    model: Literal["target", "baseline"] = "target"
    neighbor: Neighbor | None = None

    @property
    def place(self) -> Place:
        """Where, without which score."""
        return Place(self.sigma, self.kind, self.draw, self.sign, self.radius, self.neighbor)

    @property
    def branch(self) -> Branch:
        """Which score, without where."""
        return Branch(self.model, self.condition)


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """One solve of the probability flow with its volume growth, relative to an image x0.

    Attributes:
        start: where it starts: x0 itself (``"clean"``) or x0 + sigma n (``"noised"``), with the
            draw, the condition and the model of that point, at its sigma.
        sigma1: noise level at which it ends.
        solver: a fixed rule, ``"heun"`` or ``"rk4"``: its cost is known beforehand.
        num_steps: steps, evenly spaced in log sigma.
        divergence: how tr M is found, as for ``memjax.probability_flow``.
        num_products: products of a stochastic divergence; probes are common to all images.
    """

    start: Point
    sigma1: float
    solver: Literal["heun", "rk4"] = "rk4"
    num_steps: int = 8
    divergence: Literal["exact", "hutchinson", "hutchpp", "xnystrace"] = "exact"
    num_products: int = 16


class Local(NamedTuple):
    """What a product is computed from.

    Attributes:
        linearizations: of the scores wanted at this place.
        branch: the score that the product was asked for.
        results: products of the same score computed before: those that it builds on.
        key: randomness, common to all images.
    """

    linearizations: Mapping[Branch, Linearization]
    branch: Branch
    results: Mapping["Product", Any]
    key: PRNGKeyArray

    @property
    def linearization(self) -> Linearization:
        """That of the score asked for."""
        return self.linearizations[self.branch]


@dataclasses.dataclass(frozen=True)
class Product:
    """Something computed from the linearised score at a point; subclasses are frozen, hashable."""

    uses: ClassVar[tuple["Product", ...]] = ()
    """Products at the same point that this one is computed from."""
    derives: ClassVar[tuple["Product", ...]] = ()
    """Products that, where they are wanted anyway, give this one for nothing."""

    def __call__(self, local: Local) -> Any:
        """Compute it: an array or a pytree of arrays."""
        raise NotImplementedError

    def branches(self, branch: Branch) -> tuple[Branch, ...]:
        """Other scores that must be linearised at the same place."""
        return ()

    def cost(self, d: int) -> Cost:
        """Network products beyond the linearisation, and beyond the products it ``uses``."""
        raise NotImplementedError


class Need(NamedTuple):
    """A point or a flow, and the products wanted at the point; its score always comes with it."""

    point: Point | Trajectory
    products: tuple[Product, ...] = ()


class Evaluation(NamedTuple):
    """What the runner found at one point.

    Attributes:
        displacement: x - x0, from the neighbor where the point has one.
        score: s(x, sigma).
        products: result of each product asked for at this point, by product.
    """

    displacement: Float[Array, "..."]
    score: Float[Array, "..."]
    products: Mapping[Product, Any]


Evidence = Mapping[Any, Any]
"""An ``Evaluation`` for each point, a ``memjax.diffusion.VolumeGrowth`` for each flow."""


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
    status: Int[Array, ""] | None = None,
) -> Finding:
    """Build a ``Finding`` whose status follows from its numbers.

    Args:
        value: oriented, dimensionless.
        raw: the paper's scaling.
        standard_error: of ``value``; ``None`` for a deterministic statistic.
        score: the score at the evaluated points, for a statistic that does not contain it (a
            trace can be finite where the score is not).
        status: what is known to have gone wrong; ``None`` for nothing.

    Returns:
        The finding, all NaN unless its status is ``OK``: a non-finite number makes it
        ``NONFINITE``, whatever ``status`` says.
    """
    error = jnp.zeros_like(value) if standard_error is None else standard_error
    found = finite_status(value, raw, *(() if score is None else (score,)))
    if status is not None:
        found = jnp.where(found == Status.OK, status, found)
    keep = found == Status.OK
    nan = jnp.full_like(value, jnp.nan)
    return Finding(
        jnp.where(keep, value, nan),
        jnp.where(keep, raw, nan),
        jnp.where(keep, error, nan),
        found,
    )


def image_size(evidence: Evidence) -> int:
    """Numbers in the image that some evidence is about.

    Args:
        evidence: with at least one point in it.

    Returns:
        The d that the detectors' ``needs`` were told.
    """
    return next(e.displacement.size for e in evidence.values() if isinstance(e, Evaluation))


def undefined_if(undefined: Bool[Array, ""]) -> Int[Array, ""]:
    """Status of a statistic that does not exist where some direction is 0/0.

    Args:
        undefined: whether it is so here.

    Returns:
        ``Status.UNDEFINED`` or ``Status.OK``.
    """
    return jnp.where(undefined, jnp.int32(Status.UNDEFINED), jnp.int32(Status.OK))


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

    One whose value reaches a number where an image is memorized perfectly, and never exceeds it,
    may say so by an attribute ``ceiling``.
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


def check_sigma(sigma: float) -> None:
    """Raise unless a detector's noise level is a positive finite number.

    Args:
        sigma: the noise level.

    Raises:
        InputError: otherwise.
    """
    if not 0.0 < sigma < float("inf"):
        raise InputError(f"sigma: expected a positive finite noise level, got {sigma}")
