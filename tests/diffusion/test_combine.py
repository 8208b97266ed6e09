"""Combined scores: identities, exact conditional mixtures, and how often a network is called."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.calculus.linearization import linearize
from memjax.densities.conditional import ConditionalMixture
from memjax.diffusion.combine import at, classifier_guided, difference, gap, guided
from memjax.diffusion.model import Model

X = np.array([0.3, -1.2])
SIGMA = 0.6


def mixture():
    """Three components of two classes, in the precision the process runs with."""
    means = jnp.array([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]])
    return ConditionalMixture(
        [0.5, 0.3, 0.2], means, jnp.asarray([0.3, 0.2, 0.1], means.dtype), [0, 0, 1]
    )


def label(c):
    return jnp.int32(c)


class Counting:
    """A conditional score that counts its evaluations, and the rows each of them is batched to."""

    def __init__(self):
        self.conditions = []

    def __call__(self, x, sigma, condition=None):
        self.conditions.append(condition)
        shift = 0.0 if condition is None else condition["a"]
        return -(x - shift) / (1 + sigma**2)


class Stacking(eqx.Module):
    """The same with a null condition, which allows both branches in one call."""

    inner: Counting = eqx.field(static=True)
    null_condition: dict

    def __call__(self, x, sigma, condition=None):
        return self.inner(x, sigma, self.null_condition if condition is None else condition)


A = {"a": jnp.array([1.0, 2.0])}
NULL = {"a": jnp.array([0.0, 0.0])}


def test_at_is_the_score_at_a_point_and_a_pytree():
    density, x = mixture(), jnp.array(X)
    field = at(density, SIGMA, label(1))
    expected = density.score(x, SIGMA, label(1))
    np.testing.assert_allclose(field(x), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda f, x: f(x))(field, x), expected, rtol=1e-6)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(field))
    trace = jax.jit(lambda field, x: linearize(field, x).trace())(field, x)
    np.testing.assert_allclose(trace, density.laplacian(x, SIGMA, label(1)), rtol=1e-5)
    # A batch of fields: one noise level and condition each.
    fields = jax.vmap(lambda sigma, c: at(density, sigma, c))(
        jnp.array([0.1, SIGMA]), jnp.array([0, 1], jnp.int32)
    )
    np.testing.assert_allclose(jax.vmap(lambda f: f(x))(fields)[1], expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_at_hands_sigma_on_in_the_dtype_of_x(dtype, x64):
    seen = []

    def score(x, sigma, condition=None):
        seen.append(sigma)
        return -x / sigma

    for sigma in (1, 0.5, jnp.float32(0.5), jnp.float64(0.5)):
        assert at(score, sigma)(jnp.ones(2, dtype)).dtype == dtype
    assert all(sigma.dtype == dtype and sigma.shape == () for sigma in seen)


@pytest.mark.parametrize("weight", [-0.5, 0.5, 3.0])
def test_guidance_is_linear_between_the_branches(weight, x64):
    density, x = mixture(), jnp.array(X)
    conditional, null = density.score(x, SIGMA, label(1)), density.score(x, SIGMA)
    expected = null + weight * (conditional - null)
    for w in (weight, jnp.float64(weight)):
        np.testing.assert_allclose(guided(density, w)(x, SIGMA, label(1)), expected, rtol=1e-12)
    by_gap = density.score(x, SIGMA) + weight * gap(density)(x, SIGMA, label(1))
    np.testing.assert_allclose(by_gap, expected, rtol=1e-12)
    np.testing.assert_allclose(guided(density, weight)(x, SIGMA), null, rtol=1e-15)


def test_guidance_by_the_exact_classifier_is_conditioning(x64):
    """Bayes: s(x | c) = s(x) + grad log p(c | x); and so the gap is the classifier's gradient."""
    density, x = mixture(), jnp.array(X)
    for c in (0, 1):
        exact = density.score(x, SIGMA, label(c))
        score = classifier_guided(density, density.log_class_prob, 1.0)
        np.testing.assert_allclose(score(x, SIGMA, label(c)), exact, rtol=1e-10)
        slope = jax.grad(density.log_class_prob)(x, SIGMA, label(c))
        np.testing.assert_allclose(gap(density)(x, SIGMA, label(c)), slope, rtol=1e-10)
        twice = classifier_guided(density, density.log_class_prob, jnp.float64(2.0))
        np.testing.assert_allclose(
            twice(x, SIGMA, label(c)), guided(density, 2.0)(x, SIGMA, label(c)), rtol=1e-10
        )


def test_guidance_in_a_window_and_within_a_limit(x64):
    density, x, c = mixture(), jnp.array(X), label(1)
    plain, slope = density.score(x, SIGMA), jax.grad(density.log_class_prob)(x, SIGMA, c)
    size = jnp.linalg.norm(plain)

    def push(weight, **options):
        score = classifier_guided(density, density.log_class_prob, weight, **options)
        return score(x, SIGMA, c) - plain

    np.testing.assert_allclose(push(3.0, window=(SIGMA / 2, 2 * SIGMA)), 3 * slope, rtol=1e-10)
    for window in ((SIGMA, 9.0), (0, SIGMA)):  # both ends are outside
        assert not np.any(push(3.0, window=window))
    direction = slope / jnp.linalg.norm(slope)
    np.testing.assert_allclose(push(1e3, limit=0.5), size / 2 * direction, rtol=1e-9)
    np.testing.assert_allclose(push(1e-3, limit=0.5), 1e-3 * slope, rtol=1e-9)
    np.testing.assert_allclose(push(0.7, normalize=True), 0.7 * size * direction, rtol=1e-9)
    np.testing.assert_allclose(
        push(7.0, normalize=True, limit=0.5), size / 2 * direction, rtol=1e-9
    )
    # The weight as a part of the condition: a batch of weights is one program.
    by_row = classifier_guided(density, density.log_class_prob, None)
    rows = jnp.array([0.0, 1.0, 2.5])
    found = jax.vmap(lambda w: by_row(x, SIGMA, (c, w)))(rows) - plain.reshape(1, -1)
    np.testing.assert_allclose(found, rows.reshape(3, 1) * slope.reshape(1, -1), atol=1e-12)


def test_a_classifier_that_knows_nothing_pushes_nowhere():
    density, x = mixture(), jnp.array(X)
    for options in ({}, {"normalize": True}, {"limit": 1.0}, {"normalize": True, "limit": 1.0}):
        score = classifier_guided(density, lambda x, sigma, c: 0.0 * x[0], 2.0, **options)
        np.testing.assert_array_equal(score(x, SIGMA, label(0)), density.score(x, SIGMA))
        lin = linearize(at(score, SIGMA, label(0)), x)
        assert np.isfinite(lin.jvp(x)).all()


def test_guidance_options_out_of_range():
    for options in ({"window": (1.0, 1.0)}, {"window": (-1.0, 1.0)}, {"limit": 0.0}):
        with pytest.raises(InputError, match="expected"):
            classifier_guided(mixture(), lambda x, sigma, c: x[0], 1.0, **options)


def test_difference(x64):
    density, x = mixture(), jnp.array(X)

    def baseline(x, sigma, condition=None):
        return -x / (1 + sigma**2)

    both = difference(density, baseline)(x, SIGMA, label(0))
    np.testing.assert_allclose(
        both, density.score(x, SIGMA, label(0)) + x / (1 + SIGMA**2), rtol=1e-12
    )
    assert not np.any(difference(density, density)(x, SIGMA))
    # Curvature difference: the traces subtract as well.
    lin = linearize(at(difference(density, baseline), SIGMA), x)
    np.testing.assert_allclose(
        lin.trace(), density.laplacian(x, SIGMA) + 2 / (1 + SIGMA**2), rtol=1e-10
    )


@pytest.mark.parametrize(
    ("combine", "condition", "calls"),
    [
        (lambda score: guided(score, 1.0), A, 1),
        (lambda score: guided(score, 1), A, 1),
        (lambda score: guided(score, 0.0), A, 1),
        (lambda score: guided(score, 2.0), A, 2),
        (lambda score: guided(score, jnp.float32(1.0)), A, 2),
        (lambda score: guided(score, 2.0), None, 1),
        (gap, A, 2),
        (lambda score: difference(score, score), A, 2),
        (lambda score: classifier_guided(score, lambda x, sigma, c: x.sum(), 1.0), A, 1),
    ],
)
def test_evaluations(combine, condition, calls):
    score = Counting()
    args = (condition,) if condition is not None else ()
    combine(score)(jnp.array(X), SIGMA, *args)
    assert len(score.conditions) == calls


def test_static_weights_take_their_own_branch():
    score = Counting()
    guided(score, 1.0)(jnp.array(X), SIGMA, A)
    guided(score, 0.0)(jnp.array(X), SIGMA, A)
    assert score.conditions == [A, None]


@pytest.mark.parametrize("combine", [lambda score: guided(score, 2.5), gap])
def test_branches_are_stacked_where_the_null_condition_allows(combine):
    x, counting = jnp.array(X), Counting()
    stacking = Stacking(counting, NULL)
    found = combine(stacking)(x, SIGMA, A)
    assert len(counting.conditions) == 1  # one call, of two rows
    expected = combine(Counting())(x, SIGMA, A)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    # A condition of another shape is evaluated on its own.
    counting.conditions.clear()
    scalar = {"a": jnp.asarray(1.0, x.dtype)}
    np.testing.assert_allclose(
        combine(stacking)(x, SIGMA, scalar), combine(Counting())(x, SIGMA, scalar), rtol=1e-5
    )
    assert len(counting.conditions) == 2


def test_a_model_is_stacked_through_its_null_condition():
    density = mixture()
    model = Model(
        density,
        (2,),
        sigma_min=0.01,
        sigma_max=10.0,
        data_std=1.0,
        null_condition=density.null_condition,
    )
    x = jnp.array(X)
    expected = density.score(x, SIGMA, label(1)) - density.score(x, SIGMA)
    run = jax.jit(lambda score, x, c: gap(score)(x, SIGMA, c))
    np.testing.assert_allclose(run(model, x, label(1)), expected, rtol=1e-4)


def test_combined_scores_are_pytrees(x64):
    """Through jit, vmap and grad as arguments; a new weight needs no new trace."""
    density, xs = mixture(), jnp.stack([jnp.array(X), 2 * jnp.array(X)])
    traces = []

    @jax.jit
    def run(score, xs):
        traces.append(None)
        return jax.vmap(lambda x: score(x, SIGMA, label(1)))(xs)

    for score in (
        guided(density, 3.0),
        guided(density, 0.0),
        gap(density),
        difference(density, guided(density, 2.0)),
        classifier_guided(density, density.log_class_prob, 2.0),
    ):
        eager = [score(x, SIGMA, label(1)) for x in xs]
        np.testing.assert_allclose(run(score, xs), jnp.stack(eager), rtol=1e-10)
    before = len(traces)
    run(guided(density, 4.0), xs)
    assert len(traces) == before
    by_weight = jax.grad(lambda w: jnp.sum(guided(density, w)(xs[0], SIGMA, label(1))))(3.0)
    np.testing.assert_allclose(by_weight, jnp.sum(gap(density)(xs[0], SIGMA, label(1))), rtol=1e-12)


def test_a_gap_needs_a_condition():
    with pytest.raises(InputError, match="condition: expected a condition, got None"):
        gap(Counting())(jnp.array(X), SIGMA, None)
