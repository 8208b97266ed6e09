"""What noises are judged by: quadratics with known minimizers, and transcriptions."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from memjax._core.errors import InputError
from memjax.densities import ConditionalMixture
from memjax.diffusion.model import Model
from memjax.mitigate import Means, NoiseObjective, condition_means, judge_cost, judge_noises

D, SIGMA = 5, 1.7
NAMES = ("exact", "paper", "algorithm", "released", "gap", "pull")


class Gaussians(eqx.Module):
    """Equal means: s = -P_c (x - mean), condition 0 given and 1 null."""

    precisions: Array
    mean: Array

    def __call__(self, x, sigma, condition=None):
        which = jnp.int32(1) if condition is None else condition
        return -self.precisions[which] @ (x - self.mean)


def gaussians(seed=0):
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(2, D, D)) * np.array([0.8, 0.4])[:, None, None]
    world = Gaussians(
        jnp.asarray(roots @ roots.transpose(0, 2, 1)), jnp.asarray(rng.normal(size=D))
    )
    facts = {"sigma_min": 0.01, "sigma_max": SIGMA, "data_std": 1.0}
    return Model(world, (D,), null_condition=jnp.int32(1), **facts), world


def mixture(sigma_max=SIGMA):
    rng = np.random.default_rng(5)
    roots = rng.normal(size=(4, D, D)) * np.array([0.2, 0.3, 0.6, 0.8])[:, None, None]
    means = jnp.asarray(2 * rng.normal(size=(4, D)))
    world = ConditionalMixture(
        [0.2, 0.2, 0.4, 0.2], means, roots @ roots.transpose(0, 2, 1), [0, 0, 1, 1]
    )
    return Model(world, (D,), sigma_min=0.01, sigma_max=sigma_max, data_std=1.0)


def noises(count, seed=1):
    return jax.random.normal(jax.random.key(seed), (count, D))


def values(objective, model, ns, condition=0, means=None):
    return jax.vmap(lambda n: objective.value(model, n, jnp.int32(condition), means))(ns)


def test_equal_means_make_the_quadratic_with_its_minimizer(x64):
    """sigma^6 y^T (H_gap)^4 y + a |n|^2 with y = sigma n - mean."""
    model, world = gaussians()
    a, change = 0.05, np.asarray(world.precisions[0] - world.precisions[1])
    fourth = np.linalg.matrix_power(change, 4)
    ns = noises(6)
    y = SIGMA * np.asarray(ns) - np.asarray(world.mean)
    expected = SIGMA**6 * np.einsum("ni,ij,nj->n", y, fourth, y) + a * (np.asarray(ns) ** 2).sum(1)
    exact = NoiseObjective("exact", regularization=a)
    np.testing.assert_allclose(values(exact, model, ns), expected, rtol=1e-10)
    for step in (0.01, 1.0, 30.0):
        paper = NoiseObjective("paper", regularization=a, step=step)
        np.testing.assert_allclose(values(paper, model, ns), expected, rtol=1e-9)
    best = np.linalg.solve(
        SIGMA**8 * fourth + a * np.eye(D), SIGMA**7 * fourth @ np.asarray(world.mean)
    )
    slope = jax.grad(lambda n: exact.value(model, n, jnp.int32(0), None))
    scale = np.abs(slope(ns[0])).max()
    np.testing.assert_allclose(slope(jnp.asarray(best)), 0, atol=1e-12 * scale)


def test_finite_differences_converge_at_first_order(x64):
    model, ns = mixture(), noises(3)
    exact = np.asarray(values(NoiseObjective("exact"), model, ns))
    steps = np.array([1e-2, 1e-3, 1e-4])
    found = [np.asarray(values(NoiseObjective("paper", step=s), model, ns)) for s in steps]
    errors = np.abs(np.array(found) / exact - 1)
    slopes = np.diff(np.log(errors), axis=0) / np.diff(np.log(steps))[:, None]
    np.testing.assert_allclose(slopes, 1, atol=0.1)
    # The unit direction is the same derivative but for the length of the gap, squared.
    gaps = np.asarray(values(NoiseObjective("gap"), model, ns))
    unit = np.asarray(values(NoiseObjective("algorithm", step=1e-5), model, ns))
    np.testing.assert_allclose(unit * gaps**2, exact, rtol=1e-3)


def test_released_objective_is_its_code_transcribed(x64):
    """In x_t of a variance-preserving process, with noise predictions, as published."""
    model, ns, a = mixture(), noises(4), 0.05
    alpha = 1 / np.sqrt(1 + SIGMA**2)

    def unet(latent, condition):
        # x_t = alpha x; the network's input there is alpha sigma n for our n.
        x = jnp.asarray(latent) / alpha
        return -SIGMA * np.asarray(model(x, SIGMA, condition))

    expected = []
    for n in np.asarray(ns):
        latent = alpha * SIGMA * n
        diff = unet(latent, jnp.int32(0)) - unet(latent, None)
        diff = diff / np.linalg.norm(diff)
        moved = latent + alpha * SIGMA * diff
        loss = np.linalg.norm(unet(moved, jnp.int32(0)) - unet(moved, None))
        expected.append(loss + a * np.linalg.norm(n))
    found = values(NoiseObjective("released", regularization=a), model, ns)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_pull_is_one_on_average_and_knows_where_it_goes(x64):
    """A linear denoiser: the pull is 1 plus a linear function of the noise."""
    rng = np.random.default_rng(3)
    given, null = rng.normal(size=(2, D))

    class Point(eqx.Module):
        centers: Array

        def __call__(self, x, sigma, condition=None):
            which = 1 if condition is None else 0
            return (self.centers[which] - x) / (0.5 + sigma**2)

    model = Model(
        Point(jnp.asarray([given, null])), (D,), sigma_min=0.01, sigma_max=20.0, data_std=1.0
    )
    means = condition_means(model, jnp.int32(0))
    shrink = 400 / 400.5
    np.testing.assert_allclose(means.given, shrink * given, rtol=1e-9)
    np.testing.assert_allclose(means.null, shrink * null, rtol=1e-9)
    sigma, weight = 2.0, 1.5
    ns = noises(7)
    center = means.null + weight * (means.given - means.null)
    y = (1 - sigma / 20) * np.asarray(center) + sigma * np.asarray(ns)
    drawn = (0.5 * y + sigma**2 * given) / (0.5 + sigma**2)
    apart = np.asarray(means.given - means.null)
    expected = (drawn - np.asarray(means.null)) @ apart / (apart @ apart)
    objective = NoiseObjective("pull", sigma=sigma, guidance=weight)
    np.testing.assert_allclose(values(objective, model, ns, means=means), expected, rtol=1e-9)


def test_judging_rows_is_judging_each(x64):
    model, ns = mixture(20.0), noises(6).reshape(2, 3, D)
    objective = NoiseObjective("pull", sigma=2.0)
    conditions = jnp.asarray([0, 1], jnp.int32)
    found = judge_noises(model, ns, conditions, objective, chunk_size=1)
    for c in range(2):
        means = condition_means(model, conditions[c])
        np.testing.assert_allclose(found[c], values(objective, model, ns[c], c, means), rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_costs_are_counted(name, counting):
    """Forward evaluations of a value; reverse mode needs one vjp for each of them and of jvps."""
    score = counting(lambda x, sigma, condition: -x * (1 if condition is None else 2))
    model = Model(score, (D,), sigma_min=0.1, sigma_max=2.0, data_std=1.0)
    objective = NoiseObjective(name)
    means = Means(jnp.zeros(D), jnp.ones(D))
    value = objective.value(model, jnp.ones(D), jnp.int32(0), means)
    jax.block_until_ready(value)
    jax.effects_barrier()
    assert score.calls == objective.cost.forward
    full = objective.cost_with_gradient
    assert (full.forward, full.jvp) == (objective.cost.forward, objective.cost.jvp)
    assert full.vjp == full.forward + full.jvp


@pytest.mark.parametrize("name", ["pull", "gap"])
def test_what_judging_costs_is_counted(name, counting):
    score = counting(lambda x, sigma, condition: -x * (1 if condition is None else 2))
    model = Model(score, (D,), sigma_min=0.1, sigma_max=2.0, data_std=1.0)
    objective = NoiseObjective(name)
    found = judge_noises(model, noises(3)[None], jnp.zeros(1, jnp.int32), objective)
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert score.calls == judge_cost(model, 3, objective).forward


def test_bad_input():
    model, ns = mixture(), noises(2)[None]
    for wrong, message in (
        ({"name": "sharpest"}, "name: expected one of"),
        ({"sigma": 0.0}, "sigma: expected a positive"),
        ({"step": -1.0}, "step: expected a positive"),
        ({"regularization": -1.0}, "regularization: expected at least 0"),
    ):
        with pytest.raises(InputError, match=message):
            NoiseObjective(**wrong)
    one = jnp.zeros(1, jnp.int32)
    with pytest.raises(InputError, match=r"sigma: expected at most the model's 1\.7"):
        judge_noises(model, ns, one, NoiseObjective(sigma=2.0))
    with pytest.raises(InputError, match="conditions: expected 1 rows"):
        judge_noises(model, ns, jnp.zeros(2, jnp.int32), NoiseObjective())
    with pytest.raises(InputError, match="noises: expected"):
        judge_noises(model, ns[..., :3], one, NoiseObjective())
