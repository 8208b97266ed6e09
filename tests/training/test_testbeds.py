"""The cached test beds: truth, cache, damage, several processes."""

import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from memjax._core.errors import CheckpointError
from memjax.checkpoints.files import read_config
from memjax.data.testbeds import graded
from memjax.training import testbeds
from memjax.training.loop import fingerprint, train
from memjax.training.testbeds import graded_testbed, prompts_testbed

SMALL = {"steps": 40, "num_samples": 20}


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A cache that holds the small graded bed, and the bed."""
    folder = tmp_path_factory.mktemp("cache")
    return folder, graded_testbed(cache_dir=folder, **SMALL)


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("trained or sampled again")

    monkeypatch.setattr(testbeds, "train", refuse)
    monkeypatch.setattr(testbeds, "sample", refuse)


def test_first_call_trains_and_the_second_reads(cached, no_training):
    folder, first = cached
    second = graded_testbed(cache_dir=folder, **SMALL)
    equal(second.model, first.model)
    np.testing.assert_array_equal(second.samples, first.samples)
    np.testing.assert_array_equal(second.extracted, first.extracted)
    (entry,) = folder.iterdir()
    names = sorted(p.name for p in entry.iterdir())
    assert names == ["config.json", "model.safetensors", "samples-20.safetensors"]
    assert read_config(entry)["training"]["steps"] == 40


def test_fields(cached):
    _, (bed, model, samples, extracted) = cached
    assert bed.training_images.shape == (1912, 8, 8, 1)
    assert samples.shape == (20, 8, 8, 1)
    assert samples.dtype == np.float32
    assert extracted.shape == (1797,)
    assert not extracted[bed.multiplicity == 0].any()
    assert model.event_shape == (8, 8, 1)
    assert model.data_std == pytest.approx(bed.training_images.std(), rel=1e-5)


def test_the_model_is_what_train_gives(cached):
    _, result = cached
    equal(result.model, train(graded().training_images, steps=40))


def test_other_arguments_are_other_entries(cached, tmp_path):
    """The seed redraws the bed and the model; the number of samples redraws samples only."""
    folder, first = cached
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    more = graded_testbed(cache_dir=tmp_path, steps=40, num_samples=30)
    assert len(list(tmp_path.iterdir())) == 1
    np.testing.assert_array_equal(more.samples[:20], first.samples)
    other = graded_testbed(1, cache_dir=tmp_path, **SMALL)
    assert len(list(tmp_path.iterdir())) == 2
    assert (other.bed.multiplicity != first.bed.multiplicity).any()
    assert np.abs(other.samples - first.samples).max() > 0.1


def flip(file):
    data = bytearray(file.read_bytes())
    data[-50] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "samples-20.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damaged_entries_are_made_anew(file, damage, cached, tmp_path):
    folder, first = cached
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (entry,) = tmp_path.iterdir()
    victim = entry / file
    if damage == "flip":
        flip(victim)
    elif damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-60])
    else:
        victim.unlink()
    again = graded_testbed(cache_dir=tmp_path, **SMALL)
    equal(again.model, first.model)
    np.testing.assert_array_equal(again.samples, first.samples)
    assert sorted(p.name for p in entry.iterdir()) == sorted(
        p.name for p in next(folder.iterdir()).iterdir()
    )


def test_killed_training_goes_on_and_a_damaged_state_starts_over(cached, tmp_path):
    folder, first = cached
    entry = tmp_path / next(folder.iterdir()).name
    bed = graded()
    train(bed.training_images, steps=40, checkpoint_dir=entry)
    flip(entry / "state.safetensors")
    again = graded_testbed(cache_dir=tmp_path, **SMALL)
    equal(again.model, first.model)
    assert not (entry / "state.safetensors").exists()


def test_cache_folder_from_the_environment(cached, monkeypatch, no_training):
    folder, first = cached
    monkeypatch.setenv("MEMJAX_CACHE_DIR", str(folder))
    np.testing.assert_array_equal(graded_testbed(**SMALL).samples, first.samples)


def test_cache_folder_of_the_user(cached, monkeypatch, no_training):
    import platformdirs

    folder, first = cached
    monkeypatch.delenv("MEMJAX_CACHE_DIR", raising=False)
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda name: str(folder))
    np.testing.assert_array_equal(graded_testbed(**SMALL).samples, first.samples)


def test_cache_in_the_way_is_one_line(tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises((CheckpointError, ValueError), match=r"cache.*(Not a directory|exists)"):
        graded_testbed(cache_dir=tmp_path / "cache", **SMALL)


def test_progress(tmp_path):
    told = []
    graded_testbed(cache_dir=tmp_path, progress=lambda *args: told.append(args), **SMALL)
    assert told == [("training", 40, 40), ("drawing samples", 20, 20)]


def test_prompts(tmp_path):
    bed, model, samples, extracted = prompts_testbed(cache_dir=tmp_path, **SMALL)
    assert bed.images.shape == (2800, 8, 8, 1)
    assert int(model.null_condition) == 70
    assert samples.shape == (20, 8, 8, 1)
    assert extracted.shape == (2800,)


def test_extracted_is_by_prompt(tmp_path, monkeypatch):
    """A sample that copies an image under another prompt does not count."""
    from memjax.data.testbeds import prompts

    bed = prompts()
    fake = np.zeros((140, 8, 8, 1), np.float32)
    fake[0] = bed.images[0]  # prompt 0: its own image
    fake[1] = bed.images[0]  # prompt 1: the image of prompt 0
    fake[72] = bed.images[2 * 40]  # prompt 2, second round
    monkeypatch.setattr(testbeds, "sample", lambda *args, **kwargs: fake)
    result = prompts_testbed(cache_dir=tmp_path, steps=1, num_samples=140)
    assert set(bed.prompt[result.extracted]) == {0, 2}
    assert result.extracted[:40].all()
    assert not result.extracted[40:80].any()


@pytest.mark.slow
def test_two_processes_at_once(cached, tmp_path):
    """Both train into the same empty cache, and both end with the same bed."""
    _, first = cached
    script = tmp_path / "bed.py"
    script.write_text(
        "import sys\n"
        "from memjax.training.loop import fingerprint\n"
        "from memjax.training.testbeds import graded_testbed\n"
        "bed = graded_testbed(cache_dir=sys.argv[1], steps=40, num_samples=20)\n"
        "print(fingerprint(bed.samples))\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(tmp_path / "cache")],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for _ in range(2)
    ]
    told = [process.communicate(timeout=300)[0].strip() for process in processes]
    assert told == [fingerprint(first.samples)] * 2
    (entry,) = (tmp_path / "cache").iterdir()
    assert len(list(entry.iterdir())) == 3


@pytest.mark.slow
def test_the_graded_model_stores_what_it_has_seen_often(tmp_path):
    """The whole training: nearly all x32 and x16 images come out, none of those seen once."""
    bed, _, _, extracted = graded_testbed(cache_dir=tmp_path)
    rate = {m: extracted[bed.multiplicity == m].mean() for m in (0, 1, 2, 4, 8, 16, 32)}
    assert rate[32] == 1
    assert rate[16] >= 0.75
    assert rate[8] >= 0.125
    assert max(rate[0], rate[1], rate[2]) == 0
