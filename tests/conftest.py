"""Settings every test runs under: strict promotion, both precisions reachable."""

import os

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config):
    """Keep trained test beds beside the other test caches, not in the user's own."""
    os.environ.setdefault("MEMJAX_CACHE_DIR", str(config.cache.mkdir("memjax")))


@pytest.fixture
def x64():
    """Double precision for one test, whatever the process runs with."""
    with jax.enable_x64(True):
        yield


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(config, items):
    """Mark what the fixture runs in double precision; leave out the nightly sizes unless asked."""
    for item in items:
        if "x64" in getattr(item, "fixturenames", ()):
            item.add_marker("x64")
    if "nightly" in config.option.markexpr:
        return
    large = [item for item in items if item.get_closest_marker("nightly")]
    if large:
        config.hook.pytest_deselected(items=large)
        items[:] = [item for item in items if not item.get_closest_marker("nightly")]
