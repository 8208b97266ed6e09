"""Training: it finds the analytic denoiser, and a kill costs nothing but time."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import CheckpointError, InputError
from memjax.densities.gaussian import Gaussian
from memjax.networks.mlp import ResidualMLP
from memjax.networks.unet import UNet
from memjax.training._steps import Data, Recipe, adam, batch_loss, draw_rows, run, start
from memjax.training.loop import STATE_FILE, _Trained, train

TINY = ResidualMLP(width=16, num_blocks=1, embedding_width=8)
FAST = {"network": TINY, "batch_size": 8, "data_std": 0.5}


def images(n=20, shape=(2, 2, 1), seed=0):
    return (0.5 * np.random.default_rng(seed).normal(size=(n, *shape))).astype(np.float32)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_gaussian_data_give_the_gaussian_denoiser():
    """Two correlated coordinates: D(x, sigma) = mean + S (S + sigma^2)^-1 (x - mean)."""
    rng = np.random.default_rng(1)
    root = np.array([[0.5, 0.0], [0.35, 0.2]])
    mean = np.array([0.3, -0.2])
    data = (mean + rng.normal(size=(20_000, 2)) @ root.T).astype(np.float32)
    network = ResidualMLP(width=64, num_blocks=2, embedding_width=32)
    model = train(data, network=network, steps=3000, batch_size=256, seed=2)
    density = Gaussian(jnp.asarray(mean, jnp.float32), jnp.asarray(root @ root.T, jnp.float32))
    for sigma in (0.05, 0.2, 0.5, 2.0):
        x = jnp.asarray(data[:500] + sigma * rng.normal(size=(500, 2)), jnp.float32)
        found = jax.vmap(lambda x, s=sigma: model(x, s))(x)
        exact = jax.vmap(lambda x, s=sigma: density.score(x, s))(x)
        # In the denoiser: sigma^2 (s - s*), against the posterior's standard deviation.
        error = sigma**2 * np.sqrt(((found - exact) ** 2).mean())
        spread = sigma * float(np.sqrt(density.effective_dimension(x[0], sigma) / 2))
        assert error < 0.12 * spread


class Affine(nn.Module):
    """F = W x per noise level of a fixed preconditioning: one weight, so the optimum is known."""

    @nn.compact
    def __call__(self, x, t, condition=None):
        return self.param("w", nn.initializers.zeros, (), jnp.float32) * x


def test_the_loss_is_that_of_the_paper():
    """Mean of lambda |D - x0|^2, from the paper's formulas in NumPy, within sampling error."""
    d, w = 0.5, 0.3
    data = images(5)
    recipe = Recipe(20_000, 1e-9, 0.0, -1.0, 1.3, 0.0, d)
    weights = {"w": jnp.float32(w)}
    state = start(weights, adam(recipe))
    network = Affine()
    _, loss = run(
        state,
        jnp.int32(1),
        Data(jnp.asarray(data), None),
        jax.random.key(0),
        family=_Trained(network),
        recipe=recipe,
    )
    rng = np.random.default_rng(3)
    x0 = data[rng.integers(0, 5, 100_000)].reshape(100_000, -1).astype(np.float64)
    sigma = np.exp(-1 + 1.3 * rng.normal(size=(100_000, 1)))
    x = x0 + sigma * rng.normal(size=x0.shape)
    total = sigma**2 + d**2
    denoised = d**2 / total * x + sigma * d / np.sqrt(total) * w * x / np.sqrt(total)
    terms = (total / (sigma * d) ** 2 * (denoised - x0) ** 2).mean(axis=1)
    error = terms.std() * np.sqrt(1 / 20_000 + 1 / 100_000)
    assert abs(float(loss) - terms.mean()) < 4 * error


ROOT = np.array([[0.5, 0.0], [0.35, 0.2]])
SIGMA = 0.4


class FreeJacobian(nn.Module):
    """The exact F of Gaussian data with covariance R R^T at one noise, its Jacobian a weight.

    D = M x and F = ((sigma^2 + d^2) M - d^2) x / (sigma d) for x divided by
    sqrt(sigma^2 + d^2). The value's own Jacobian is cut off, and W takes its place.
    """

    @nn.compact
    def __call__(self, x, t, condition=None):
        w = self.param("w", nn.initializers.zeros, (2, 2), jnp.float32)
        still = jax.lax.stop_gradient(x)
        return jnp.asarray(exact_jacobian(), jnp.float32) @ still + w @ (x - still)


def exact_jacobian(d=0.5):
    covariance = ROOT @ ROOT.T
    retained = covariance @ np.linalg.inv(covariance + SIGMA**2 * np.eye(2))
    return ((SIGMA**2 + d**2) * retained - d**2 * np.eye(2)) / (SIGMA * d)


def test_the_second_loss_finds_the_hessian_of_the_data():
    """The value holds no gradient for W: the second loss alone moves it, to the exact Jacobian."""
    data = (np.random.default_rng(1).normal(size=(20_000, 2)) @ ROOT.T).astype(np.float32)
    fit = partial(
        train,
        data,
        network=FreeJacobian(),
        steps=500,
        batch_size=256,
        learning_rate=2e-2,
        ema_decay=0.99,
        log_sigma_mean=float(np.log(SIGMA)),
        log_sigma_std=1e-6,
        data_std=0.5,
    )

    def found(model):
        return np.asarray(jax.jacfwd(lambda x: model(x, SIGMA))(jnp.zeros(2, jnp.float32)))

    covariance = ROOT @ ROOT.T + SIGMA**2 * np.eye(2)
    np.testing.assert_allclose(
        found(fit(second_order_weight=0.5)), -np.linalg.inv(covariance), atol=0.15
    )
    without = fit(steps=20)
    np.testing.assert_allclose(found(without), -np.eye(2) / (SIGMA**2 + 0.25), rtol=1e-4)


def test_the_second_loss_at_its_minimum_is_that_of_gaussian_data():
    """E |M - l l^T|^2 = (tr M)^2 + |M|^2 for l ~ N(0, M); random signs keep the mean."""
    d = 0.5
    data = (np.random.default_rng(1).normal(size=(20_000, 2)) @ ROOT.T).astype(np.float32)
    weights = {"w": jnp.asarray(exact_jacobian(d), jnp.float32)}
    losses = [
        batch_loss(
            weights,
            Data(jnp.asarray(data), None),
            draw_rows(jax.random.key(0), len(data), 50_000),
            jax.random.key(0),
            _Trained(FreeJacobian()),
            Recipe(50_000, 1e-3, 0.0, float(np.log(SIGMA)), 1e-6, 0.0, d, w),
        )
        for w in (0.0, 1.0)
    ]
    covariance = ROOT @ ROOT.T
    retained = covariance @ np.linalg.inv(covariance + SIGMA**2 * np.eye(2))
    expected = (np.trace(retained) ** 2 + np.sum(retained**2)) / 2
    assert float(losses[1] - losses[0]) == pytest.approx(expected, rel=0.05)


def test_average_is_the_weighted_mean_of_the_weights():
    """Against the definition, with the weights after every step."""
    after = [
        train(images(), steps=k, ema_decay=0.0, **FAST).raw_score.network.network.variables
        for k in range(1, 6)
    ]
    found = train(images(), steps=5, ema_decay=0.7, **FAST).raw_score.network.network.variables
    shares = 0.7 ** np.arange(4, -1, -1)
    expected = jax.tree.map(
        lambda *leaves: sum(s * w for s, w in zip(shares / shares.sum(), leaves, strict=True)),
        *[jax.tree.map(lambda w: np.asarray(w, np.float64), v) for v in after],
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)


def test_model_and_progress():
    told = []
    model = train(images(), steps=250, progress=lambda *args: told.append(args), **FAST)
    assert [args[:2] for args in told] == [(100, 250), (200, 250), (250, 250)]
    assert all(0 < loss < 3 for _, _, loss in told)
    assert model.event_shape == (2, 2, 1)
    assert model.data_std == 0.5
    np.testing.assert_allclose(np.log([model.sigma_min, model.sigma_max]), [-4.9, 2.9])
    assert model.null_condition is None
    out = model(jnp.ones((2, 2, 1), jnp.float32), 0.3)
    assert out.shape == (2, 2, 1)
    assert jnp.isfinite(out).all()


def test_data_std_is_that_of_the_data():
    data = images()
    model = train(data, network=TINY, steps=1, batch_size=2)
    assert model.data_std == pytest.approx(data.std())


def test_same_seed_same_bits_and_another_seed_another_model():
    first, again = (train(images(), steps=7, seed=5, **FAST) for _ in range(2))
    equal(first, again)
    other = train(images(), steps=7, seed=6, **FAST)
    assert any(
        (np.asarray(a) != np.asarray(b)).any()
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    )


def test_double_precision_default_changes_nothing():
    single = train(images(), steps=7, **FAST)
    with jax.enable_x64(not jax.config.jax_enable_x64):
        double = train(images(), steps=7, **FAST)
    for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(double), strict=True):
        assert a.dtype == b.dtype == np.float32
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_repeated_images_are_drawn_as_often_as_they_stand():
    """One image 7 times of 8: what the network sees is mostly that."""
    two = np.zeros((2, 1, 1, 1), np.float32)
    two[0], two[1] = 1.0, -1.0
    network = ResidualMLP(width=32, num_blocks=1, embedding_width=16)
    kwargs = {"steps": 800, "learning_rate": 3e-3, "data_std": 1.0, "ema_decay": 0.98}
    model = train(two[[0] * 7 + [1]], network=network, **kwargs)
    x = jnp.zeros((1, 1, 1), jnp.float32)
    # Half way between the two the denoiser is the mean of the training set at every noise.
    denoised = [float((x + s**2 * model(x, s)).sum()) for s in (1.0, 2.0)]
    np.testing.assert_allclose(denoised, 6 / 8, atol=0.15)


def test_conditions_reach_the_network():
    """Each condition has one image; under the null condition it is their mean."""
    data = np.array([1.0, -1.0], np.float32).reshape(2, 1, 1, 1)
    network = ResidualMLP(width=32, num_blocks=1, embedding_width=16, num_conditions=2)
    model = train(
        data,
        conditions=np.arange(2),
        network=network,
        steps=600,
        batch_size=64,
        condition_dropout=0.3,
        data_std=1.0,
        ema_decay=0.98,
    )
    assert int(model.null_condition) == 2
    x = jnp.zeros((1, 1, 1), jnp.float32)
    denoised = [float((x + model(x, 1.0, c)).sum()) for c in (jnp.int32(0), jnp.int32(1), None)]
    np.testing.assert_allclose(denoised, [1.0, -1.0, 0.0], atol=0.15)


def test_default_networks_by_name():
    model = train(images(4), network="mlp", steps=1, batch_size=2, conditions=np.arange(4))
    assert model.raw_score.network.network.module == ResidualMLP(num_conditions=4)


@pytest.mark.slow
def test_unet_trains():
    told = []
    network = UNet(channels=(8,), groups=4, embedding_width=8)
    train(
        images(8, (4, 4, 1)),
        network=network,
        steps=300,
        batch_size=32,
        progress=lambda *args: told.append(args[2]),
    )
    assert told[-1] < 0.8 * told[0]


# Resuming


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_resumed_equals_uninterrupted(stop_at, tmp_path):
    """Stopped by an exception in the callback after some hundred steps, then called again."""
    kwargs = {"steps": 450, "checkpoint_every": 150, "seed": 3, **FAST}
    expected = train(images(), **kwargs)

    class StopError(Exception):
        pass

    calls = []

    def progress(step, steps, loss):
        calls.append(step)
        if len(calls) == stop_at:
            raise StopError

    with pytest.raises(StopError):
        train(images(), checkpoint_dir=tmp_path, progress=progress, **kwargs)
    calls.clear()
    stop_at = -1
    resumed = train(images(), checkpoint_dir=tmp_path, progress=progress, **kwargs)
    equal(resumed, expected)
    calls.clear()
    equal(train(images(), checkpoint_dir=tmp_path, progress=progress, **kwargs), expected)
    assert calls == []


@pytest.mark.slow
def test_killed_equals_uninterrupted(tmp_path):
    """SIGKILL in a process of its own, as soon as it has stored a state."""
    script = tmp_path / "fit.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys
            import numpy as np
            from memjax.networks.mlp import ResidualMLP
            from memjax._core.hashing import fingerprint
            from memjax.training.loop import train
            import jax

            rng = np.random.default_rng(0)
            model = train(
                rng.normal(size=(30, 3)).astype(np.float32),
                network=ResidualMLP(width=16, num_blocks=1, embedding_width=8),
                steps=1500, batch_size=8, checkpoint_dir=sys.argv[1], checkpoint_every=20,
                progress=lambda *args: print(*args, flush=True),
            )
            print("done", fingerprint(*[np.asarray(leaf) for leaf in jax.tree.leaves(model)]))
            """
        )
    )

    def start(folder):
        return subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )

    whole, _ = start(tmp_path / "whole").communicate(timeout=300)
    for lines in (2, 5):
        process = start(tmp_path / "killed")
        for _ in range(lines):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=300)
    resumed, _ = start(tmp_path / "killed").communicate(timeout=300)
    assert whole.splitlines()[-1].startswith("done ")
    assert resumed.splitlines()[-1] == whole.splitlines()[-1]
    assert len(resumed.splitlines()) < len(whole.splitlines())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 30}, "expected steps = 30, found 20"),
        ({"seed": 1}, "expected seed = 1, found 0"),
        ({"learning_rate": 1e-2}, r"expected learning_rate = 0\.01, found 0\.001"),
        ({"data_std": 0.6}, r"expected data_std = 0\.6, found 0\.5"),
        (
            {"second_order_weight": 0.5},
            r"expected second_order_weight = 0\.5, found None",
        ),
        ({"network": TINY.clone(width=8)}, r"expected network = .*'width': 8.*found .*'width': 16"),
        ({"images": images(seed=1)}, "expected images = '[0-9a-f]{64}', found '[0-9a-f]{64}'"),
    ],
)
def test_resume_refuses_another_training(change, message, tmp_path):
    arguments = {"images": images(), "steps": 20, "checkpoint_dir": tmp_path, **FAST}
    train(**arguments)
    with pytest.raises(InputError, match="belongs to another training: " + message) as caught:
        train(**(arguments | change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["flip", "truncate", "other"])
def test_damaged_state_is_refused(damage, tmp_path):
    arguments = {"images": images(), "steps": 20, "checkpoint_dir": tmp_path, **FAST}
    train(**arguments)
    file = tmp_path / STATE_FILE
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-100] ^= 1
    elif damage == "truncate":
        data = data[:-100]
    else:
        data = bytearray(b"not a state")
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"state\.safetensors: expected the state.*delete it"):
        train(**arguments)


# What it is compiled into


def test_no_data_or_weight_is_baked_into_the_program():
    data = images(500, (8, 8, 1))
    network = ResidualMLP(width=32, num_blocks=1, embedding_width=8)
    variables = jax.eval_shape(
        network.init, jax.random.key(0), jnp.zeros((8, 8, 1), jnp.float32), jnp.float32(0)
    )
    weights = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), variables["params"])
    recipe = Recipe(8, 1e-3, 0.999, -1.0, 1.3, 0.1, 0.5)
    state = start(weights, adam(recipe))
    text = run.lower(
        state,
        jnp.int32(5),
        Data(jnp.asarray(data), None),
        jax.random.key(0),
        family=_Trained(network),
        recipe=recipe,
    ).as_text()
    shapes = re.findall(r"stablehlo.constant dense.*: tensor<([0-9x]*)x[a-z]", text)
    assert all(np.prod([int(n) for n in shape.split("x")]) < 1000 for shape in shapes)


def test_one_program_for_every_stretch():
    run.clear_cache()
    train(images(), steps=250, checkpoint_every=70, **FAST)
    assert run._cache_size() == 1


# Bad input


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"learning_rate": -1.0}, r"learning_rate: expected a positive number, got -1\.0"),
        ({"ema_decay": 1.0}, r"ema_decay: expected 0 <= ema_decay < 1, got 1\.0"),
        ({"data_std": 0.0}, r"data_std: expected a positive number, got 0\.0"),
        (
            {"second_order_weight": -1},
            r"second_order_weight: expected at least 0, got -1\.0",
        ),
        ({"checkpoint_every": 0}, "checkpoint_every: expected at least 1, got 0"),
        ({"conditions": np.zeros(20, np.int64)}, r"conditions: expected 0\.\.-1 .*found 0\.\.0"),
        (
            {"conditions": np.arange(20), "network": TINY.clone(num_conditions=19)},
            r"conditions: expected 0\.\.18 \(network\.num_conditions = 19\), found 0\.\.19",
        ),
    ],
)
def test_bad_arguments(kwargs, message):
    arguments = FAST | {"steps": 5} | kwargs
    with pytest.raises(InputError, match=message):
        train(images(), **arguments)


def test_bad_images():
    bad = images()
    bad[[3, 5], 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="found 2 rows with others, the first is row 3"):
        train(bad, **FAST)
    with pytest.raises(InputError, match="images: expected float32, got float64"):
        train(images().astype(np.float64), **FAST)
    with pytest.raises(InputError, match="data_std: expected a positive number"):
        train(np.ones((3, 2, 2, 1), np.float32), network=TINY)
