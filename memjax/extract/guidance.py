"""SIDE: sampling guided by a classifier of surrogate labels, all weights under one program."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from memjax._core.checks import check_count
from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax.diffusion.combine import classifier_guided
from memjax.diffusion.model import Model
from memjax.diffusion.sampling import Method, noise_levels, sample


class GuidedSamples(NamedTuple):
    """n samples, each guided towards a cluster.

    Attributes:
        samples: in the space of the score.
        label: the cluster of each.
        cost: network products of all samples together.
        num_gradients: gradients of the classifier, of all together.
    """

    samples: Float[Array, "n *event"]
    label: Int[np.ndarray, "n"]
    cost: Cost
    num_gradients: int


def guided_samples(
    model: Model,
    log_prob: Callable[..., Float[Array, ""]],
    num_samples: int,
    weight: float | int,
    *,
    num_clusters: int,
    key: int | PRNGKeyArray,
    window: tuple[float | int, float | int] | None = None,
    limit: float | int | None = None,
    normalize: bool = False,
    method: Method = "heun",
    num_steps: int = 18,
    chunk_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GuidedSamples:
    """Draw samples by the probability flow of s(x, sigma) + w grad_x log p(c | x, sigma).

    The cluster c of every sample is drawn uniformly. Sample i starts at the same noise and goes
    for the same cluster whatever the weight, and a program compiled for one weight serves all:
    call it in a loop over weights, of which 0 is unguided sampling.

    Args:
        model: the model that is examined, taken without conditions.
        log_prob: callable pytree ``(x, sigma, c) -> log p(c | x, sigma)`` in nats, c int32 in
            0..``num_clusters`` - 1, such as ``memjax.training.train_classifier`` gives.
        num_samples: n.
        weight: w >= 0, the paper's lambda. Traced.
        num_clusters: k.
        key: a seed or a typed key, of clusters and noises.
        window: noise levels (low, high) between which samples are guided; ``None`` for all.
        limit: bound of the push relative to the score, see ``memjax.classifier_guided``.
        normalize: push in units of the score, see there.
        method: ``"heun"`` or ``"ddim"``, as in ``memjax.sample``.
        num_steps: steps of it.
        chunk_size: samples computed together, as in ``memjax.sample``.
        progress: called as ``progress(done, num_samples)`` after every chunk.

    Returns:
        `GuidedSamples`. A sample is NaN where the score or the classifier is.

    Raises:
        InputError: an argument out of range.

    Cost: of a sample, the evaluations of ``memjax.sample``, and of these as many gradients of the
    classifier as lie in the window.

    References:
        SIDE: surrogate conditional data extraction from diffusion models, arXiv:2410.02467v7,
        Algorithm 1, Part 2 (the printed equation 1 drops lambda, the algorithm has it).
    """
    check_count("num_samples", num_samples, 1)
    check_count("num_clusters", num_clusters, 1)
    if not 0 <= weight < np.inf:
        raise InputError(f"weight: expected a number of at least 0, got {weight}")
    score = classifier_guided(
        model, log_prob, None, window=window, limit=limit, normalize=normalize
    )
    guided = Model(
        score,
        model.event_shape,
        sigma_min=model.sigma_min,
        sigma_max=model.sigma_max,
        data_std=model.data_std,
    )
    label = _draw_labels(derive_key(key, "clusters"), num_samples, num_clusters)
    samples = sample(
        guided,
        num_samples,
        key=derive_key(key, "noise"),
        conditions=(label, jnp.full(num_samples, weight, jnp.float32)),
        method=method,
        num_steps=num_steps,
        chunk_size=chunk_size,
        progress=progress,
    )
    levels = noise_levels(model.sigma_max, model.sigma_min, num_steps)[:-1]
    if method == "heun":
        levels = np.append(levels, levels[1:])
    low, high = (0.0, np.inf) if window is None else window
    pushed = int(np.sum((levels > low) & (levels < high)))
    return GuidedSamples(
        samples, np.asarray(label), Cost(forward=num_samples * len(levels)), num_samples * pushed
    )


@partial(jax.jit, static_argnames=("num_samples", "num_clusters"))
def _draw_labels(key: PRNGKeyArray, num_samples: int, num_clusters: int) -> Int[Array, "n"]:
    """Uniform in 0..num_clusters - 1, the i-th from a key of its own."""

    def one(row):
        return jax.random.randint(jax.random.fold_in(key, row), (), 0, num_clusters, jnp.int32)

    return jax.vmap(one)(jnp.arange(num_samples, dtype=jnp.uint32))
