"""Settings every test runs under: strict promotion, both precisions reachable."""

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def x64():
    """Double precision for one test, whatever the process runs with."""
    with jax.enable_x64(True):
        yield
