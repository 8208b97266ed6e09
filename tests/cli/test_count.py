"""``memjax count``: which files it writes, what stands in them, and what it refuses."""

import inspect
import json

import numpy as np
import pytest

import memjax.auditing.counting as counting
import memjax.cli.app as app
from memjax.checkpoints import load
from memjax.cli.count import count
from memjax.data.images import load_images
from memjax.data.testbeds import graded
from memjax.detect.multiplicity import PASSES, estimate_multiplicity
from memjax.networks import ResidualMLP
from memjax.training import train
from memjax.training.testbeds import GradedTestbed

SHAPE = (6, 6, 1)
QUICK = ["--passes", 2, "--rounds", 1, "--runs", 2, "--batch-size", 4]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Training images, the first two equal, and one that cannot be used."""
    values = np.random.default_rng(0).uniform(-1, 1, (9, *SHAPE)).astype(np.float32)
    values[1], values[8] = values[0], np.nan
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, values)
    return path


def test_writes_what_the_library_finds(memjax, plain, images, tmp_path, read_rows):
    out = tmp_path / "out"
    status, shown, _ = memjax("count", plain, "--data", images, "--out", out, *QUICK, "--seed", 7)
    assert status == app.COMPLETED
    assert "1 images have no estimate" in shown
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*"))
    assert written == [
        "figures", "figures/images.png", "figures/ranking.png", "report.html", "settings.json",
        "table.csv",
    ]  # fmt: skip
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 2
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["data"], settings["seed"], settings["passes"]) == ("images.npy", 7, 2)

    rows = read_rows(out / "table.csv")
    assert len(rows) == 9
    given = load_images(images)
    expected = estimate_multiplicity(
        load(plain),
        given.images[given.ok],
        rounds=1,
        runs=2,
        steps=4,
        batch_size=4,
        learning_rate=5e-4,
        seed=7,
    )
    assert settings["products"] == expected.cost.total
    found = np.array([float(row["times"] or "nan") for row in rows])
    where = [int(row["row"]) for row in rows]
    np.testing.assert_allclose(found[:8], expected.multiplicity[where[:8]], rtol=1e-4)
    assert [row["rank"] for row in rows] == [*map(str, range(1, 9)), ""]
    assert found[:8].tolist() == sorted(found[:8], reverse=True)
    assert (where[8], rows[8]["status"]) == (8, "input_corrupt")
    assert rows[8]["reason"]
    twins = [row["times"] for row in rows if row["row"] in ("0", "1")]
    assert twins[0] == twins[1]
    z = [float(row["z"]) for row in rows[:8]]
    wanted = expected.value / expected.standard_error
    np.testing.assert_allclose(z, wanted[where[:8]], rtol=1e-4, atol=1e-4)


def test_conditions_belong_to_rows(memjax, prompted, images, tmp_path, read_rows, one_error_line):
    labels = tmp_path / "labels.npy"
    np.save(labels, np.arange(9) % 5)
    out = tmp_path / "out"
    command = ["count", prompted, "--data", images, "--conditions", labels, *QUICK]
    status, *_ = memjax(*command, "--out", out)
    assert status == app.COMPLETED
    rows = {row["row"]: row["times"] for row in read_rows(out / "table.csv")}
    assert rows["0"] != rows["1"]  # equal images under other conditions
    np.save(labels, np.arange(9))
    status, _, err = memjax(*command, "--out", out)
    assert status == app.BAD_USAGE
    assert "expected conditions from 0 to 5" in one_error_line(err)


def test_digits_show_the_truth(memjax, tmp_path, monkeypatch):
    """A bed of its own in place of the trained one."""
    bed = graded(0)
    model = train(bed.images[:64], network=ResidualMLP(8, 1, 8), steps=2, batch_size=8)

    def tiny(seed, **_):
        return GradedTestbed(bed, model, bed.images[:3], np.zeros(len(bed.images), bool))

    monkeypatch.setattr(counting, "graded_testbed", tiny)
    monkeypatch.chdir(tmp_path)
    options = ["--passes", 1, "--rounds", 0, "--runs", 1]
    status, shown, _ = memjax("count", "digits", *options)
    assert status == app.COMPLETED
    assert "truly  2 times: 16 images" in shown
    assert "truly" in (tmp_path / "memjax-count" / "table.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["count", "digits", "--data", "x"], "'digits' brings its own images"),
        (["count", "model"], "--data is missing"),
        (["count", "model", "--data", "x"], "--out DIR is missing"),
        (["count", "nowhere", "--data", "x", "--out", "o"], "nowhere does not exist"),
        (["count", "digits", "--runs", "0"], "0 is not in the range"),
        (["count", "digits", "--learning-rate", "0"], "0.0 is not in the range"),
    ],
)
def test_refuses_in_one_line(memjax, arguments, message, tmp_path, monkeypatch, one_error_line):
    monkeypatch.chdir(tmp_path)
    status, _, err = memjax(*arguments)
    assert status == app.BAD_USAGE
    assert message in one_error_line(err)
    assert not list(tmp_path.iterdir())


def test_refuses_a_folder_without_usable_images(memjax, plain, tmp_path, one_error_line):
    path = tmp_path / "nan.npy"
    np.save(path, np.full((3, *SHAPE), np.nan, np.float32))
    options = ["--value-range", -1, 1, "--out", tmp_path / "out"]
    status, _, err = memjax("count", plain, "--data", path, *options)
    assert status == app.BAD_USAGE
    assert "expected at least one usable image, found none among 3" in one_error_line(err)


def test_defaults_are_those_of_the_library():
    """Which the command does not import for its help."""
    usual = inspect.signature(estimate_multiplicity).parameters
    options = {option.name: option.default for option in count.params}
    assert options["passes"] == PASSES
    for name in ("rounds", "runs", "batch_size", "learning_rate", "seed"):
        assert options[name] == usual[name].default, name
