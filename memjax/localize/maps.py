"""Which pixels a condition pins: differences of curvature, and of scores, at one noise level."""

import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from memjax._core.checks import check_count, check_floating, check_positive
from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.status import Status, finite_status
from memjax.diffusion.adapters import Scalar
from memjax.diffusion.combine import Score, at
from memjax.linalg.choice import diagonal_auto
from memjax.linalg.diagonal import diagonal_hutchinson
from memjax.linalg.exact import diagonal_exact
from memjax.linalg.lattice import diagonal_lattice

Method = Literal["exact", "lattice", "hutchinson", "auto"]

EXACT_SIZE = 4096
"""Entries up to which diagonals are exact unless told otherwise."""


class PixelMap(NamedTuple):
    """A signed number for every entry of an image, with its standard error.

    Attributes:
        value: in the shape of the image, without dimension.
        standard_error: of each entry; zero where nothing is random.
        summed: the sum over channels (the last axis of an image of rank 3 or more), as the
            papers' maps are; ``value`` itself for arrays of lower rank.
        summed_standard_error: of each pixel. From one point and random probes it is an upper
            bound: channels of one pixel may err alike.
    """

    value: Float[Array, "..."]
    standard_error: Float[Array, "..."]
    summed: Float[Array, "..."]
    summed_standard_error: Float[Array, "..."]

    def times(self, factor: Scalar) -> "PixelMap":
        """The map in other units, such as ``maps.curvature_unit(alpha)``."""
        factor = jnp.asarray(factor, self.value.dtype)
        return PixelMap(*(entry * factor for entry in self))


class Maps(NamedTuple):
    """Every map at one noise level. Larger = more pinned by the condition.

    With rho = diag(I + sigma^2 H), H = ds/dx, the share of a pixel's variance that is left once x
    is seen (1: free at this noise; 0: pinned), and s the score of the model under the condition.

    Attributes:
        sigma: the noise level.
        curvature: 1 - rho = sigma^2 diag(-H): large wherever images vary little, stored or not.
        curvature_over_null: rho_null - rho, against the same model without condition; ``None``
            where there is no condition.
        curvature_over_baseline: rho_baseline - rho, against another model under the same
            condition, such as a less trained one; ``None`` without a baseline.
        score_over_null: sigma^2 (s - s_null)^2, a proxy that needs no products: its mean over
            conditions c given x is that of ``curvature_over_null`` if the scores are exact.
        score_over_baseline: sigma^2 (s - s_baseline)^2, an analogy to it without such a law.
        status: ``OK``, or ``NONFINITE``, and then all maps are NaN.
        cost: network products used.
    """

    sigma: Float[Array, "..."]
    curvature: PixelMap
    curvature_over_null: PixelMap | None
    curvature_over_baseline: PixelMap | None
    score_over_null: PixelMap | None
    score_over_baseline: PixelMap | None
    status: Int[Array, "..."]
    cost: Cost

    def curvature_unit(self, alpha: Scalar = 1.0) -> Float[Array, "..."]:
        """Factor 1/(alpha sigma)^2 from these maps to the papers' diag(-H) and (s - s')^2.

        For alpha = 1 in our coordinates x; for the alpha_t of a schedule in those of the process
        x_t = alpha_t x, whose noise is alpha_t sigma. (The code released with the paper leaves
        out 1/(alpha sigma) in its curvature maps, not in its score maps.)
        """
        return 1 / (jnp.asarray(alpha, self.sigma.dtype) * self.sigma) ** 2


def curvature_maps(
    score: Score,
    x: Float[Array, "..."],
    sigma: Scalar,
    condition: PyTree = None,
    *,
    baseline: Score | None = None,
    key: PRNGKeyArray | None = None,
    method: Method | None = None,
    num_products: int = 64,
    chunk_size: int | None = 64,
) -> Maps:
    """Every map at one point, from one linearization of all branches with common probes.

    The branches are the score at ``condition``, at the null condition, and the baseline's at
    ``condition``. Each map is the diagonal of a *difference* of their Jacobians, estimated as
    such: what the branches share cancels in every product, with its error.

    Args:
        score: ``(x, sigma, condition=None) -> s`` in EDM coordinates; a ``Model`` will do.
        x: the noisy point, one sample; channels are the last axis if its rank is 3 or more.
        sigma: noise level, > 0. Traced.
        condition: pytree of arrays; ``None`` for a model without, and no null branch.
        baseline: another score of the same conditions, such as an earlier checkpoint's.
        key: of the probes; ``None`` for the exact method only.
        method: ``"exact"`` (a product for every entry), ``"lattice"``, ``"hutchinson"`` or
            ``"auto"`` as in ``memjax.linalg``; ``None`` for exact up to 4,096 entries and lattice
            beyond. Static.
        num_products: probes of an estimate; from the number of entries on it is exact. Static.
        chunk_size: products evaluated together.

    Returns:
        `Maps`.

    Raises:
        InputError: an argument out of range, or an estimate without key.

    Without raising: not finite numbers give ``NONFINITE`` and maps of NaN.

    Accuracy: equal branches give exactly zero. Cost: as ``maps_cost`` says, before ``vmap``.

    >>> import jax.numpy as jnp
    >>> world = lambda x, sigma, c=None: -x / (sigma**2 + (1.0 if c is None else c))
    >>> maps = curvature_maps(world, jnp.zeros(2), 1.0, jnp.array([1.0, 0.0]))
    >>> maps.curvature_over_null.value.tolist()
    [0.0, 0.5]

    References:
        Kim, Lee (2026), arXiv:2605.26756, equations 1, 2, 5 and 6 (there not multiplied by
        sigma^2); the second-order Tweedie formula.
    """
    check_floating("x", x)
    check_positive("sigma", sigma)
    method = _method(method, x.size, num_products)
    if key is None and method != "exact":
        raise InputError(f"key: expected one for the estimate {method!r}, got None")
    key = jax.random.key(0) if key is None else key  # which the exact method does not use
    sigma = jnp.asarray(sigma, x.dtype)
    fields = [at(score, sigma, condition)]
    fields += [at(score, sigma)] if condition is not None else []
    fields += [at(baseline, sigma, condition)] if baseline is not None else []

    def branches(point):
        return jnp.stack([field(point) for field in fields])

    scores, tangents = jax.linearize(branches, x)
    others = jnp.eye(len(fields), dtype=x.dtype)
    signed = others.at[:, 0].add(-1).at[0, 0].set(-1)

    def diagonal(signs):
        def product(v):
            mixed = jnp.tensordot(signs, tangents(v), 1, precision="highest")
            return sigma**2 * mixed

        if method == "exact":
            value = diagonal_exact(product, x, chunk_size=chunk_size)
            return value, jnp.zeros_like(value), jnp.int32(Status.OK)
        options = {"num_products": num_products, "chunk_size": chunk_size}
        if method == "auto":

            def transposed(u):
                return jax.linear_transpose(product, x)(u)[0]

            found = diagonal_auto(product, x, key, rmatvec=transposed, **options).estimate
        else:
            estimator = diagonal_lattice if method == "lattice" else diagonal_hutchinson
            found = estimator(product, x, key, **options)
        return (
            found.value.astype(x.dtype),
            found.standard_error.astype(x.dtype),
            found.status.astype(jnp.int32),
        )

    # Only the signs differ: the products are computed once for all rows of them.
    value, error, status = jax.vmap(diagonal)(signed)
    squared = (sigma * (scores - scores[:1])) ** 2
    bad = (finite_status(value, scores) != Status.OK) | jnp.any(status != Status.OK)

    def pixel_map(value, error):
        value, error = jnp.where(bad, jnp.nan, value), jnp.where(bad, jnp.nan, error)
        if x.ndim < 3:
            return PixelMap(value, error, value, error)
        # Var sum_c e_c <= 2 sum_c Var e_c for random signs and a symmetric operator, since the
        # covariance of e_c and e_c' is A_cc'^2, a part of either variance.
        bound = min(x.shape[-1], 2) * jnp.sum(error**2, -1)
        return PixelMap(value, error, value.sum(-1), jnp.sqrt(bound))

    curvature, *curvatures = (pixel_map(value[i], error[i]) for i in range(len(fields)))
    proxies = [pixel_map(row, jnp.zeros_like(row)) for row in squared[1:]]
    null = 0 if condition is not None else None
    trained = len(fields) - 2 if baseline is not None else None
    return Maps(
        sigma=sigma,
        curvature=curvature,
        curvature_over_null=None if null is None else curvatures[null],
        curvature_over_baseline=None if trained is None else curvatures[trained],
        score_over_null=None if null is None else proxies[null],
        score_over_baseline=None if trained is None else proxies[trained],
        status=jnp.where(bad, jnp.int32(Status.NONFINITE), jnp.int32(Status.OK)),
        cost=Cost(*map(jnp.int32, maps_cost(x.size, len(fields), method, num_products))),
    )


def maps_cost(
    size: int, num_branches: int, method: Method | None = None, num_products: int = 64
) -> Cost:
    """Network products of ``curvature_maps`` at one point.

    Args:
        size: entries of x.
        num_branches: 1, plus 1 with a condition, plus 1 with a baseline.
        method: as there.
        num_products: as there.

    Returns:
        One evaluation and ``min(num_products, size)`` jvps a branch. ``"auto"`` may choose other
        probes for every map, and then shares only its pilot; half its products are transposed.

    Raises:
        InputError: an argument out of range.
    """
    method = _method(method, size, num_products)
    m, half = num_products, num_products // 2
    if method == "auto" and 8 <= m < size:
        pilot = min(1 << (m // 4).bit_length() - 1, 16)
        products = Cost(0, pilot + num_branches * (half - pilot), num_branches * (m - half))
    else:
        products = Cost(0, size if method == "exact" else m, 0)
    return products.plus(Cost(1)).times(num_branches)


def _method(method: Method | None, size: int, num_products: int) -> Method:
    check_count("num_products", num_products, 1)
    if method not in (None, *get_args(Method)):
        raise InputError(f"method: expected one of {', '.join(get_args(Method))}, got {method!r}")
    if method is None:
        method = "exact" if size <= EXACT_SIZE else "lattice"
    return "exact" if method in ("lattice", "auto") and num_products >= size else method


def mean_over_draws(maps: Maps) -> Maps:
    """The mean of maps over their leading axis, with the spread of the draws as its error.

    Args:
        maps: with n draws along the leading axis of every field. Draws with independent probes:
            then the spread contains the probes' error too.

    Returns:
        Mean maps. Standard errors are those of a mean of n independent draws; with n = 1 the
        draw's own. The status is ``NONFINITE`` if that of a draw is. Costs are added up.
    """
    n = maps.status.shape[0]

    def mean(of: PixelMap | None) -> PixelMap | None:
        if of is None:
            return None
        if n == 1:
            return PixelMap(*(entry[0] for entry in of))
        scale = math.sqrt(n)
        return PixelMap(
            of.value.mean(0),
            of.value.std(0, ddof=1) / scale,
            of.summed.mean(0),
            of.summed.std(0, ddof=1) / scale,
        )

    return Maps(
        maps.sigma[0],
        mean(maps.curvature),  # type: ignore[arg-type]: never None
        mean(maps.curvature_over_null),
        mean(maps.curvature_over_baseline),
        mean(maps.score_over_null),
        mean(maps.score_over_baseline),
        maps.status.max(0),
        Cost(*(count.sum(0) for count in maps.cost)),  # type: ignore[union-attr]: arrays here
    )


def over_others(curvature: PixelMap) -> PixelMap:
    """How much more a row pins each pixel than the other rows do: mean_j rho_j - rho_i, j != i.

    The baseline without a second model, and without a null condition that knows what is stored:
    the mean retained variance under other prompts, at their own images. It supposes that a pixel
    means the same in all images (digits, faces, X-rays; of natural images, only its place).

    Args:
        curvature: ``Maps.curvature`` of n >= 2 rows along the leading axis: the rows of interest
            and others to compare them with. A row whose map is NaN is compared with nobody.

    Returns:
        The map of every row; its standard error counts the rows as independent.

    Raises:
        InputError: fewer than 2 rows.

    >>> import jax.numpy as jnp
    >>> one_minus_rho, exact = jnp.array([[0.9], [0.3], [0.1]]), jnp.zeros((3, 1))
    >>> rows = PixelMap(one_minus_rho, exact, one_minus_rho, exact)
    >>> [round(float(v), 2) for v in over_others(rows).value[:, 0]]
    [0.7, -0.2, -0.5]

    References:
        Ours, after the comparison with an underfitted model of Kim, Lee (2026), arXiv:2605.26756.
    """
    rows = curvature.value.shape[0]
    if rows < 2:
        raise InputError(f"curvature: expected at least 2 rows to compare, got {rows}")

    def difference(value, error):
        known = jnp.isfinite(value)
        value_or_0, variance = jnp.where(known, value, 0), jnp.where(known, error, 0) ** 2
        present = known.astype(value.dtype)
        others = jnp.sum(present, 0)[None] - present
        mean = (jnp.sum(value_or_0, 0)[None] - value_or_0) / others
        spread = (jnp.sum(variance, 0)[None] - variance) / others**2
        return value - mean, jnp.sqrt(error**2 + spread)

    return PixelMap(
        *difference(curvature.value, curvature.standard_error),
        *difference(curvature.summed, curvature.summed_standard_error),
    )
