"""Status codes: stable numbers, readable labels, usable under transformations."""

import jax
import jax.numpy as jnp
import pytest

from memjax._core.status import Status, finite_status


def test_codes_are_stable():
    # Written into tables that outlive a release: append, never renumber.
    assert {status.name: int(status) for status in Status} == {
        "OK": 0,
        "NONFINITE": 1,
        "UNDEFINED": 2,
        "NOT_CONVERGED": 3,
        "BREAKDOWN": 4,
        "MAX_STEPS": 5,
        "INPUT_CORRUPT": 6,
        "INPUT_MISMATCH": 7,
        "INDEFINITE": 8,
    }


def test_labels_are_lower_case_and_distinct():
    labels = [status.label for status in Status]
    assert labels == [label.lower() for label in labels]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_one_bad_entry_is_seen(bad):
    good = jnp.zeros((3, 2))
    assert finite_status(good) == Status.OK
    assert finite_status(good, good.at[2, 1].set(bad)) == Status.NONFINITE


def test_under_jit_and_vmap():
    rows = jnp.zeros((4, 3)).at[2, 0].set(jnp.nan)
    statuses = jax.jit(jax.vmap(finite_status))(rows)
    assert statuses.dtype == jnp.int32
    assert statuses.tolist() == [0, 0, 1, 0]


def test_nothing_to_look_at_is_ok():
    assert finite_status() == Status.OK
    assert finite_status(jnp.zeros(0)) == Status.OK
