"""The classifiers: shapes, dtypes, derivatives, what the noise level does, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.networks.classifier import MLPClassifier, ResNetClassifier

NETWORKS = {
    "mlp": (MLPClassifier(5, width=16, num_blocks=2, embedding_width=8), (4, 4, 2)),
    "mlp, flat": (MLPClassifier(3, width=8, num_blocks=1, embedding_width=4), (7,)),
    "resnet": (ResNetClassifier(5, channels=(4, 8), groups=2, embedding_width=8), (4, 6, 2)),
    "resnet, one level": (
        ResNetClassifier(2, channels=(4,), num_blocks=1, groups=1, embedding_width=4),
        (3, 5, 1),
    ),
}


@functools.cache
def build(name):
    """The module, its weights away from the zeros that layers start with, and five inputs."""
    module, shape = NETWORKS[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, *shape)), np.float32)
    t = jnp.linspace(-1.5, 1.1, 5, dtype=np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(1), x[0], t[0])

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1], initial=1)
        return jnp.asarray(rng.normal(size=leaf.shape) / np.sqrt(max(fan_in, 4)), leaf.dtype)

    return module, jax.tree.map(draw, shapes), x, t


@pytest.mark.parametrize("name", ["mlp, flat", "resnet, one level"])
def test_logits_start_at_zero_and_weights_are_single(name):
    module, shape = NETWORKS[name]
    x = jnp.ones(shape, jnp.float32)
    logits, variables = jax.jit(module.init_with_output)(jax.random.key(0), x, jnp.float32(0.3))
    assert logits.shape == (module.num_classes,)
    assert logits.dtype == jnp.float32
    assert not logits.any()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize("name", NETWORKS)
def test_batched_equals_unbatched_and_everything_counts(name):
    module, variables, x, t = build(name)
    apply = jax.jit(module.apply)
    one_by_one = jnp.stack([apply(variables, *args) for args in zip(x, t, strict=True)])
    together = jax.jit(jax.vmap(module.apply, in_axes=(None, 0, 0)))(variables, x, t)
    np.testing.assert_allclose(together, one_by_one, atol=3e-6 * np.abs(one_by_one).max())
    # The same image at another noise level, and another image at the same, have other logits.
    assert np.abs(apply(variables, x[0], t[1]) - one_by_one[0]).max() > 1e-4
    assert np.abs(apply(variables, x[1], t[0]) - one_by_one[0]).max() > 1e-3


@pytest.mark.parametrize("name", ["mlp", "resnet, one level"])
def test_gradient_is_that_of_finite_differences(name, x64):
    module, variables, x, t = build(name)
    t2, x = t[2].astype(np.float64), x[2].astype(np.float64)

    def log_prob(x):
        logits = module.apply(variables, x, t2)
        return jax.nn.log_softmax(logits)[1], logits

    f = jax.jit(jax.value_and_grad(log_prob, has_aux=True))
    v = np.random.default_rng(4).normal(size=x.shape)
    (value, logits), gradient = f(x)
    difference = (f(x + 1e-5 * v)[0][0] - f(x - 1e-5 * v)[0][0]) / 2e-5
    np.testing.assert_allclose(jnp.sum(gradient * v), difference, rtol=1e-6)
    assert value.dtype == np.float64
    single = jax.jit(module.apply)(variables, x.astype(np.float32), t[2])
    np.testing.assert_allclose(logits, single, atol=1e-4 * np.abs(single).max())


def test_the_mlp_is_its_formula():
    """One block, written out: W_out silu(h + V silu((1 + a) W h + b)), h = W_in x."""
    module, variables, x, t = build("mlp, flat")
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    silu = lambda h: h / (1 + np.exp(-h))  # noqa: E731
    layer = lambda name, h: h @ p[name]["kernel"] + p[name]["bias"]  # noqa: E731
    angles = float(t[0]) * np.geomspace(1, 36, 16)
    embedding = p["Embedding_0"]
    e = np.concatenate([np.sin(angles), np.cos(angles)])
    for name in ("Dense_0", "Dense_1"):
        e = silu(e @ embedding[name]["kernel"] + embedding[name]["bias"])
    h = layer("in", np.asarray(x[0], np.float64))
    scale, shift = np.split(layer("block0_film", e), 2)
    h = h + layer("block0_out", silu((1 + scale) * layer("block0_in", h) + shift))
    expected = layer("out", silu(h))
    np.testing.assert_allclose(jax.jit(module.apply)(variables, x[0], t[0]), expected, atol=1e-5)


def test_the_resnet_forgets_where_things_are_at_the_lowest_resolution():
    """All parts but the border commute with shifts: a shifted pattern has nearly its logits."""
    module, variables, _, t = build("resnet, one level")
    x = np.zeros((24, 24, 1), np.float32)
    x[8:11, 9:12, 0] = np.random.default_rng(3).normal(size=(3, 3))
    apply = jax.jit(module.apply)
    here, there = (apply(variables, jnp.roll(x, s, (0, 1)), t[0]) for s in ((0, 0), (3, -2)))
    np.testing.assert_allclose(here, there, atol=1e-5)


def test_what_does_not_fit_is_refused():
    module = ResNetClassifier(2, channels=(4, 8), groups=4)
    t = jnp.float32(0)
    for shape in ((3, 4, 1), (4, 4)):
        with pytest.raises(InputError, match="sides divisible by 2"):
            jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape, jnp.float32), t)
    x, other = jnp.zeros((4, 4, 1), jnp.float32), ResNetClassifier(2, groups=3)
    with pytest.raises(InputError, match="multiples of groups = 3"):
        jax.eval_shape(other.init, jax.random.key(0), x, t)
