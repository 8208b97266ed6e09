"""``memjax inspect``: the table and the JSON of a small published model."""

import json

import jax
import jax.numpy as jnp
import pytest

import memjax.cli.app as app
from memjax.checkpoints import save
from memjax.cli.inspect import _duration, _size
from memjax.diffusion import LinenNetwork, Model, VarianceExploding, from_prediction
from memjax.networks import ResidualMLP


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    module = ResidualMLP(width=16, num_blocks=1, embedding_width=8)
    shape = (8, 8, 1)
    variables = module.init(jax.random.key(0), jnp.zeros(shape, jnp.float32), jnp.float32(0))
    score = from_prediction(
        LinenNetwork(module, variables), prediction="denoiser", schedule=VarianceExploding()
    )
    path = tmp_path_factory.mktemp("models") / "model"
    save(Model(score, shape, sigma_min=0.002, sigma_max=80.0, data_std=0.5), path)
    return path


def test_the_table_and_the_json_say_the_same(memjax, model_dir):
    status, table, _ = memjax("inspect", model_dir)
    assert status == app.COMPLETED
    shown = " ".join(table.split())
    assert "a model of memjax" in shown
    assert "ResidualMLP, predicts denoiser" in shown
    assert "sigma 0.002 to 80" in shown
    assert "pixels, 8 x 8 x 1" in shown
    assert "audit, localize, sample" in shown
    assert "at least" in shown
    status, text, _ = memjax("inspect", model_dir, "--json", "--images", 100)
    found = json.loads(text)
    assert status == app.COMPLETED
    assert found["schedule"] == {
        "schedule": "variance_exploding",
        "sigma_min": 0.002,
        "sigma_max": 80.0,
    }
    assert f"{found['parts'][0]['parameters']:,}" in shown
    assert found["commands"] == ["audit", "localize", "sample"]
    audit = found["audit"]
    assert ", ".join(audit["detectors"]) in shown
    assert f"{audit['products_per_image']:,} products an image" in shown
    # What an audit asks for: a baseline there is none, nor conditions.
    assert audit["detectors"][0] == "p_laplace_flux_over_difficulty"
    assert not {"score_gap", "p_laplace_flux_over_baseline"} & set(audit["detectors"])
    evaluations = 100 * audit["products_per_image"] + 1024 * 35
    assert audit["seconds"] == pytest.approx(found["work"]["seconds"] * evaluations)
    work = found["work"]
    assert audit["bytes"] == work["weight_bytes"] + audit["rows_per_chunk"] * work["row_bytes"]


def test_measured(memjax, model_dir):
    status, table, _ = memjax("inspect", model_dir, "--measure")
    assert status == app.COMPLETED
    assert "here (measured)" in table
    assert "an audit" in table


def test_a_folder_that_is_no_score(memjax, tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "DiTTransformer2DModel[/red]"}')
    status, shown, _ = memjax("inspect", tmp_path)
    assert status == app.COMPLETED
    assert "DiTTransformer2DModel[/red]" in shown
    assert "memjax makes no model of it: " in shown
    status, text, _ = memjax("inspect", tmp_path, "--json")
    found = json.loads(text)
    assert found["problem"]
    assert found["commands"] == []
    assert found["audit"] is None


def test_bad_usage_is_one_line(memjax, tmp_path):
    status, _, err = memjax("inspect", tmp_path / "nothing")
    assert status == app.BAD_USAGE
    assert "does not exist" in err
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04.")
    for path in (tmp_path, tmp_path / "model.ckpt"):
        status, shown, err = memjax("inspect", path)
        assert (status, shown) == (app.BAD_USAGE, "")
        assert err.startswith("memjax: error: ")
        assert "convert it" in err
        assert len(err.splitlines()) == 1


def test_units():
    assert [_size(n) for n in (0, 1023, 1024, 5 * 2**20, 2**60)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "5 MiB",
        "1.049e+06 TiB",
    ]
    durations = [_duration(s) for s in (1e-5, 0.5, 1.9, 90, 150, 7000, 7300, 10**6)]
    assert durations == [
        "0.01 ms",
        "0.5 s",
        "1.9 s",
        "90 s",
        "2.5 min",
        "117 min",
        "2.03 h",
        "11.6 days",
    ]
