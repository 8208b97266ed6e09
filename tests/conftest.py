"""Settings every test runs under: strict promotion, both precisions reachable."""

import contextlib
import ctypes
import gc
import importlib.util
import os
import warnings

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config):
    """Keep trained test beds beside the other test caches; share programs with no child."""
    os.environ.setdefault("MEMJAX_CACHE_DIR", str(config.cache.mkdir("memjax")))
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        # Processes that tests start compile for themselves, whatever this one shares: that they
        # compute the same bits, or survive being killed, must not hang on a stored program.
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"


@pytest.fixture
def x64():
    """Double precision for one test, whatever the process runs with."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def import_with_torch():
    """Import a file of helpers that needs torch, diffusers and transformers."""

    def import_(path):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what those libraries say while they are imported
            for name in ("torch", "diffusers", "transformers"):
                pytest.importorskip(name)
            spec = importlib.util.spec_from_file_location(path.stem, path)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return module

    return import_


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


_MAX_MAPPINGS = 20_000
"""Memory mappings of a process above which it forgets its compiled programs; Linux allows 65,530,
and every program has a few. What asks for one more dies of a segmentation fault in the compiler."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Between two files, drop compiled programs where thousands of them have piled up."""
    if nextitem is None or nextitem.path == item.path:
        return
    with contextlib.suppress(OSError, AttributeError):  # not Linux, or another C library
        with open("/proc/self/maps", "rb") as maps:
            count = sum(1 for _ in maps)
        if count > _MAX_MAPPINGS:
            jax.clear_caches()
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # gigabytes that the allocator would keep
