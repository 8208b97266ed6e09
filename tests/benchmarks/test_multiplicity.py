"""The bench of multiplicities: which rows are given, what is counted, what is asked."""

from types import SimpleNamespace

import numpy as np
import pytest

from memjax._core.cost import Cost
from memjax.data.testbeds import graded
from memjax.detect.multiplicity import MultiplicityEstimate


@pytest.fixture
def world(load, monkeypatch):
    """The bench, with an estimator that knows the truth but for the images that stand twice."""
    bench = load("multiplicity")
    asked = []

    def testbed(seed, sizes, *, steps, num_samples):
        asked.append((seed, sizes, steps))
        return SimpleNamespace(bed=graded(seed, sizes), model=seed)

    def estimate(model, images, *, steps, rounds, runs, seed):
        bed = graded(model, bench.GROUP_SIZES)
        known = {image.tobytes(): m for image, m in zip(bed.images, bed.multiplicity, strict=True)}
        times = np.array([known[image.tobytes()] for image in images], float)
        times[times == 2] = 1.0
        value = np.log(np.maximum(times, 0.3))
        asked.append((len(images), steps, int((times == 0).sum())))
        zeros = np.zeros(len(value), int)
        return MultiplicityEstimate(value, np.exp(value), 0 * value, zeros, zeros, Cost(10, 0, 5))

    monkeypatch.setattr(bench, "graded_testbed", testbed)
    monkeypatch.setattr(bench, "estimate_multiplicity", estimate)
    return bench, asked


def test_a_row_tells_what_was_given_and_found(world):
    bench, asked = world
    row = bench._row("all", bench.Setting("all"), (6, 7), False)
    assert [one for one in asked if len(one) == 3][1] == (1797, round(42 * 1797 / 16), 797)
    assert row["questions"]["membership"]["auroc"]["seeds"] == [1.0, 1.0]
    assert row["questions"]["x4"]["tpr"]["value"] == 1.0
    assert row["questions"]["x2"]["auroc"]["value"] == 0.5
    assert row["median_estimates"]["8"] == [8.0, 8.0]
    assert row["products"] == 15
    expected = 15 * 1797 / (2 * 8000 * 128)
    assert row["products_over_those_of_the_training"] == pytest.approx(expected, abs=1e-3)


def test_half_of_the_training_set_is_drawn_by_the_seed(world):
    bench, asked = world
    bench._row("half", bench.Setting("half", 50, steps=3000), (6,), False)
    assert asked == [(6, bench.GROUP_SIZES, 3000), (500, round(50 * 500 / 16), 0)]


def test_targets_are_what_is_missing_to_one(world):
    bench, _ = world
    rows = [bench._row("training set", bench.Setting(), (6, 7), False)] * 2
    value, rate, products, low, _, fewer = bench._targets("graded", rows)
    assert "auroc of x2, value" in value.what
    assert (value.value, value.bound) == (0.5, 0.01)
    assert rate.bound == 0.12
    assert "auroc of x2, lower end" in low.what
    assert low.value > 0.5
    assert (products.value, products.bound, fewer.bound) == (15, 100, 64)


def test_the_figure_shows_every_row(world):
    bench, _ = world
    records = []
    for name, settings in bench.SETTINGS.items():
        rows = [bench._row(title, setting, (6,), False) for title, setting in settings.items()]
        records.append({"case": f"multiplicity/{name}", "rows": rows})
    figure = bench.figure(records)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert len(labels) == 6
    assert labels[-1] == "training set, model of 3,000 steps"
