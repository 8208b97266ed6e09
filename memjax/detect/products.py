"""Products with the linearised score that detectors ask for."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax.calculus.p_laplace import ROUNDINGS
from memjax.detect.protocol import Branch, Local, Product
from memjax.linalg.trace import trace_hutchinson


class Measured(NamedTuple):
    """A number and how far chance moved it.

    Attributes:
        value: the number.
        standard_error: over the random draws; zero where nothing is random.
    """

    value: Float[Array, ""]
    standard_error: Float[Array, ""]


@dataclasses.dataclass(frozen=True)
class Jacobian(Product):
    """H = ds/dx as a dense d x d matrix: d jvps, d^2 numbers an image."""

    chunk_size: int | None = 256

    def __call__(self, local: Local) -> Float[Array, "d d"]:
        """Compute ``H[i, j] = ds_i/dx_j`` over the flattened image."""
        return local.linearization.jacobian(chunk_size=self.chunk_size)

    def cost(self, d: int) -> Cost:
        """``d`` jvps."""
        return Cost(jvp=d)


@dataclasses.dataclass(frozen=True)
class Trace(Product):
    """tr H, the divergence of the score: a value with its standard error.

    Exact by d jvps, or by Hutchinson's estimator from ``num_probes`` random signs that are
    common to all images. Nothing is paid where the dense Jacobian is wanted at the same point.
    """

    num_probes: int | None = None

    @property
    def derives(self) -> tuple[Product, ...]:  # type: ignore[override]
        """The dense Jacobian gives the exact trace; probes are probes whoever else asks."""
        return (Jacobian(),) if self.num_probes is None else ()

    def __post_init__(self):
        if self.num_probes is not None and self.num_probes < 2:
            raise InputError(
                f"num_probes: expected at least 2 (for an error), got {self.num_probes}"
            )

    def __call__(self, local: Local) -> Measured:
        """Compute it; the standard error of an exact trace is zero."""
        linearization = local.linearization
        if self.num_probes is not None:
            found = trace_hutchinson(
                linearization.jvp, linearization.point, local.key, num_products=self.num_probes
            )
            return Measured(found.value, found.standard_error)
        if Jacobian() in local.results:
            value = jnp.trace(local.results[Jacobian()])
        else:
            value = linearization.trace()
        return Measured(value, jnp.zeros_like(value))

    def cost(self, d: int) -> Cost:
        """``d`` jvps, or the probes."""
        return Cost(jvp=d if self.num_probes is None else self.num_probes)


@dataclasses.dataclass(frozen=True)
class AlongScore(Product):
    """H s: how the score changes along itself. One jvp."""

    derives: ClassVar[tuple[Product, ...]] = (Jacobian(),)

    def __call__(self, local: Local) -> Float[Array, "..."]:
        """Compute ``H s``, in the shape of s."""
        s = local.linearization.value
        if Jacobian() in local.results:
            product = jnp.matmul(local.results[Jacobian()], s.reshape(-1), precision="highest")
            return product.reshape(s.shape)
        return local.linearization.jvp(s)

    def cost(self, d: int) -> Cost:
        """One jvp."""
        return Cost(jvp=1)


@dataclasses.dataclass(frozen=True)
class AlongGap(Product):
    """H_gap s_gap, with gap = this score minus the same model's under the null condition.

    Two jvps, one with each score, along the difference of the two.
    """

    def branches(self, branch: Branch) -> tuple[Branch, ...]:
        """The null condition's score."""
        return (branch._replace(condition="null"),)

    def __call__(self, local: Local) -> Float[Array, "..."]:
        """Compute ``(H_given - H_null)(s_given - s_null)``."""
        (null,) = self.branches(local.branch)
        given, other = local.linearization, local.linearizations[null]
        direction = given.value - other.value
        return given.jvp(direction) - other.jvp(direction)

    def cost(self, d: int) -> Cost:
        """Two jvps."""
        return Cost(jvp=2)


@dataclasses.dataclass(frozen=True)
class TraceGap(Product):
    """tr H_gap, from probes: the difference of two traces is far smaller than either.

    The exact one is the difference of two exact ``Trace``, which others may want.
    """

    num_probes: int

    def branches(self, branch: Branch) -> tuple[Branch, ...]:
        """The null condition's score."""
        return (branch._replace(condition="null"),)

    def __post_init__(self):
        Trace(self.num_probes)  # refuses what it cannot take

    def __call__(self, local: Local) -> Measured:
        """Compute it by Hutchinson's estimator with random signs, common to all images."""
        (null,) = self.branches(local.branch)
        given, other = local.linearization, local.linearizations[null]
        found = trace_hutchinson(
            lambda v: given.jvp(v) - other.jvp(v),
            given.point,
            local.key,
            num_products=self.num_probes,
        )
        return Measured(found.value, found.standard_error)

    def cost(self, d: int) -> Cost:
        """Two jvps a probe."""
        return Cost(jvp=2 * self.num_probes)


@dataclasses.dataclass(frozen=True)
class Roundoff(Product):
    """How far rounding the point to its dtype can move the score: a score below has no direction.

    ``16 eps |H x|``, the threshold of ``memjax.p_laplacian``. One jvp.
    """

    derives: ClassVar[tuple[Product, ...]] = (Jacobian(),)

    def __call__(self, local: Local) -> Float[Array, ""]:
        """Compute it, in the units of the score."""
        point = local.linearization.point
        if Jacobian() in local.results:
            moved = jnp.matmul(local.results[Jacobian()], point.reshape(-1), precision="highest")
        else:
            moved = local.linearization.jvp(point)
        eps = float(jnp.finfo(point.dtype).eps)
        return ROUNDINGS * eps * jnp.sqrt(jnp.sum(moved * moved))

    def cost(self, d: int) -> Cost:
        """One jvp."""
        return Cost(jvp=1)
