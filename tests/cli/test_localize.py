"""``memjax localize``: which files it writes, what stands in them, and what it refuses."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import memjax.auditing.localization as localization
import memjax.cli.app as app
from memjax._core.keys import derive_key
from memjax.checkpoints import load
from memjax.data.testbeds import prompts
from memjax.evaluate import mask_iou
from memjax.localize import scan_samples, smooth
from memjax.training.testbeds import PromptsTestbed

SHAPE = (6, 6, 1)
QUICK = ["--draws", 2, "--levels", "0.5,1"]
UNCONDITIONAL = {"curvature", "curvature_over_others"}


@pytest.fixture(scope="module")
def weaker(make_model):
    return make_model(5, seed=1)


def test_prompts_with_a_baseline(memjax, prompted, weaker, tmp_path, read_rows):
    out = tmp_path / "out"
    command = ["localize", prompted, "--prompts", "0,2-3", "--baseline", weaker, "--out", out]
    status, shown, _ = memjax(*command, *QUICK)
    assert status == app.COMPLETED
    assert "by curvature_over_baseline" in shown
    assert "threshold: 0.1 (convention, not calibrated)" in shown
    assert sorted(path.name for path in (out / "masks").iterdir()) == [
        f"{i:05d}.png" for i in range(3)
    ]
    assert sorted(path.relative_to(out).as_posix() for path in out.glob("*")) == [
        "figures", "maps.npz", "masks", "report.html", "settings.json", "table.csv",
    ]  # fmt: skip
    assert (out / "figures" / "maps-01.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert "0.1, convention, not calibrated" in page
    assert page.count("data:image/png") == 1
    rows = read_rows(out / "table.csv")
    assert [row["id"] for row in rows] == ["prompt 0", "prompt 2", "prompt 3"]

    settings = json.loads((out / "settings.json").read_text())
    assert settings["sigmas"] == pytest.approx([0.25, 0.5])
    with np.load(out / "maps.npz") as archive:
        maps = dict(archive)
    assert json.loads(str(maps["settings"])) == settings
    # The same numbers as the library's, whatever the command does in between.
    found = scan_samples(
        load(prompted),
        np.array([0.25, 0.5]),
        jnp.array([0, 2, 3, 3, 3, 3, 3, 3], jnp.int32),
        key=derive_key(0, "localize"),
        baseline=load(weaker),
        num_draws=2,
        row_chunk=None,
    )
    for name in localization.UNITS:
        if name == "curvature_over_others":
            continue
        for part, values in getattr(found, name)._asdict().items():
            np.testing.assert_array_equal(maps[f"{name}.{part}"], values[:3])
    # Two levels: the mean over log sigma is that of the two.
    over = maps["curvature_over_baseline.summed"]
    np.testing.assert_allclose(maps["curvature_over_baseline.mean"], over.mean(1), rtol=1e-5)
    curvature = maps["curvature.value"]
    others = curvature - (curvature.sum(0) - curvature) / 2
    np.testing.assert_allclose(maps["curvature_over_others.value"], others, atol=1e-5)
    mask = smooth(over.mean(1), 0.65) > 0.1
    assert np.array_equal(maps["mask"], mask)
    assert 0 < mask.mean() < 1
    for i, row in enumerate(rows):
        assert float(row["stored_share"]) == pytest.approx(mask[i].mean(), rel=1e-5)
        with Image.open(out / "masks" / f"{i:05d}.png") as picture:
            assert np.array_equal(np.asarray(picture) > 0, mask[i])


def test_images_rerun_and_bad_rows(memjax, plain, tmp_path, monkeypatch, read_rows):
    monkeypatch.setattr(app.console, "width", 200)
    data, out = tmp_path / "photos", tmp_path / "out"
    data.mkdir()
    rng = np.random.default_rng(0)
    hostile = "=cmd|' '!A0 \x1b[31m[bold]<script>..%2f.png"
    for name in ("a.png", hostile, "z.png"):
        Image.fromarray(rng.integers(0, 256, SHAPE[:2], dtype=np.uint8)).save(data / name)
    (data / "broken.png").write_text("no image")
    command = ["localize", plain, "--data", data, "--out", out, *QUICK]
    status, shown, _ = memjax(*command)
    assert status == app.COMPLETED
    assert "by curvature_over_others" in shown
    assert "\x1b[31m" not in shown
    assert "[31m[bold]<script>" in shown
    rows = read_rows(out / "table.csv")
    assert [row["status"] for row in rows] == ["ok", "ok", "input_corrupt", "ok"]
    assert rows[0]["id"] == "'=cmd|' '!A0 [31m[bold]<script>..%2f.png"
    assert rows[2]["reason"] != ""
    assert (rows[2]["stored_share"], rows[2]["curvature_mean"]) == ("", "")
    written = sorted(path.relative_to(tmp_path).as_posix() for path in out.rglob("*"))
    assert [name for name in written if "/masks/" in name] == [
        f"out/masks/{i:05d}.png" for i in (0, 1, 3)
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with np.load(out / "maps.npz") as archive:
        names = {name.split(".")[0] for name in archive if "." in name}
        assert names == UNCONDITIONAL
        assert np.isnan(archive["curvature.value"][2]).all()
        assert np.isfinite(archive["curvature_over_others.value"][[0, 1, 3]]).all()
    # A row more that was there before is gone, and everything else stands as it was.
    (out / "masks" / "00009.png").write_bytes(b"stale")
    assert memjax(*command)[0] == app.COMPLETED
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_threshold_from_known_masks(memjax, one_error_line, prompted, tmp_path):
    rng = np.random.default_rng(1)
    images = rng.uniform(-1, 1, (6, *SHAPE)).astype(np.float32)
    np.save(tmp_path / "data.npy", images[:2])
    np.save(tmp_path / "conditions.npy", np.array([0, 1]))
    np.save(tmp_path / "others.npy", np.array([2, 3, 4, 5]))
    out = tmp_path / "out"
    command = ["localize", prompted, "--data", tmp_path / "data.npy", "--out", out, *QUICK]
    command += ["--conditions", tmp_path / "conditions.npy", "--map", "curvature", "--smooth", 0]
    assert memjax(*command)[0] == app.COMPLETED
    # Masks that a threshold on the very map separates.
    np.save(tmp_path / "all.npy", np.arange(6))
    np.save(tmp_path / "images.npy", images)
    whole = ["localize", prompted, "--data", tmp_path / "images.npy", *QUICK, *command[-4:]]
    whole += ["--conditions", tmp_path / "all.npy", "--out", tmp_path / "all"]
    assert memjax(*whole)[0] == app.COMPLETED
    with np.load(tmp_path / "all" / "maps.npz") as archive:
        means = archive["curvature.mean"]
    cut = float(np.quantile(means, 0.7))
    known = tmp_path / "known.npz"
    np.savez(known, images=images[2:], masks=means[2:] > cut)
    extra = ["--calibration", known, "--calibration-conditions", tmp_path / "others.npy"]
    status, shown, _ = memjax(*command, *extra)
    assert status == app.COMPLETED
    assert "(fitted to known masks)" in shown
    with np.load(out / "maps.npz") as archive:
        assert len(archive["mask"]) == 2
        assert mask_iou(archive["mask"], means[:2] > cut) > 0.8
    status, _, err = memjax(*command, *extra[:2])
    assert status == app.BAD_USAGE
    assert "expected conditions where the rows have some" in one_error_line(err)
    np.savez(known, images=images[2:], masks=np.ones((4, 3, 3), bool))
    status, _, err = memjax(*command, *extra)
    assert status == app.BAD_USAGE
    assert "expected masks" in one_error_line(err)
    np.savez(known, images=images[2:])
    status, _, err = memjax(*command, *extra)
    assert status == app.BAD_USAGE
    assert "expected an array 'masks', found one" in one_error_line(err)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nowhere", "--prompts", "0"], "nowhere"),
        (["MODEL"], "--prompts or --data"),
        (["MODEL", "--prompts", "0", "--data", "DATA"], "--prompts or --data"),
        (["MODEL", "--prompts", "0", "--conditions", "DATA"], "there is no --data"),
        (["MODEL", "--prompts", "a cat"], "expected whole numbers"),
        (["MODEL", "--prompts", "3-1"], "the range 3-1"),
        (["MODEL", "--prompts", "0-999999999"], "the range"),
        (["MODEL", "--prompts", "6"], "from 0 to 5 (none), found 6 to 6"),
        (["MODEL", "--prompts", "missing.npy"], "missing.npy"),
        (["MODEL", "--prompts", "DATA"], "at most 100000 whole numbers"),
        (["PLAIN", "--prompts", "0"], "takes no conditions"),
        (["MODEL", "--data", "nowhere"], "nowhere"),
        (["MODEL", "--data", "DATA", "--conditions", "DATA"], "expected 2 whole numbers"),
        (["MODEL", "--prompts", "0", "--baseline", "nowhere"], "nowhere"),
        (["MODEL", "--prompts", "0", "--baseline", "PLAIN"], "takes conditions like"),
        (["MODEL", "--prompts", "0", "--baseline", "LARGE"], "samples of shape 6x6x1"),
        (["MODEL", "--prompts", "0", "--levels", "0.5,x"], "--levels"),
        (["MODEL", "--prompts", "0", "--levels", "0.5,500"], "from 0.02 to 40"),
        (["MODEL", "--prompts", "0", "--levels", "1,1"], "expected different ones"),
        (["MODEL", "--prompts", "0", "--map", "magic"], "curvature_over_null"),
        (["MODEL", "--prompts", "0", "--map", "curvature_over_baseline"], "curvature_over_null"),
        (["MODEL", "--prompts", "0", "--calibration", "DATA", "--threshold", "1"], "one of them"),
        (["MODEL", "--prompts", "0", "--calibration", "DATA"], "'masks'"),
        (["MODEL", "--prompts", "0", "--calibration-conditions", "DATA"], "no --calibration"),
        (["MODEL", "--prompts", "0", "--draws", "0"], "--draws"),
        (["digits", "--prompts", "0"], "brings its own"),
    ],
)
def test_bad_usage_is_one_line(
    memjax, one_error_line, make_model, prompted, plain, tmp_path, arguments, word
):
    np.save(tmp_path / "data.npy", np.random.default_rng(0).uniform(-1, 1, (2, *SHAPE)))
    out = tmp_path / "out"
    places = {"MODEL": prompted, "PLAIN": plain, "DATA": tmp_path / "data.npy"}
    if "LARGE" in arguments:
        places["LARGE"] = make_model(5, shape=(8, 8, 1))
    arguments = [places.get(argument, argument) for argument in arguments]
    status, shown, err = memjax("localize", *arguments, "--out", out)
    assert (status, shown) == (app.BAD_USAGE, "")
    assert word in one_error_line(err)
    assert not out.exists()


def test_out_must_be_a_folder_of_ones_own(memjax, one_error_line, prompted, tmp_path):
    (tmp_path / "file").write_text("mine")
    command = ["localize", prompted, "--prompts", "0", *QUICK]
    status, _, err = memjax(*command, "--out", tmp_path / "file")
    assert status == app.BAD_USAGE
    assert "is not a folder" in one_error_line(err)
    status, _, err = memjax(*command)
    assert status == app.BAD_USAGE
    assert "--out DIR is missing" in one_error_line(err)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "masks").symlink_to(tmp_path / "elsewhere")
    status, _, err = memjax(*command, "--out", tmp_path / "out")
    assert status == app.BAD_USAGE
    assert "is a link" in one_error_line(err)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_an_interruption_leaves_nothing_behind(memjax, prompted, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(localization, "scan_samples", interrupt)
    status, shown, err = memjax("localize", prompted, "--prompts", "0", "--out", tmp_path / "out")
    assert (status, shown) == (app.INCOMPLETE, "")
    assert "memjax: interrupted" in err
    assert not (tmp_path / "out").exists()


def test_digits_have_a_truth(memjax, make_model, monkeypatch, tmp_path, read_rows):
    """The test bed's own door, without its training: a model that stores nothing."""
    model = load(make_model(70, shape=(8, 8, 1)))

    def untrained(seed, **options):
        return PromptsTestbed(prompts(seed), model, np.zeros((1, 8, 8, 1)), np.zeros(1, bool))

    monkeypatch.setattr(localization, "prompts_testbed", untrained)
    out = tmp_path / "out"
    status, shown, _ = memjax("localize", "digits", "--out", out, "--draws", 1, "--levels", "0.5")
    assert status == app.COMPLETED
    assert "by curvature_over_others" in shown
    assert "Half-stored prompts" in shown
    rows = read_rows(out / "table.csv")
    assert [row["id"] for row in rows[:2]] == ["41 template", "43 template"]
    assert (len(rows), rows[0]["true_share"]) == (50, "0.5")
    quality = json.loads((out / "settings.json").read_text())["quality"]
    assert set(quality) == set(localization.UNITS)
    # The weaker model is the same one: every difference is exactly zero, and tells nothing.
    assert quality["curvature_over_baseline"]["all"]["auroc"]["value"] == 0.5
    with np.load(out / "maps.npz") as archive:
        assert np.all(archive["curvature_over_baseline.value"] == 0)
        assert "curvature_over_baseline.persistent" not in archive
