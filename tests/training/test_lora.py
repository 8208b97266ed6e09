"""Fine-tuning: it starts at the model, finds planted changes, and moves means to the labels."""

import json
from pathlib import Path

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import memjax as mj
from memjax._core.errors import InputError
from memjax.densities.gaussian import Gaussian
from memjax.diffusion.model import Model
from memjax.diffusion.prediction import EDMPreconditioned, from_prediction
from memjax.diffusion.schedule import DiscreteVP, VarianceExploding
from memjax.networks import (
    LearnedConditions,
    LinenUNet2D,
    ResidualMLP,
    TextCondition,
    UNet,
    UNet2DConditionModel,
    UNet2DModel,
    low_rank_adapters,
    merge_adapters,
)
from memjax.training._steps import run
from memjax.training.loop import train
from memjax.training.lora import _labeled, fine_tune

GOLDEN = Path(__file__).parents[1] / "networks" / "golden"
SIGMA, D = 0.4, 0.5


class Linear(nn.Module):
    """F = x K + the row of a condition: the exact network of Gaussian data at one noise level."""

    num_conditions: int = 0

    @nn.compact
    def __call__(self, x, t, condition=None):
        out = nn.Dense(x.size, use_bias=False, precision="highest", name="map")(x)
        if self.num_conditions:
            table = nn.Embed(self.num_conditions + 1, x.size, name="label")
            out = out + table(jnp.int32(self.num_conditions) if condition is None else condition)
        return out


def edm_model(module, params, event_shape, null=None):
    network = EDMPreconditioned(mj.LinenNetwork(module, {"params": params}), D)
    score = from_prediction(network, prediction="denoiser", schedule=VarianceExploding(0.02, 10.0))
    return Model(
        score, event_shape, sigma_min=0.02, sigma_max=10.0, data_std=D, null_condition=null
    )


def exact_map(covariance):
    """F of Gaussian data: ((sigma^2 + d^2) S (S + sigma^2)^-1 - d^2)/(sigma d), symmetric."""
    eye = np.eye(len(covariance))
    retained = covariance @ np.linalg.inv(covariance + SIGMA**2 * eye)
    return ((SIGMA**2 + D**2) * retained - D**2 * eye) / (SIGMA * D)


@pytest.mark.slow
def test_a_planted_change_of_rank_two_is_found():
    """Two directions of the data gain variance: by Woodbury the exact map changes in rank two.

    Adapters of rank two find it. With rank one the best change is reduced-rank regression: the
    loss |(A B - change) C^(1/2)|^2, C the covariance of the input, has the minimum
    [change C^(1/2)]_1 C^(-1/2) (Eckart, Young).
    """
    rng = np.random.default_rng(0)
    n = 5
    root = 0.3 * rng.normal(size=(n, n))
    before = root @ root.T
    directions = np.linalg.qr(rng.normal(size=(n, 2)))[0] * [1.2, 0.5]
    after = before + directions @ directions.T
    planted = exact_map(after) - exact_map(before)
    assert np.linalg.matrix_rank(planted, tol=1e-9) == 2
    model = edm_model(
        Linear(), {"map": {"kernel": jnp.asarray(exact_map(before), jnp.float32)}}, (n,)
    )
    data = (rng.normal(size=(50_000, n)) @ np.linalg.cholesky(after).T).astype(np.float32)

    def found(rank):
        tuned = fine_tune(
            model,
            data,
            np.zeros(len(data), int),
            rank=rank,
            alpha=3.0,
            steps=1500,
            batch_size=512,
            learning_rate=3e-3,
            ema_decay=0.995,
            log_sigma_mean=float(np.log(SIGMA)),
            log_sigma_std=1e-6,
        )
        parameters = tuned.raw_score.network.network.variables["params"]
        return np.asarray(parameters["map"]["kernel"], np.float64) - exact_map(before)

    # The input is divided by sqrt(sigma^2 + d^2), which scales C alone.
    values, vectors = np.linalg.eigh(after + SIGMA**2 * np.eye(n))
    half = vectors * np.sqrt(values) @ vectors.T
    u, s, v = np.linalg.svd(half @ planted)
    best = np.linalg.inv(half) @ (s[0] * np.outer(u[:, 0], v[0]))
    size = np.linalg.norm(planted)
    assert np.linalg.norm(best - planted) > 0.2 * size
    for rank, expected in ((1, best), (2, planted)):
        change = found(rank)
        assert np.linalg.norm(change - expected) < 0.06 * size
        assert np.linalg.matrix_rank(change, tol=1e-5) == rank


@pytest.fixture(scope="module")
def mixture():
    """Two components, the labels of their samples, and a model trained on both without labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 4000)
    means = np.array([[1.0, 0.4], [-1.0, 0.2]])
    data = (means[labels] + 0.3 * rng.normal(size=(4000, 2))).astype(np.float32)
    network = ResidualMLP(width=32, num_blocks=1, embedding_width=16)
    return train(data, network=network, steps=600, data_std=1.0), data, labels, means


def test_conditional_means_move_to_the_components(mixture, tmp_path):
    model, data, labels, means = mixture
    labels = labels.copy()
    data = np.concatenate([data, np.full((1000, 2), 9, np.float32)])  # left out
    labels = np.concatenate([labels, np.full(1000, -1)])
    told = []
    tuned = fine_tune(
        model,
        data,
        labels,
        rank=4,
        steps=600,
        learning_rate=5e-3,
        ema_decay=0.98,
        progress=lambda *args: told.append(args),
    )
    assert [args[:2] for args in told] == [(100 * k, 600) for k in range(1, 7)]
    assert told[-1][2] < 0.8 * told[0][2]
    assert int(tuned.null_condition) == 2
    asked = jnp.asarray(np.repeat([0, 1], 300), jnp.int32)
    drawn = np.asarray(mj.sample(tuned, 600, key=0, conditions=asked)).reshape(2, 300, 2)
    np.testing.assert_allclose(drawn.mean(1), means, atol=0.12)
    np.testing.assert_allclose(drawn.std(1), 0.3, atol=0.1)
    # The denoiser of a component in closed form, and of both under the null condition.
    x, sigma = jnp.asarray([0.2, -0.1], jnp.float32), 0.8
    for label in (0, 1):
        component = Gaussian(jnp.asarray(means[label], jnp.float32), 0.09 * jnp.eye(2))
        found, exact = tuned(x, sigma, jnp.int32(label)), component.score(x, sigma)
        np.testing.assert_allclose(sigma**2 * found, sigma**2 * exact, atol=0.12)
    # Guidance reaches beyond the component, away from the other one.
    pushed = np.asarray(mj.sample(tuned, 600, key=0, conditions=asked, guidance=2))
    pushed = pushed.reshape(2, 300, 2).mean(1)
    assert pushed[0, 0] > drawn[0, :, 0].mean() + 0.03
    assert pushed[1, 0] < drawn[1, :, 0].mean() - 0.03
    # A plain model, in our own format.
    mj.save(tuned, tmp_path)
    for a, b in zip(jax.tree.leaves(mj.load(tmp_path)), jax.tree.leaves(tuned), strict=True):
        np.testing.assert_array_equal(a, b)
    # Labels that are there already give way: all of the new ones start at the null condition.
    score, learned, _ = _labeled(tuned, 5)
    (rows,) = learned.values()
    old = tuned.raw_score.network.network.variables["params"]["Embedding_0"]["prompt"]["embedding"]
    np.testing.assert_array_equal(rows, np.tile(old[2], (6, 1)))
    np.testing.assert_array_equal(score(x, sigma, jnp.int32(3)), tuned(x, sigma))


def test_deterministic_in_one_program(mixture):
    model, data, labels, _ = mixture
    run.clear_cache()
    kwargs = {"rank": 2, "steps": 110, "batch_size": 8}
    first, again = (fine_tune(model, data, labels, **kwargs) for _ in range(2))
    assert run._cache_size() == 1
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    other = fine_tune(model, data, labels, seed=1, **kwargs)
    assert any(
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    )
    # Biases are frozen, matrices moved.
    before = model.raw_score.network.network.variables["params"]["block0_in"]
    after = first.raw_score.network.network.variables["params"]["block0_in"]
    np.testing.assert_array_equal(before["bias"], after["bias"])
    assert np.linalg.matrix_rank(after["kernel"] - before["kernel"], tol=1e-6) == 2


# Every network that can take a condition


def noisy(tree, seed=0):
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    made = [jnp.asarray(0.3 * rng.normal(size=a.shape), jnp.float32) for a in leaves]
    return jax.tree.unflatten(treedef, made)


def linen(module):
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jnp.zeros((4, 4, 1), jnp.float32), jnp.float32(0)
    )
    count = module.num_conditions
    null = jnp.int32(count) if count else None
    return edm_model(module, noisy(shapes)["params"], (4, 4, 1), null)


def unet2d(num_conditions=0):
    module = LinenUNet2D((4,), groups=2, num_conditions=num_conditions)
    weights = linen(module).raw_score.network.network.variables["params"]
    network = UNet2DModel.from_weights(weights, module.options(1)._asdict())
    null = jnp.int32(num_conditions) if num_conditions else None
    return mj.from_callable(
        network,
        schedule=DiscreteVP(),
        prediction="v_prediction",
        event_shape=(4, 4, 1),
        data_std=D,
        null_condition=null,
    )


class Told(nn.Module):
    """A network of a vector."""

    @nn.compact
    def __call__(self, x, t, vector):
        told = nn.Dense(x.size, precision="highest")(vector).reshape(x.shape)
        return x * jnp.cos(t) + jnp.tanh(told)


def told():
    shapes = jax.eval_shape(
        Told().init,
        jax.random.key(0),
        jnp.zeros((4, 4, 1), jnp.float32),
        jnp.float32(0),
        jnp.zeros(3, jnp.float32),
    )
    return edm_model(
        Told(), noisy(shapes)["params"], (4, 4, 1), jnp.asarray([0.1, 0.2, 0.3], jnp.float32)
    )


NETWORKS = {
    "mlp": lambda: linen(ResidualMLP(width=8, num_blocks=1, embedding_width=4)),
    "mlp with labels": lambda: linen(
        ResidualMLP(width=8, num_blocks=1, embedding_width=4, num_conditions=3)
    ),
    "unet": lambda: linen(UNet(channels=(4,), groups=2, embedding_width=4)),
    "linen unet2d": lambda: linen(LinenUNet2D((4,), groups=2)),
    "unet2d": unet2d,
    "unet2d with classes": lambda: unet2d(3),
    "vector": told,
}
X = jnp.asarray(np.random.default_rng(1).normal(size=(4, 4, 1)), jnp.float32)
LABELS = jnp.arange(4, dtype=jnp.int32)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_start_is_the_model_to_the_last_bit(name):
    """Under every label and none, operation by operation, with the adapters in it."""
    model = NETWORKS[name]()
    score, learned, layout = _labeled(model, 3)
    (rows,) = learned.values()
    assert len(rows) == 4
    adapters = low_rank_adapters(score, 2, key=0, kernel_layout=layout)
    start = merge_adapters(score, adapters | learned, 0.7)
    expected = np.asarray(model(X, 0.7))
    for label in LABELS:
        np.testing.assert_array_equal(start(X, 0.7, label), expected)


@pytest.mark.parametrize("name", ["mlp with labels", "unet2d"])
def test_a_few_steps_tell_labels_apart(name):
    model = NETWORKS[name]()
    images = np.random.default_rng(2).normal(size=(6, 4, 4, 1)).astype(np.float32)
    tuned = fine_tune(
        model,
        images,
        np.arange(6) % 2,
        num_labels=3,
        rank=2,
        steps=3,
        batch_size=4,
        learning_rate=0.03,
        ema_decay=0.0,
    )
    expected = np.asarray(model(X, 0.7))
    found = np.stack([np.asarray(tuned(X, 0.7, label)) for label in LABELS])
    assert np.isfinite(found).all()
    assert (np.abs(found - expected[None]).reshape(4, -1).max(1) > 1e-4).all()
    assert np.abs(found[0] - found[1]).max() > 1e-5
    np.testing.assert_array_equal(tuned(X, 0.7, None), tuned(X, 0.7, LABELS[3]))


class AsNoise(eqx.Module):
    """The noise that a denoiser of EDM predicts, as a network of its own."""

    denoiser: EDMPreconditioned

    def __call__(self, x, sigma, vector):
        return self.denoiser.noise(x, sigma, vector)


def test_the_loss_is_the_same_whatever_the_network_predicts():
    """One denoiser as EDM's raw network and as one that predicts the noise: the same steps."""
    edm = told()
    score = from_prediction(
        AsNoise(edm.raw_score.network),
        prediction="epsilon",
        schedule=VarianceExploding(edm.sigma_min, edm.sigma_max),
    )
    noise = Model(
        score,
        edm.event_shape,
        sigma_min=edm.sigma_min,
        sigma_max=edm.sigma_max,
        data_std=D,
        null_condition=edm.null_condition,
    )
    images = np.random.default_rng(2).normal(size=(6, 4, 4, 1)).astype(np.float32)
    losses = []
    for model in (edm, noise):
        # A small rate: the factors are drawn by path, so that the steps themselves differ.
        fine_tune(
            model,
            images,
            np.zeros(6, int),
            steps=20,
            learning_rate=1e-8,
            progress=lambda step, steps, loss: losses.append(loss),
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_text_is_learned_and_its_sizes_are_not():
    """A tiny Stable Diffusion XL: what is trained beside the factors of its matrices."""
    folder = GOLDEN / "unet2d-condition-xl"
    arrays = {k: v.astype(np.float32) for k, v in load_file(folder / "model.safetensors").items()}
    arrays = {
        k: jnp.asarray(a.transpose(2, 3, 1, 0) if a.ndim == 4 else a) for k, a in arrays.items()
    }
    config = json.loads((folder / "config.json").read_text())
    golden = np.load(folder / "reference.npz")
    parts = ("hidden_states", "pooled", "time_ids")
    null = TextCondition(*(jnp.asarray(golden[part], jnp.float32) for part in parts))
    network = UNet2DConditionModel.from_weights(arrays, config)
    shape = golden["x"].shape
    model = mj.from_callable(
        network,
        schedule=DiscreteVP(),
        prediction="epsilon",
        event_shape=shape,
        data_std=1.0,
        null_condition=null,
    )
    score, learned, layout = _labeled(model, 2)
    assert isinstance(score.network, LearnedConditions)
    assert layout == "HWIO"
    assert set(learned) == {".network.table.hidden_states", ".network.table.pooled"}
    for part in parts:
        rows, row = (np.asarray(getattr(c, part)) for c in (score.network.table, null))
        np.testing.assert_array_equal(rows, np.stack([row] * 3))
    out = jax.eval_shape(score, jnp.zeros(shape, jnp.float32), jnp.float32(1), jnp.int32(1))
    assert out.shape == shape


# Bad input


def test_a_network_without_a_way_to_take_a_condition_is_refused():
    images, labels = np.zeros((2, 3), np.float32), np.arange(2)

    def attempt(network, null=None):
        score = from_prediction(
            network, prediction="denoiser", schedule=VarianceExploding(0.02, 10.0)
        )
        model = Model(
            score, (3,), sigma_min=0.02, sigma_max=10.0, data_std=1.0, null_condition=null
        )
        with pytest.raises(InputError) as caught:
            fine_tune(model, images, labels)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    plain = attempt(jax.tree_util.Partial(lambda w, x, t, c: w @ x, jnp.eye(3)))
    assert "expected a network that can take a condition" in plain
    assert "got Partial with none" in plain
    module = Told()
    assert "got LinenNetwork with none" in attempt(mj.LinenNetwork(module, {"params": {}}))
    whole = attempt(mj.LinenNetwork(module, {"params": {}}), jnp.int32(1))
    assert "got LinenNetwork with a null condition of whole numbers" in whole
    mlp = mj.LinenNetwork(ResidualMLP(num_conditions=2), {"params": {}})
    assert "expected a null condition where the network has num_conditions > 0" in attempt(mlp)
    model = Model(
        Gaussian(jnp.zeros(3), jnp.eye(3)).score, (3,), sigma_min=0.1, sigma_max=1.0, data_std=1.0
    )
    with pytest.raises(InputError, match="model: expected the score of a network"):
        fine_tune(model, images, labels)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"images": np.zeros((2, 4), np.float32)}, r"images: expected shape \[n, \*\[3\]\]"),
        ({"images": np.zeros((2, 3))}, "images: expected float32"),
        ({"labels": np.arange(3)}, "labels: expected one per image, 2"),
        ({"labels": np.array([-1, -1])}, r"labels: expected 0\.\.-1, or -1 .*found -1\.\.-1"),
        ({"num_labels": 1}, r"labels: expected 0\.\.0, or -1 for images left out, found 0\.\.1"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"rank": 0}, "rank: expected at least 1, got 0"),
        ({"alpha": 0}, "alpha: expected a positive number, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
    ],
)
def test_bad_arguments(kwargs, message):
    model = edm_model(Linear(), {"map": {"kernel": jnp.eye(3, dtype=jnp.float32)}}, (3,))
    arguments = {"images": np.zeros((2, 3), np.float32), "labels": np.arange(2)} | kwargs
    with pytest.raises(InputError, match=message):
        fine_tune(model, **arguments)
