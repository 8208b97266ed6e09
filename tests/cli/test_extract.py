"""``memjax extract``: which files it writes, what stands in them, and what it refuses."""

import json

import numpy as np
import pytest

import memjax.auditing.extraction as extraction
import memjax.cli.app as app
from memjax.auditing.parts import Parts
from memjax.checkpoints import load
from memjax.checkpoints.classifier import load_classifier
from memjax.data.testbeds import graded
from memjax.evaluate import find_copies
from memjax.training.testbeds import GradedTestbed

SHAPE = (6, 6, 1)
QUICK = ["--samples", 12, "--chunk-size", 1, "--level", 4]


def arrays(path):
    with np.load(path) as archive:
        return dict(archive)


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Training images, the first two equal, and one that cannot be used."""
    values = np.random.default_rng(0).uniform(-1, 1, (9, *SHAPE)).astype(np.float32)
    values[1], values[8] = values[0], np.nan
    path = tmp_path_factory.mktemp("data") / "images.npy"
    np.save(path, values)
    return path


def test_with_training_images(memjax, plain, images, tmp_path, read_rows):
    out = tmp_path / "out"
    command = ["extract", plain, "--data", images, "--heldout", images, "--out", out, *QUICK]
    status, shown, err = memjax(*command, "--seed", 7)
    assert status == app.COMPLETED
    assert "1 images cannot be used" in err
    for title in ("Candidates, found without", "Samples that copy", "Training images matched"):
        assert title in shown
    assert "reached: 0 of 1 images that stand in the data several times" in shown
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*"))
    assert written == [
        "candidates.npz", "figures", "figures/candidates-01.png", "figures/curves.png",
        "figures/scores.png", "report.html", "samples.npz", "scores.csv", "settings.json",
        "table.csv",
    ]  # fmt: skip
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 3
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["plan"]["seed"], settings["data"]) == (7, "images.npy")

    # What it says of candidates and samples, computed again from what it wrote.
    candidates, samples = arrays(out / "candidates.npz"), arrays(out / "samples.npz")
    assert json.loads(str(candidates["settings"])) == settings
    data = np.load(images)[:8]
    copies = find_copies(candidates["images"], data)
    assert np.array_equal(candidates["nearest"], copies.nearest)
    np.testing.assert_allclose(candidates["d1"], copies.d1)
    rows = read_rows(out / "table.csv")
    assert len(rows) == len(copies.d1) > 0
    for row, at, d1 in zip(rows, copies.nearest, copies.d1, strict=True):
        assert row["nearest"] == f"row-{at:04d}"
        assert row["times"] == ("2" if at == 0 else "1")
        assert float(row["d1"]) == pytest.approx(d1, rel=1e-5)
    assert sum(int(row["hits"]) for row in rows) == settings["converged"]
    for name in ("unguided", "fixed_points"):
        assert samples[name].shape == (12, *SHAPE)
        assert np.array_equal(samples[f"{name}.copy"], find_copies(samples[name], data).is_copy)
    scores = read_rows(out / "scores.csv")
    assert len(scores) == 2 * 3
    assert float(scores[0]["copied"]) == samples["unguided.copy"].mean()

    before = files(out)
    (out / "figures" / "candidates-09.png").write_bytes(b"stale")
    assert memjax(*command, "--seed", 7)[0] == app.COMPLETED
    assert files(out) == before


def test_without_training_images(memjax, plain, tmp_path, read_rows):
    out = tmp_path / "out"
    out.mkdir()
    (out / "scores.csv").write_text("stale")
    status, shown, _ = memjax("extract", plain, "--out", out, *QUICK)
    assert status == app.COMPLETED
    assert "cop" not in shown
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*"))
    assert written == [
        "candidates.npz", "figures", "figures/candidates-01.png", "report.html", "samples.npz",
        "settings.json", "table.csv",
    ]  # fmt: skip
    rows = read_rows(out / "table.csv")
    assert list(rows[0]) == ["rank", "hits", "radius", "stable", "residual", "status"]
    assert [int(row["hits"]) for row in rows] == [12]  # such a model has one attractor


def test_a_table_without_rows(memjax, plain, images, tmp_path):
    out = tmp_path / "out"
    command = ["extract", plain, "--data", images, "--out", out, "--samples", 2]
    status, shown, _ = memjax(*command, "--steps", 1)
    assert status == app.COMPLETED
    assert "candidates: 0; 0 of 2 samples came to rest" in shown
    assert (out / "table.csv").read_text() == "rank,hits,radius,stable,residual,status\n"
    assert "There is no row to show" in (out / "report.html").read_text()


def test_an_interrupted_command_goes_on(memjax, plain, images, tmp_path, monkeypatch):
    """Every file is that of a command that nobody interrupted."""
    command = ["extract", plain, "--data", images, *QUICK]
    assert memjax(*command, "--out", tmp_path / "whole")[0] == app.COMPLETED
    out, written = tmp_path / "out", []

    def stop(self, name, arrays):
        Parts_write(self, name, arrays)
        written.append(name)
        raise KeyboardInterrupt

    Parts_write = Parts.write
    monkeypatch.setattr(Parts, "write", stop)
    for _ in range(5):  # two blocks of samples, two of fixed points, the attractors
        status, _, err = memjax(*command, "--out", out)
        assert status == app.INCOMPLETE
        assert "the same command goes on from there" in err
    assert len(set(written)) == 5
    assert "differs in seed;" in memjax(*command, "--out", out, "--seed", 1)[2]
    assert memjax(*command, "--out", out)[0] == app.COMPLETED
    whole, found = files(tmp_path / "whole"), files(out)
    assert [p.name for p in whole] == [p.name for p in found]
    assert list(whole.values()) == list(found.values())


def test_guided_samples(memjax, plain, images, tmp_path, read_rows):
    out = tmp_path / "out"
    command = ["extract", plain, "--data", images, "--out", out, "--method", "both", *QUICK]
    command += ["--weights", "0,2.5", "--pool", 20, "--clusters", 3, "--training", 30]
    status, shown, _ = memjax(*command, "--cohesion", -1, "--window", 0.5, 5)
    assert status == app.COMPLETED
    assert "beside these: 700 network products for the pool, and 30 steps" in shown
    assert load_classifier(out / "classifier").num_classes == 3
    settings = json.loads((out / "settings.json").read_text())
    assert settings["plan"]["side"]["window"] == [0.5, 5.0]
    scores = read_rows(out / "scores.csv")
    names = ["weight 0", "weight 2.5", "weight 0, fixed", "weight 2.5, fixed"]
    assert [row["samples"] for row in scores] == [name for name in names for _ in range(3)]
    assert [row["weight"] for row in scores[::3]] == ["0", "2.5", "0", "2.5"]
    assert [row["fixed"] for row in scores[::3]] == ["false", "false", "true", "true"]
    samples = arrays(out / "samples.npz")
    assert np.array_equal(samples["weight_0.cluster"], samples["weight_2.5_fixed.cluster"])
    page = (out / "report.html").read_text()
    for words in ("fixed points from guided samples", "3 of 3, from 20", "0.5 to 5 standard"):
        assert words in page
    for name, values in arrays(out / "candidates.npz").items():
        assert name == "settings" or len(values) == 1

    # Alone, with nothing that crowds together: fewer neighbors than it takes.
    command[command.index("both")] = "side"
    del command[command.index("--level") : command.index("--level") + 2]
    assert memjax(*command, "--cohesion", -1, "--samples", 1)[0] == app.COMPLETED
    assert (out / "table.csv").read_text() == "rank,hits,weight,cluster,contrast,radius\n"


def test_digits_have_a_truth(memjax, make_model, monkeypatch, tmp_path, read_rows):
    """The test bed's own door, without its training: a model that stores nothing."""
    model = load(make_model(shape=(8, 8, 1)))

    def untrained(seed, group_size, **options):
        bed = graded(seed, group_size)
        return GradedTestbed(bed, model, np.zeros((1, 8, 8, 1)), np.zeros(1797, bool))

    monkeypatch.setattr(extraction, "graded_testbed", untrained)
    out = tmp_path / "out"
    status, shown, _ = memjax("extract", "digits", "--out", out, *QUICK)
    assert status == app.COMPLETED
    assert "reached: 0 of 192 images that stand in the data several times" in shown
    assert "reached: 0 of 808 images that stand in the data once" in shown
    bed, found = graded(0, (0, 0, 128, 64, 0)), arrays(out / "candidates.npz")
    trained = bed.multiplicity > 0
    nearest = find_copies(found["images"], bed.images[trained]).nearest
    for row, at in zip(read_rows(out / "table.csv"), nearest, strict=True):
        assert row["nearest"] == np.array(bed.ids)[trained][at]
        assert row["times"] == str(bed.multiplicity[trained][at])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nowhere"], "nowhere"),
        (["MODEL", "--data", "nowhere"], "nowhere"),
        (["MODEL", "--data", "SMALL"], "(6, 6, 1)"),
        (["MODEL", "--data", "SAME"], "at least 2 distinct"),
        (["MODEL", "--heldout", "SMALL"], "there is no --data"),
        (["MODEL", "--method", "magic"], "--method"),
        (["MODEL", "--samples", "0"], "--samples"),
        (["MODEL", "--level", "1000"], "expected a number from 0.02 to 40"),
        (["MODEL", "--bands", "1,x"], "--bands"),
        (["MODEL", "--bands", "1,0.5"], "ascending"),
        (["MODEL", "--distance", "l2"], "bands"),
        (["MODEL", "--weights", "0,1"], "--weights: not used by --method fixed-points"),
        (["MODEL", "--method", "side", "--level", "1"], "--level: not used by --method side"),
        (["MODEL", "--method", "side", "--weights", "0,-1"], "numbers from 0 up"),
        (["MODEL", "--method", "side", "--weights", "1,1"], "different numbers"),
        (["MODEL", "--method", "side", "--pool", "5"], "at least 100 (clusters)"),
        (["MODEL", "--method", "both", "--window", "2", "1"], "low < high"),
        (["digits", "--data", "SMALL"], "brings its own"),
    ],
)
def test_bad_usage_is_one_line(memjax, one_error_line, plain, tmp_path, arguments, word):
    np.save(tmp_path / "small.npy", np.full((2, 4, 4, 1), -0.5, np.float32))
    np.save(tmp_path / "same.npy", np.full((2, *SHAPE), -0.5, np.float32))
    out = tmp_path / "out"
    places = {"MODEL": plain, "SMALL": tmp_path / "small.npy", "SAME": tmp_path / "same.npy"}
    arguments = [places.get(argument, argument) for argument in arguments]
    status, shown, err = memjax("extract", *arguments, "--out", out)
    assert (status, shown) == (app.BAD_USAGE, "")
    assert word in one_error_line(err)
    assert not out.exists()


def test_out_is_needed_and_must_be_a_folder(memjax, one_error_line, plain, tmp_path):
    assert "--out DIR is missing" in one_error_line(memjax("extract", plain)[2])
    (tmp_path / "parts").symlink_to(tmp_path)
    assert "parts is a link" in one_error_line(memjax("extract", plain, "--out", tmp_path)[2])
