"""Likelihood of a point under a score, by the probability flow to noise."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from memjax._core.checks import check_count, check_positive, is_traced
from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.diffusion._divergence import mean_error
from memjax.diffusion.adapters import Scalar, callable_pytree
from memjax.diffusion.flow import ProbabilityFlow

Prior = Callable[[Float[Array, "..."], Float[Array, ""]], Float[Array, ""]]
"""``(x, sigma) -> log p_sigma(x)`` in nats, for large sigma."""


class LogLikelihood(NamedTuple):
    """A log-density and its two parts.

    Attributes:
        value: log p_sigma0(x), in nats, of a density on R^d.
        standard_error: of ``value``, from the probes (see ``Flow``).
        log_volume: the part that the flow adds, in nats.
        log_prior: the log-density of the latent point, in nats.
        point: the latent point x(sigma1).
        status: a ``Status``, that of the flow.
        cost: network products used.
    """

    value: Float[Array, ""]
    standard_error: Float[Array, ""]
    log_volume: Float[Array, ""]
    log_prior: Float[Array, ""]
    point: Float[Array, "..."]
    status: Int[Array, ""]
    cost: Cost


def log_likelihood(
    flow: ProbabilityFlow, *, data_std: Scalar = 0.0, prior: Prior | None = None
) -> Callable[..., LogLikelihood]:
    """Log-density of the noisy data at x, by the change of variables of the probability flow.

        log p_sigma0(x) = log p_sigma1(x(sigma1)) + log |det dx(sigma1)/dx(sigma0)|

    The density is that of data with noise sigma0; no value at zero noise is extrapolated.

    Args:
        flow: made by ``probability_flow`` with a ``divergence``, from sigma0 to a larger sigma1
            (any other if a ``prior`` is given).
        data_std: standard deviation of the data per coordinate (``Model.data_std``), a number or
            traced: without a ``prior``, p_sigma1 is taken for N(0, (sigma1^2 + data_std^2) I).
        prior: log p_sigma1, a callable pytree ``(x, sigma) -> nats``; of an exact density its
            ``log_prob``.

    Returns:
        A function ``(x, key=None) -> LogLikelihood`` of one point; the key for a stochastic
        divergence.

    Raises:
        InputError: the flow follows no volume, or goes towards data without a ``prior``.

    Error of the normal prior: for data of mean m and covariance C, to lowest order
    x.m/sigma1^2 + x^T (C - data_std^2 I) x/(2 sigma1^4) less its mean, for a typical latent x a
    number of standard deviation |m|/sigma1 and about |C - data_std^2 I|_F/(sqrt(2) sigma1^2): for
    image data in [-1, 1] (|m| about 0.3 sqrt(d), d = 3072) at sigma1 = 80 a tenth of a nat, at
    sigma1 = 5 several. It is nearly the same for similar images, and cancels in ratios.

    Cost: that of the flow.

    >>> import jax.numpy as jnp
    >>> from memjax.densities import Gaussian
    >>> from memjax.diffusion import probability_flow
    >>> density, x = Gaussian(jnp.zeros(2), 1.0), jnp.array([0.5, -1.0])
    >>> flow = probability_flow(density, 0.1, 10.0, divergence="exact", solver="rk4")
    >>> out = log_likelihood(flow, data_std=1.0)(x)
    >>> bool(jnp.abs(out.value - density.log_prob(x, 0.1)) < 1e-4)
    True

    References:
        Song et al. (2021), arXiv:2011.13456, section 4.3 and Appendix D.2.
    """
    _check_flow("flow", flow)
    log_prior = _log_prior("flow", flow, data_std, prior)

    def evaluate(x: Float[Array, "..."], key: PRNGKeyArray | None = None) -> LogLikelihood:
        out = flow(x, key)
        assert out.log_volume is not None
        assert out.standard_error is not None
        value = log_prior(out.point)
        return LogLikelihood(
            value + out.log_volume,
            out.standard_error,
            out.log_volume,
            value,
            out.point,
            out.status,
            out.cost,
        )

    return evaluate


class LogLikelihoodRatio(NamedTuple):
    """Difference of two log-densities at one point, and its parts.

    Attributes:
        value: log p(x) - log p_reference(x), in nats.
        standard_error: of ``value``, from the probes that both flows share.
        log_volume: difference of the log volumes, in nats.
        log_prior: difference of the log-densities of the two latent points, in nats.
        status: a ``Status``: that of the first flow that is not ``OK``.
        cost: network products used by both.
    """

    value: Float[Array, ""]
    standard_error: Float[Array, ""]
    log_volume: Float[Array, ""]
    log_prior: Float[Array, ""]
    status: Int[Array, ""]
    cost: Cost


def log_likelihood_ratio(
    flow: ProbabilityFlow,
    reference: ProbabilityFlow,
    *,
    data_std: Scalar = 0.0,
    prior: Prior | None = None,
) -> Callable[..., LogLikelihoodRatio]:
    """Log-likelihood of x under one flow less that under another, with the same probes.

    Simple images (smooth, empty) have a large likelihood under every model; a ratio is free of
    that. Against a model of other data, ``reference`` is its flow between the same levels;
    conditional against unconditional, the same score's with ``condition=None``.

    Args:
        flow: made by ``probability_flow`` with a ``divergence``.
        reference: another, between the same levels, with the same divergence and number of
            products.
        data_std: as for ``log_likelihood``; for both.
        prior: as for ``log_likelihood``; for both.

    Returns:
        A function ``(x, key=None) -> LogLikelihoodRatio`` of one point. For ``"hutchinson"`` the
        standard error is that of the mean of paired differences, one for each probe, far below
        that of either likelihood where the models agree; otherwise the upper bound, the sum.

    Raises:
        InputError: a flow follows no volume, goes towards data without a ``prior``, or their
            divergences differ.

    Cost: that of both flows.
    """
    _check_flow("flow", flow)
    _check_flow("reference", reference)
    if flow.plan.divergence != reference.plan.divergence:
        raise InputError(
            f"reference: expected the divergence of flow, {flow.plan.divergence}, "
            f"got {reference.plan.divergence}"
        )
    log_priors = [
        _log_prior(name, one, data_std, prior)
        for name, one in (("flow", flow), ("reference", reference))
    ]

    def evaluate(x: Float[Array, "..."], key: PRNGKeyArray | None = None) -> LogLikelihoodRatio:
        ours, theirs = flow(x, key), reference(x, key)
        assert ours.log_volumes is not None
        assert ours.standard_error is not None
        assert theirs.log_volumes is not None
        assert theirs.standard_error is not None
        differences = ours.log_volumes - theirs.log_volumes
        error = ours.standard_error + theirs.standard_error
        if flow.plan.divergence.method == "hutchinson":
            error = mean_error(differences)
        log_volume = jnp.mean(differences)
        log_prior = log_priors[0](ours.point) - log_priors[1](theirs.point)
        return LogLikelihoodRatio(
            log_volume + log_prior,
            error,
            log_volume,
            log_prior,
            jnp.where(ours.status == Status.OK, theirs.status, ours.status),
            ours.cost.plus(theirs.cost),
        )

    return evaluate


def bits_per_dim(
    log_prob: Float[Array, "..."], num_dims: int, *, bin_width: float = 2 / 255
) -> Float[Array, "..."]:
    """Bits per dimension of discrete data from a log-density: the number images are compared by.

        bits = -(log p + d log w)/(d log 2)

    where p w^d approximates the probability of a bin of width w around x. For 8-bit pixels
    k = 0..255 in the data's own scaling: w = 2/255 for x = k/127.5 - 1 (as memjax reads images),
    1/255 for x = k/255, 1/128 for [-1, 1] cut into 256 bins. The offset -log2(w) is then 6.99,
    7.99 or 7: in published code 7 for data in [-1, 1].

    Args:
        log_prob: log-density in nats, at data in that scaling: ``log_likelihood(...)(x).value``.
        num_dims: d, the number of coordinates. Static.
        bin_width: w, in units of x. Static.

    Returns:
        Bits per dimension, in the shape of ``log_prob``. For a bound on the discrete likelihood
        x must have uniform noise of one bin added to it (dequantization); at whole pixel values
        it may be anything. Noise sigma0 of the density below w makes little difference.

    Raises:
        InputError: ``num_dims`` is below 1, or ``bin_width`` not positive.

    >>> import jax.numpy as jnp
    >>> float(bits_per_dim(jnp.array(0.0), 10, bin_width=2**-7))
    7.0

    References:
        Song et al. (2021), arXiv:2011.13456, Appendix D.2; Theis, van den Oord, Bethge (2016),
        arXiv:1511.01844, section 3.1.
    """
    check_count("num_dims", num_dims, 1)
    check_positive("bin_width", bin_width)
    return -(log_prob / num_dims + math.log(bin_width)) / math.log(2)


def _check_flow(name: str, flow: ProbabilityFlow) -> None:
    if flow.plan.divergence.method is None:
        raise InputError(f"{name}: expected one made with a divergence, got divergence=None")


def _log_prior(
    name: str, flow: ProbabilityFlow, data_std: Scalar, prior: Prior | None
) -> Callable[[Float[Array, "..."]], Float[Array, ""]]:
    """Log p_sigma1 of the flow's last level."""
    ratio = flow.log_ratio
    if prior is None and not is_traced(ratio) and float(ratio) < 0:
        raise InputError(f"{name}: expected sigma1 above sigma0, or a prior for sigma1")
    if not isinstance(data_std, jax.Array) and not 0 <= data_std < math.inf:
        raise InputError(f"data_std: expected a number >= 0, got {data_std}")
    known = None if prior is None else callable_pytree(prior, "prior")

    def evaluate(x):
        sigma = flow.sigma1.astype(x.dtype)
        if known is not None:
            return known(x, sigma)
        variance = sigma**2 + jnp.asarray(data_std, x.dtype) ** 2
        return -(jnp.sum(x * x) / variance + x.size * jnp.log(2 * math.pi * variance)) / 2

    return evaluate
