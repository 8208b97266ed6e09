"""The command line: what it prints, writes and returns, for good input and bad."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import memjax.auditing.run as run_module
import memjax.cli.app as app
from memjax.auditing.plan import DETECTORS, SAMPLE_DETECTORS
from memjax.checkpoints import save
from memjax.cli.audit import _show
from memjax.diffusion import (
    EDMPreconditioned,
    LinenNetwork,
    Model,
    VarianceExploding,
    from_prediction,
)
from memjax.networks import ResidualMLP

SHAPE = (8, 8, 1)


@pytest.fixture(autouse=True, scope="module")
def _one_backend_check():
    report = run_module.check_backend()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "check_backend", lambda: report)
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    module = ResidualMLP(width=16, num_blocks=1, embedding_width=8)
    variables = module.init(jax.random.key(0), jnp.zeros(SHAPE, jnp.float32), jnp.float32(0))
    denoiser = EDMPreconditioned(LinenNetwork(module, variables), 0.5)
    schedule = VarianceExploding(0.002, 80.0)
    score = from_prediction(denoiser, prediction="denoiser", schedule=schedule)
    model = Model(score, SHAPE, sigma_min=0.002, sigma_max=80.0, data_std=0.5)
    path = tmp_path_factory.mktemp("models") / "model"
    save(model, path)
    return path


@pytest.fixture(scope="module")
def prompted_dir(tmp_path_factory):
    """A model that takes conditions 0, 1, 2, or 3 for none."""
    module = ResidualMLP(width=16, num_blocks=1, embedding_width=8, num_conditions=3)
    x = jnp.zeros(SHAPE, jnp.float32)
    variables = module.init(jax.random.key(0), x, jnp.float32(0), jnp.int32(0))
    score = from_prediction(
        LinenNetwork(module, variables),
        prediction="denoiser",
        schedule=VarianceExploding(0.002, 80.0),
    )
    noise = {"sigma_min": 0.002, "sigma_max": 80.0, "data_std": 0.5}
    path = tmp_path_factory.mktemp("models") / "prompted"
    save(Model(score, SHAPE, null_condition=jnp.int32(3), **noise), path)
    return path


def write_images(folder: Path, count: int = 6, size: int = 8) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(size)
    for i in range(count):
        pixels = rng.integers(0, 256, (size, size), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"image{i}.png")
    return folder


def one_error_line(err: str) -> str:
    lines = [line for line in err.strip().splitlines() if line.strip()]
    assert "Traceback" not in err
    (line,) = [line for line in lines if "rror" in line]
    return line


def test_an_audit_of_ones_own_model(memjax, model_dir, tmp_path):
    data = write_images(tmp_path / "photos", 12)
    unseen = write_images(tmp_path / "unseen", 20, size=8)
    out = tmp_path / "audit"
    command = ["audit", model_dir, "--data", data, "--out", out, "--samples", 8]
    status, shown, _ = memjax(*command, "--calibration", unseen, "--detector", "flipd")
    assert status == app.COMPLETED
    assert "Most suspicious by flipd" in shown
    assert "flagged for membership (evidence of having been trained on): 0 of 12" in shown
    assert (out / "report.html").is_file()
    assert (out / "figures").is_dir()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["command"].startswith("memjax audit ")
    assert manifest["model"]["name"] == "model"
    assert manifest["data"] | {"sha256": ""} == {
        "name": "photos",
        "rows": 12,
        "sha256": "",
        "status_counts": {"ok": 12},
    }


def test_bad_rows_cost_their_row_only(memjax, model_dir, tmp_path):
    data = write_images(tmp_path / "photos", 6)
    write_images(data / "large", 2, size=9)
    whole = (data / "image0.png").read_bytes()
    (data / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (data / "notes.png").write_text("not an image")
    status, shown, err = memjax(
        "audit", model_dir, "--data", data, "--out", tmp_path / "a", "--samples", 0
    )
    assert status == app.COMPLETED
    assert "rows without a result: 4 " in shown
    named = [line for line in err.splitlines() if line.startswith("memjax: ")]
    assert [line.split(": ")[1] for line in named] == [
        "large/image0.png",
        "large/image1.png",
        "notes.png",
        "truncated.png",
    ]
    assert all(line.count("input_") == 1 for line in named)
    page = (tmp_path / "a" / "report.html").read_text()
    assert "truncated.png" in page
    assert "notes.png" in page


def test_nan_pixels_are_named(memjax, model_dir, tmp_path):
    pixels = np.random.default_rng(0).uniform(-1, 1, (5, 8, 8, 1)).astype(np.float32)
    pixels[3, 2, 2] = np.nan
    np.save(tmp_path / "photos.npy", pixels)
    command = ["audit", model_dir, "--data", tmp_path / "photos.npy", "--out", tmp_path / "a"]
    status, shown, err = memjax(*command, "--samples", 0)
    assert status == app.COMPLETED
    assert "memjax: row-0003: input_corrupt: " in err
    assert "rows without a result: 1 " in shown


def test_findings_can_fail_the_command(memjax, model_dir, tmp_path, monkeypatch):
    data = write_images(tmp_path / "photos")
    flag = run_module.flag_metrics

    def flag_all(*arguments):
        return [entry | {"flagged": 1} for entry in flag(*arguments)]

    monkeypatch.setattr(run_module, "flag_metrics", flag_all)
    command = ["audit", model_dir, "--data", data, "--calibration", data, "--samples", 0]
    assert memjax(*command, "--out", tmp_path / "a", "--fail-on-findings")[0] == app.FINDINGS
    assert memjax(*command, "--out", tmp_path / "a")[0] == app.COMPLETED


def test_an_interrupted_audit_says_how_to_go_on(memjax, model_dir, tmp_path, monkeypatch):
    import memjax.auditing.rows as rows_module

    data = write_images(tmp_path / "photos")
    out = tmp_path / "a"
    chunk, calls = rows_module._evaluate_chunk, []

    def interrupt(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return chunk(*arguments)

    monkeypatch.setattr(rows_module, "_evaluate_chunk", interrupt)
    command = ["audit", model_dir, "--data", data, "--out", out, "--samples", 0, "--chunk-size", 2]
    status, _, err = memjax(*command)
    assert status == app.INCOMPLETE
    assert "the same command goes on from there" in err
    assert len(list((out / "parts").glob("data-*.npz"))) == 2
    assert memjax(*command)[0] == app.COMPLETED
    assert len(calls) == 4


def test_an_audit_with_conditions_and_a_baseline(memjax, model_dir, prompted_dir, tmp_path):
    data = write_images(tmp_path / "photos", 6)
    unseen = write_images(tmp_path / "unseen", 4, size=8)
    np.save(tmp_path / "prompts.npy", np.arange(6, dtype=np.uint8) % 4)
    np.save(tmp_path / "others.npy", np.zeros(4, np.int64))
    out = tmp_path / "a"
    command = ["audit", prompted_dir, "--data", data, "--out", out, "--samples", 0]
    detectors = ["--detector", "score_norm_over_baseline", "--detector", "score_gap"]
    conditions = ["--conditions", tmp_path / "prompts.npy"]
    calibration = ["--calibration", unseen, "--calibration-conditions", tmp_path / "others.npy"]
    baseline = ["--baseline", prompted_dir]
    status, shown, _ = memjax(*command, *detectors, *conditions, *calibration, *baseline)
    assert status == app.COMPLETED
    assert "Most suspicious by score_norm_over_baseline" in shown
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["baseline"]["name"] == "prompted"
    assert len(manifest["conditions"]) == 64
    command = [*command[:-4], "--out", tmp_path / "b", *command[-2:]]
    for arguments, word in (
        ([*detectors, *conditions], "give a baseline"),
        ([*detectors, *baseline], "give conditions"),
        ([*conditions, *calibration[:2]], "expected conditions of its images"),
        ([*conditions, *calibration[2:]], "there is no --calibration"),
        (["--conditions", tmp_path / "others.npy"], "expected 6 whole numbers"),
        (["--conditions", data], "photos"),
        ([*conditions, "--baseline", model_dir], "takes conditions like the audited one's"),
        (["--baseline", "nowhere"], "nowhere"),
    ):
        status, shown, err = memjax(*command, *arguments)
        assert (status, shown) == (app.BAD_USAGE, "")
        assert word in one_error_line(err)
    np.save(tmp_path / "prompts.npy", np.arange(6))
    status, _, err = memjax(*command, *conditions)
    assert status == app.BAD_USAGE
    assert "expected conditions from 0 to 3 (none), found 0 to 5" in one_error_line(err)
    status, _, err = memjax("audit", model_dir, *command[2:], *conditions)
    assert status == app.BAD_USAGE
    assert "the model takes no conditions" in one_error_line(err)


@pytest.mark.parametrize("width", [80, 66])
def test_a_short_line_cuts_no_number(monkeypatch, width):
    primary = "a_detector_with_quite_a_long_name"
    row = {"rank": 10, "id": "a/very/long/folder/name/and/an/image-000017.png", primary: 0.12345}
    row |= {f"p_{meaning}_{primary}": 0.00251 for meaning in ("membership", "duplication")}
    row |= {"stored": True, "copies": 1234, "multiplicity": 32}
    result = types.SimpleNamespace(
        manifest={"primary": primary},
        top=lambda n: [row],
        metrics={"contrasts": [], "flags": [], "stored": None},
        table=pa.table({"id": [row["id"]], "status": ["ok"], "reason": [None]}),
    )
    monkeypatch.setattr(app.console, "width", width)
    with app.console.capture() as shown:
        _show(result, Path("out"), Path("out/report.html"))
    (line,) = (line for line in shown.get().splitlines() if line.lstrip().startswith("10 "))
    assert line.split()[-6:] == ["0.123", "0.00251", "0.00251", "yes", "1234", "32"]


def test_the_detectors_are_listed(memjax, monkeypatch):
    monkeypatch.setattr(app.console, "width", 200)
    status, shown, _ = memjax("detectors")
    assert status == app.COMPLETED
    for name in (*DETECTORS, *SAMPLE_DETECTORS):
        assert f" {name} " in shown
    (line,) = (line for line in shown.splitlines() if line.startswith(" flipd *"))
    assert line.split()[-2:] == ["65", "17"]  # estimated where it would take days
    (line,) = (line for line in shown.splitlines() if line.startswith(" score_gap"))
    assert " conditions " in line


def broken(model_dir: Path, tmp_path: Path, name: str) -> Path:
    """A copy of the model folder with one thing wrong."""
    copy = tmp_path / name
    copy.mkdir()
    for path in model_dir.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    weights = copy / "model.safetensors"
    if name == "no_config":
        (copy / "config.json").unlink()
    elif name == "no_weights":
        weights.unlink()
    elif name == "flipped":
        data = bytearray(weights.read_bytes())
        data[-5] ^= 1
        weights.write_bytes(data)
    elif name == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif name == "pickled":
        weights.rename(copy / "model.pt")
    return copy


@pytest.mark.parametrize("name", ["no_config", "no_weights", "flipped", "truncated", "pickled"])
def test_a_damaged_model_is_one_line(memjax, model_dir, tmp_path, name):
    data = write_images(tmp_path / "photos")
    folder = broken(model_dir, tmp_path, name)
    status, out, err = memjax("audit", folder, "--data", data, "--out", tmp_path / "a")
    assert status == app.BAD_USAGE
    assert out == ""
    assert name in one_error_line(err)
    assert not (tmp_path / "a").exists()


def make_data(kind: str, folder: Path) -> Path:
    if kind == "missing":
        return folder / "missing"
    if kind == "empty":
        folder.mkdir()
        return folder
    if kind == "another_size":
        return write_images(folder, size=12)
    path = folder.with_suffix(".npy")
    if kind == "all_nan":
        np.save(path, np.full((3, 8, 8, 1), np.nan, np.float32))
    elif kind == "garbage":
        path.write_bytes(b"garbage")
    elif kind == "unsigned":
        np.save(path, np.random.default_rng(0).uniform(0.1, 1, (3, 8, 8)).astype(np.float32))
    return path


@pytest.mark.parametrize(
    "kind", ["missing", "empty", "another_size", "all_nan", "garbage", "unsigned"]
)
def test_unusable_data_is_one_line(memjax, model_dir, tmp_path, kind):
    data = make_data(kind, tmp_path / "data")
    status, out, err = memjax("audit", model_dir, "--data", data, "--out", tmp_path / "a")
    assert status == app.BAD_USAGE
    assert out == ""
    line = one_error_line(err)
    assert str(tmp_path / "data") in line
    assert kind != "another_size" or "shape [12, 12, 1], expected [8, 8, 1]" in line


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nonsense"], "nonsense"),
        (["audit"], "digits|MODEL_DIR"),
        (["audit", "MODEL"], "--data"),
        (["audit", "MODEL", "--data", "DATA"], "--out"),
        (["audit", "nowhere", "--data", "DATA", "--out", "OUT"], "nowhere"),
        (["audit", "digits", "--data", "DATA"], "digits"),
        (["audit", "MODEL", "--data", "DATA", "--out", "OUT", "--detector", "magic"], "magic"),
        (["audit", "MODEL", "--data", "DATA", "--out", "OUT", "--fdr", "2"], "fdr"),
        (["audit", "digits", "--baseline", "MODEL"], "--baseline"),
        (["audit", "MODEL", "--data", "DATA", "--out", "OUT", "--samples", "x"], "--samples"),
        (["audit", "MODEL", "--data", "DATA", "--out", "DATA/image0.png"], "image0.png"),
        (["audit", "MODEL", "--data", "DATA", "--out", "OUT", "--calibration", "no"], "no"),
        (["sample", "nowhere"], "nowhere"),
        (["sample", "MODEL", "--out", "no/where/grid.png"], "no/where"),
        (["train", "nowhere", "--out", "OUT"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["report", "DATA"], "manifest.json"),
    ],
)
def test_bad_usage_is_status_two_and_one_line(memjax, model_dir, tmp_path, arguments, word):
    data = write_images(tmp_path / "photos")
    places = {"MODEL": model_dir, "DATA": data, "OUT": tmp_path / "out"}
    arguments = [str(places.get(a, a)).replace("DATA", str(data)) for a in arguments]
    status, out, err = memjax(*arguments)
    assert status == app.BAD_USAGE
    assert out == ""
    assert word in one_error_line(err)
    assert not (tmp_path / "out").exists()


def test_an_unforeseen_fault_is_one_line_too(memjax, model_dir, monkeypatch, tmp_path):
    import memjax.diffusion.sampling as sampling

    def explode(*arguments, **options):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(sampling, "sample", explode)
    monkeypatch.delenv("MEMJAX_DEBUG", raising=False)
    status, _, err = memjax("sample", model_dir, "--out", tmp_path / "grid.png")
    assert status == app.INCOMPLETE
    assert "RuntimeError: first line second line" in one_error_line(err)
    monkeypatch.setenv("MEMJAX_DEBUG", "1")
    with pytest.raises(RuntimeError):
        memjax("sample", model_dir, "--out", tmp_path / "grid.png")


def test_train_then_sample(memjax, tmp_path):
    data = write_images(tmp_path / "photos")
    model = tmp_path / "model"
    status, out, _ = memjax("train", data, "--out", model, "--steps", 4, "--batch-size", 2)
    assert (status, "model:" in out) == (app.COMPLETED, True)
    assert sorted(path.name for path in model.iterdir()) == ["config.json", "model.safetensors"]
    grid = tmp_path / "grid.png"
    status, out, _ = memjax("sample", model, "--out", grid, "-n", 5, "--steps", 3)
    assert status == app.COMPLETED
    first = grid.read_bytes()
    with Image.open(grid) as picture:
        assert picture.size == (3 * 66 + 2, 2 * 66 + 2)
    memjax("sample", model, "--out", grid, "-n", 5, "--steps", 3)
    assert grid.read_bytes() == first


def test_doctor(memjax):
    status, out, _ = memjax("doctor")
    assert status == app.COMPLETED
    assert f"jax {jax.__version__}" in out


def test_hostile_names_stay_text(memjax, model_dir, tmp_path):
    data = write_images(tmp_path / "photos", 3)
    name = "[bold red]x[red]\x1b[31m<script>.png"
    (data / "image0.png").rename(data / name)
    out = tmp_path / "a"
    status, shown, _ = memjax("audit", model_dir, "--data", data, "--out", out, "--samples", 0)
    assert status == app.COMPLETED
    assert "\x1b[31m" not in shown
    assert "[bold red]x[red]" in shown
    assert "<script>" not in (out / "report.html").read_text()


@pytest.mark.parametrize("extra", ["click", "rich"])
def test_a_missing_extra_is_named(extra):
    code = f"import sys; sys.modules[{extra!r}] = None\nfrom memjax.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"memjax: this needs the package {extra!r}, which is not installed: "
        "pip install 'memjax[audit]'"
    )


def test_the_installed_command_shows_its_help():
    done = subprocess.run(
        [sys.executable, "-c", "from memjax.cli import main; main()", "audit", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.returncode == 0
    assert "--calibration-means" in done.stdout
    assert "4 incomplete" in done.stdout
