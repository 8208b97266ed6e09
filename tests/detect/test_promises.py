"""What every detector promises: a bad row stays alone, truth is found, absence is not invented.

All detectors that an audit knows run as one program, on exact scores; whichever is added to the
registry is held to the same.
"""

import functools
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import memjax.auditing.run as audit_module
from memjax._core.keys import derive_key
from memjax._core.status import Status
from memjax.auditing import audit
from memjax.auditing.metrics import Truth
from memjax.auditing.plan import (
    DEFAULT_DETECTORS,
    DETECTORS,
    RANKING,
    SAMPLE_DETECTORS,
    plan_detectors,
)
from memjax.auditing.rows import _evaluate_chunk
from memjax.data.images import from_array, load_images
from memjax.densities import ConditionalMixture, GaussianMixture
from memjax.detect import SampleDetector
from memjax.diffusion.model import Model
from memjax.evaluate import auroc, flag

pytestmark = pytest.mark.slow

KEY = derive_key(0, "detectors")
SHAPE = {8: (2, 4, 1), 64: (8, 8, 1), 768: (16, 16, 3)}
# Of the worlds below: sets the noise levels, and so is not measured anew in each.
DATA_STD = {8: 0.5, 64: 0.4, 768: 0.2}
NUM_STORED, NUM_COMPONENTS, NUM_ROWS, NUM_SAMPLES = 5, 8, 100, 600
ALPHA = 0.1

# Conditional and unconditional score differ where the noisy image does not yet tell the prompt.
LEVELS = {"score_gap": 10.0, "gap_sharpness": 10.0}
NOT_FOUND = {
    "negative_share": "near every point of an exact mixture all eigenvalues are negative",
    "p_laplace": "undefined at zeros of the score, where an exact world stores its points",
    "denoised_norm": "a stored image may be smaller than what another prompt shows on average",
    "anisotropy": "undefined without a gap at small noise, where ordinary images have none here",
}


class World(NamedTuple):
    """A density with stored points, and rows of which the stored ones come first."""

    model: Model
    baseline: Model
    rows: np.ndarray
    labels: np.ndarray
    samples: np.ndarray


class Unconditional(eqx.Module):
    density: GaussianMixture

    def __call__(self, x, sigma, condition=None):
        return self.density.score(x, sigma)


def world(seed: int, d: int, num_stored: int) -> World:
    """Components of local dimension 2, 4 and 8, and stored points drawn from them.

    Every stored point has a label of its own (its prompt). The components share one label where
    there are stored points, so that the condition of ordinary rows says little; elsewhere each
    has its own, so that it says something. The baseline has not seen the stored points. Samples
    are exact draws. All worlds of one dimension have arrays of one shape: one program.
    """
    rng = np.random.default_rng([seed, d, num_stored])
    count = NUM_COMPONENTS - num_stored
    local = np.array([2, 4, 8])[np.arange(count) % 3]
    std = np.where(np.stack([rng.permutation(d) < k for k in local]), 1.0, 0.1)
    means = std * rng.normal(size=std.shape)

    def draw(component):
        return means[component] + std[component] * rng.normal(size=(len(component), d))

    def shaped(points):
        return points.reshape(-1, *SHAPE[d]).astype(np.float32)

    stored = draw(rng.integers(0, count, num_stored))
    component = rng.integers(0, count, NUM_ROWS - num_stored)
    rows = np.concatenate([stored, draw(component)])
    samples = draw(rng.integers(0, count, NUM_SAMPLES))
    chosen = rng.integers(0, 50, NUM_SAMPLES)  # each stored point is one sample in 50
    samples[chosen < num_stored] = rows[chosen[chosen < num_stored]]

    labels = np.zeros(count, int) if num_stored else np.arange(count)
    prompts = np.arange(count, NUM_COMPONENTS)
    again = np.arange(NUM_COMPONENTS) % count
    weights = np.concatenate([np.full(count, (1 - 0.02 * num_stored) / count), [0.02] * num_stored])
    density = ConditionalMixture(
        weights.astype(np.float32),
        jnp.asarray(shaped(np.concatenate([means, stored]))),
        shaped(np.concatenate([std**2, np.zeros((num_stored, d))])),
        np.concatenate([labels, prompts]),
    )
    background = GaussianMixture(
        (1 / np.bincount(again)[again] / count).astype(np.float32),
        jnp.asarray(shaped(means[again])),
        shaped(std[again] ** 2),
    )
    options = {"sigma_min": 1e-3, "sigma_max": 50.0, "data_std": DATA_STD[d]}
    options |= {"null_condition": jnp.int32(-1)}
    return World(
        Model(density, SHAPE[d], **options),
        Model(Unconditional(background), SHAPE[d], **options),
        shaped(rows),
        np.concatenate([prompts, labels[component]]).astype(np.int32),
        shaped(samples),
    )


@functools.cache
def planned(d: int):
    """Every detector an audit knows: those of the score, those of samples."""
    names = dict.fromkeys((*RANKING[1:], *DEFAULT_DETECTORS, *DETECTORS))
    specs = [f"{name}@{LEVELS[name]}" if name in LEVELS else name for name in names]
    entries = plan_detectors([*specs, *SAMPLE_DETECTORS], world(0, d, 1).model)
    of_samples = [e for e in entries if isinstance(e.detector, SampleDetector)]
    return [e for e in entries if e not in of_samples], of_samples


def column(entry) -> str:
    """The detector's name in an audit, whatever the level."""
    return entry.label.partition("@")[0]


def evaluate(here: World, d: int, rows=None):
    """Findings of every detector of the score, as arrays [n, k]."""
    detectors = tuple(entry.detector for entry in planned(d)[0])
    images = jnp.asarray(here.rows if rows is None else rows)
    labels = jnp.asarray(here.labels)
    found = _evaluate_chunk(here.model, here.baseline, images, labels, KEY, detectors)
    return jax.tree.map(np.asarray, found)


def compare(here: World, d: int, rows=None):
    """(value, status) of every detector of samples, as arrays [n, k]."""
    rows = here.rows if rows is None else rows
    found = [e.detector.compare(rows, here.samples, here.rows) for e in planned(d)[1]]
    return np.stack([f.value for f in found], 1), np.stack([f.status for f in found], 1)


def spoil(rng, rows):
    """Overwrite one to four rows, in part or whole; the other rows' numbers stay."""
    bad = rng.choice(len(rows), rng.integers(1, 5), replace=False)
    rows = rows.copy()
    for row in bad:
        value = rng.choice([np.nan, np.inf, -np.inf, np.finfo(np.float32).max, -1e30, 1e19])
        pixels = rng.random(rows.shape[1:]) < rng.choice([0.2, 1.0])
        pixels.flat[rng.integers(pixels.size)] = True
        rows[row, pixels] = value
    return rows, bad


@pytest.mark.parametrize(
    "cases", [300, pytest.param(3000, marks=pytest.mark.nightly)], ids=["300", "3000"]
)
def test_a_bad_row_changes_no_other(cases):
    """NaN, infinities and huge numbers inside a chunk, one case a chunk."""
    rng = np.random.default_rng(0)
    names = [column(entry) for part in planned(8) for entry in part]
    for case in range(cases):
        if case % 20 == 0:
            here = world(case, 8, NUM_STORED)
            clean = evaluate(here, 8)
            clean_value, clean_status = compare(here, 8)
        rows, bad = spoil(rng, here.rows)
        found = evaluate(here, 8, rows)
        value, status = compare(here, 8, rows)
        good = np.setdiff1d(np.arange(NUM_ROWS), bad)
        for field, before, after in zip(clean._fields, clean, found, strict=True):
            np.testing.assert_array_equal(after[good], before[good], err_msg=field)
        np.testing.assert_array_equal(value[good], clean_value[good])
        np.testing.assert_array_equal(status[good], clean_status[good])
        value = np.concatenate([found.value, value], 1)
        status = np.concatenate([found.status, status], 1)
        np.testing.assert_array_equal(np.isfinite(value), status == Status.OK)
        unreadable = bad[~np.isfinite(rows[bad]).all(axis=(1, 2, 3))]
        failed = (status[unreadable] != Status.OK).all(axis=0)
        assert failed.all(), np.array(names)[~failed]


@pytest.fixture
def _one_backend_check(monkeypatch):
    report = audit_module.check_backend()
    monkeypatch.setattr(audit_module, "check_backend", lambda: report)


def write_pictures(folder, count):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = rng.integers(0, 256, SHAPE[8][:2], dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image{i:02d}.png")
    return folder


@pytest.mark.usefixtures("_one_backend_check")
def test_a_bad_row_of_an_audit_keeps_its_place_and_no_rank(tmp_path):
    """Files of a wrong shape or no picture at all; NaN, infinite and huge pixels."""
    here = world(0, 8, NUM_STORED)
    detectors = [entry.detector for part in planned(8) for entry in part]
    n, bad = 24, [0, 7, 16, 17, 23]
    good = np.setdiff1d(np.arange(n), bad)
    folder = write_pictures(tmp_path / "pictures", n)

    def run(images):
        return audit(
            here.model,
            images,
            detectors=detectors,
            conditions=np.arange(n, dtype=np.int32) % 2 * 3,
            baseline=here.baseline,
            samples=np.tanh(here.samples),
            trained_on=good,  # what samples are compared with stays the same
            truth=Truth(np.where(np.arange(n) < 9, 4, 1), np.zeros(n, bool), ("train",) * n),
            chunk_size=NUM_ROWS,  # the program of the other tests
        )

    clean_images = load_images(folder, event_shape=SHAPE[8])
    clean = run(clean_images).table.to_pydict()
    pixels = clean_images.images.copy()
    for row, value in zip(bad, (np.nan, np.inf, -np.inf, 1e30, 2.0), strict=True):
        pixels[row, 0, 1] = value
    for row in bad[:2]:
        Image.fromarray(np.zeros((3, 3), np.uint8)).save(folder / f"image{row:02d}.png")
    for row in bad[2:]:
        (folder / f"image{row:02d}.png").write_bytes(b"\x89PNG\r\n\x1a\n, and then nothing")
    for images in (from_array(pixels), load_images(folder, event_shape=SHAPE[8])):
        result = run(images)
        table = result.table.to_pydict()
        for detector in detectors:
            for suffix in ("", "_raw", "_se", "_status"):
                before, after = (t[detector.name + suffix] for t in (clean, table))
                assert [after[row] for row in good] == [before[row] for row in good]
            for row in bad:
                assert table[detector.name][row] is None
                assert table[f"{detector.name}_rank"][row] is None
                assert table[f"{detector.name}_status"][row].startswith("input_")
        assert [table["rank"][row] for row in bad] == [None] * len(bad)
        assert all(table["reason"][row] for row in bad)
        assert result.manifest["data"]["status_counts"]["ok"] == len(good)
        assert {entry["detector"] for entry in result.metrics["contrasts"]} == {
            detector.name for detector in detectors
        }
        assert all(entry["excluded"] >= len(bad) for entry in result.metrics["contrasts"])


SIZES = [
    pytest.param(8, 20, id="8"),
    pytest.param(64, 20, id="64"),
    pytest.param(8, 200, id="8-large", marks=pytest.mark.nightly),
    pytest.param(64, 200, id="64-large", marks=pytest.mark.nightly),
    pytest.param(768, 20, id="768", marks=pytest.mark.nightly),
]


def values(here: World, d: int):
    """Values of all detectors by name."""
    of_score, of_samples = planned(d)
    table = np.concatenate([evaluate(here, d).value, compare(here, d)[0]], 1)
    names = [column(entry) for entry in (*of_score, *of_samples)]
    return dict(zip(names, table.T, strict=True))


@pytest.mark.parametrize(("d", "seeds"), SIZES)
def test_planted_points_are_found(d, seeds):
    """AUROC of 5 stored points among 100, pooled within each world; the worst world counts."""
    stored = np.arange(NUM_ROWS) < NUM_STORED
    worst: dict[str, float] = {}
    for seed in range(seeds):
        for name, value in values(world(seed, d, NUM_STORED), d).items():
            if name not in NOT_FOUND:
                assert np.isfinite(value).all(), f"{name}, seed {seed}: rows without a value"
                area = auroc(value.astype(np.float64), stored).value
                worst[name] = min(area, worst.get(name, 1.0))
    assert {*DEFAULT_DETECTORS, *SAMPLE_DETECTORS} <= set(worst)
    missed = {name: area for name, area in worst.items() if area < 0.99}
    assert not missed, missed


@pytest.mark.parametrize(("d", "seeds"), SIZES)
def test_absence_is_not_invented(d, seeds):
    """Without stored points, half of the rows calibrate flags for the other half.

    The share of conformal p-values up to alpha keeps to alpha, and so does the share of worlds
    in which any row is flagged (all flags are false), each within four standard errors.
    """
    half = NUM_ROWS // 2
    shares: dict[str, list[float]] = {}
    flagged: dict[str, list[bool]] = {}
    for seed in range(seeds):
        for name, value in values(world(seed, d, 0), d).items():
            scores, calibration = value[half:].astype(np.float64), value[:half].astype(np.float64)
            if np.isnan(calibration).all():
                continue  # undefined on every row: no flag is given (an audit says so)
            found = flag(scores, calibration, ALPHA)
            shares.setdefault(name, []).append(np.mean(found.p_value <= ALPHA))
            flagged.setdefault(name, []).append(bool(found.flagged.any()))
    spread = (ALPHA * (1 - ALPHA) * (1 / half + 1 / (half + 2))) ** 0.5  # rows, and calibration
    assert {*DEFAULT_DETECTORS, *SAMPLE_DETECTORS} <= set(shares)
    for name in shares:
        worlds = len(shares[name]) ** 0.5
        assert np.mean(shares[name]) <= ALPHA + 4 * spread / worlds, name
        assert np.mean(flagged[name]) <= ALPHA + 4 * (ALPHA * (1 - ALPHA)) ** 0.5 / worlds, name
