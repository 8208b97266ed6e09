"""The rate d - d_eff at which the flow stretches volume, from Jacobian-vector products."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from memjax._core.checks import check_count
from memjax._core.chunked import chunked_map
from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.calculus.linearization import Linearization
from memjax.linalg.probes import rademacher
from memjax.linalg.trace import trace_hutchpp, trace_xnystrace

_FEWEST_PRODUCTS = {None: 0, "exact": 0, "hutchinson": 1, "hutchpp": 4, "xnystrace": 2}


class Rates(NamedTuple):
    """d - d_eff at one point and noise level.

    Attributes:
        values: independent estimates, whose mean is the estimate; one each for the methods that
            make a single one of all their products.
        standard_error: of the mean.
        status: a ``Status``.
    """

    values: Float[Array, " m"]
    standard_error: Float[Array, ""]
    status: Int[Array, ""]


class Divergence(NamedTuple):
    """How tr M is found, M = I + sigma^2 J, at every point of a trajectory. Static."""

    method: str | None
    num_products: int
    chunk_size: int

    def check(self) -> None:
        """Refuse an unknown method or a size out of range."""
        if self.method not in _FEWEST_PRODUCTS:
            expected = ", ".join(str(name) for name in _FEWEST_PRODUCTS)
            raise InputError(f"divergence: expected one of {expected}, got {self.method!r}")
        check_count("num_products", self.num_products, _FEWEST_PRODUCTS[self.method])
        check_count("chunk_size", self.chunk_size, 1)

    @property
    def stochastic(self) -> bool:
        """Whether a key is needed."""
        return self.method not in (None, "exact")

    @property
    def num_values(self) -> int:
        """How many independent estimates are followed side by side."""
        return {None: 0, "hutchinson": self.num_products}.get(self.method, 1)

    def products(self, d: int) -> tuple[int, int]:
        """Products J v and J^T u at one point in d dimensions."""
        jvp = {None: 0, "exact": d, "hutchinson": self.num_products}.get(self.method)
        jvp = min(d, self.num_products) if jvp is None else jvp
        return jvp, jvp if self.method == "xnystrace" else 0

    def draw(self, key: PRNGKeyArray | None, like: Float[Array, "..."]) -> Array | None:
        """The randomness of one trajectory, drawn once: the field along it is then one field."""
        if not self.stochastic:
            return None
        if key is None:
            raise InputError(f"key: expected a key for divergence={self.method!r}, got None")
        return rademacher(key, self.num_products, like) if self.method == "hutchinson" else key

    def rates(self, lin: Linearization, sigma: Float[Array, ""], drawn: Array | None) -> Rates:
        """The rate at the point of a linearization of the score."""
        x, square, size = lin.point, sigma * sigma, self.chunk_size
        exact, ok = jnp.zeros((), x.dtype), jnp.int32(Status.OK)
        # As -sigma^2 tr J where one can: d and d_eff may differ by little.
        if self.method is None:
            return Rates(jnp.zeros(0, x.dtype), exact, ok)
        if drawn is None:
            return Rates(-square * lin.trace(chunk_size=size)[None], exact, ok)
        if self.method == "hutchinson":
            # Signs have |v|^2 = d: for them too v^T (I - M) v = -sigma^2 v^T J v.
            forms = chunked_map(lambda v: jnp.sum(v * lin.jvp(v)), drawn, chunk_size=size)
            values = -square * forms
            return Rates(values, mean_error(values), ok)
        if self.method == "hutchpp":
            estimate = trace_hutchpp(
                lambda v: v + square * lin.jvp(v), x, drawn, self.num_products, chunk_size=size
            )
        else:
            estimate = trace_xnystrace(
                lambda v: v + square * lin.symmetric(v),
                x,
                drawn,
                self.num_products,
                chunk_size=size,
            )
        return Rates((x.size - estimate.value)[None], estimate.standard_error, estimate.status)


def mean_error(values: Float[Array, " m"]) -> Float[Array, ""]:
    """Standard error of the mean of independent values; infinite for a single one."""
    m = values.shape[0]
    if m == 1:
        return jnp.full((), jnp.inf, values.dtype)
    return jnp.std(values, ddof=1) / m**0.5
