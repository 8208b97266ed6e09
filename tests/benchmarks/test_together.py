"""What all detectors cost together: every one of them is timed, and right, beside the others."""

import pytest

from memjax.auditing.plan import DETECTORS


def test_what_needs_no_more_than_an_image_is_timed(load):
    fits = load("together")._fits
    left_out = {name for name, kind in DETECTORS.items() if not fits(kind(1.0), 3072)}
    assert {"score_gap", "gap_sharpness", "volume_growth"} <= left_out
    assert not {"flipd", "sharpness", "extreme_eigenvalue", "p_laplace", "score_norm"} & left_out


@pytest.mark.slow
def test_a_quick_case_times_all_detectors_against_the_dearest(load):
    case = load("together").cases()[1]
    record = load("harness").measure(case, quick=True)
    assert (record["case"], record["status"]) == ("detectors/together-unet", "ok")
    assert record["error"] < 1e-4
    parameters = record["parameters"]
    alone = dict(zip(parameters["detectors"], parameters["products_alone"], strict=True))
    assert max(alone.values()) < parameters["products"] < sum(alone.values())
    assert list(record["baselines"]) == [f"{parameters['dearest']} alone"]
    assert [target["bound"] for target in record["targets"]] == [1.3]
