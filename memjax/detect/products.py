"""Products with the linearised score that detectors ask for."""

import dataclasses
from typing import ClassVar, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from memjax._core.checks import check_count
from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.calculus.p_laplace import ROUNDINGS
from memjax.detect.protocol import Branch, Local, Product
from memjax.linalg.lanczos import eigsh
from memjax.linalg.probes import rademacher
from memjax.linalg.quadrature import SpectralDensity, spectral_density
from memjax.linalg.trace import trace_hutchinson

EXACT_LIMIT = 1024
"""Numbers in an image up to which detectors take one product for each, unless told otherwise."""
NUM_PROBES = 16
"""Products of a trace that is estimated instead, unless told otherwise."""


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
    common to all images. Nothing is paid where the dense Jacobian is wanted at the same point, or
    a ``SpectralQuadrature`` (of the default steps) from as many probes: they are the same signs.
    """

    num_probes: int | None = None

    @property
    def derives(self) -> tuple[Product, ...]:  # type: ignore[override]
        """The dense Jacobian gives the exact trace; probes are probes whoever else asks."""
        if self.num_probes is None:
            return (Jacobian(),)
        return (SpectralQuadrature(self.num_probes),)

    def __post_init__(self):
        if self.num_probes is not None and self.num_probes < 2:
            raise InputError(
                f"num_probes: expected at least 2 (for an error), got {self.num_probes}"
            )

    def __call__(self, local: Local) -> Measured:
        """Compute it; the standard error of an exact trace is zero."""
        linearization, (known,) = local.linearization, self.derives
        if self.num_probes is None:
            dense = local.results.get(known)
            value = linearization.trace() if dense is None else jnp.trace(dense)
            return Measured(value, jnp.zeros_like(value))
        if known in local.results:
            found = local.results[known].trace(lambda nodes: nodes)
        else:
            found = trace_hutchinson(
                linearization.jvp, linearization.point, local.key, num_products=self.num_probes
            )
        return Measured(found.value, found.standard_error)

    def cost(self, d: int) -> Cost:
        """``d`` jvps, or the probes."""
        return Cost(jvp=d if self.num_probes is None else self.num_probes)


def _along(local: Local, v: Float[Array, "..."]) -> Float[Array, "..."]:
    """H v, from the dense Jacobian where that is wanted anyway."""
    if Jacobian() not in local.results:
        return local.linearization.jvp(v)
    product = jnp.matmul(local.results[Jacobian()], v.reshape(-1), precision="highest")
    return product.reshape(v.shape)


@dataclasses.dataclass(frozen=True)
class AlongScore(Product):
    """H s: how the score changes along itself. One jvp."""

    derives: ClassVar[tuple[Product, ...]] = (Jacobian(),)

    def __call__(self, local: Local) -> Float[Array, "..."]:
        """Compute ``H s``, in the shape of s."""
        return _along(local, local.linearization.value)

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
        moved = _along(local, point)
        eps = float(jnp.finfo(point.dtype).eps)
        return ROUNDINGS * eps * jnp.sqrt(jnp.sum(moved * moved))

    def cost(self, d: int) -> Cost:
        """One jvp."""
        return Cost(jvp=1)


@dataclasses.dataclass(frozen=True)
class Spectrum(Product):
    """Eigenvalues of (H + H^T)/2, all of them, from the dense Jacobian.

    The Hessian of a density is symmetric, the Jacobian of a learned score only nearly so.
    """

    uses: ClassVar[tuple[Product, ...]] = (Jacobian(),)

    def __call__(self, local: Local) -> Float[Array, " d"]:
        """Compute them, ascending; all NaN if an entry of H is not finite."""
        jacobian = local.results[Jacobian()]
        finite = jnp.all(jnp.isfinite(jacobian))
        symmetric = jnp.where(finite, jacobian / 2 + jacobian.T / 2, 0)
        values = jnp.linalg.eigvalsh(symmetric, symmetrize_input=False)
        return jnp.where(finite, values, jnp.nan)

    def cost(self, d: int) -> Cost:
        """Nothing beyond the dense Jacobian."""
        return Cost()


class Extremes(NamedTuple):
    """Eigenvalues at an end of a spectrum, the most extreme first.

    Attributes:
        values: approximate eigenvalues.
        residuals: an eigenvalue lies within this of each value.
        extreme: it was established that none is missing; see ``memjax.linalg.Eigenpairs``.
        status: ``memjax.Status.NONFINITE`` (values NaN) or ``OK``; how good the values are, the
            residuals say.
    """

    values: Float[Array, " k"]
    residuals: Float[Array, " k"]
    extreme: Bool[Array, ""]
    status: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class ExtremeEigenvalues(Product):
    """The k largest or smallest eigenvalues of (H + H^T)/2, without the matrix.

    All ``num_products`` Lanczos products are spent (fewer if the space is exhausted, which is
    the end of all error), so that every image costs the same.
    """

    k: int = 1
    which: str = "largest"
    num_products: int = 32

    def __post_init__(self):
        check_count("k", self.k, 1)
        check_count("num_products", self.num_products, self.k)
        if self.which not in ("largest", "smallest"):
            raise InputError(f"which: expected 'largest' or 'smallest', got {self.which!r}")

    def __call__(self, local: Local) -> Extremes:
        """Run Lanczos on the symmetrized products."""
        pairs = eigsh(
            local.linearization.symmetric,
            local.linearization.point,
            local.key,
            self.k,
            which=self.which,
            tol=0.0,
            max_products=self.num_products,
            basis_size=self.num_products,
        )
        bad = pairs.status == Status.NONFINITE
        status = jnp.where(bad, jnp.int32(Status.NONFINITE), jnp.int32(Status.OK))
        return Extremes(pairs.values, pairs.residuals, pairs.extreme, status)

    def cost(self, d: int) -> Cost:
        """A jvp and a vjp for each of at most d products."""
        products = min(self.num_products, d)
        return Cost(jvp=products, vjp=products)


@dataclasses.dataclass(frozen=True)
class SpectralQuadrature(Product):
    """Sums over the spectrum of (H + H^T)/2 without the matrix: stochastic Lanczos quadrature.

    From the random signs that ``Trace`` takes, which then follows: a rule is exact for v^T H v.
    """

    num_probes: int = 16
    num_steps: int = 16

    def __post_init__(self):
        check_count("num_probes", self.num_probes, 2)
        check_count("num_steps", self.num_steps, 1)

    def __call__(self, local: Local) -> SpectralDensity:
        """Compute a Gauss rule for each probe; the probes are common to all images."""
        linearization = local.linearization
        return spectral_density(
            linearization.symmetric,
            linearization.point,
            local.key,
            self.num_probes,
            self.num_steps,
            probes=lambda _, num, like: rademacher(local.key, num, like),
        )

    def cost(self, d: int) -> Cost:
        """A jvp and a vjp for each step of each probe, at most d steps."""
        products = self.num_probes * min(self.num_steps, d)
        return Cost(jvp=products, vjp=products)
