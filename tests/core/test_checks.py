"""Bad arguments are refused in one line that names them, before anything runs."""

import jax
import jax.numpy as jnp
import pytest

from memjax._core.checks import (
    check_count,
    check_floating,
    check_maps_alike,
    check_positive,
    is_traced,
)
from memjax._core.errors import InputError


def never(x):
    raise AssertionError("computed")


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: check_count("k", 0, 1), "k: expected a whole number at least 1, got 0"),
        (lambda: check_count("k", 5, 1, 4), "k: expected a whole number from 1 to 4, got 5"),
        (lambda: check_positive("r", 0), "r: expected a positive finite number, got 0"),
        (
            lambda: check_positive("r", float("nan")),
            "r: expected a positive finite number, got nan",
        ),
        (
            lambda: check_positive("r", float("inf")),
            "r: expected a positive finite number, got inf",
        ),
        (
            lambda: check_floating("x", jnp.zeros(2, jnp.int32)),
            "x: expected a floating-point array, got dtype int32",
        ),
        (
            lambda: check_maps_alike("f", "f(x) like x", lambda x: x[:1], jnp.zeros(2, "f4")),
            r"f: expected f\(x\) like x, float32\[2\], got float32\[1\]",
        ),
        (
            lambda: check_maps_alike("f", "f(x) like x", lambda x: (x, x), jnp.zeros(2, "f4")),
            r"f: expected f\(x\) like x, float32\[2\], got tuple",
        ),
    ],
)
def test_what_is_refused(check, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        check()


def test_what_passes():
    check_count("k", 1, 1, 1)
    check_positive("r", 1e-300)
    check_positive("r", jnp.zeros(()))  # values of arrays are looked at under jit by nobody
    check_floating("x", jnp.zeros(2, jnp.bfloat16))
    check_maps_alike("f", "f(x) like x", jnp.sin, jnp.zeros(3))


def test_only_traced_values_count_as_traced():
    seen = []
    jax.jit(lambda x: seen.append(is_traced(x)) or x)(jnp.zeros(()))
    assert seen == [True]
    assert not is_traced(jnp.zeros(()))
    assert not is_traced(1.0)
