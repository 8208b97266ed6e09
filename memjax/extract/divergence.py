"""Memorization divergence: how much closer one model is to a set of images than another."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from memjax._core.chunked import chunked_map
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax._core.status import Status
from memjax.diffusion.adapters import callable_pytree
from memjax.diffusion.combine import Score
from memjax.diffusion.flow import probability_flow
from memjax.diffusion.likelihood import log_likelihood_ratio
from memjax.evaluate.intervals import check_open_unit


class DivergenceDifference(NamedTuple):
    """M(images; model) - M(images; reference), in nats an image.

    Attributes:
        value: the mean over images; negative where the model is closer to them.
        low: lower end of its interval.
        high: upper end.
        log_ratio: log p(y) - log p_reference(y) for every image; NaN where it could not be found.
        status: a ``Status`` for every image.
    """

    value: float
    low: float
    high: float
    log_ratio: Float[np.ndarray, "n"]
    status: Int[np.ndarray, "n"]


def divergence_difference(
    score: Score,
    reference: Score,
    images: Float[Array, "n ..."],
    sigma: float | int,
    sigma_max: float | int,
    *,
    key: int | PRNGKeyArray,
    conditions: PyTree = None,
    reference_conditions: PyTree = None,
    data_std: float | int = 0.0,
    divergence: str = "hutchinson",
    num_products: int = 16,
    num_steps: int = 32,
    confidence: float = 0.95,
    chunk_size: int = 64,
) -> DivergenceDifference:
    """Difference of the memorization divergences of two models for one set of images.

        M(D; p) = KL(q || p),   q = (1/n) sum_i N(x_i, sigma^2 I)
        M(D; p) - M(D; p_ref) = E_{y ~ q} [log p_ref(y) - log p(y)]

    The entropy of q, which makes M itself diverge as sigma -> 0 for every model, cancels: what
    remains is a mean ratio of likelihoods, found by the probability flow of both scores from
    y_i = x_i + sigma z_i with the same probes. A negative difference says that the first model
    has stored more of the images, or only that it fits their kind better: compare it with the
    difference over held-out images.

    Args:
        score: callable ``(x, sigma, condition) -> s`` of the model, such as a `Model`, or one
            conditioned on a cluster.
        reference: of the other, such as the same model without its condition.
        images: x_i, one a row.
        sigma: noise level of q and of both densities, > 0.
        sigma_max: level at which both densities are taken for normal.
        key: a seed or a typed key, of z and probes; image i has its own.
        conditions: of the first score, pytree of arrays with a leading axis of n, or ``None``.
        reference_conditions: of the reference.
        data_std: standard deviation of the data per coordinate, for the normal density at
            ``sigma_max`` (``Model.data_std``).
        divergence: ``"hutchinson"`` or ``"exact"``, see ``memjax.probability_flow``.
        num_products: probes.
        num_steps: of Heun's rule.
        confidence: of the interval, in (0, 1).
        chunk_size: images together. Static.

    Returns:
        `DivergenceDifference`; its interval is Student's over the images whose status is OK,
        (-inf, inf) below two.

    Raises:
        InputError: an argument out of range, or conditions without one row per image.

    Cost: 2 (2 ``num_steps`` + 1) evaluations an image with ``num_products`` jvps each (d for
    ``"exact"``).

    >>> import jax.numpy as jnp
    >>> import memjax as mj
    >>> narrow, wide = (mj.Gaussian(jnp.zeros(2), jnp.full(2, v)) for v in (0.1, 1.0))
    >>> found = divergence_difference(narrow, wide, jnp.zeros((8, 2)), 0.1, 20.0, key=0)
    >>> found.value < 0
    True

    References:
        SIDE: surrogate conditional data extraction from diffusion models, arXiv:2410.02467v7,
        Definition 1 and Theorem 1 (conditioning on an informative label does not raise M).
    """
    check_open_unit("confidence", confidence)
    if divergence not in ("hutchinson", "exact"):
        raise InputError(f"divergence: expected 'hutchinson' or 'exact', got {divergence!r}")
    for name, given in (("conditions", conditions), ("reference_conditions", reference_conditions)):
        for leaf in jax.tree.leaves(given):
            if jnp.ndim(leaf) < 1 or len(leaf) != len(images):
                raise InputError(
                    f"{name}: expected {len(images)} rows, one per image, got shape "
                    f"{jnp.shape(leaf)}"
                )
    settings = {
        "divergence": divergence,
        "num_products": num_products,
        "solver": "heun",
        "num_steps": num_steps,
    }
    rows = (jnp.arange(len(images), dtype=jnp.uint32), images, conditions, reference_conditions)
    ratio, status = _log_ratios(
        callable_pytree(score, "score"),
        callable_pytree(reference, "reference"),
        rows,
        derive_key(key, "memorization divergence"),
        float(sigma),
        float(sigma_max),
        float(data_std),
        settings=tuple(settings.items()),
        chunk_size=chunk_size,
    )
    ratio, status = np.asarray(ratio, np.float64), np.asarray(status)
    known = ratio[status == Status.OK]
    if len(known) < 2:
        value = -float(known[0]) if len(known) else math.nan
        return DivergenceDifference(value, -math.inf, math.inf, ratio, status)
    from scipy.special import stdtrit

    half = stdtrit(len(known) - 1, (1 + confidence) / 2) * known.std(ddof=1) / len(known) ** 0.5
    value = -float(known.mean())
    return DivergenceDifference(value, value - float(half), value + float(half), ratio, status)


@partial(jax.jit, static_argnames=("sigma", "sigma_max", "data_std", "settings", "chunk_size"))
def _log_ratios(
    score, reference, rows, key, sigma, sigma_max, data_std, *, settings, chunk_size
) -> tuple[Float[Array, "n"], Int[Array, "n"]]:
    def one(row):
        index, image, condition, other = row
        own = jax.random.fold_in(key, index)
        noise = jax.random.normal(derive_key(own, "noise"), image.shape, jnp.float32)
        flows = (
            probability_flow(f, sigma, sigma_max, condition=given, **dict(settings))
            for f, given in ((score, condition), (reference, other))
        )
        compare = log_likelihood_ratio(*flows, data_std=data_std)
        out = compare(image + sigma * noise.astype(image.dtype), derive_key(own, "probes"))
        return out.value, out.status

    return chunked_map(one, rows, chunk_size=chunk_size)
