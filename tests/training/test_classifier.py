"""Training a classifier: it finds Bayes' posterior and its derivative, the same bits every time."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import InputError
from memjax.evaluate.calibration import calibration_error
from memjax.networks.classifier import MLPClassifier, ResNetClassifier
from memjax.training._steps import start
from memjax.training.classifier import (
    _adamw,
    _Data,
    _loss,
    _posterior,
    _Recipe,
    _run,
    train_classifier,
)

M, VARIANCE = np.array([0.6, -0.3]), 0.2
TINY = MLPClassifier(3, width=8, num_blocks=1, embedding_width=8)
FAST = {
    "network": TINY,
    "batch_size": 16,
    "steps": 30,
    "data_std": 0.9,
    "sigma_range": (0.1, 9.0),
}
RECIPE = _Recipe(16, 1e-3, 0.1, 0.9, (0.1, 5.0), 0.7, True)


def blobs(n=60, seed=0, num_classes=3):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, n)
    images = 0.3 * rng.normal(size=(n, 2, 2, 1)) + np.array([-1, 0, 1])[labels].reshape(-1, 1, 1, 1)
    return images.astype(np.float32), labels


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@functools.cache
def two_gaussians():
    """N(m, v) and N(-m, v) in the plane, 6,000 points, and the classifier trained on them."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 6000)
    x = (2 * labels[:, None] - 1) * M + np.sqrt(VARIANCE) * rng.normal(size=(6000, 2))
    network = MLPClassifier(2, width=32, num_blocks=1, embedding_width=16)
    return train_classifier(
        x.astype(np.float32), labels, network=network, steps=1200, sigma_range=(0.1, 5.0), seed=1
    )


def fresh(sigma, n=4000):
    """New points of the two Gaussians, noised, with their labels; m.x decides alone."""
    rng = np.random.default_rng(int(100 * sigma))
    labels = rng.integers(0, 2, n)
    x = (2 * labels[:, None] - 1) * M + np.sqrt(VARIANCE + sigma**2) * rng.normal(size=(n, 2))
    return x.astype(np.float32), labels


@pytest.mark.slow
@pytest.mark.parametrize("sigma", [0.2, 0.5, 1.0, 2.5])
def test_two_gaussians_have_their_posterior_and_its_derivative(sigma):
    """log p(+ | x) = log sigmoid(2 m.x/v), v = variance + sigma^2, and its gradient."""
    classifier = two_gaussians().classifier
    x, labels = fresh(sigma)
    v = VARIANCE + sigma**2
    z = 2 * x @ M / v
    f = jax.jit(jax.vmap(jax.value_and_grad(lambda x, s: classifier(x, s, 1)), (0, None)))
    values, slopes = (np.asarray(a) for a in f(jnp.asarray(x), jnp.float32(sigma)))
    exact = -np.logaddexp(0, -z)
    exact_slopes = (2 * M / v) * (1 - 1 / (1 + np.exp(-z)))[:, None]
    np.testing.assert_allclose(np.exp(values), np.exp(exact), atol=0.09)
    error = ((slopes - exact_slopes) ** 2).mean() / (exact_slopes**2).mean()
    assert error < 0.1
    # The loss on new points against Bayes': the excess is the divergence of the two posteriors.
    signs = 2 * labels - 1
    bayes = np.logaddexp(0, -signs * z)
    found = np.asarray(-jax.vmap(classifier, (0, None, 0))(x, sigma, jnp.asarray(labels)))
    excess = found - bayes
    assert -4 * excess.std() / np.sqrt(len(x)) < excess.mean() < 0.01


@pytest.mark.slow
def test_report_is_that_of_bayes():
    """Every level's loss and accuracy, against the optimum by one-dimensional quadrature."""
    report = two_gaussians().report
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    for sigma, accuracy, loss, error in zip(*report[:4], strict=True):
        v = VARIANCE + sigma**2
        a = 2 * M @ M / v  # 2 m.x/v is normal with mean +-a and variance 2 a
        z = a + np.sqrt(2 * a) * nodes
        best = weights @ np.logaddexp(0, -z)
        best_accuracy = float(jax.scipy.stats.norm.cdf(np.sqrt(a / 2)))
        # 600 held-out points, drawn several times: the scatter is that of the points.
        spread = np.sqrt(weights @ (np.logaddexp(0, -z) - best) ** 2)
        assert abs(loss - best) < 4 * spread / np.sqrt(600) + 0.01
        chance = best_accuracy * (1 - best_accuracy)
        assert abs(accuracy - best_accuracy) < 4 * np.sqrt(chance / 600) + 0.01
        assert error < 0.06


@pytest.mark.slow
def test_logistic_regression_at_one_noise_level_agrees():
    """An independent estimate: scikit-learn's, at sigma = .5, where the optimum is linear."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, labels = fresh(0.5, 20_000)
    model = linear_model.LogisticRegression().fit(x, labels)
    test = fresh(0.5)[0][:1000]
    found = np.asarray(jax.vmap(two_gaussians().classifier.log_probs, (0, None))(test, 0.5))
    expected = model.predict_proba(test)
    np.testing.assert_allclose(np.exp(found), expected, atol=0.09)
    assert np.abs(np.exp(found) - expected).mean() < 0.025


def test_soft_labels_are_the_posterior_of_the_training_set():
    images, labels = blobs()
    members = jax.nn.one_hot(labels, 3, dtype=jnp.float32)
    data = _Data(jnp.asarray(images), jnp.asarray(labels, jnp.int32), members)
    x = images[5] + 0.8 * np.random.default_rng(1).normal(size=(2, 2, 1))
    x = x.astype(np.float32)
    found = jax.jit(_posterior)(x, jnp.float32(0.8), data)
    weights = np.exp(-((x - images) ** 2).sum(axis=(1, 2, 3)) / (2 * 0.8**2))
    expected = [weights[labels == c].sum() / weights.sum() for c in range(3)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_soft_labels_do_not_change_the_expected_gradient():
    """Paired over 400 batches: the mean difference within its error, the scatter smaller."""
    images, labels = blobs()
    hard = _Data(jnp.asarray(images), jnp.asarray(labels, jnp.int32), None)
    soft = hard._replace(members=jax.nn.one_hot(labels, 3, dtype=jnp.float32))
    x, t = jnp.zeros((2, 2, 1), jnp.float32), jnp.float32(0)
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), x, t)["params"]
    rng = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda a: jnp.asarray(0.5 * rng.normal(size=a.shape), jnp.float32), shapes
    )

    @jax.jit
    def gradients(keys):
        def one(key):
            both = [jax.grad(_loss)(weights, d, key, TINY, RECIPE) for d in (hard, soft)]
            return [g["out"]["bias"] for g in both]

        return jax.vmap(one)(keys)

    a, b = (np.asarray(g) for g in gradients(jax.random.split(jax.random.key(2), 400)))
    difference = a - b
    error = difference.std(axis=0) / np.sqrt(len(difference))
    assert (np.abs(difference.mean(axis=0)) < 4 * error).all()
    assert (b.std(axis=0) < 0.97 * a.std(axis=0)).all()


def test_same_seed_same_bits_and_where_calls_are_cut_does_not_matter():
    images, labels = blobs(45)
    first, second = (train_classifier(images, labels, **FAST, seed=4) for _ in range(2))
    equal(first, second)
    other = train_classifier(images, labels, **FAST, seed=5)
    a, b = (jax.tree.leaves(t.classifier.network)[0] for t in (first, other))
    assert np.abs(a - b).max() > 1e-3

    data = _Data(jnp.asarray(images), jnp.asarray(labels, jnp.int32), None)
    x = jnp.zeros((2, 2, 1), jnp.float32)

    def begin():
        return start(TINY.init(jax.random.key(0), x, jnp.float32(0))["params"], _adamw(RECIPE))

    def run(state, stop):
        key = jax.random.key(1)
        return _run(state, jnp.int32(stop), data, key, network=TINY, recipe=RECIPE)[0]

    programs = _run._cache_size()
    equal(run(begin(), 9), run(run(begin(), 4), 9))
    assert _run._cache_size() == programs + 1


def test_images_without_a_label_are_as_if_not_there():
    images, labels = blobs()
    left_out = np.arange(60) % 4 == 1
    marked, broken = np.where(left_out, -1, labels), images.copy()  # 45 remain
    broken[left_out] = np.nan
    found = train_classifier(broken, marked, **FAST)
    equal(found, train_classifier(images[~left_out], labels[~left_out], **FAST))
    assert np.isfinite(found.report.loss).all()


def test_a_training_that_diverges_says_so():
    images, labels = blobs()
    images[0] = 1e20  # as an iteration that diverges may leave behind
    with pytest.raises(InputError, match=r"of data_std = 0.9, found up to 1e\+20: the tra"):
        train_classifier(images, labels, **FAST)


def test_report_and_temperatures():
    images, labels = blobs(300)
    steps = []
    options = {"network": TINY, "batch_size": 16, "steps": 150}
    options["progress"] = lambda *args: steps.append(args)
    classifier, report = train_classifier(images, labels, **options)
    assert [step[:2] for step in steps] == [(100, 150), (150, 150)]
    assert steps[1][2] < steps[0][2]
    std = float(images.std(dtype=np.float64))
    assert classifier.data_std == pytest.approx(std)
    np.testing.assert_allclose(report.sigmas[[0, -1]], [std / 5, 20 * std], rtol=1e-5)
    np.testing.assert_allclose(classifier.temperature, report.temperature, rtol=1e-6)
    assert report.accuracy[0] > 0.6 > report.accuracy[-1]
    # Without calibration the network is the same, and on the same images its loss no smaller.
    plain = train_classifier(images, labels, **options, calibrate=False)
    equal(plain.classifier.network, classifier.network)
    np.testing.assert_array_equal(plain.report.temperature, 1)
    assert (plain.report.loss >= report.loss - 1e-9).all()
    np.testing.assert_allclose(plain.report.accuracy, report.accuracy)


def test_a_timeless_classifier_is_that_of_clean_images():
    images, labels = blobs(300)
    options = {**FAST, "steps": 300, "time_dependent": False}
    classifier, report = train_classifier(images, labels, **options)
    assert not classifier.time_dependent
    assert len(set(report.temperature)) == 1
    assert report.accuracy[0] > 0.9
    x = jnp.asarray(images[0])
    shrink = float(classifier.data_std / np.hypot(2.0, classifier.data_std))
    found = classifier.log_probs(x, 2.0)
    np.testing.assert_allclose(found, classifier.log_probs(x * shrink, 0.0), rtol=1e-5, atol=1e-6)
    probs = np.exp(np.asarray(jax.vmap(classifier.log_probs, (0, None))(jnp.asarray(images), 0.0)))
    assert (probs.argmax(axis=1) == labels).mean() > 0.9
    assert calibration_error(probs, labels) < 0.15


def test_single_precision_whatever_the_default(x64):
    images, labels = blobs()
    classifier, _ = train_classifier(images, labels, **FAST)
    assert {leaf.dtype for leaf in jax.tree.leaves(classifier)} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 2}, "labels: expected -1..1, found 2"),
        ({"num_classes": 4}, "network: expected logits of shape [4], got [3]"),
        ({"steps": 0}, "steps: expected a whole number at least 1, got 0"),
        ({"batch_size": 0}, "batch_size: expected a whole number at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive"),
        ({"weight_decay": -1.0}, "weight_decay: expected at least 0, got -1.0"),
        ({"ema_decay": 1.0}, "ema_decay: expected 0 <= ema_decay < 1, got 1.0"),
        ({"sigma_range": (2.0, 1.0)}, "sigma_range: expected 0 < low < high, got 2.0, 1.0"),
        ({"data_std": -1.0}, "data_std: expected a positive"),
        ({"heldout": 0.0}, "heldout: expected 0 < heldout < 1, got 0.0"),
        ({"labels": np.full(60, -1)}, "labels: expected at least 2 labelled images, got 0"),
        ({"labels": np.arange(60) - 2}, "labels: expected classes, or -1 for none, found -2"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    images, labels = blobs()
    options = {**FAST, "labels": labels, **options}
    with pytest.raises(InputError, match=re.escape(message)):
        train_classifier(images, **options)


def test_broken_images_are_named_by_their_row():
    images, labels = blobs()
    images[7] = np.inf
    with pytest.raises(InputError, match="found 1 rows with others, the first is row 7"):
        train_classifier(images, labels, **FAST)
    with pytest.raises(InputError, match="images: expected float32, got float64"):
        train_classifier(images.astype(np.float64), labels, **FAST)


@pytest.mark.slow
def test_the_residual_network_learns_images():
    """Stripes across or along: which needs a neighborhood, not a pixel."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    stripes = np.sign(rng.normal(size=(400, 4, 1))) * np.ones((1, 1, 4))
    images = np.where(labels[:, None, None] > 0, stripes, stripes.swapaxes(1, 2))[..., None]
    network = ResNetClassifier(2, channels=(8,), num_blocks=1, groups=2, embedding_width=8)
    options = {"network": network, "batch_size": 32, "steps": 200, "learning_rate": 4e-3}
    report = train_classifier(images.astype(np.float32), labels, **options).report
    assert report.accuracy[0] > 0.95
    assert report.accuracy[-1] < 0.7
