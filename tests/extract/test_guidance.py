"""Guided sampling against a mixture's exact classifier, whose conditional scores are known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.stats import chisquare, kstest

import memjax as mj
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax.evaluate.extraction import rarefaction
from memjax.extract import guided_samples

LOW, HIGH = 0.01, 40.0


def pair():
    return mj.ConditionalMixture([0.5, 0.5], jnp.array([[-1.5], [1.5]]), 0.25, [0, 1])


def model_of(density, sigma_min=LOW, sigma_max=HIGH):
    return mj.Model(
        density,
        (1,),
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        data_std=1.6,
        null_condition=getattr(density, "null_condition", None),
    )


def draw(weight, num_samples=64, **kwargs):
    density = pair()
    return guided_samples(
        model_of(density),
        density.log_class_prob,
        num_samples,
        weight,
        num_clusters=2,
        key=3,
        **kwargs,
    )


def test_the_exact_posterior_at_weight_one_samples_its_component(x64):
    found = draw(1.0, num_samples=400, num_steps=60)
    for label, mean in ((0, -1.5), (1, 1.5)):
        own = np.asarray(found.samples)[found.label == label, 0]
        assert 150 < len(own) < 250
        assert kstest((own - mean) / 0.5, "norm").pvalue > 0.01
    # The flow of the conditional score itself, from the same noises.
    direct = mj.sample(
        model_of(pair()),
        400,
        key=derive_key(3, "noise"),
        conditions=jnp.asarray(found.label, jnp.int32),
        num_steps=60,
    )
    np.testing.assert_allclose(found.samples, direct, atol=1e-9)


@pytest.mark.parametrize("weight", [0.0, 1.0, 5.0])
def test_guided_flow_against_an_independent_solver(weight, x64):
    """The closed-form gradient (2 m / v) (1 - sigmoid(2 m x / v)), integrated by SciPy."""
    found = draw(weight, num_samples=6, num_steps=400)
    start = guided_samples(model_of(still), flat, 6, 0.0, num_clusters=2, key=3).samples[:, 0]

    def slope(sigma, x, sign):
        v, m = 0.25 + sigma**2, 1.5
        posterior = (1 + np.tanh(m * x / v)) / 2  # of the component at +m
        score = (-x + m * (2 * posterior - 1)) / v
        toward = sign * (2 * m / v) * (1 - posterior if sign > 0 else posterior)
        return -sigma * (score + weight * toward)

    for x0, label, x in zip(start, found.label, found.samples[:, 0], strict=True):
        sign = 2 * label - 1
        end = solve_ivp(slope, (HIGH, LOW), [float(x0)], args=(sign,), rtol=1e-9, atol=1e-9)
        last = end.y[0, -1] + LOW * slope(LOW, end.y[0, -1], sign)  # the step to zero
        np.testing.assert_allclose(x, last, atol=2e-3)


def still(x, sigma, condition=None):
    """A score that is zero: samples stay where they start."""
    return jnp.zeros_like(x)


def flat(x, sigma, label):
    """A classifier that knows nothing."""
    return 0.0 * x[0]


def test_plain_guidance_overshoots_and_a_limit_holds_it_back():
    means = {}
    for name, kwargs in (("plain", {}), ("limited", {"limit": 0.5})):
        for weight in (1.0, 4.0, 16.0):
            found = draw(weight, **kwargs)
            toward = np.asarray(found.samples)[:, 0] * (2 * found.label - 1)
            means[name, weight] = toward.mean()
    assert means["plain", 1.0] < means["plain", 4.0] < means["plain", 16.0]
    assert means["plain", 16.0] > 1.5 + 0.3
    assert means["limited", 16.0] < means["plain", 16.0]


def test_weights_share_noises_clusters_and_the_program():
    traces, density = [], pair()

    def log_prob(x, sigma, label):
        traces.append(None)
        return density.log_class_prob(x, sigma, label)

    classifier = jax.tree_util.Partial(log_prob)
    model = model_of(density)
    found = [
        guided_samples(model, classifier, 8, w, num_clusters=2, key=3) for w in (0.0, 1.0, 2.5)
    ]
    once = len(traces)
    guided_samples(model, classifier, 8, 7.0, num_clusters=2, key=3)
    assert len(traces) == once
    for other in found[1:]:
        np.testing.assert_array_equal(other.label, found[0].label)
    # Sample i does not depend on how many are drawn.
    more = guided_samples(model, classifier, 12, 2.5, num_clusters=2, key=3, chunk_size=8)
    fewer = guided_samples(model, classifier, 8, 2.5, num_clusters=2, key=3, chunk_size=8)
    np.testing.assert_array_equal(more.samples[:8], fewer.samples)
    np.testing.assert_array_equal(more.label[:8], fewer.label)


def test_weight_zero_is_unguided_and_cost_is_counted():
    found = draw(0.0, num_samples=8, num_steps=10)
    moved = draw(3.0, num_samples=8, num_steps=10, window=(0.0, LOW))  # an empty window
    np.testing.assert_allclose(found.samples, moved.samples, rtol=1e-6, atol=1e-6)
    assert int(found.cost.total) == 8 * 19
    assert (found.num_gradients, moved.num_gradients) == (8 * 19, 0)
    euler = draw(1.0, num_samples=8, num_steps=10, method="ddim", window=(0.5, 5.0))
    levels = mj.diffusion.noise_levels(HIGH, LOW, 10)[:-1]
    assert int(euler.cost.total) == 8 * 10
    assert euler.num_gradients == 8 * int(np.sum((levels > 0.5) & (levels < 5)))


def test_clusters_are_uniform():
    found = guided_samples(model_of(still), flat, 3000, 1.0, num_clusters=7, key=0, num_steps=1)
    assert chisquare(np.bincount(found.label, minlength=7)).pvalue > 0.01


def test_an_empirical_score_gives_back_its_images_as_often_as_they_weigh():
    """Hit probabilities are the weights; distinct images follow sum_i 1 - (1 - k_i)^N."""
    weights = np.array([0.4, 0.2, 0.2, 0.1, 0.05, 0.03, 0.02])
    points = jnp.array([[-6.0], [-4.0], [-1.0], [1.0], [2.5], [5.0], [8.0]])
    stored = mj.Empirical(points, weights)
    n = 4000
    samples = mj.sample(model_of(stored, 0.005, 200.0), n, key=1, num_steps=40, chunk_size=1000)
    gap = np.abs(np.asarray(samples) - np.asarray(points)[:, 0])
    assert gap.min(axis=1).max() < 1e-3
    nearest = gap.argmin(axis=1)
    hits = np.bincount(nearest, minlength=7)
    assert chisquare(hits, n * weights).pvalue > 0.01
    sizes = np.array([5, 20, 50])
    exact = np.array([np.sum(1 - (1 - weights) ** m) for m in sizes])
    batches = [[len(set(b)) for b in nearest[: n // m * m].reshape(-1, m)] for m in sizes]
    for mean, batch in zip(exact, batches, strict=True):
        assert abs(np.mean(batch) - mean) < 4 * np.std(batch) / math.sqrt(len(batch))
    np.testing.assert_allclose(rarefaction(hits, n, sizes).value, exact, rtol=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": -1.0}, "weight: expected a number of at least 0"),
        ({"weight": math.nan}, "weight: expected a number of at least 0"),
        ({"num_samples": 0}, "num_samples: expected"),
        ({"num_clusters": 0}, "num_clusters: expected"),
        ({"window": (2.0, 1.0)}, "window: expected noise levels"),
        ({"limit": 0.0}, "limit: expected a positive number"),
    ],
)
def test_refused(change, message):
    given = {"num_samples": 4, "weight": 1.0, "num_clusters": 2, "key": 0} | change
    count, weight = given.pop("num_samples"), given.pop("weight")
    with pytest.raises(InputError, match=message):
        guided_samples(model_of(pair()), flat, count, weight, **given)
