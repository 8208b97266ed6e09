"""Published networks: their models in PyTorch, where it is installed, and the products of ours."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture(scope="session")
def torch_models(import_with_torch):
    """The module of this name, with torch, diffusers and transformers behind it."""
    return import_with_torch(Path(__file__).with_name("torch_models.py"))


@pytest.fixture(scope="session")
def loaded():
    """Arrays of a state dict as a loader hands them over: kernels as [h, w, in, out]."""

    def convert(arrays, dtype=jnp.float32):
        def one(a):
            return jnp.asarray(a.transpose(2, 3, 1, 0) if a.ndim == 4 else a, dtype)

        return {name: one(a) for name, a in arrays.items()}

    return convert


@pytest.fixture(scope="session")
def compiled():
    """The function compiled for these arguments in half the time, at some cost in speed."""

    def compile_(function, *args):
        options = {"xla_backend_optimization_level": 0}
        return jax.jit(function).lower(*args).compile(compiler_options=options)

    return compile_


@pytest.fixture(scope="session")
def products(compiled):
    """f(network, x), J v and J^T u."""

    def products(f, network, x, v, u):
        def everything(network, x, v, u):
            y, push = jax.linearize(lambda x: f(network, x), x)
            return y, push(v), jax.linear_transpose(push, x)(u)[0]

        return compiled(everything, network, x, v, u)(network, x, v, u)

    return products
