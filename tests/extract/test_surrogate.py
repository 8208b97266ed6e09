"""Surrogate labels: clusters of samples, loose ones dropped, every sample labelled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.extract import assign_labels, posterior_classifier, surrogate_labels

DIRECTIONS = np.array([[8.0, 0.0, 0.0], [0.0, 8.0, 0.0], [0.0, 0.0, 8.0]])
SPREAD = (0.2, 0.8, 4.0)
"""Of three clusters, so that their cohesion falls."""


@pytest.fixture(scope="module")
def features():
    """Thirty, twenty and ten rows around three directions, the rows shaped 3 x 1; one is bad."""
    rng = np.random.default_rng(0)
    which = np.repeat(np.arange(3), (30, 20, 10))
    rows = DIRECTIONS[which] + np.array(SPREAD)[which, None] * rng.standard_normal((60, 3))
    rows[which == 2] += DIRECTIONS[2]  # wide, and still apart
    rows = np.append(rows, [[np.nan, 0.0, 0.0]], axis=0)
    return rows[:, :, None], np.append(which, -1)


def test_clusters_are_found_and_described(features):
    rows, which = features
    found = surrogate_labels(rows, 3, min_cohesion=-1, seed=0)
    np.testing.assert_array_equal(found.labels, which)
    np.testing.assert_array_equal(found.size, [30, 20, 10])
    assert np.all(np.diff(found.cohesion) < 0)
    for label in range(3):
        own = rows[which == label, :, 0]
        np.testing.assert_allclose(found.centers[label, :, 0], own.mean(axis=0), rtol=1e-12)
        center = own.mean(axis=0)
        cosine = own @ center / np.linalg.norm(own, axis=1) / np.linalg.norm(center)
        np.testing.assert_allclose(found.cohesion[label], cosine.mean(), rtol=1e-12)
    assert len(found.dropped_size) == len(found.dropped_cohesion) == 0


def test_loose_clusters_are_dropped_and_their_samples_join_the_nearest(features):
    rows, which = features
    whole = surrogate_labels(rows, 3, min_cohesion=-1)
    by_cohesion = surrogate_labels(rows, 3, min_cohesion=float(whole.cohesion[1]) - 1e-9)
    by_share = surrogate_labels(rows, 3, min_cohesion=-1, keep=0.7)  # two of three
    for found in (by_cohesion, by_share):
        np.testing.assert_array_equal(found.size, whole.size[:2])
        np.testing.assert_array_equal(found.dropped_size, whole.size[2:])
        np.testing.assert_array_equal(found.dropped_cohesion, whole.cohesion[2:])
        np.testing.assert_array_equal(found.labels[which < 2], which[which < 2])
        stray = rows[which == 2, :, 0]
        gap = np.linalg.norm(stray[:, None] - found.centers[None, :, :, 0], axis=2)
        np.testing.assert_array_equal(found.labels[which == 2], gap.argmin(axis=1))
        assert found.labels[-1] == -1


def test_new_rows_are_labelled_as_old_ones(features):
    rows, _ = features
    found = surrogate_labels(rows, 3, min_cohesion=-1)
    np.testing.assert_array_equal(assign_labels(rows[::-1], found.centers), found.labels[::-1])


def test_the_same_seed_gives_the_same_labels():
    rows = np.random.default_rng(1).standard_normal((200, 8))
    first, again, other = (surrogate_labels(rows, 20, min_cohesion=0, seed=s) for s in (0, 0, 1))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first.centers, other.centers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_clusters": 0}, "num_clusters: expected"),
        ({"num_clusters": 61}, "at least 61 finite rows"),
        ({"keep": 0.0}, "keep: expected 0 < keep <= 1"),
        ({"keep": 1.5}, "keep: expected 0 < keep <= 1"),
        ({"min_cohesion": 1.5}, "min_cohesion: expected clusters of cohesion 1.5, found at most"),
    ],
)
def test_refused(features, change, message):
    with pytest.raises(InputError, match=message):
        surrogate_labels(features[0], **{"num_clusters": 3, **change})


def test_the_posterior_of_a_pool_by_bayes_rule(x64):
    rng = np.random.default_rng(3)
    pool, labels = rng.standard_normal((40, 2, 3)), rng.integers(-1, 4, 40)
    density = posterior_classifier(pool, labels)
    x, sigma = jnp.asarray(rng.standard_normal((2, 3))), 0.8
    used = labels >= 0
    density_at = np.exp(-((pool - np.asarray(x)) ** 2).sum(axis=(1, 2)) / (2 * sigma**2))
    for label in range(4):
        share = density_at[labels == label].sum() / density_at[used].sum()
        np.testing.assert_allclose(
            density.log_class_prob(x, sigma, label), np.log(share), rtol=1e-9
        )
    mean = [
        (density_at[rows, None, None] * pool[rows]).sum(axis=0) / density_at[rows].sum()
        for rows in (labels == 2, used)
    ]
    slope = jax.grad(density.log_class_prob)(x, jnp.asarray(sigma), jnp.int32(2))
    np.testing.assert_allclose(slope, (mean[0] - mean[1]) / sigma**2, rtol=1e-9)


def test_posterior_refused():
    pool = np.zeros((3, 2))
    with pytest.raises(InputError, match="labels: expected 3, one a sample, got 2"):
        posterior_classifier(pool, np.zeros(2, int))
    with pytest.raises(InputError, match="labels: expected one of at least 0"):
        posterior_classifier(pool, np.full(3, -1))
