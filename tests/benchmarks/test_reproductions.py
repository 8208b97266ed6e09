"""The reproductions run, say what holds, and measure with what is itself right."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax.densities.gaussian import Gaussian
from memjax.diffusion.model import Model
from memjax.diffusion.sampling import ddim, noise_levels

NAMES = (
    "circle",
    "early_signatures",
    "p_laplace_triangle",
    "sharpness_digits",
    "sharpness_mixture",
    "volume_growth",
)


def test_every_module_is_one(load):
    found = load("reproductions.__main__").reproductions()
    assert [one.name for one in found] == list(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_says_what_holds(load, name, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("sklearn")
    record_module = load("reproductions._record")
    reproduction = load(f"reproductions.{name}").REPRODUCTION
    arguments = ["--quick", "--results", str(tmp_path), "--figures", str(tmp_path)]
    assert record_module.main([reproduction], arguments) == 0
    told = capsys.readouterr().out
    record = json.loads((tmp_path / f"reproduction-{name}.quick.json").read_text())
    assert len(record["statements"]) >= 2
    for statement in record["statements"]:
        assert statement["expected"] in told
        assert statement["measured"] in told
        assert isinstance(statement["holds"], bool)
        assert statement["holds"] or statement["why"] or record["quick"]
    assert {"versions", "git", "cpu"} <= set(record)
    assert (tmp_path / f"reproduction-{name}.quick.png").stat().st_size > 10_000
    assert load("harness").read(tmp_path, quick=True) == {}, "no benchmark takes it for its own"


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_of_the_full_size(load, name):
    """The committed record is no quick run, and where a statement fails it says why."""
    harness = load("harness")
    record = json.loads((harness.RESULTS / f"reproduction-{name}.json").read_text())
    assert not record["quick"]
    assert all(s["holds"] or s["why"] for s in record["statements"])
    assert (harness.FIGURES / f"reproduction-{name}.png").exists()


def test_the_fluxes_of_the_triangle(load):
    """Quadrature against the published setting's table, and Gauss' law at a lone mode."""
    triangle = load("reproductions.p_laplace_triangle")
    lone = Gaussian(jnp.zeros(2), triangle.VARIANCE * jnp.eye(2))
    (flux,) = triangle._quadrature(lone, 0.0, jnp.zeros((1, 2)))
    np.testing.assert_allclose(flux, [2 * np.pi, 2 * np.pi / triangle.VARIANCE], rtol=1e-4)
    world = triangle.world()
    found = triangle._quadrature(world, 0.0, jnp.asarray(triangle.POINTS, world.dtype))
    published = np.array([triangle.PUBLISHED[label] for label in triangle.LABELS])
    np.testing.assert_allclose(found, published, rtol=1e-3)


def test_trajectories_are_those_of_the_sampler(load):
    density = Gaussian(jnp.zeros(3, jnp.float32), jnp.diag(jnp.array([0.1, 1.0, 2.0], jnp.float32)))
    model = Model(density, (3,), sigma_min=0.01, sigma_max=5.0, data_std=1.0)
    sigmas, path = load("reproductions._trajectories").trajectories(
        model, 4, jax.random.key(0), last=0.05, steps=20, kept=6
    )
    grid = noise_levels(5.0, 0.05, 21)[:-1]
    np.testing.assert_allclose(sigmas, grid[::4], rtol=1e-5)
    whole = jax.vmap(lambda x: ddim(model, x, jnp.asarray(grid, x.dtype)))(path[0])
    np.testing.assert_allclose(path[-1], whole, rtol=1e-4, atol=1e-5)


def test_pairs_are_disjoint_and_of_one_digit(load):
    growth = load("reproductions.volume_growth")
    labels = np.arange(40) % 3
    first, second = np.arange(10), np.arange(10, 40)
    pairs = growth._pairs(first, second, labels, np.random.default_rng(0))
    assert len(np.unique(pairs)) == pairs.size == 20
    assert (labels[pairs[:, 0]] == labels[pairs[:, 1]]).all()
    assert set(pairs[:, 0]) == set(first)


def test_the_paired_test_is_scipys(load):
    from scipy.stats import ttest_rel

    a, b = np.random.default_rng(0).normal(size=(2, 12))
    expected = ttest_rel(a, b, alternative="greater")
    found = load("reproductions.volume_growth")._paired(a - b)
    np.testing.assert_allclose(found, [expected.statistic, expected.pvalue], rtol=1e-12)


def test_what_is_not_finite_becomes_null(load):
    jsonable = load("reproductions._record").jsonable
    value = {"a": np.array([1 / 3, np.nan]), "b": (True, np.bool_(False)), "c": np.int32(3)}
    assert jsonable(value) == {"a": [0.33333, None], "b": [True, False], "c": 3}
