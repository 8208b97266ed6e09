"""The bench of maps: what it reports was chosen elsewhere, and says what the numbers are."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from memjax.evaluate.overlap import mask_iou
from memjax.evaluate.roc import auroc

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("memorized",) * 2 + ("general",) * 2 + ("template",) * 6


@pytest.fixture
def bench(monkeypatch):
    """Benchmark modules lie beside the package, outside what is installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.localization")


def fake_bed(bench, seed, good="0.5", steps=(300, 1000)):
    """Maps that show the mask at one level only, the weaker of two checkpoints being better."""
    rng = np.random.default_rng(seed)
    kind = np.array(KINDS)
    mask = np.zeros((len(kind), 8, 8), bool)
    mask[kind == "memorized"] = True
    mask[kind == "template", :4] = True
    varying = np.ones(mask.shape, bool)
    varying[:, :, 0] = False
    maps, scans = {}, {}
    for place in bench.PLACES:
        for name in bench.TITLES:
            for k in steps:
                noise = rng.standard_normal((len(kind), len(bench.SIGMAS), 8, 8))
                shown = 3.0 * (k == 300 or name not in bench.SECOND_MODEL)
                noise[:, bench.SIGMAS.index(float(good))] += shown * (mask & varying)
                maps[place, name, k] = noise.astype(np.float32)
                if name.startswith("curvature_over"):
                    scans[place, name, k] = {"persistent": noise[:, 0]}
    return bench.Bed(mask, kind, varying, maps, scans)


def test_a_row_is_chosen_on_some_seeds_and_scored_on_others(bench):
    tuning = [fake_bed(bench, seed) for seed in (1, 2)]
    scoring = [fake_bed(bench, seed) for seed in (3, 4)]
    row = bench._summary(tuning, scoring, "noised", "curvature_over_baseline", (0.0,))
    assert row["chosen"] == {"at": "0.5", "width": 0.0, "weaker_steps": 300}
    level = bench.SIGMAS.index(0.5)

    def pixels(beds):
        return [
            np.concatenate([part(bed)[bed.kind == "template"] for bed in beds])
            for part in (
                lambda bed: bed.maps["noised", "curvature_over_baseline", 300][:, level],
                lambda bed: bed.mask,
                lambda bed: bed.varying,
            )
        ]

    values, truth, varying = pixels(scoring)
    expected = auroc(values[varying].astype(float), truth[varying]).value
    assert row["varying"]["auroc"]["value"] == round(expected, 4)
    assert row["auroc_by_sigma"][level] == pytest.approx(np.mean(row["auroc_by_seed"]), abs=1e-4)
    masks = values > row["threshold"]
    here = mask_iou(masks[varying][None], truth[varying][None])
    assert row["varying"]["iou"]["value"] == pytest.approx(here, abs=2e-3)
    # Other levels show nothing, and constant pixels keep the number over all pixels down.
    assert max(np.delete(row["auroc_by_sigma"], level)) < 0.6
    assert row["iou_ceiling_all"] == 0.875
    assert row["all"]["auroc"]["value"] < row["varying"]["auroc"]["value"]
    assert row["varying"]["iou"]["all_ones"] == 0.5
    # The threshold is not one that the scored masks would choose.
    again = bench._summary(tuning, [scoring[0]], "noised", "curvature_over_baseline", (0.0,))
    assert again["threshold"] == row["threshold"]


def test_the_published_protocol_sees_the_columns_it_is_quoted_for(bench):
    beds = [fake_bed(bench, 3)]
    best = bench.Candidate(300, "0.5", 0.85)
    found = bench._published(beds, "noised", "curvature_over_null", best)
    assert found["template"]["all_ones"] == 0.5
    assert found["template and general"]["all_ones"] == round(6 * 32 / (8 * 64), 4)
    assert found["all"]["all_ones"] == round((6 * 32 + 2 * 64) / (10 * 64), 4)
    assert found["template"]["iou"] >= found["template"]["all_ones"]


def test_targets_are_of_what_the_tuning_seeds_recommend(bench, tmp_path):
    beds = [fake_bed(bench, seed) for seed in (1, 2)]
    rows = [
        bench._summary(beds[:1], beds[1:], "noised", name, (0.0,))
        for name in ("curvature_over_null", "curvature_over_baseline")
    ]
    rows[1]["merit"], rows[0]["merit"] = 0.9, 0.8
    targets = bench._targets(rows)
    assert [target.bound for target in targets] == [0.01, 0.15, 0.03, 0.15]
    assert ["weaker" in target.what for target in targets] == [True, True, False, False]
    for target, row, metric in zip(
        targets, (rows[1], rows[1], rows[0], rows[0]), ("auroc", "iou") * 2, strict=True
    ):
        assert target.value == pytest.approx(1 - row["varying"][metric]["value"])

    pytest.importorskip("matplotlib")
    record = {"case": "localization/prompts", "rows": rows}
    bench.figure([record]).savefig(tmp_path / "figure")


def test_the_planted_world_is_what_it_says(bench):
    world, mask = bench.planted(8, 0.1)
    covariances = [
        np.asarray(field.vectors) * np.asarray(field.variances) @ np.asarray(field.vectors).T
        for field in (world.pinned, world.free)
    ]
    ratio = np.diag(covariances[0]) / np.diag(covariances[1])
    np.testing.assert_allclose(ratio, np.where(mask.reshape(-1), 0.01, 1.0), rtol=1e-3)
    assert 0.1 < mask.mean() < 0.3


@pytest.mark.slow
def test_a_quick_case_finds_the_planted_block(bench):
    harness = importlib.import_module("benchmarks.harness")
    record = harness.measure(bench.cases()[1], quick=True)
    assert record["status"] == "ok"
    assert all(target["met"] for target in record["targets"])
    dose = [row["inside"] for row in record["rows"] if row["method"] == "dose"]
    assert dose == sorted(dose)
