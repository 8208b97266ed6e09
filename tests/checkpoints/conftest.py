"""Folders of diffusers, made by diffusers where it is installed."""

import importlib.util
import warnings
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def torch_pipelines():
    """The module of this name, with torch, diffusers and transformers behind it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what those libraries say while they are imported
        for name in ("torch", "diffusers", "transformers"):
            pytest.importorskip(name)
        path = Path(__file__).with_name("torch_pipelines.py")
        spec = importlib.util.spec_from_file_location("torch_pipelines", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module
