"""The bench of mitigation: what is chosen, what counts as normal, what counts as a copy."""

import importlib
from pathlib import Path

import numpy as np
import pytest

from memjax.data.testbeds import prompts

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    """The benchmarks lie beside the package, outside what is installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.mitigation")


def test_the_gentlest_setting_that_reaches_the_margin_is_chosen(bench):
    def row(copies, moved, accepted=1.0):
        return {"copies": copies, "moved": moved, "accepted": accepted}

    rows = [row(0.5, 1.0), row(0.04, 3.0), row(0.0, 4.0), row(0.01, 0.5, accepted=0.2)]
    assert bench.choose(rows, 1.0) == 1
    assert bench.choose(rows, 0.5) == 2
    assert bench.choose([row(0.5, 1.0), row(0.3, 2.0), row(None, 0.0)], 1.0) == 1
    assert bench.choose([row(None, 0.0), row(None, 0.0)], 1.0) == 0


def test_random_noises_pass_for_normal_and_others_do_not(bench):
    noises = np.random.default_rng(0).normal(size=(2000, 64))
    found = bench.normality(noises)
    assert found["norm p"] > 0.01
    assert abs(found["rejected"] - 0.05) < 3 * (0.05 * 0.95 / 2000) ** 0.5
    assert bench.normality(1.1 * noises)["norm p"] < 1e-6
    assert bench.normality(noises + 0.3)["rejected"] > 0.3


def test_quality_tells_copies_from_other_digits(bench):
    bed = prompts(1)
    here = bench.World(None, bed, np.array(bed.kind))
    prompt = int(np.flatnonzero(here.kind == "mitigation")[0])
    own = bed.images[40 * prompt + 38]
    middle = (bed.images[40 * prompt] + own) / 2
    samples = np.stack([bed.images[40 * prompt], own, middle])
    found = bench.quality(here, samples, np.full(3, prompt))
    np.testing.assert_array_equal(found["copies"], [True, True, False])
    assert np.isnan(found["neighbor"][:2]).all()
    assert found["neighbor"][2] > 0
    assert np.isnan(found["right digit"]).all()
    general = np.flatnonzero(here.kind == "general").astype(np.int32)
    digits = bench.quality(here, bed.images[40 * general], general)["right digit"]
    assert digits.mean() > 0.9
