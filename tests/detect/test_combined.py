"""Flux and loss in one number; differences of scores or images, of every kind of evaluation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from scipy.ndimage import gaussian_filter

from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.detect import (
    FLIPD,
    AlongGap,
    Blurred,
    DenoisedNorm,
    Difference,
    FluxAndLoss,
    Need,
    PLaplaceFlux,
    Point,
    Requirements,
    SphereLoss,
    Trajectory,
    cost,
    evaluate_detectors,
    finding,
    requirements,
)

D = 5
KEY = jax.random.key(0)
X = jnp.linspace(-1.0, 1.0, D)


def gaussian(variance):
    """Centered, of one variance that the condition multiplies."""

    def score(x, sigma, condition=None):
        scale = 1.0 if condition is None else condition
        return -x / (variance * scale + sigma**2)

    return score


TARGET, BASELINE = gaussian(0.25), gaussian(4.0)


@dataclasses.dataclass(frozen=True)
class Doubled:
    """A neighbor of any point."""

    name = "doubled"
    needs_image = False

    def __call__(self, x):
        return 2 * x


def run(detectors, x=X, condition=None, target=TARGET, baseline=BASELINE):
    evaluate = jax.jit(
        lambda x: evaluate_detectors(
            target, x, detectors, key=KEY, condition=condition, baseline=baseline
        )
    )
    return evaluate(x)


class Growth:
    """The volume growth of a flow that starts at the image."""

    name = title = statement = raw_name = "growth"
    default_level = 1.0
    sigma = 0.5
    flow = Trajectory(Point(0.5), 2.0, "heun", 2)

    def needs(self, d):
        return (Need(self.flow),)

    def finish(self, evidence):
        value = evidence[self.flow].normalized
        return finding(value, value)


class Gap(Growth):
    """Looks at two scores itself."""

    def needs(self, d):
        return (Need(Point(0.5), (AlongGap(),)),)


def test_flux_and_loss_is_made_of_its_parts(x64):
    sphere = {"radius": 0.3, "num_pairs": 4}
    parts = PLaplaceFlux(0.5, **sphere), SphereLoss(0.5, **sphere)
    detectors = (*parts, FluxAndLoss(0.5, **sphere), FluxAndLoss(0.5, **sphere, loss_weight=0))
    flux, loss, both, alone = run(detectors, X.astype(jnp.float64))
    np.testing.assert_allclose(both.value, flux.value + 1.6 * loss.value, rtol=1e-12)
    np.testing.assert_allclose(alone.value, flux.value, rtol=1e-12)
    np.testing.assert_allclose(alone.standard_error, flux.standard_error, rtol=1e-12)
    assert cost(detectors, D) == Cost(forward=8)


def test_flux_and_loss_of_a_stored_point_is_one(x64):
    """Of N(0, v) at its center the flux is 1 and the loss (radius v / (v + sigma^2))^2."""
    center = jnp.zeros(D, jnp.float64)
    sigma, variance = 0.5, 0.01
    expected = 1 - 1.6 * (0.5 * variance / (variance + sigma**2)) ** 2
    (found,) = run((FluxAndLoss(sigma),), center, target=gaussian(variance))
    np.testing.assert_allclose(found.value, expected, rtol=1e-10)
    (stored,) = run((FluxAndLoss(sigma),), center, target=gaussian(0.0))
    assert stored.value == pytest.approx(1, rel=1e-12)
    (wide,) = run((FluxAndLoss(sigma),), center, target=gaussian(1.0))
    assert wide.value < found.value < stored.value


def test_flux_and_loss_has_an_honest_error():
    keys = jax.random.split(KEY, 300)
    detector = (FluxAndLoss(0.5, num_pairs=8),)
    steep = jnp.asarray([0.01, 0.1, 1.0, 1.0, 4.0])

    def score(x, sigma, condition=None):
        return -x / (steep + sigma**2)

    one = jax.vmap(lambda key: evaluate_detectors(score, X, detector, key=key)[0])
    found = jax.jit(one)(keys)
    ratio = np.mean(np.asarray(found.standard_error) ** 2) / np.var(found.value, ddof=1)
    assert 0.7 < ratio < 1.4


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: FluxAndLoss(0.0), "sigma"),
        (lambda: FluxAndLoss(0.1, radius=0.0), "radius"),
        (lambda: FluxAndLoss(0.1, loss_weight=-1), "loss_weight"),
    ],
)
def test_unusable_settings_are_refused(make, named):
    with pytest.raises(InputError, match=f"^{named}: expected"):
        make()


@pytest.mark.parametrize("detector", [FLIPD(0.5), SphereLoss(0.5, num_pairs=3), Growth()])
def test_over_a_neighbor_it_is_the_difference_of_two_images(x64, detector):
    def score(x, sigma, condition=None):
        return -x / (0.25 + sigma**2) - 0.1 * x**3

    x = X.astype(jnp.float64)
    over = Difference(detector, Doubled(), weight=0.5)
    own, both = run((detector, over), x, target=score)
    (near,) = run((detector,), 2 * x, target=score)
    np.testing.assert_allclose(both.value, own.value - 0.5 * near.value, rtol=1e-12)
    np.testing.assert_allclose(both.raw, own.raw - 0.5 * near.raw, rtol=1e-12)
    assert abs(own.value - near.value) > 1e-3
    assert cost((over, detector), D) == cost((Difference(detector),), D)
    assert requirements((over,), D) == Requirements(conditions=False, baseline=False)
    assert requirements((Difference(detector, Blurred()),), D).images


def test_the_blurred_image_is_that_of_an_image_library(x64):
    """SciPy's filter, cut at four standard deviations, its border continued likewise."""
    image = jax.random.normal(KEY, (9, 4, 2), jnp.float64)
    for width in (0.5, 1.25):  # SciPy rounds where it cuts: four widths are whole here
        expected = gaussian_filter(np.asarray(image), (width, width, 0), mode="nearest")
        np.testing.assert_allclose(jax.jit(Blurred(width))(image), expected, atol=1e-12)
    constant = jnp.full((3, 5, 1), 0.7, jnp.float32)
    np.testing.assert_allclose(Blurred()(constant), constant, rtol=1e-6)
    with pytest.raises(InputError, match=r"^width: expected"):
        Blurred(0.0)
    with pytest.raises(InputError, match=r"^neighbor: expected an image .* got \[5\]"):
        run((Difference(SphereLoss(0.5), Blurred()),))


@pytest.mark.parametrize("detector", [FLIPD(0.5), SphereLoss(0.5, num_pairs=3), Growth()])
def test_it_is_the_difference_of_two_runs(x64, detector):
    condition = jnp.asarray(3.0, jnp.float64)
    x = X.astype(jnp.float64)
    against = Difference(detector), Difference(detector, "null", weight=0.5)
    own, baseline, null = run((detector, *against), x, condition)
    (other,) = run((detector,), x, condition, target=BASELINE)
    (without,) = run((detector,), x)
    for found, part, weight in ((baseline, other, 1), (null, without, 0.5)):
        assert found.status == Status.OK
        error = np.hypot(own.standard_error, weight * part.standard_error)
        np.testing.assert_allclose(found.value, own.value - weight * part.value, rtol=1e-12)
        np.testing.assert_allclose(found.raw, own.raw - weight * part.raw, rtol=1e-12)
        np.testing.assert_allclose(found.standard_error, error, rtol=1e-12, atol=1e-15)
    assert abs(baseline.value) > 0.01


def test_closed_form_of_flipd_between_two_gaussians(x64):
    sigma, x = 0.5, X.astype(jnp.float64)
    (found,) = run((Difference(FLIPD(sigma)),), x)

    def flipd(variance):
        total = variance + sigma**2
        return D * variance / total + sigma**2 * float(x @ x) / total**2

    np.testing.assert_allclose(found.raw, flipd(0.25) - flipd(4.0), rtol=1e-12)


def test_common_draws_make_it_surer_than_its_error_says():
    keys = jax.random.split(KEY, 200)
    detector = (Difference(SphereLoss(0.5, num_pairs=4)),)
    steep = jnp.asarray([0.01, 0.1, 1.0, 1.0, 4.0])

    def other(x, sigma, condition=None):
        return -x / (1.2 * steep + sigma**2)

    def target(x, sigma, condition=None):
        return -x / (steep + sigma**2)

    one = jax.vmap(lambda key: evaluate_detectors(target, X, detector, key=key, baseline=other)[0])
    found = jax.jit(one)(keys)
    assert np.std(found.value) < 0.5 * np.mean(found.standard_error)


def test_what_it_costs_and_requires():
    loss = SphereLoss(0.5, num_pairs=2)
    for against, required in (
        ("baseline", Requirements(conditions=False, baseline=True)),
        ("null", Requirements(conditions=True, baseline=False)),
    ):
        detector = Difference(loss, against)
        assert requirements((detector,), D) == required
        assert cost((detector,), D) == Cost(forward=8)
        assert cost((detector, loss, PLaplaceFlux(0.5, num_pairs=2)), D) == Cost(forward=8)
    assert cost((Difference(FLIPD(0.5)),), D) == Cost(forward=2, jvp=2 * D)


def test_the_declared_cost_is_what_runs():
    calls = []

    def counting(of):
        def score(x, sigma, condition=None):
            jax.debug.callback(calls.append, sigma)
            return of(x, sigma, condition)

        return score

    detectors = (Difference(SphereLoss(0.5, num_pairs=3)), Difference(FLIPD(0.5), "null"))
    found = run(detectors, X, jnp.asarray(3.0), counting(TARGET), counting(BASELINE))
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert len(calls) == cost(detectors, D).forward == 14


def test_it_says_what_is_compared():
    detector = Difference(SphereLoss(0.5), "null")
    assert detector.name == "sphere_loss_over_null"
    assert detector.title == "Sphere loss over null"
    assert detector.default_level == SphereLoss.default_level
    assert detector == Difference(SphereLoss(0.5), "null")
    assert Difference(SphereLoss(0.5), weight=0.5).name == "sphere_loss_over_0.5_baseline"
    assert hash(detector) != hash(Difference(SphereLoss(0.5)))
    near = Difference(SphereLoss(0.5), Blurred(), 0.5)
    assert near.name == "sphere_loss_over_0.5_blurred"
    assert near.title == "Sphere loss over blurred"
    assert near.statement.startswith(
        "How much larger than 0.5 times the value at the blurred image: "
    )
    assert near == Difference(SphereLoss(0.5), Blurred(0.5), 0.5)


def test_failure_of_either_is_failure():
    def dead(x, sigma, condition=None):
        return jnp.zeros_like(x)

    detector = (Difference(FluxAndLoss(0.5, num_pairs=2)),)
    for target, baseline in ((dead, BASELINE), (TARGET, dead)):
        (found,) = run(detector, target=target, baseline=baseline)
        assert found.status == Status.UNDEFINED
        assert np.isnan(found.value)
    (found,) = run(detector, X.at[0].set(jnp.nan))
    assert found.status == Status.NONFINITE


def test_it_refuses_what_it_cannot_compare():
    with pytest.raises((InputError, TypeCheckError), match="against"):
        Difference(FLIPD(0.5), "other")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^weight: expected"):
        Difference(FLIPD(0.5), weight=0)
    with pytest.raises(InputError, match=r"^detector: expected one that looks at one score"):
        Difference(Gap()).needs(D)
    with pytest.raises(InputError, match=r"^detector: expected one that looks at one score"):
        Difference(Difference(FLIPD(0.5))).needs(D)
    with pytest.raises(InputError, match=r"^detector: expected one that looks at one score"):
        Difference(Difference(FLIPD(0.5), Blurred()), Blurred()).needs(D)
    with pytest.raises(InputError, match=r"^detector: expected one that looks at the image"):
        Difference(DenoisedNorm(20.0), Blurred()).needs(D)
