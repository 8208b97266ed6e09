"""One command in this process, and small models to run it on."""

import csv
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import memjax.cli.app as app
from memjax.checkpoints import save
from memjax.diffusion import (
    EDMPreconditioned,
    LinenNetwork,
    Model,
    VarianceExploding,
    from_prediction,
)
from memjax.networks import ResidualMLP


@pytest.fixture
def memjax(monkeypatch, capsys):
    """Run one command in this process: (exit status, standard output, standard error)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["memjax", *map(str, arguments)])
        status = app.run()
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture(scope="session")
def one_error_line():
    """The one line of standard error that says what was wrong."""

    def find(err: str) -> str:
        assert "Traceback" not in err
        (line,) = [line for line in err.strip().splitlines() if "rror" in line]
        return line

    return find


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """Saves a model with random weights: of how many conditions, and from which seed."""

    def make(num_conditions=0, seed=0, shape=(6, 6, 1)):
        module = ResidualMLP(
            width=16, num_blocks=1, embedding_width=8, num_conditions=num_conditions
        )
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        given = (x, jnp.float32(0), *([jnp.int32(0)] if num_conditions else []))
        shapes = jax.eval_shape(module.init, jax.random.key(0), *given)
        rng = np.random.default_rng(seed)
        # Not initialized as in training: some layers begin at zero, and zeros store nothing.
        variables = jax.tree.map(
            lambda w: rng.normal(scale=0.3, size=w.shape).astype(np.float32), shapes
        )
        schedule = VarianceExploding(0.01, 20.0)
        network = EDMPreconditioned(LinenNetwork(module, variables), 0.5)
        score = from_prediction(network, prediction="denoiser", schedule=schedule)
        null = jnp.int32(num_conditions) if num_conditions else None
        noise = {"sigma_min": 0.01, "sigma_max": 20.0, "data_std": 0.5}
        path = tmp_path_factory.mktemp("models") / "model"
        save(Model(score, shape, null_condition=null, **noise), path)
        return path

    return make


@pytest.fixture(scope="session")
def prompted(make_model):
    """A model of five prompts."""
    return make_model(5)


@pytest.fixture(scope="session")
def plain(make_model):
    """A model without prompts."""
    return make_model()


@pytest.fixture(scope="session")
def read_rows():
    """Rows of a CSV file by column."""

    def read(path):
        with open(path, newline="") as stream:
            return list(csv.DictReader(stream))

    return read
