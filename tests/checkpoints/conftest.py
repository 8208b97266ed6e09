"""Folders of diffusers, made by diffusers where it is installed, and what its networks need."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def torch_pipelines(import_with_torch):
    """The module of this name, with torch, diffusers and transformers behind it."""
    return import_with_torch(Path(__file__).with_name("torch_pipelines.py"))


@pytest.fixture
def bridged():
    """One thread for PyTorch; the tests that ask for it hear no warnings about its exporter."""
    pytest.importorskip("torch").set_num_threads(1)


@pytest.fixture(scope="session")
def fast_compile():
    """Options for programs that take longer to compile than to run."""
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def pytest_collection_modifyitems(items):
    """Let pass what PyTorch says of itself while it exports a graph."""
    for item in items:
        if "bridged" in getattr(item, "fixturenames", ()):
            item.add_marker(
                pytest.mark.filterwarnings(
                    "ignore::DeprecationWarning",
                    "ignore::FutureWarning",
                    "ignore:.*isinstance.treespec.*",
                )
            )
