"""``memjax mitigate``: which files it writes, what stands in them, and what it refuses."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import memjax.auditing.mitigation as mitigation
import memjax.cli.app as app
from memjax.checkpoints import load
from memjax.data.testbeds import prompts
from memjax.diffusion import sample
from memjax.evaluate import find_copies
from memjax.mitigate import NoiseObjective, embed_conditions, judge_noises
from memjax.training.testbeds import PromptsTestbed

SHAPE = (6, 6, 1)
QUICK = ["--samples", 3, "--budget", 4]


def arrays(path):
    with np.load(path) as archive:
        return dict(archive)


def test_other_noises(memjax, prompted, tmp_path, read_rows):
    out, images = tmp_path / "out", tmp_path / "images.npy"
    np.save(images, np.random.default_rng(0).uniform(-1, 1, (9, *SHAPE)).astype(np.float32))
    command = ["mitigate", prompted, "--prompts", "1,3", "--data", images, "--out", out, *QUICK]
    status, shown, _ = memjax(*command, "--share", 0.95, "--seed", 7)
    assert status == app.COMPLETED
    assert "Prompts before and after" in shown
    assert "of the samples before" in shown
    written = sorted(path.relative_to(out).as_posix() for path in out.rglob("*"))
    assert written == [
        "figures", "figures/samples-01.png", "noises.npz", "report.html", "samples.npz",
        "settings.json", "table.csv",
    ]  # fmt: skip
    page = (out / "report.html").read_text()
    assert "Prompts before and after" in page
    assert page.count("data:image/png") == 1
    noises, samples = arrays(out / "noises.npz"), arrays(out / "samples.npz")
    assert noises["before"].shape == noises["after"].shape == (2, 3, *SHAPE)
    settings = json.loads((out / "settings.json").read_text())
    assert json.loads(str(noises["settings"])) == settings
    assert (settings["seed"], settings["share"], settings["guidance"]) == (7, 0.95, 1.0)

    # What it says of noises and samples, computed again from what it wrote.
    model, conditions = load(prompted), jnp.array([1, 3], jnp.int32)
    objective = NoiseObjective("pull", sigma=2.5 * model.data_std)
    for when in ("before", "after"):
        judged = judge_noises(model, jnp.asarray(noises[when]), conditions, objective)
        np.testing.assert_allclose(noises[f"objective_{when}"], judged, rtol=1e-3, atol=1e-4)
        drawn = sample(
            model,
            6,
            noises=jnp.asarray(noises[when].reshape(6, *SHAPE)),
            conditions=jnp.repeat(conditions, 3),
        )
        np.testing.assert_allclose(samples[when].reshape(6, *SHAPE), drawn, rtol=1e-3, atol=1e-3)
        found = find_copies(samples[when].reshape(6, *SHAPE), np.load(images))
        assert np.array_equal(samples[f"copy_{when}"].ravel(), found.is_copy)
    below = noises["objective_after"] <= noises["threshold"][:, None]
    assert np.array_equal(noises["accepted"], below)
    assert below.any()
    for i, row in enumerate(read_rows(out / "table.csv")):
        assert row["id"] == f"prompt {(1, 3)[i]}"
        assert int(row["accepted"]) == below[i].sum()
        assert int(row["candidates"]) <= 4
        assert float(row["copies_after"]) == pytest.approx(samples["copy_after"][i].mean())

    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / "figures" / "samples-07.png").write_bytes(b"stale")
    assert memjax(*command, "--share", 0.95, "--seed", 7)[0] == app.COMPLETED
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_another_embedding(memjax, prompted, tmp_path, read_rows):
    out, listed = tmp_path / "out", tmp_path / "=1+1 [bold].npy"
    np.save(listed, np.array([4, 0]))
    command = ["mitigate", prompted, "--prompts", listed, "--method", "prompt", "--out", out]
    status, shown, _ = memjax(*command, "--samples", 2, "--share", 0.9, "--guidance", 2)
    assert status == app.COMPLETED
    assert "copies" not in shown
    noises = arrays(out / "noises.npz")
    assert np.array_equal(noises["before"], noises["after"])
    _, vectors = embed_conditions(load(prompted), jnp.array([4, 0]))
    assert noises["condition_0"].shape == vectors.shape
    assert np.abs(noises["condition_0"] - vectors).max() > 0
    assert np.all(noises["objective_after"] <= noises["objective_before"])
    assert [row["id"] for row in read_rows(out / "table.csv")] == ["prompt 4", "prompt 0"]


def test_one_threshold_for_all_prompts(make_model, monkeypatch):
    """However few are searched together: the share of the median gap over all of them."""
    monkeypatch.setattr(mitigation, "PROMPT_STEPS", 1)
    model, conditions = load(make_model(5, shape=SHAPE)), jnp.arange(5, dtype=jnp.int32)
    options = {"method": "prompt", "share": 0.9, "num_samples": 1}
    together = mitigation.mitigate(model, conditions, **options)
    median = np.median(together.objective_before[:, 0])
    np.testing.assert_allclose(together.threshold, np.full(5, 0.9 * median), rtol=1e-6)
    monkeypatch.setattr(mitigation, "_TOGETHER", 2)
    apart = mitigation.mitigate(model, conditions, **options)
    assert np.array_equal(apart.threshold, together.threshold)
    np.testing.assert_allclose(apart.objective_before, together.objective_before, rtol=1e-5)
    assert np.array_equal(apart.products, together.products)


def test_digits_have_a_truth(memjax, make_model, monkeypatch, tmp_path, read_rows):
    """The test bed's own door, without its training: a model that stores nothing."""
    model = load(make_model(70, shape=(8, 8, 1)))

    def untrained(seed, **options):
        return PromptsTestbed(prompts(seed), model, np.zeros((1, 8, 8, 1)), np.zeros(1, bool))

    monkeypatch.setattr(mitigation, "prompts_testbed", untrained)
    out = tmp_path / "out"
    command = ["mitigate", "digits", "--out", out, "--samples", 1, "--budget", 1]
    status, shown, _ = memjax(*command, "--objective", "gap")
    assert status == app.COMPLETED
    assert "copies (mixed prompts): 0.0% of the samples before, 0.0% after" in shown
    assert "copies (stored prompts): 0.0% of the samples before" in shown
    rows = read_rows(out / "table.csv")
    assert [rows[k]["id"] for k in (0, 9, 10, 14)] == [
        "60 mixed", "69 mixed", "00 stored", "04 stored",
    ]  # fmt: skip
    samples, bed = arrays(out / "samples.npz"), prompts(0)
    nearest = find_copies(samples["after"][:, 0], bed.images).nearest
    numbers = [*range(60, 70), *range(5)]
    assert [float(row["own_after"]) for row in rows] == [
        float(bed.prompt[at] == number) for at, number in zip(nearest, numbers, strict=True)
    ]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nowhere", "--prompts", "0"], "nowhere"),
        (["MODEL"], "--prompts is missing"),
        (["MODEL", "--prompts", "6"], "from 0 to 5 (none)"),
        (["MODEL", "--prompts", "a cat"], "expected whole numbers"),
        (["MODEL", "--prompts", "none.txt"], "none.txt"),
        (["PLAIN", "--prompts", "0"], "takes no conditions"),
        (["MODEL", "--prompts", "0", "--data", "nowhere"], "nowhere"),
        (["MODEL", "--prompts", "0", "--data", "SMALL"], "(6, 6, 1)"),
        (["MODEL", "--prompts", "0", "--method", "magic"], "--method"),
        (["MODEL", "--prompts", "0", "--objective", "magic"], "--objective"),
        (["MODEL", "--prompts", "0", "--share", "1", "--threshold", "1"], "one of them"),
        (["MODEL", "--prompts", "0", "--budget", "7"], "at least --samples"),
        (["MODEL", "--prompts", "0", "--level", "1000"], "expected a number from 0.02 to 40"),
        (["MODEL", "--prompts", "0", "--share", "-1"], "--share"),
        (["digits", "--prompts", "0"], "brings its own"),
    ],
)
def test_bad_usage_is_one_line(memjax, one_error_line, prompted, plain, tmp_path, arguments, word):
    np.save(tmp_path / "small.npy", np.full((2, 4, 4, 1), -0.5, np.float32))
    out = tmp_path / "out"
    places = {"MODEL": prompted, "PLAIN": plain, "SMALL": tmp_path / "small.npy"}
    arguments = [places.get(argument, argument) for argument in arguments]
    status, shown, err = memjax("mitigate", *arguments, "--out", out)
    assert (status, shown) == (app.BAD_USAGE, "")
    assert word in one_error_line(err)
    assert not out.exists()


def test_an_interruption_leaves_nothing_behind(memjax, prompted, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(mitigation, "judge_noises", interrupt)
    status, shown, err = memjax("mitigate", prompted, "--prompts", "0", "--out", tmp_path / "out")
    assert (status, shown) == (app.INCOMPLETE, "")
    assert "memjax: interrupted" in err
    assert not (tmp_path / "out").exists()
