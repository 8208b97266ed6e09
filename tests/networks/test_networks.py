"""The networks: shapes, dtypes, parity of batched and unbatched, derivatives, conditions."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.diffusion.adapters import LinenNetwork
from memjax.networks._parts import GroupNorm
from memjax.networks.mlp import ResidualMLP
from memjax.networks.unet import UNet

NETWORKS = {
    "mlp": (ResidualMLP(width=16, num_blocks=2, embedding_width=8), (4, 4, 2)),
    "mlp, conditional": (ResidualMLP(width=16, embedding_width=8, num_conditions=3), (7,)),
    "unet": (UNet(channels=(8, 16), groups=4, embedding_width=8), (4, 6, 2)),
    "unet, attention": (
        UNet(channels=(8, 12), groups=4, embedding_width=8, attention=True, num_conditions=3),
        (4, 4, 1),
    ),
    "unet, one level": (UNet(channels=(8,), groups=4, num_blocks=2, embedding_width=8), (3, 5, 1)),
}
CONDITIONAL = [name for name, (module, _) in NETWORKS.items() if module.num_conditions]


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


@pytest.mark.parametrize("name", ["mlp", "unet, one level"])
def test_output_is_like_x_and_starts_at_zero(name):
    module, shape = NETWORKS[name]
    x = jnp.ones(shape, jnp.float32)
    out, variables = jax.jit(module.init_with_output)(jax.random.key(0), x, jnp.float32(0.3))
    assert out.shape == shape
    assert out.dtype == jnp.float32
    assert not out.any()
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize("name", NETWORKS)
def test_batched_equals_unbatched(name):
    module, variables, x, t = build(name)
    apply = jax.jit(module.apply)
    one_by_one = jnp.stack([apply(variables, *args) for args in zip(x, t, strict=True)])
    together = jax.jit(jax.vmap(module.apply, in_axes=(None, 0, 0)))(variables, x, t)
    np.testing.assert_allclose(together, one_by_one, atol=3e-6 * np.abs(one_by_one).max())
    assert np.abs(one_by_one).min() > 1e-4


@pytest.mark.parametrize("name", NETWORKS)
def test_double_precision_input_is_computed_in_double(name, x64):
    """float32 weights at a float64 point: exact enough for finite differences."""
    module, variables, x, t = build(name)
    f = jax.jit(lambda x: module.apply(variables, x, t[2].astype(np.float64)))
    x = x[2].astype(np.float64)
    assert f(x).dtype == np.float64
    v = jax.random.normal(jax.random.key(4), x.shape, np.float64)
    exact = jax.jvp(f, (x,), (v,))[1]
    step = 1e-5
    difference = (f(x + step * v) - f(x - step * v)) / (2 * step)
    np.testing.assert_allclose(exact, difference, atol=1e-7 * np.abs(exact).max())
    single = jax.jit(module.apply)(variables, x.astype(np.float32), t[2])
    np.testing.assert_allclose(f(x), single, atol=1e-4 * np.abs(single).max())


@pytest.mark.parametrize("name", ["mlp", "unet, attention"])
def test_jacobian_forward_equals_reverse(name):
    module, variables, x, t = build(name)

    @jax.jit
    def both(x, t):
        f = lambda x: module.apply(variables, x, t)  # noqa: E731
        return jax.jacfwd(f)(x), jax.jacrev(f)(x)

    forward, reverse = both(x[0], t[0])
    np.testing.assert_allclose(forward, reverse, atol=1e-5 * np.abs(forward).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_noise_level_matters(name):
    module, variables, x, _ = build(name)
    apply = jax.jit(module.apply)
    out = [apply(variables, x[0], jnp.float32(t)) for t in (-1.0, -0.9, 0.9)]
    assert np.abs(out[0] - out[1]).max() > 1e-3
    assert np.abs(out[0] - out[2]).max() > 1e-2


@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditions(name):
    """None is the last index; every condition gives another answer; a batch may mix them."""
    module, variables, x, t = build(name)
    network = LinenNetwork(module, variables)
    apply = jax.jit(lambda c: network(x[0], t[0], c))
    outs = [apply(jnp.int32(c)) for c in range(4)]
    scale = np.abs(outs).max()
    np.testing.assert_allclose(apply(None), outs[3], atol=3e-6 * scale)
    for a in range(4):
        for b in range(a):
            assert np.abs(outs[a] - outs[b]).max() > 1e-3
    mixed = jax.vmap(lambda c: network(x[0], t[0], c))(jnp.arange(4, dtype=jnp.int32))
    np.testing.assert_allclose(mixed, jnp.stack(outs), atol=3e-6 * scale)


def test_published_sizes():
    """The widths of the test beds, and how many weights that is."""
    module = ResidualMLP()
    x = jnp.zeros((8, 8, 1), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), x, jnp.float32(0))
    assert (module.width, module.num_blocks) == (256, 3)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == 646720


def test_group_normalization_is_per_group():
    """Mean and variance of every group over pixels, in NumPy, far from zero mean."""
    norm = GroupNorm(2)
    x = jax.random.normal(jax.random.key(0), (3, 5, 6), jnp.float32) + 100
    found = norm.apply(norm.init(jax.random.key(0), x), x)
    grouped = np.asarray(x, np.float64).reshape(15, 2, 3)
    mean, var = grouped.mean((0, 2), keepdims=True), grouped.var((0, 2), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(var + 1e-6)).reshape(x.shape)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (UNet(channels=(8, 8, 8)), (8, 6, 1), r"divisible by 4, got \[8, 6, 1\]"),
        (UNet(channels=(8, 12)), (8, 8, 1), r"channels: expected multiples of groups = 8"),
    ],
)
def test_bad_input(module, shape, message):
    with pytest.raises(InputError, match=message):
        module.init(jax.random.key(0), jnp.zeros(shape, jnp.float32), jnp.float32(0))


def test_products_lower_to_full_precision():
    """No matrix product or convolution may fall to TF32."""
    for name in ("mlp", "unet, attention"):
        module, variables, x, t = build(name)
        text = jax.jit(module.apply).lower(variables, x[0], t[0]).as_text()
        products = re.findall(r"stablehlo\.(?:dot_general|convolution).*", text)
        assert products
        assert all("HIGHEST" in line for line in products)
