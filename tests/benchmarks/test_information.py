"""What the training runs know: the oracles of the table, and the classifier they are given to."""

import importlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from memjax._core.keys import derive_key
from memjax.networks.mlp import ResidualMLP
from memjax.training import _steps, loop

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    """The benchmarks lie beside the package, outside what is installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.information")


def test_the_classifier_is_at_its_minimum(bench):
    rng = np.random.default_rng(0)
    labels = rng.random(400) < 0.2
    features = rng.normal(size=(400, 3)) * [1, 10, 0.1] + labels[:, None] * [1, 0, 0.2]
    scaled = (features - features.mean(0)) / features.std(0)
    share = np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())

    def loss(w):
        margins = np.where(labels, 1, -1) * (scaled @ w[:3] + w[3])
        return share @ np.log1p(np.exp(-margins)) + bench.RIDGE * w[:3] @ w[:3]

    best = minimize(loss, np.zeros(4), method="BFGS", options={"gtol": 1e-9}).x
    np.testing.assert_allclose(bench.fit(features, labels), best[:3] / features.std(0), rtol=1e-3)


def test_exposures_are_the_draws_of_the_training(bench, monkeypatch):
    """A training step is asked which rows and noise levels it takes."""
    seed, steps, multiplicity = 3, 2, np.array([1, 0, 2, 1])
    train_indices = np.repeat(np.arange(4), multiplicity)
    drawn = []

    class Recorder:
        """Images that note which of them are taken."""

        shape = (len(train_indices), 2)

        def __len__(self):
            return len(train_indices)

        def __getitem__(self, rows):
            drawn.append(np.asarray(rows))
            return jnp.zeros((len(rows), 2), jnp.float32)

    network = ResidualMLP()
    levels = []
    exp = jnp.exp
    monkeypatch.setattr(_steps.jnp, "exp", lambda x: levels.append(np.asarray(exp(x))) or exp(x))
    recipe = _steps.Recipe(bench.BATCH, 1e-3, 0.999, *bench.LOG_SIGMA, 0.1, 1.0, 0.0)
    monkeypatch.setattr(type(network), "apply", lambda self, w, x, t: x)
    for step in range(steps):
        key = _steps.jax.random.fold_in(derive_key(seed, "step"), step)
        draws = _steps.draw_rows(key, len(train_indices), bench.BATCH)
        data = _steps.Data(Recorder(), None)
        _steps.batch_loss({}, data, draws, key, loop._Trained(network), recipe)
    monkeypatch.undo()
    rows, sigmas = np.stack(drawn), np.stack(levels[:steps])
    found = bench.exposures(seed, train_indices, multiplicity, steps)
    for column, (low, high) in enumerate(bench.BANDS):
        chosen = train_indices[rows[(sigmas > low) & (sigmas <= high)]]
        counts = np.bincount(chosen, minlength=4)
        expected = multiplicity * len(chosen) / len(train_indices)
        trained = multiplicity > 0
        np.testing.assert_allclose(
            found[trained, column], counts[trained] / expected[trained] - 1, rtol=1e-6
        )
    assert (found[1] == 0).all()


def test_shadows_leave_out_the_model_itself(bench):
    rng = np.random.default_rng(1)
    size = len(bench.STATISTICS)
    statistics = {seed: rng.normal(size=(6, size)) for seed in range(3)}
    multiplicity = {seed: np.array([1, 0, 1, 2, 0, 1]) for seed in range(3)}
    found = bench.shadows(0, statistics, multiplicity)
    columns = list(bench.SHADOWED)
    for times, part in ((1, found[:, :4]), (0, found[:, 4:])):
        seen = multiplicity[0] == times
        centered = [
            statistics[s][:, columns] - statistics[s][seen][:, columns].mean(0) for s in (1, 2)
        ]
        np.testing.assert_allclose(part[seen], sum(centered)[seen] / 3)
        assert (part[~seen] == 0).all()


def test_an_image_is_no_neighbor_of_its_own(bench):
    images = np.zeros((200, 2, 2, 1), np.float32)
    images[:, 0, 0, 0] = np.arange(200) ** 2
    images[:, 1, 1, 0] = np.arange(200) % 3
    columns = bench.rows_nearby(images, np.ones(200, int))
    assert np.isfinite(columns).all()
    assert np.argmin(columns[:, 0]) < 3
