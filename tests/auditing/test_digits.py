"""The demonstration audit finds what was planted, in full size."""

import numpy as np
import pytest

import memjax.auditing.digits as digits_module
from memjax.auditing import audit
from memjax.auditing.digits import digits_audit
from memjax.training.testbeds import graded_testbed


@pytest.fixture(scope="module")
def result():
    return audit(**digits_audit(0, lambda stage, done, total: None))


@pytest.mark.slow
def test_planted_duplicates_are_found(result):
    def of(detector, positives):
        return next(
            entry
            for entry in result.metrics["contrasts"]
            if (entry["detector"], entry["positives"]) == (detector, positives)
        )

    flipd = of("flipd", "repeated 4 times or more")
    assert flipd["auroc"]["value"] >= 0.99
    assert flipd["tpr_at_fpr"][0]["value"] >= 0.9
    assert of("score_norm", "seen once")["auroc"]["value"] >= 0.97
    # Duplication, not membership, is what the effective dimension sees.
    assert abs(of("effective_dimension", "seen once")["auroc"]["value"] - 0.5) < 0.1


@pytest.mark.slow
def test_stored_means_reproduced_and_only_often_repeated_digits_are(result):
    hits = result.metrics["stored"]["by_multiplicity"]
    assert hits["32"] == [16, 16]
    assert hits["16"][0] >= 12
    assert hits["1"][0] == 0
    columns = {name: result.table.column(name).to_pylist() for name in ("stored", "extracted")}
    truth = result.table.column("multiplicity").to_pylist()
    for stored, extracted, multiplicity in zip(*columns.values(), truth, strict=True):
        assert stored == (extracted if multiplicity > 0 else None)


@pytest.mark.slow
def test_flags_keep_their_promise(result):
    for entry in result.metrics["flags"]:
        # The promise is about the expected share; the flags of one draw scatter around it.
        if entry["flagged"]:
            expected = 0.1 * entry["flagged"]
            assert entry["false"] <= expected + 4 * np.sqrt(expected) + 4, entry
    flipd = {e["meaning"]: e for e in result.metrics["flags"] if e["detector"] == "flipd"}
    assert flipd["duplication"]["true"] >= 60
    assert flipd["membership"]["true"] >= 900


def test_calibration_rows_are_not_tested(monkeypatch, tmp_path):
    small = graded_testbed(3, steps=2, num_samples=2, cache_dir=tmp_path)
    monkeypatch.setattr(digits_module, "graded_testbed", lambda seed, progress: small)
    arguments = digits_audit(3, lambda stage, done, total: None)
    multiplicity = np.asarray(small.bed.multiplicity)
    duplication, membership = arguments["calibrations"]
    assert (multiplicity[duplication.rows] == 1).all()
    assert len(duplication.rows) == 460
    assert (multiplicity[membership.rows] == 0).all()
    assert len(membership.rows) == 398
    result = audit(**arguments, detectors=["score_norm"])
    roles = result.table.column("role_duplication").to_pylist()
    assert {role: roles.count(role) for role in set(roles)} == {
        "calibration": 460,
        "tested": 540,
        None: 797,
    }
