"""Counting the rows of an image set: failed rows keep their place, wrong machines are refused."""

import numpy as np
import pytest

import memjax.auditing.counting as counting
from memjax._core.errors import InputError, MemjaxError
from memjax._core.status import Status
from memjax.data.images import from_array
from memjax.detect.multiplicity import estimate_multiplicity
from memjax.networks import ResidualMLP
from memjax.training import train

QUICK = {"rounds": 0, "runs": 1, "steps": 2, "batch_size": 4}


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).uniform(-1, 1, (7, 4, 4, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def model(pixels):
    return train(pixels, network=ResidualMLP(8, 1, 8), steps=2, batch_size=4)


def test_failed_rows_keep_their_place(model, pixels):
    given = pixels.copy()
    given[2] = np.nan
    found = counting.count_images(model, from_array(given), **QUICK)
    ok = np.arange(7) != 2
    alone = estimate_multiplicity(model, pixels[ok], **QUICK)
    np.testing.assert_array_equal(found.value[ok], alone.value)
    assert np.isnan(found.value[2])
    assert found.status.tolist() == [0, 0, Status.INPUT_CORRUPT, 0, 0, 0, 0]


def test_conditions_go_with_their_rows(pixels):
    model = train(
        pixels, network=ResidualMLP(8, 1, 8, num_conditions=7), conditions=np.arange(7), steps=2
    )
    given = pixels.copy()
    given[0] = np.nan
    found = counting.count_images(model, from_array(given), np.arange(7), **QUICK)
    alone = estimate_multiplicity(model, pixels[1:], conditions=np.arange(1, 7), **QUICK)
    np.testing.assert_array_equal(found.value[1:], alone.value)


def test_refuses_what_cannot_be_counted(model, pixels, monkeypatch):
    broken = from_array(np.concatenate([pixels[:1] * np.nan, pixels]))
    broken.status[:] = Status.INPUT_CORRUPT
    with pytest.raises(InputError, match="images: expected some that can be used, found none"):
        counting.count_images(model, broken)

    class Wrong:
        ok, message = False, "2 + 2 = 5"

    monkeypatch.setattr(counting, "check_backend", Wrong)
    with pytest.raises(MemjaxError, match="this machine computes wrong numbers"):
        counting.count_images(model, from_array(pixels))
