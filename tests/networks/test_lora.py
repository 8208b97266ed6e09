"""Low-rank changes: of the right rank and number, zero at first, and the same once merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.networks import (
    LearnedConditions,
    LowRank,
    ResidualMLP,
    TextCondition,
    UNet,
    conv,
    low_rank_adapters,
    merge_adapters,
)


def drawn(adapters, seed=1):
    """The same changes with normal factors, as after training."""
    leaves, tree = jax.tree.flatten(adapters)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(
        tree, [jnp.asarray(rng.normal(size=a.shape), jnp.float32) for a in leaves]
    )


def test_number_of_trained_parameters():
    """r (m + n) for each dense layer of the MLP, and nothing for biases."""
    width, blocks, embedding, d, r = 16, 2, 8, 10, 3
    network = ResidualMLP(width=width, num_blocks=blocks, embedding_width=embedding)
    shapes = jax.eval_shape(
        network.init, jax.random.key(0), jnp.zeros(d, jnp.float32), jnp.float32(0)
    )
    adapters = low_rank_adapters(shapes, r, key=0)
    layers = [(32, embedding), (embedding, embedding), (d, width), (width, d)]
    layers += [(width, width), (width, width), (embedding, 2 * width)] * blocks
    assert len(adapters) == len(layers)
    found = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert found == sum(r * (m + n) for m, n in layers)
    # A matrix with fewer rows than the rank has the rank of its rows.
    full = low_rank_adapters(shapes, 1000, key=0)
    found = sum(leaf.size for leaf in jax.tree.leaves(full))
    assert found == sum(min(m, n) * (m + n) for m, n in layers)


def test_zero_at_first_and_normal_on_the_side_of_the_inputs():
    network = {
        "kernel": jnp.ones((400, 300)),
        "weight": jnp.ones((300, 400)),
        "conv": {"kernel": jnp.ones((3, 3, 40, 50))},
        "published.weight": jnp.ones((3, 3, 40, 50)),
    }
    for layout, inputs_last in (("HWIO", False), ("OIHW", True)):
        adapters = low_rank_adapters(network, 20, key=0, kernel_layout=layout)
        merged = merge_adapters(network, adapters, 0.7)
        for found, given in zip(jax.tree.leaves(merged), jax.tree.leaves(network), strict=True):
            np.testing.assert_array_equal(found, given)
        for name, inputs, left in (
            ("['kernel']", 400, True),
            ("['weight']", 400, False),
            ("['conv']['kernel']", 360, True),
            ("['published.weight']", 6000 if inputs_last else 360, not inputs_last),
        ):
            change = adapters[name]
            random, zero = change if left else change[::-1]
            assert not np.any(zero)
            variance = float(jnp.mean(random**2)) * inputs
            assert variance == pytest.approx(1, abs=5 * np.sqrt(2 / random.size))


def test_a_kernel_of_low_rank_is_two_convolutions():
    """To r channels, then a dense layer for each pixel: an independent form of the change."""
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 5, 4), (3, 3, 4, 7)))
    adapters = drawn(low_rank_adapters({"kernel": kernel}, 2, key=0))
    left, right = adapters["['kernel']"]
    found = conv(x, merge_adapters({"kernel": kernel}, adapters, 0.5)["kernel"])
    small = conv(x, left.reshape(3, 3, 4, 2))
    expected = conv(x, kernel) + 0.5 * jnp.einsum("hwr,rc->hwc", small, right)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_merged_is_adapted():
    """The merged MLP against one written out with W x + s A (B x) in NumPy, in float64."""
    network = ResidualMLP(width=8, num_blocks=1, embedding_width=6)
    x, t = jnp.asarray([0.3, -0.4, 0.9], jnp.float32), jnp.float32(0.2)
    weights = network.init(jax.random.key(0), x, t)["params"]
    changes = drawn(low_rank_adapters(weights, 2, key=0), 3)
    scale = 0.3
    found = network.apply({"params": merge_adapters(weights, changes, scale)}, x, t)

    def dense(path, h):
        layer = weights
        for name in path:
            layer = layer[name]
        where = "".join(f"['{name}']" for name in path) + "['kernel']"
        left, right = (np.asarray(a, np.float64) for a in changes[where])
        kernel, bias = (np.asarray(layer[name], np.float64) for name in ("kernel", "bias"))
        return h @ kernel + scale * (h @ left) @ right + bias

    def silu(h):
        return h / (1 + np.exp(-h))

    angles = 0.2 * np.geomspace(1, 36, 16)
    e = dense(("Embedding_0", "Dense_0"), np.concatenate([np.sin(angles), np.cos(angles)]))
    e = silu(dense(("Embedding_0", "Dense_1"), silu(e)))
    h = dense(("in",), np.asarray(x, np.float64))
    a, b = np.split(dense(("block0_film",), e), 2)
    h = h + dense(("block0_out",), silu((1 + a) * dense(("block0_in",), h) + b))
    np.testing.assert_allclose(found, dense(("out",), h), rtol=2e-5, atol=2e-5)


def test_half_precision_does_not_swallow_a_change():
    network = {"weight": jnp.ones((2, 2), jnp.bfloat16), "bias": jnp.ones(2, jnp.bfloat16)}
    change = LowRank(jnp.full((2, 1), 1e-2, jnp.float32), jnp.full((1, 2), 1e-2, jnp.float32))
    merged = merge_adapters(network, {"['weight']": change})
    assert merged["weight"].dtype == jnp.float32
    np.testing.assert_allclose(merged["weight"], 1.0001, rtol=1e-7)
    assert merged["bias"] is network["bias"]


def test_factors_do_not_depend_on_other_leaves():
    one = low_rank_adapters({"b": {"kernel": jnp.ones((4, 4))}}, 2, key=5)
    more = {"a": {"kernel": jnp.ones((4, 4))}, "b": {"kernel": jnp.ones((4, 4))}}
    two = low_rank_adapters(more, 2, key=5)
    np.testing.assert_array_equal(two["['b']['kernel']"].left, one["['b']['kernel']"].left)
    assert np.any(two["['a']['kernel']"].left != two["['b']['kernel']"].left)


def test_a_unet_adapts_its_kernels():
    network = UNet(channels=(8, 8), groups=4, embedding_width=8, attention=True)
    x = jnp.zeros((4, 4, 1), jnp.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, jnp.float32(0))["params"]
    adapters = low_rank_adapters(shapes, 4, key=0)
    assert len(adapters) == sum(leaf.ndim in (2, 4) for leaf in jax.tree.leaves(shapes))
    assert adapters["['in']['kernel']"].left.shape == (9, 4)
    assert adapters["['down1']['kernel']"].left.shape == (72, 4)


def test_learned_conditions():
    condition = TextCondition(jnp.ones((2, 3)), time_ids=jnp.arange(4.0))
    network = LearnedConditions.all_equal(lambda x, t, c: x + c.hidden_states.sum(), condition, 2)
    assert jax.tree.map(jnp.shape, network.table) == TextCondition((3, 2, 3), time_ids=(3, 4))
    rows = jnp.arange(18.0).reshape(3, 2, 3)
    network = LearnedConditions(network.network, TextCondition(rows, time_ids=jnp.ones((3, 4))))
    zero = jnp.zeros(())
    found = [float(network(zero, zero, jnp.int32(i))) for i in range(3)]
    assert found == [15.0, 51.0, 87.0]
    assert float(network(zero, zero)) == 87.0
    assert np.isnan(network(zero, zero, jnp.int32(3)))


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="rank: expected at least 1, got 0"):
        low_rank_adapters({"kernel": jnp.ones((2, 2))}, 0, key=0)
    with pytest.raises(InputError, match="network: expected matrices or kernels"):
        low_rank_adapters({"kernel": jnp.ones((2, 2, 2)), "scale": jnp.ones((2, 2))}, 1, key=0)
    with pytest.raises(InputError, match="changes: expected paths of the network's leaves"):
        merge_adapters({"kernel": jnp.ones((2, 2))}, {"['bias']": jnp.ones(2)})
