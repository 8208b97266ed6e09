"""Extraction from models whose stored images are known, whole, interrupted and refused."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.auditing.extraction import Extracted, discard, extract
from memjax.auditing.matches import band_edges, distinct_images, judge, match
from memjax.auditing.parts import Parts
from memjax.auditing.stages import Candidates, SampleSet, Side
from memjax.densities import Empirical
from memjax.diffusion import Model, sample
from memjax.evaluate import find_copies
from memjax.extract import find_attractors

SHAPE = (3, 2, 1)
QUICK = {"num_samples": 40, "chunk_size": 2, "level": 0.1}


class Score(eqx.Module):
    """The score of images, of a density of vectors."""

    density: Callable

    def __call__(self, x, sigma, condition=None):
        return self.density(x.reshape(-1), sigma).reshape(x.shape)


@pytest.fixture(scope="module")
def stored():
    """Images far apart; the first stands three times in the training set."""
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (7, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def model(stored):
    points = np.concatenate([stored, stored[:1], stored[:1]]).reshape(9, -1)
    score = Score(Empirical(jnp.asarray(points)))
    return Model(
        score, SHAPE, sigma_min=0.01, sigma_max=20.0, data_std=float(stored.std(dtype=np.float64))
    )


def test_all_that_is_stored_comes_out(model, stored):
    """The exact score of a training set has no other attractors than its images."""
    found = extract(model, **QUICK, seed=3)
    unguided, fixed = found.sets
    assert [each.name for each in found.sets] == ["unguided", "fixed points"]
    copies = find_copies(found.candidates.points, stored)
    assert copies.is_copy.all()
    assert len(set(copies.nearest)) == len(copies.nearest)
    hits = np.bincount(find_copies(unguided.samples, stored).nearest, minlength=len(stored))
    assert np.array_equal(found.candidates.facts["hits"], hits[copies.nearest])
    np.testing.assert_allclose(fixed.samples, stored[find_copies(fixed.samples, stored).nearest],
                               atol=1e-3)  # fmt: skip
    assert found.facts["converged"] == found.facts["starts"] == 40
    assert unguided.products == 40 * 35
    assert unguided.products + 40 <= fixed.products <= unguided.products + 40 * 201

    # The same as the two functions that it is made of.
    np.testing.assert_allclose(
        unguided.samples.std(), np.asarray(sample(model, 400, key=1)).std(), rtol=0.2
    )
    at = find_attractors(model, jnp.asarray(unguided.samples), found.facts["sigma"], key=0)
    np.testing.assert_allclose(found.candidates.points, at.points, atol=1e-5)
    np.testing.assert_allclose(found.candidates.facts["radius"], at.radius, atol=1e-4)


def test_judged_by_the_training_set(model, stored):
    found = extract(model, **QUICK, seed=3)
    images = np.concatenate([stored, stored[:1]])
    reference = distinct_images(images, np.arange(10, 18))
    assert reference.rows.tolist() == [10, 11, 12, 13, 14, 15, 16]
    assert reference.times.tolist() == [2, 1, 1, 1, 1, 1, 1]
    bands = band_edges("l2", [0.1, 5.0])
    heldout = np.random.default_rng(5).uniform(-1, 1, (20, *SHAPE)).astype(np.float32)
    judged = judge(model, found, reference, bands=bands, distance="l2", heldout=heldout)
    for each, of in zip(judged.sets, found.sets, strict=True):
        assert each.copied.value == 1
        hit = set(find_copies(of.samples, stored).nearest)
        assert each.distinct.value == pytest.approx(len(hit))
        assert each.bands[0].ams.value == 1
        assert each.bands[0].ums.value == pytest.approx(len(hit) / 40)
        assert each.heldout is not None
        assert each.heldout.value == 0
    assert judged.is_copy.all()
    np.testing.assert_allclose(judged.distance, judged.d1, atol=1e-6)
    without = match(found.sets[0].samples, reference, bands=bands, distance="l2")
    assert without.heldout is None


def test_nothing_comes_to_rest(model, stored):
    found = extract(model, **{**QUICK, "level": 3.0}, num_steps=1)
    assert found.facts["converged"] == 0
    assert found.candidates.images.shape == (0, *SHAPE)
    reference = distinct_images(stored, np.arange(7))
    judged = judge(model, found, reference, bands=band_edges("adaptive", None))
    assert len(judged.is_copy) == len(judged.distance) == 0


def test_interrupted_work_goes_on_bitwise(model, tmp_path, monkeypatch):
    """Stopped before and after every block that is written, as a kill would."""
    whole = extract(model, **QUICK)
    write = Parts.write
    stops = 0
    for where in range(9):  # 3 blocks of samples, 3 of fixed points, the attractors
        left = [where]

        def stop(self, name, arrays, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            write(self, name, arrays)

        out = tmp_path / str(where)
        monkeypatch.setattr(Parts, "write", stop)
        try:
            extract(model, **QUICK, out=out)
        except KeyboardInterrupt:
            stops += 1
        monkeypatch.setattr(Parts, "write", write)
        parts = sorted((out / "parts").glob("*.npz"))
        if parts:  # the last one did not reach the disk whole
            parts[-1].write_bytes(parts[-1].read_bytes()[:100])
        again = extract(model, **QUICK, out=out)
        for one, other in zip(again.sets, whole.sets, strict=True):
            assert one.samples.tobytes() == other.samples.tobytes()
        for name, values in whole.candidates.facts.items():
            assert again.candidates.facts[name].tobytes() == values.tobytes()
        assert again.candidates.images.tobytes() == whole.candidates.images.tobytes()
        assert again.facts == whole.facts
        discard(out, whole.plan)
        assert not (out / "parts").exists()
    assert stops == 7


def test_unfinished_work_is_not_mixed_with_other(model, tmp_path):
    extract(model, **QUICK, out=tmp_path)
    with pytest.raises(InputError, match="unfinished extraction that differs in seed;"):
        extract(model, **QUICK, out=tmp_path, seed=1)
    with pytest.raises(InputError, match="differs in samples;"):
        extract(model, **{**QUICK, "num_samples": 41}, out=tmp_path)
    other = Model(
        model.raw_score, SHAPE, sigma_min=0.01, sigma_max=20.0, data_std=2 * model.data_std
    )
    with pytest.raises(InputError, match="differs in data_std;"):
        extract(other, **QUICK, out=tmp_path)


def test_what_is_refused(model, stored):
    with pytest.raises(InputError, match="num_samples"):
        extract(model, num_samples=0)
    with pytest.raises(InputError, match="level: expected a number from"):
        extract(model, level=1e3)
    with pytest.raises(InputError, match="at least 2 distinct"):
        distinct_images(stored[:1], np.arange(1))
    with pytest.raises(InputError, match="ascending"):
        band_edges("adaptive", [0.5, 0.2])
    with pytest.raises(InputError, match="none are usual"):
        band_edges("l2", None)
    with pytest.raises(InputError, match="distance"):
        band_edges("cosine", None)


def test_samples_that_failed_match_nothing(model, stored):
    samples = np.full((4, *SHAPE), np.nan, np.float32)
    samples[0] = stored[2]
    of = SampleSet(None, False, samples, None, 140, 0)
    nothing = Candidates(samples[:0], samples[:0], {})
    reference = distinct_images(stored, np.arange(7))
    found = Extracted({}, (of,), nothing, {})
    (only,) = judge(model, found, reference, bands=band_edges("adaptive", None)).sets
    assert only.copied.value == 0.25
    assert only.bands[0].failed == 3
    assert only.copies.nearest.tolist() == [2, -1, -1, -1]


SIDE = Side(weights=(0.0, 3.0), pool=60, clusters=5, steps=200)


@pytest.fixture(scope="module")
def guided(model):
    """Both methods together."""
    return extract(model, method="both", **QUICK, side=SIDE)


def test_guidance_changes_only_what_it_guides(model, guided, stored):
    names = ["weight 0", "weight 3", "weight 0, fixed", "weight 3, fixed"]
    assert [each.name for each in guided.sets] == names
    free, pushed, *_ = guided.sets
    assert np.array_equal(free.label, pushed.label)
    assert free.products == pushed.products == 40 * 35
    assert (free.gradients, pushed.gradients) == (0, 40 * 35)
    assert not np.array_equal(free.samples, pushed.samples)
    # Few samples of few images: clusters are images, and guided samples are those asked for.
    nearest = [find_copies(each.samples, stored).nearest for each in (free, pushed)]
    agree = [
        np.mean([len(set(near[free.label == c])) == 1 for c in np.unique(free.label)])
        for near in nearest
    ]
    assert agree[1] > agree[0]
    assert find_copies(guided.candidates.points, stored).is_copy.all()
    assert sum(guided.facts["cluster_size"]) == 60
    assert guided.facts["classifier"]["accuracy"][0] > 0.9


def test_crowds_are_ranked_without_fixed_points(model, guided, stored):
    found = extract(model, method="side", **QUICK, side=SIDE)
    for one, other in zip(found.sets, guided.sets[:2], strict=True):
        assert one.samples.tobytes() == other.samples.tobytes()
    facts = found.candidates.facts
    assert np.all(np.diff(facts["contrast"]) >= 0)
    assert np.all(facts["weight"] == 3)
    assert len(facts["hits"]) > 0
    assert np.all(facts["hits"] > 1)
    assert find_copies(found.candidates.images, stored).is_copy.all()
    assert "level" not in found.plan
    assert "sigma" not in found.facts


def test_interrupted_guidance_goes_on_bitwise(model, guided, tmp_path, monkeypatch):
    write, written = Parts.write, []

    def stop(self, name, arrays):
        write(self, name, arrays)
        written.append(name)
        if len(written) in (3, 5, 6, 7, 10, 12):  # clusters, classifier, samples, fixed points
            raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "write", stop)
    for _ in range(6):
        with pytest.raises(KeyboardInterrupt):
            extract(model, method="both", **QUICK, side=SIDE, out=tmp_path)
    again = extract(model, method="both", **QUICK, side=SIDE, out=tmp_path)
    assert len(written) == len(set(written))  # nothing was computed twice
    for one, other in zip(again.sets, guided.sets, strict=True):
        assert one.samples.tobytes() == other.samples.tobytes()
    assert again.candidates.images.tobytes() == guided.candidates.images.tobytes()
    assert again.facts == guided.facts

    # A classifier that is not the one that was kept is trained again.
    weights = tmp_path / "classifier" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    written.clear()
    monkeypatch.setattr(Parts, "write", write)
    once_more = extract(model, method="both", **QUICK, side=SIDE, out=tmp_path)
    assert once_more.facts == guided.facts
    changed = SIDE._replace(weights=(0.0, 2.0))
    with pytest.raises(InputError, match="differs in side;"):
        extract(model, method="both", **QUICK, side=changed, out=tmp_path)


def test_features_are_what_is_clustered(model, guided):
    shapes = []

    def halves(images):
        shapes.append(images.shape)
        return images[:, :1]

    side = SIDE._replace(features=halves, weights=(0.0,), steps=1)
    found = extract(model, method="side", **QUICK, side=side)
    assert shapes == [(60, *SHAPE), (40, *SHAPE)]
    assert found.plan["side"]["features"].endswith("halves")
    assert np.all(found.candidates.facts["weight"] == 0)


def test_the_exact_posterior_needs_no_training(model, guided, tmp_path, stored):
    side = SIDE._replace(classifier="posterior", weights=(3.0,), window=(0.2, 20.0))
    found = extract(model, method="side", **QUICK, side=side, out=tmp_path)
    assert not (tmp_path / "classifier").exists()
    assert "classifier" not in found.facts
    (pushed,) = found.sets
    label = np.asarray(pushed.label)
    assert np.array_equal(label, guided.sets[1].label)
    assert 0 < pushed.gradients < 40 * 35  # in the window only
    # Clusters of an empirical density are its images: everybody gets the one that was asked for.
    nearest = find_copies(pushed.samples, stored).nearest
    assert all(len(set(nearest[label == c])) <= 2 for c in range(5))


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"weights": ()}, "weights"),
        ({"weights": (1.0, 1.0)}, "different numbers"),
        ({"weights": (-1.0,)}, "at least 0"),
        ({"clusters": 1}, "clusters"),
        ({"pool": 4}, "at least 5"),
        ({"keep": 0.0}, "keep"),
        ({"classifier": "magic"}, "classifier"),
        ({"steps": 0}, "steps"),
        ({"window": (2.0, 1.0)}, "window"),
        ({"limit": 0.0}, "limit"),
        ({"features": "magic"}, "features"),
    ],
)
def test_what_side_refuses(model, changed, word):
    with pytest.raises(InputError, match=word):
        extract(model, method="side", **QUICK, side=SIDE._replace(**changed))
