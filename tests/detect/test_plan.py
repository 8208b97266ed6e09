"""The union of needs: every evaluation is made once, and the declared cost is what runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.cost import Cost
from memjax._core.errors import InputError
from memjax.detect import (
    FLIPD,
    AlongGap,
    AlongScore,
    Jacobian,
    Need,
    Point,
    Requirements,
    ScoreNorm,
    Trace,
    Trajectory,
    cost,
    evaluate_detectors,
    finding,
    requirements,
)

D = 5
KEY = jax.random.key(1)
X = jnp.linspace(-1.0, 1.0, D)


def scale(condition):
    return 1.0 if condition is None else condition


def score(x, sigma, condition=None):
    """Not symmetric, not linear; the condition scales a part of it."""
    mixing = jnp.asarray(np.random.default_rng(0).normal(size=(D, D)), x.dtype)
    return -x / sigma + scale(condition) * jnp.tanh(mixing @ x)


class Asking:
    """A detector made of its needs; it reports what ``read`` takes from the evidence."""

    name = title = statement = raw_name = "asking"
    default_level = 1.0
    sigma = 0.5

    def __init__(self, *needs, read=lambda evidence: jnp.zeros(())):
        self.asked, self.read = needs, read

    def needs(self, d):
        return self.asked

    def finish(self, evidence):
        value = self.read(evidence)
        return finding(value, value)


def run(*detectors, condition=None, of=score, **kwargs):
    out = evaluate_detectors(of, X, detectors, key=KEY, condition=condition, **kwargs)
    jax.block_until_ready(out)
    jax.effects_barrier()
    return out


CLEAN, NULL = Point(0.5), Point(0.5, condition="null")


def test_products_agree_with_the_dense_jacobian(x64):
    condition = jnp.asarray(0.3, jnp.float64)
    x = X.astype(jnp.float64)
    jacobians = {c: jax.jacfwd(lambda y, c=c: score(y, 0.5, c))(x) for c in (None, 0.3)}
    s = {c: score(x, 0.5, c) for c in (None, 0.3)}
    expected = {
        Trace(): jnp.trace(jacobians[0.3]),
        AlongScore(): jacobians[0.3] @ s[0.3],
        AlongGap(): (jacobians[0.3] - jacobians[None]) @ (s[0.3] - s[None]),
        Jacobian(): jacobians[0.3],
    }

    def read(evidence):
        results = dict(evidence[CLEAN].products)
        trace = results.pop(Trace())
        errors = [jnp.max(jnp.abs(results[p] - expected[p])) for p in results]
        return jnp.max(jnp.stack([*errors, jnp.abs(trace.value - expected[Trace()])]))

    for products in (tuple(expected), (Trace(), AlongScore(), AlongGap())):
        asking = Asking(Need(CLEAN, products), read=read)
        (out,) = evaluate_detectors(score, x, (asking,), key=KEY, condition=condition)
        assert out.value < 1e-12


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        ([Need(CLEAN)], Cost(1)),
        ([Need(CLEAN), Need(CLEAN, (Trace(),))], Cost(1, D)),
        ([Need(CLEAN, (Trace(), AlongScore()))], Cost(1, D + 1)),
        ([Need(CLEAN, (Trace(), Jacobian(), AlongScore()))], Cost(1, D)),
        ([Need(CLEAN, (Trace(2), Jacobian()))], Cost(1, D + 2)),
        ([Need(CLEAN, (AlongGap(),)), Need(NULL)], Cost(2, 2)),
        ([Need(CLEAN, (AlongGap(),)), Need(NULL, (Trace(),))], Cost(2, D + 2)),
        ([Need(Trajectory(CLEAN, 2.0, "heun", 3))], Cost(7, 7 * D)),
        ([Need(Trajectory(CLEAN, 2.0, "rk4", 2, "hutchinson", 3))], Cost(9, 27)),
    ],
)
def test_the_declared_cost_is_what_runs(needs, expected, counting):
    counted = counting(score)
    detectors = tuple(Asking(need) for need in needs)
    assert cost(detectors, D) == expected
    run(*detectors, condition=jnp.asarray(0.3), of=counted)
    assert counted.calls == expected.forward


def test_probes_stay_probes_beside_a_dense_jacobian():
    probes = FLIPD(0.5, num_probes=2)
    alone = run(probes)[0]
    beside = run(probes, Asking(Need(CLEAN, (Jacobian(),))))[0]
    np.testing.assert_allclose(alone.value, beside.value, rtol=1e-6)
    assert alone.standard_error > 0
    assert run(FLIPD(0.5))[0].standard_error == 0


def test_a_trace_from_probes_is_within_its_error():
    exact = run(FLIPD(0.5))[0].value
    keys = jax.random.split(KEY, 200)
    detector = (FLIPD(0.5, num_probes=4),)
    found = jax.vmap(lambda key: evaluate_detectors(score, X, detector, key=key)[0])(keys)
    spread = float(jnp.std(found.value))
    assert abs(float(jnp.mean(found.value)) - exact) < 4 * spread / 200**0.5
    assert 0.8 < float(jnp.sqrt(jnp.mean(found.standard_error**2))) / spread < 1.2


def test_what_must_be_given():
    baseline = Asking(Need(Point(0.5, model="baseline")))
    gap = Asking(Need(CLEAN, (AlongGap(),)))
    flows = Asking(
        Need(Trajectory(CLEAN, 2.0)), Need(Trajectory(Point(0.5, condition="null"), 2.0))
    )
    assert requirements((ScoreNorm(0.5), FLIPD(0.5)), D) == Requirements(False, False)
    assert requirements((ScoreNorm(0.5), gap), D) == Requirements(True, False)
    assert requirements((flows,), D) == Requirements(True, False)
    assert requirements((baseline,), D) == Requirements(False, True)
    with pytest.raises(InputError, match=r"^baseline: "):
        run(baseline)


def test_one_probe_has_no_error():
    with pytest.raises(InputError, match=r"^num_probes: expected at least 2"):
        FLIPD(0.5, num_probes=1)


def draws(count, *products):
    return [Point(0.5, "noised", draw=i) for i in range(count)], tuple(products)


def test_places_evaluated_together_say_what_each_says_alone(x64, counting):
    """As many as fit, what is left over, and beside them places where only the score is wanted."""
    points, products = draws(7, AlongScore(), Trace(2))
    others = [Point(0.5, "noised", draw=i) for i in range(7, 10)]

    def read(evidence):
        along = [evidence[point].products[AlongScore()] for point in points]
        traces = [evidence[point].products[Trace(2)].value for point in points]
        scores = [evidence[point].score for point in (*points, *others)]
        weights = jnp.arange(1.0, 1 + D * 24).reshape(24, D)
        rows = jnp.stack([*along, *scores, *(jnp.full(D, t) for t in traces)])
        return jnp.sum(weights * rows)

    needs = [Need(point, products) for point in points] + [Need(point) for point in others]
    counted, x = counting(score), X.astype(jnp.float64)
    (found,) = evaluate_detectors(counted, x, (Asking(*needs, read=read),), key=KEY)
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert counted.calls == 10

    def alone(need):
        evidence = {}
        keep = Asking(need, read=lambda e: evidence.update(e) or jnp.zeros(()))
        evaluate_detectors(score, x, (keep,), key=KEY)
        return evidence

    evidence = {point: e for need in needs for point, e in alone(need).items()}
    np.testing.assert_allclose(found.value, read(evidence), rtol=1e-12)


def test_places_do_not_all_keep_their_linearizations_of_large_images():
    x = jnp.zeros(2**13)

    def deep(x, sigma, condition=None):
        for _ in range(50):
            x = jnp.tanh(jnp.roll(x, 1) + sigma)
        return x

    def memory(count):
        points, products = draws(count, AlongScore())
        asking = Asking(
            *(Need(point, products) for point in points),
            read=lambda e: sum(jnp.sum(e[p].products[AlongScore()]) for p in points),
        )
        run = jax.jit(lambda x: evaluate_detectors(deep, x, (asking,), key=KEY)[0])
        return run.lower(x).compile().memory_analysis().temp_size_in_bytes

    # All of them at once would keep 24 times 50 images.
    assert memory(24) < 2 * memory(2) < 5 * 50 * x.nbytes
