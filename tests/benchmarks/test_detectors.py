"""The bench of all detectors: what its intervals cover; nothing is chosen where it is scored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.keys import derive_key
from memjax.detect.evaluate import evaluate_detectors
from memjax.detect.local_dimension import FLIPD, EffectiveDimension
from memjax.detect.p_laplace import PLaplaceFlux
from memjax.detect.score_norm import ScoreNorm
from memjax.detect.volume_growth import NormalizedVolumeGrowth
from memjax.diffusion.adapters import LinenNetwork
from memjax.diffusion.model import Model
from memjax.diffusion.prediction import EDMPreconditioned, from_prediction
from memjax.diffusion.schedule import VarianceExploding
from memjax.evaluate.roc import auroc, average_precision, tpr_at_fpr
from memjax.networks.mlp import ResidualMLP


def draw(rng, num_seeds, between, positives=48, negatives=400, shift=2.5):
    """Values of rows of several seeds; the groups lie ``shift`` apart, more or less by seed."""
    out = []
    for _ in range(num_seeds):
        apart = shift + between * rng.standard_normal()
        scores = rng.standard_normal(positives + negatives)
        labels = np.arange(positives + negatives) < positives
        out.append((scores + apart * labels, labels))
    return out


def test_quality_is_that_of_the_public_metrics(load):
    tools, rng = load("_quality"), np.random.default_rng(0)
    ((scores, labels),) = draw(rng, 1, 0.0)
    scores[3] = np.nan
    everything = np.append(labels, [False, False])  # two rows that the question leaves out
    question = tools.Question(everything, np.append(~labels, [False, False]))
    found = tools.quality(np.append(scores, [9.0, np.nan]), question)
    assert found.auroc == auroc(scores, labels).value
    assert found.average_precision == average_precision(scores, labels).value
    assert found.tpr == tpr_at_fpr(scores, labels, fpr=0.01).value
    assert (found.positives, found.negatives, found.excluded) == (47, 400, 1)


@pytest.mark.parametrize("between", [0.0, 0.5])
def test_intervals_cover_new_seeds_with_new_rows(load, between):
    """Against the mean over seeds and rows, simulated; 95 of 100, within 3 standard errors."""
    tools, rng = load("_quality"), np.random.default_rng(1)

    def one(seeds):
        return [tools.quality(scores, tools.Question(labels, ~labels)) for scores, labels in seeds]

    many = one(draw(rng, 600, between))
    truth = {metric: np.mean([getattr(q, metric) for q in many]) for metric in ("auroc", "tpr")}
    repeats = 60
    hits = dict.fromkeys(truth, 0)
    for _ in range(repeats):
        found = one(draw(rng, 5, between))
        for metric, value in truth.items():
            mean, low, high = tools.pooled(metric, found)
            assert 0 <= low <= mean <= high <= 1
            hits[metric] += low <= value <= high
    assert min(hits.values()) >= (0.95 - 3 * (0.95 * 0.05 / repeats) ** 0.5) * repeats


def test_intervals_do_not_collapse_where_all_seeds_are_perfect(load):
    tools = load("_quality")
    labels = np.arange(448) < 48
    perfect = tools.quality(labels.astype(float), tools.Question(labels, ~labels))
    for metric in tools.METRICS:
        mean, low, high = tools.pooled(metric, [perfect] * 5)
        assert (mean, high) == (1, 1)
        # Of 240 positives: 0.025^(1/240) for a rate; Newcombe's for the area is nearer.
        assert low == pytest.approx(0.9955 if metric == "auroc" else 0.98475, abs=2e-4)
    assert np.isnan(tools.pooled("tpr", [perfect._replace(tpr=np.nan)] * 2)).all()
    # Inside (0, 1) the limit is the root of Newcombe's equation, which auroc solves too.
    scores = np.concatenate([np.full(1, -0.5), np.ones(9), np.linspace(-1, 0.5, 40)])
    labels = np.arange(50) < 10
    whole = auroc(scores, labels)
    assert whole.low <= tools.newcombe(whole.value, 10, 40) + 1e-9


def test_a_threshold_is_set_on_other_seeds(load):
    tools = load("_quality")
    negative, positive = np.arange(1000.0), np.array([2000.0, 0.0])
    rows = np.concatenate([negative, positive])
    question = tools.Question(rows > 1e9, np.arange(1002) < 1000)
    question = question._replace(positive=~question.negative)
    moved = tools.transferred([rows], [question], [rows + 20], [question])
    # 989 is the largest value that ten of a thousand exceed; shifted by 20, thirty do.
    assert moved == {"fpr": 0.03, "tpr": 0.5}
    assert tools.above(np.array([np.nan, 1.0]), 0.0) == 0.5


@pytest.fixture(scope="module")
def world():
    """Two seeds of a small world, as a bench would see them."""
    from memjax.densities.planted import planted_mixture

    return {
        seed: planted_mixture(derive_key(seed, "test"), 8, num_stored=12, num_ordinary=108)
        for seed in (1, 2, 3)
    }


def bed_of(load, found):
    stored = np.asarray(found.stored)
    questions = {"stored": load("_quality").Question(stored, ~stored)}
    known = {"log odds": lambda sigma: np.asarray(found.log_odds(sigma))}
    return load("_beds").Bed(found.density, np.asarray(found.points), questions, known=known)


def test_values_in_units_of_the_noise_are_those_of_the_detectors(load, world, x64):
    """One program for all noise levels says what each detector says at its own."""
    bed = bed_of(load, world[1])
    bed = bed._replace(images=bed.images[9:16])
    sigma, key = 0.2, derive_key(0, "detectors")
    kinds = (FLIPD, lambda s: PLaplaceFlux(s, num_pairs=2), NormalizedVolumeGrowth)
    found = load("_beds").values(bed, [kind(1.0) for kind in kinds], sigma, chunk=4)

    @jax.jit
    def directly(score, xs):
        def one(x):
            findings = evaluate_detectors(score, x, tuple(kind(sigma) for kind in kinds), key=key)
            return jnp.stack([finding.value for finding in findings])

        return jax.vmap(one)(xs)

    expected = directly(bed.score, jnp.asarray(bed.images))
    np.testing.assert_allclose(found.T, expected, rtol=2e-5)


@pytest.mark.parametrize("num_conditions", [0, 3])
def test_one_score_for_all_training_seeds_is_the_models_own(load, num_conditions):
    network = ResidualMLP(width=8, num_blocks=1, embedding_width=8, num_conditions=num_conditions)
    x, condition = jnp.linspace(-1, 1, 4).reshape(2, 2, 1), jnp.int32(num_conditions)
    given = (condition,) if num_conditions else (None,)
    weights = network.init(jax.random.key(0), x, jnp.float32(0.0), *given)
    raw = EDMPreconditioned(LinenNetwork(network, weights), 0.7)
    schedule = VarianceExploding(0.01, 10.0)
    model = Model(
        from_prediction(raw, prediction="denoiser", schedule=schedule),
        (2, 2, 1),
        sigma_min=0.01,
        sigma_max=10.0,
        data_std=0.7,
        null_condition=condition if num_conditions else None,
    )
    score = load("_beds").score_of(model)
    for condition in (None, jnp.int32(1)) if num_conditions else (None,):
        np.testing.assert_allclose(
            score(x, 0.3, condition), model.score(x, 0.3, condition), rtol=1e-5, atol=1e-6
        )


def test_a_table_is_chosen_on_some_seeds_and_scored_on_others(load, world, tmp_path):
    bench, tools = load("detectors"), load("_quality")
    beds = {seed: bed_of(load, found) for seed, found in world.items()}
    setting = bench.Setting(lambda seed, quick: beds[seed], (0.02, 0.5), (), 60)
    kinds = (ScoreNorm, EffectiveDimension)
    rows = bench.table(kinds, setting, (1,), (2, 3), timed=1)
    names = [row["method"] for row in rows]
    assert names == ["score_norm", "effective_dimension(num_probes=16)", *names[2:]]
    by_name = {row["method"]: row for row in rows}
    norm = by_name["score_norm"]
    assert (norm["products"], norm["cost"]) == (1, {"forward": 1, "jvp": 0, "vjp": 0})
    assert norm["forwards"] > 0

    def value(seed, sigma):
        found = load("_beds").values(beds[seed], [ScoreNorm(1.0)], sigma, 60)[0]
        return tools.quality(found, beds[seed].questions["stored"])

    merits = {sigma: tools.merit([value(1, sigma)]) for sigma in setting.sigmas}
    answer = norm["questions"]["stored"]
    assert answer["sigma"] == max(merits, key=merits.__getitem__) == 0.02
    assert answer["auroc"]["seeds"] == [round(value(seed, 0.02).auroc, 4) for seed in (2, 3)]
    assert (answer["positives"], answer["negatives"]) == (24, 216)
    # What theory says heads the table, and at little noise the detectors do as well.
    assert by_name["log odds"]["questions"]["stored"]["auroc"]["value"] == 1
    assert by_name["effective_dimension"]["questions"]["stored"]["auroc"]["value"] > 0.99

    pytest.importorskip("matplotlib")
    record = {"case": "detectors/mixture-8", "rows": rows}
    bench.figure([record]).savefig(tmp_path / "figure")


def test_targets_name_the_detector_that_was_chosen(load):
    bench = load("detectors")

    def row(name, products, merit, low):
        metrics = {m: {"value": low, "low": low} for m in ("auroc", "tpr")}
        questions = {q: {"merit": merit, **metrics} for q in ("x2", "x4", "membership")}
        return {"method": name, "products": products, "questions": questions}

    rows = [row("cheap", 2, 0.5, 0.999), row("dear", 32, 1.5, 0.9), row("lucky", 32, 1.0, 0.999)]
    targets = bench._targets("graded", rows)
    assert [t.what.split(": ")[1] for t in targets] == ["cheap"] * 2 + ["dear"] * 6
    assert [t.record()["met"] for t in targets] == [True] * 2 + [
        False,
        True,
        False,
        True,
        False,
        True,
    ]
    samples_only = {"method": "nearest", "questions": {}}
    assert bench._targets("graded", [*rows, samples_only]) == targets


@pytest.mark.slow
def test_a_quick_case_runs_every_detector(load):
    record = load("harness").measure(load("detectors").cases()[3], quick=True)
    assert record["case"] == "detectors/mixture-8"
    assert record["status"] == "ok"
    methods = {row["method"].split("(")[0] for row in record["rows"]}
    assert {"flipd", "score_norm", "denoising_loss", "log odds"} <= methods
    for row in record["rows"]:
        assert row["status"] == "ok"
        assert 0 <= row["questions"]["stored"]["auroc"]["value"] <= 1, row["method"]
