"""Saved classifiers: bitwise back, inert, and every fault named in one line."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from memjax._core.errors import CheckpointError, InputError
from memjax.checkpoints.classifier import load_classifier, save_classifier
from memjax.checkpoints.files import CONFIG_FILE, WEIGHTS_FILE, load
from memjax.diffusion.adapters import LinenNetwork
from memjax.diffusion.classifier import NoisyClassifier
from memjax.networks.classifier import MLPClassifier, ResNetClassifier
from memjax.networks.mlp import ResidualMLP

SHAPE = (4, 4, 1)
NETWORKS = {
    "mlp": MLPClassifier(5, width=8, num_blocks=1, embedding_width=4),
    "resnet": ResNetClassifier(3, channels=(4, 8), num_blocks=1, groups=2, embedding_width=4),
}


def build(module, **options):
    x, t = jnp.zeros(SHAPE, jnp.float32), jnp.zeros((), jnp.float32)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype),
        jax.eval_shape(module.init, jax.random.key(0), x, t),
    )
    return NoisyClassifier(
        LinenNetwork(module, variables),
        SHAPE,
        num_classes=getattr(module, "num_classes", 1),
        data_std=0.7,
        sigmas=np.geomspace(0.1, 9.9, 4),
        temperature=np.array([1.1, 0.9, 1 / 3, 20.0]),
        **options,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved classifier; copy it before breaking it."""
    path = tmp_path_factory.mktemp("saved") / "classifier"
    save_classifier(build(NETWORKS["mlp"]), path, training={"steps": 3})
    return path


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "classifier")


def edit(folder, change):
    config = json.loads((folder / CONFIG_FILE).read_text())
    change(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


@pytest.mark.parametrize("time_dependent", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_is_bitwise(name, time_dependent, tmp_path):
    classifier = build(NETWORKS[name], time_dependent=time_dependent)
    save_classifier(classifier, tmp_path / "a")
    loaded = load_classifier(tmp_path / "a")
    assert jax.tree.structure(loaded) == jax.tree.structure(classifier)
    for found, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(classifier), strict=True):
        assert found.dtype == expected.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
    save_classifier(loaded, tmp_path / "b")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_configuration_says_what_it_is(saved):
    config = json.loads((saved / CONFIG_FILE).read_text())
    assert config["format"] == "memjax-classifier"
    assert config["network"]["name"] == "MLPClassifier"
    assert config["network"]["num_classes"] == 5
    assert config["event_shape"] == [4, 4, 1]
    assert config["training"] == {"steps": 3}


def setter(*keys, value):
    def change(config):
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return lambda folder: edit(folder, change)


def flip(folder):
    data = bytearray((folder / WEIGHTS_FILE).read_bytes())
    data[-100] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(bytes(data))


DAMAGE = {
    "another format": (setter("format", value="memjax"), "format: expected 'memjax-classifier'"),
    "newer": (setter("version", value=2), "version: expected 1, found 2"),
    "flipped bit": (flip, "damaged or exchanged"),
    "no weights": (lambda folder: (folder / WEIGHTS_FILE).unlink(), WEIGHTS_FILE),
    "another network": (setter("network", "name", value="ResidualMLP"), "network.name"),
    "unknown argument": (setter("network", "depth", value=2), "network: expected arguments of"),
    "more classes": (setter("network", "num_classes", value=6), "out/bias"),
    "no classes": (setter("network", "num_classes", value=0), "network.num_classes: expected"),
    "too many": (setter("network", "num_classes", value=10**9), "network.num_classes: expected"),
    "too deep": (setter("network", "num_blocks", value=65), "at most 64 blocks, found 65"),
    "shape": (setter("event_shape", value=[4, 4, 2]), "in/kernel: expected float32[32, 8]"),
    "no shape": (lambda f: edit(f, lambda c: c.pop("event_shape")), "a field event_shape"),
    "std": (setter("data_std", value=-1), "data_std: expected a positive number, found -1"),
    "descending": (setter("sigmas", value=[4, 3, 2, 1]), "sigmas: expected positive numbers, asc"),
    "tiny": (setter("sigmas", value=[1e-60, 1, 2, 3]), "sigmas: expected a list of"),
    "huge": (setter("temperature", value=[1, 1, 1, 1e300]), "temperature: expected a list of"),
    "negative": (setter("sigmas", value=[-1, 1, 2, 3]), "sigmas: expected a list of"),
    "no number": (setter("temperature", value=["1"] * 4), "temperature: expected a list of"),
    "too few": (setter("temperature", value=[1.0]), "temperature: expected one per noise level"),
    "time": (setter("time_dependent", value=1), "time_dependent: expected true or false, found 1"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_in_one_line(name, folder):
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(CheckpointError) as caught:
        load_classifier(folder)
    text = str(caught.value)
    assert message in text
    assert str(folder) in text
    assert "\n" not in text


def test_a_classifier_is_no_model(saved):
    with pytest.raises(CheckpointError, match="format"):
        load(saved)


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="the folder of a saved classifier, found nothing"):
        load_classifier(tmp_path / "none")
    (tmp_path / "weights.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="pickle"):
        load_classifier(tmp_path / "weights.pt")


def test_only_our_own_networks_are_saved(tmp_path):
    with pytest.raises(InputError, match="MLPClassifier, ResNetClassifier, got ResidualMLP"):
        save_classifier(build(ResidualMLP(width=4, embedding_width=4)), tmp_path / "a")
    other = NoisyClassifier(lambda x, t: x, (2,), num_classes=2, data_std=1.0, sigmas=[1.0])
    with pytest.raises(InputError, match="classifier: expected a LinenNetwork"):
        save_classifier(other, tmp_path / "a")
    assert not (tmp_path / "a").exists()
