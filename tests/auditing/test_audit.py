"""The audit as a whole, on a world where the right answer is known."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memjax.auditing.rows as rows_module
import memjax.auditing.run as audit_module
from memjax._core.errors import InputError, MemjaxError
from memjax.auditing import Calibration, audit
from memjax.auditing.metrics import Truth
from memjax.auditing.plan import (
    COMPARISONS,
    Given,
    plan_detectors,
)
from memjax.data.images import from_array
from memjax.detect import FLIPD, Difference, ScoreNorm, cost
from memjax.diffusion.model import Model

NUM_STORED = 6
DETECTORS = ("flipd", "denoising_loss")


def run(model, images, **kwargs):
    return audit(model, images, **{"detectors": DETECTORS, "num_samples": 0, **kwargs})


def column(result, name):
    return np.array(result.table.column(name).to_pylist(), dtype=object)


def replace_rows(images, bad):
    """The same images with some pixels overwritten, as a user's array would have them."""
    pixels = images.images.copy()
    for row, value in bad.items():
        pixels[row] = value
    return from_array(pixels, ids=images.ids)


def test_stored_rows_rank_first_and_are_reproduced(model, images):
    truth = Truth(
        np.array([8] * 6 + [1] * 34), np.array([True] * 6 + [False] * 34), ("train",) * 40
    )
    result = run(model, images, num_samples=200, truth=truth, seed=3)
    assert sorted(row["row"] for row in result.top(NUM_STORED)) == list(range(NUM_STORED))
    stored = column(result, "stored")
    assert stored[:NUM_STORED].all()
    assert not stored[NUM_STORED:].any()
    # Half of the model's mass lies on the stored rows, and every sample from there is a copy.
    copying = result.metrics["stored"]["copying_share"]
    assert copying["low"] < 0.5 < copying["high"]
    assert result.metrics["stored"]["by_multiplicity"] == {"1": [0, 34], "8": [6, 6]}
    assert result.manifest["samples"]["copies"] == column(result, "copies").sum()
    for entry in result.metrics["contrasts"]:
        assert entry["auroc"]["value"] == 1.0
        assert entry["tpr_at_fpr"][0]["resolvable"] is False  # 34 negatives cannot show 1 %


def test_without_calibration_there_is_a_ranking_and_no_flag(model, images):
    result = run(model, images)
    assert result.metrics["flags"] == []
    assert not [name for name in result.table.column_names if name.startswith(("flag", "p_"))]
    assert column(result, "stored").tolist() == [None] * 40
    assert result.metrics["stored"] is None
    ranks = column(result, "rank").astype(int)
    order = np.lexsort((ranks, -column(result, "flipd").astype(float)))
    assert ranks.min() == 1
    assert (np.diff(ranks[order]) >= 0).all()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_flags_against_calibration_rows_or_other_images(model, images, elsewhere):
    if elsewhere:
        pixels = np.clip(np.random.default_rng(9).normal(0, 0.4, (60, 4, 4, 1)), -0.99, 0.99)
        calibration = Calibration("membership", images=from_array(pixels.astype(np.float32)))
    else:
        calibration = Calibration("membership", rows=np.arange(10, 40))
    result = run(model, images, calibrations=(calibration,), fdr=0.2)
    flagged = column(result, "flag_membership_flipd")
    assert flagged[:NUM_STORED].all()
    roles = column(result, "role_membership")
    if elsewhere:
        assert result.table.num_rows == 100
        assert set(roles[40:]) == {"calibration"}
        assert set(column(result, "rank")[40:]) == {None}
        assert set(column(result, "source")[40:]) == {"calibration"}
    else:
        assert set(roles[10:]) == {"calibration"}
        assert set(flagged[10:]) == {None}
    (entry, _) = result.metrics["flags"]
    assert entry["flagged"] == sum(flag is True for flag in flagged)
    assert entry["tested"] == sum(role == "tested" for role in roles)


def test_bad_rows_keep_their_place_and_leave_the_others_alone(model, images):
    clean = run(model, images, chunk_size=16)
    dirty = run(model, replace_rows(images, {2: np.nan, 17: np.inf, 30: 5.0}), chunk_size=16)
    assert column(dirty, "status")[[2, 17, 30]].tolist() == [
        "input_corrupt",
        "input_corrupt",
        "input_mismatch",
    ]
    assert all(column(dirty, "reason")[[2, 17, 30]])
    assert column(dirty, "rank")[[2, 17, 30]].tolist() == [None] * 3
    good = np.setdiff1d(np.arange(40), [2, 17, 30])
    for name in ("flipd", "denoising_loss", "flipd_raw", "denoising_loss_se"):
        np.testing.assert_array_equal(column(clean, name)[good], column(dirty, name)[good])
    assert dirty.manifest["data"]["status_counts"] == {
        "input_corrupt": 2,
        "input_mismatch": 1,
        "ok": 37,
    }


def test_a_row_the_model_cannot_evaluate_has_a_status_and_no_rank(model, images):
    def broken(x, sigma, condition=None):
        s = model(x, sigma, condition)
        return jnp.where(jnp.abs(x[0, 0, 0] - images.images[5, 0, 0, 0]) < 1e-6, jnp.nan, s)

    nan_model = type(model)(broken, model.event_shape, sigma_min=0.01, sigma_max=20.0, data_std=0.4)
    result = run(nan_model, images, detectors=["flipd"])
    assert column(result, "status")[5] == "nonfinite"
    assert column(result, "rank")[5] is None
    assert column(result, "flipd")[5] is None
    assert all(column(result, "rank")[column(result, "status") == "ok"])


def test_row_order_and_chunk_neighbours_do_not_change_a_bit(model, images):
    order = np.random.default_rng(1).permutation(40)
    shuffled = from_array(images.images[order], ids=[images.ids[i] for i in order])
    one, other = (run(model, rows, chunk_size=8) for rows in (images, shuffled))
    for name in ("flipd", "denoising_loss"):
        np.testing.assert_array_equal(column(one, name)[order], column(other, name))
    another = run(model, images, chunk_size=7)
    a, b = (column(r, "flipd").astype(float) for r in (one, another))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


class Stop(BaseException):
    pass


def interrupted(model, images, out, after, **kwargs):
    """An audit that dies after some chunks, as a kill would have it."""

    def progress(stage, done, total):
        if done >= after:
            raise Stop

    with pytest.raises(Stop):
        run(model, images, out=out, progress=progress, chunk_size=8, **kwargs)


def test_an_interrupted_audit_goes_on_and_ends_the_same(model, images, tmp_path, monkeypatch):
    whole = run(model, images, chunk_size=8, num_samples=16)
    interrupted(model, images, tmp_path, after=24, num_samples=16)
    evaluated = []
    chunk = rows_module._evaluate_chunk
    monkeypatch.setattr(
        rows_module, "_evaluate_chunk", lambda *args: evaluated.append(1) or chunk(*args)
    )
    resumed = run(model, images, out=tmp_path, chunk_size=8, num_samples=16)
    assert len(evaluated) == 2  # of five chunks three were there
    assert resumed.table.equals(whole.table)
    assert not (tmp_path / "parts").exists()


def test_torn_parts_are_computed_again(model, images, tmp_path):
    whole = run(model, images, chunk_size=8)
    interrupted(model, images, tmp_path, after=24)
    parts = sorted((tmp_path / "parts").glob("*.npz"))
    assert len(parts) == 3
    parts[0].write_bytes(parts[0].read_bytes()[:100])
    data = bytearray(parts[1].read_bytes())
    data[len(data) // 2] ^= 0xFF
    parts[1].write_bytes(data)
    parts[2].write_bytes(b"")
    assert run(model, images, out=tmp_path, chunk_size=8).table.equals(whole.table)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"detectors": ("flipd",)}, "detectors"),
        ({"chunk_size": 4}, "chunk_size"),
        ({"num_samples": 3}, "num_samples"),
        ({"calibrations": (Calibration("membership", rows=np.arange(10)),)}, "calibrations"),
    ],
)
def test_resume_refuses_another_experiment(model, images, tmp_path, change, named):
    interrupted(model, images, tmp_path, after=8)
    before = sorted((tmp_path / "parts").iterdir())
    with pytest.raises(InputError, match=rf"unfinished audit that differs in {named};"):
        run(model, images, **{"out": tmp_path, "chunk_size": 8, **change})
    assert sorted((tmp_path / "parts").iterdir()) == before


def test_resume_refuses_other_images_or_weights(model, images, tmp_path):
    interrupted(model, images, tmp_path, after=8)
    with pytest.raises(InputError, match="differs in data;"):
        run(model, replace_rows(images, {0: 0.5}), out=tmp_path, chunk_size=8)
    other = jax.tree.map(lambda leaf: leaf * 1.0001, model)
    with pytest.raises(InputError, match="differs in model;"):
        run(other, images, out=tmp_path, chunk_size=8)


def test_files_say_what_the_result_says(model, images, tmp_path):
    import pyarrow.csv
    import pyarrow.parquet

    names = ["=1+1", "@cmd", "-3", "a,b", 'say "x"', *images.ids[5:]]
    renamed = from_array(images.images, ids=names)
    result = run(model, renamed, out=tmp_path)
    assert pyarrow.parquet.read_table(tmp_path / "table.parquet").equals(result.table)
    ids = pyarrow.csv.read_csv(tmp_path / "table.csv").column("id").to_pylist()
    assert ids[:5] == ["'=1+1", "'@cmd", "-3", "a,b", 'say "x"']
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["state"] == "completed"
    assert manifest["primary"] == "flipd"
    assert manifest["data"]["rows"] == 40
    assert [d["cost"] for d in manifest["detectors"]] == [
        {"forward": 1, "jvp": 16, "vjp": 0},
        {"forward": 32, "jvp": 0, "vjp": 0},
    ]
    with np.load(tmp_path / "gallery.npz") as gallery:
        np.testing.assert_array_equal(gallery["images"], images.images[gallery["rows"]])
        assert gallery["rows"].tolist() == [row["row"] for row in result.top(24)]
        assert np.isnan(gallery["nearest_samples"]).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gallery.npz",
        "manifest.json",
        "metrics.json",
        "table.csv",
        "table.parquet",
    ]


def test_detectors_by_name_level_and_object(model, images):
    result = run(model, images, detectors=["flipd@0.5", "flipd", ScoreNorm(0.1), "flipd@1e9"])
    labels = [entry["name"] for entry in result.manifest["detectors"]]
    assert labels == ["flipd@0.5", "flipd", "score_norm", "flipd@1e+09"]
    sigmas = [entry["sigma"] for entry in result.manifest["detectors"]]
    np.testing.assert_allclose(sigmas, [0.2, FLIPD.default_level * 0.4, 0.1, 20.0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"detectors": ["nonsense"]}, "detectors: unknown 'nonsense'; known: flipd, "),
        ({"detectors": ["flipd@x"]}, "detectors: expected NAME@LEVEL"),
        ({"detectors": ["flipd@-1"]}, "detectors: expected NAME@LEVEL"),
        ({"detectors": ["flipd", "flipd"]}, "detectors: expected each once"),
        ({"fdr": 1.5}, "fdr: expected a rate between 0 and 1"),
        ({"num_samples": -1}, "num_samples: expected 0 or more"),
        ({"chunk_size": 0}, "chunk_size: expected at least 1"),
        ({"samples": np.zeros((3, 5, 5, 1))}, "samples: expected images of shape 4x4x1"),
        ({"conditions": np.zeros(3)}, "conditions: expected 40 rows"),
        ({"truth": Truth(np.ones(3), np.ones(3, bool), ("train",) * 3)}, "truth: expected 40 rows"),
        ({"trained_on": np.array([99])}, "trained_on: expected row numbers between 0 and 39"),
        ({"trained_on": np.array([True])}, "trained_on: expected a mask of 40 rows"),
    ],
)
def test_unusable_arguments_are_named(model, images, arguments, message):
    with pytest.raises(InputError, match=message):
        run(model, images, **{"num_samples": 4, **arguments})


def test_images_of_another_size_are_named(model, images):
    other = from_array(np.random.default_rng(0).uniform(-1, 1, (3, 5, 5, 1)).astype(np.float32))
    with pytest.raises(InputError, match=r"images: the model takes images of shape 4x4x1, found"):
        run(model, other)
    with pytest.raises(InputError, match=r"calibration: the model takes"):
        run(model, images, calibrations=(Calibration("membership", images=other),))


def test_a_calibration_says_what_it_means(images):
    with pytest.raises(InputError, match="either images or rows"):
        Calibration("membership")
    with pytest.raises(InputError, match="either images or rows"):
        Calibration("membership", images=images, rows=np.arange(3))
    with pytest.raises(InputError, match="'membership' or 'duplication'"):
        Calibration("stored", rows=np.arange(3))


def test_a_wrong_stack_stops_the_audit(model, images, tmp_path, monkeypatch):
    bad = audit_module.check_backend()._replace(ok=False, message="products are wrong")
    monkeypatch.setattr(audit_module, "check_backend", lambda: bad)
    with pytest.raises(MemjaxError, match="wrong numbers: products are wrong"):
        run(model, images, out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_images_are_encoded_and_samples_decoded(model, images):
    latent = type(model)(
        model.raw_score,
        model.event_shape,
        sigma_min=0.01,
        sigma_max=20.0,
        data_std=0.4,
        encode=lambda image: 0.5 * image,
        decode=lambda x: 2.0 * x,
    )
    result = run(latent, images, detectors="score_norm", num_samples=8)
    halves = from_array(0.5 * images.images)
    expected = run(model, halves, detectors="score_norm", num_samples=8)
    np.testing.assert_array_equal(column(result, "score_norm"), column(expected, "score_norm"))
    near, half = (column(r, "nearest_sample_distance").astype(float) for r in (result, expected))
    np.testing.assert_allclose(near, 2 * half, rtol=1e-6)


def test_conditions_reach_their_rows(images):
    def score(x, sigma, condition):
        return -(x - condition) / (0.16 + sigma**2)

    from memjax.diffusion.model import Model

    conditional = Model(
        score,
        (4, 4, 1),
        sigma_min=0.01,
        sigma_max=20.0,
        data_std=0.4,
        null_condition=jnp.zeros((), jnp.float32),
    )
    conditions = np.zeros(40, np.float32)
    conditions[7] = 3.0
    result = run(conditional, images, detectors=[ScoreNorm(0.1)], conditions=conditions)
    raw = column(result, "score_norm_raw").astype(float)
    assert raw.argmax() == 7
    plain = run(conditional, images, detectors=[ScoreNorm(0.1)])
    expected = column(plain, "score_norm_raw").astype(float)
    np.testing.assert_array_equal(np.delete(raw, 7), np.delete(expected, 7))


@pytest.fixture(scope="module")
def prompted(model):
    """The same model with a condition that stretches its score; zero is the null condition."""

    def score(x, sigma, condition):
        return (1 + 0.1 * condition) * model(x, sigma)

    return with_score(model, score, null_condition=jnp.zeros((), jnp.float32))


def with_score(model, score, **options):
    noise = {"sigma_min": 0.01, "sigma_max": 20.0, "data_std": 0.4}
    return type(model)(score, model.event_shape, **noise, **options)


BASELINE_DETECTOR = Difference(ScoreNorm(0.1))
OVER = BASELINE_DETECTOR.name


def test_a_baseline_is_compared_with(model, images, tmp_path):
    weaker = with_score(model, lambda x, sigma, condition: 0.5 * model(x, sigma))
    result = run(model, images, detectors=["score_norm", OVER], baseline=weaker, out=tmp_path)
    norm, difference = (column(result, name).astype(float) for name in ("score_norm", OVER))
    expected = norm - COMPARISONS["baseline"][1] * norm / 2
    np.testing.assert_allclose(difference, expected, rtol=1e-4, atol=1e-12)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["baseline"]["event_shape"] == [4, 4, 1]
    assert manifest["baseline"]["sha256"] == manifest["plan"]["baseline"] != ""
    assert run(model, images).manifest["baseline"] is None


def test_resume_refuses_another_baseline_or_other_conditions(prompted, images, tmp_path):
    settings = {"baseline": prompted, "conditions": np.zeros(40, np.float32)}
    interrupted(prompted, images, tmp_path, after=8, **settings)
    other = jax.tree.map(lambda leaf: leaf + 1.0, prompted)
    for change, named in (
        ({"baseline": other}, "baseline"),
        ({"baseline": None}, "baseline"),
        ({"conditions": np.ones(40, np.float32)}, "conditions"),
        ({"conditions": None}, "conditions"),
    ):
        with pytest.raises(InputError, match=rf"unfinished audit that differs in {named};"):
            run(prompted, images, out=tmp_path, chunk_size=8, **{**settings, **change})
    run(prompted, images, out=tmp_path, chunk_size=8, **settings)


def test_what_a_named_detector_lacks_is_said_in_one_line(model, images):
    other = from_array(np.random.default_rng(0).uniform(-1, 1, (3, 5, 5, 1)).astype(np.float32))
    wide = Model(model.raw_score, (8, 8, 1), sigma_min=0.01, sigma_max=20.0, data_std=0.4)
    elsewhere = Calibration("membership", images=from_array(images.images))
    for arguments, message in (
        (
            {"detectors": ["flipd", "score_gap"]},
            "detectors: score_gap needs the rows' own conditions; give conditions",
        ),
        (
            {"detectors": [OVER]},
            f"detectors: {OVER} compares the model with another one; give a baseline",
        ),
        (
            {"detectors": ["nearest_sample"]},
            "detectors: nearest_sample compares the rows with generated samples; "
            "give samples, or draw some",
        ),
        ({"detectors": ["tiled_l2@0.1"]}, "detectors: tiled_l2 looks at samples, not at a noise"),
        ({"detectors": ["score_gap_over_null"]}, "detector: expected one that looks at one score"),
        ({"detectors": []}, "detectors: expected at least one, got none"),
        ({"baseline": wide}, "baseline: expected a model of samples of shape 4x4x1, got 8x8x1"),
        (
            {"calibrations": (elsewhere,), "conditions": np.zeros(40)},
            "calibration: expected conditions of its images where the audited rows have some",
        ),
    ):
        with pytest.raises(InputError, match=message) as error:
            run(model, images, **arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="calibration conditions: expected 3 rows, got shape 2"):
        Calibration("membership", images=other, conditions=np.zeros(2))
    with pytest.raises(InputError, match="rows have the conditions of the audit"):
        Calibration("membership", rows=np.arange(2), conditions=np.zeros(2))


def test_samples_fill_columns_like_any_detector(model, images):
    """Half of the model's mass lies on the stored rows: samples alone find them."""
    names = ["distance_ratio", "score_norm", "tiled_l2"]
    pixels = np.clip(np.random.default_rng(9).normal(0, 0.4, (60, 4, 4, 1)), -0.99, 0.99)
    calibration = Calibration("membership", images=from_array(pixels.astype(np.float32)))
    result = run(
        model, images, detectors=names, num_samples=200, calibrations=(calibration,), fdr=0.2
    )
    assert [entry["name"] for entry in result.manifest["detectors"]] == names
    assert [entry["sigma"] is None for entry in result.manifest["detectors"]] == [True, False, True]
    assert result.manifest["detectors"][0]["cost"] == {"forward": 0, "jvp": 0, "vjp": 0}
    for name in (names[0], names[2]):
        rank = column(result, f"{name}_rank")
        assert sorted(rank[:NUM_STORED]) == list(range(1, NUM_STORED + 1))
        assert (column(result, f"{name}_se") == 0).all()
        flagged = column(result, f"flag_membership_{name}")
        assert flagged[:NUM_STORED].all()
    hit = column(result, "distance_ratio_raw")[:40].astype(float) < 1 / 3
    np.testing.assert_array_equal(hit, column(result, "stored")[:40].astype(bool))
    alone = run(model, images, detectors=names[2], num_samples=200)
    assert column(alone, "tiled_l2").tolist() == column(result, "tiled_l2")[:40].tolist()


def test_one_training_image_leaves_comparisons_undefined(model, images):
    result = run(
        model,
        images,
        detectors=["flipd", "distance_ratio"],
        samples=images.images[:4],
        trained_on=np.arange(1),
    )
    assert set(column(result, "distance_ratio_status")) == {"undefined"}
    assert set(column(result, "distance_ratio")) == {None}
    assert all(column(result, "rank"))


def test_samples_are_drawn_under_the_rows_conditions_in_turn(prompted, images, monkeypatch):
    seen = []
    look = audit_module.look_for_copies
    monkeypatch.setattr(
        audit_module,
        "look_for_copies",
        lambda rows, samples, among: seen.append(samples) or look(rows, samples, among),
    )
    given = np.zeros(40, np.float32)
    other = np.where(np.arange(40) == 1, np.float32(3), given)
    for conditions in (given, other, None):
        run(prompted, images, detectors="score_norm", num_samples=80, conditions=conditions)
    changed = (seen[0] != seen[1]).any(axis=(1, 2, 3))
    assert np.flatnonzero(changed).tolist() == [1, 41]
    np.testing.assert_array_equal(seen[0], seen[2])


@pytest.mark.slow
def test_all_detectors_make_exactly_the_evaluations_they_declare(prompted, images):
    """Every evaluation of either model is counted, and each distinct one is made once."""
    calls = []

    def counting(x, sigma, condition):
        jax.debug.callback(lambda _: calls.append(1), x[0, 0, 0])  # once a row
        return prompted(x, sigma, condition)

    counted = with_score(prompted, counting, null_condition=prompted.null_condition)
    few = from_array(images.images[4:8])
    lone = Given(images=4)
    detectors = [e.detector for e in plan_detectors("all", counted, lone) if not e.samples]
    run(
        counted,
        few,
        detectors=detectors,
        conditions=np.linspace(0.1, 1.0, 4, dtype=np.float32),
        baseline=counted,
        chunk_size=4,
    )
    jax.effects_barrier()
    declared = cost(tuple(detectors), 16)
    assert len(calls) == 4 * declared.forward
    assert declared.total < sum(cost((detector,), 16).total for detector in detectors)
