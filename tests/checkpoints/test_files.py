"""Saved models: there and back bitwise, and every kind of damage in one line."""

import json
import pickle
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from memjax._core.errors import CheckpointError, InputError
from memjax.checkpoints.files import CONFIG_FILE, WEIGHTS_FILE, load, read_config, save
from memjax.diffusion.adapters import LinenNetwork
from memjax.diffusion.model import Model
from memjax.diffusion.prediction import EDMPreconditioned, from_prediction
from memjax.diffusion.schedule import DiscreteVP, VarianceExploding
from memjax.networks.mlp import ResidualMLP
from memjax.networks.unet import UNet

SHAPE = (4, 4, 1)
NETWORKS = {
    "mlp": ResidualMLP(width=8, num_blocks=2, embedding_width=4),
    "mlp, conditional": ResidualMLP(width=8, num_blocks=1, embedding_width=4, num_conditions=5),
    "unet": UNet(channels=(4, 8), groups=2, embedding_width=4, attention=True),
}


def build(module, *, preconditioned=True):
    x, t = jnp.zeros(SHAPE, jnp.float32), jnp.zeros((), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, t)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype), shapes
    )
    network = LinenNetwork(module, variables)
    if preconditioned:
        schedule = VarianceExploding(0.01, 40.0)
        score = from_prediction(
            EDMPreconditioned(network, 0.7), prediction="denoiser", schedule=schedule
        )
    else:
        schedule = DiscreteVP()
        score = from_prediction(network, prediction="epsilon", schedule=schedule)
    return Model(
        score,
        SHAPE,
        sigma_min=schedule.sigma_min,
        sigma_max=schedule.sigma_max,
        data_std=0.7,
        null_condition=jnp.int32(module.num_conditions) if module.num_conditions else None,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved model; copy it before breaking it."""
    path = tmp_path_factory.mktemp("saved") / "model"
    save(build(NETWORKS["mlp, conditional"]), path, training={"steps": 3, "seed": 1})
    return path


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.mark.parametrize("preconditioned", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_round_trip_is_bitwise(name, preconditioned, tmp_path):
    model = build(NETWORKS[name], preconditioned=preconditioned)
    save(model, tmp_path / "a")
    loaded = load(tmp_path / "a")
    assert jax.tree.structure(loaded) == jax.tree.structure(model)
    for found, expected in zip(jax.tree.leaves(loaded), jax.tree.leaves(model), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)
    x = jnp.ones(SHAPE, jnp.float32)
    f = jax.jit(lambda m, x: m(x, 0.5))
    np.testing.assert_array_equal(f(loaded, x), f(model, x))
    assert f._cache_size() == 1
    save(loaded, tmp_path / "b")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_configuration_says_what_it_is(saved):
    config = read_config(saved)
    assert config["format"] == "memjax"
    assert config["network"] == {
        "name": "ResidualMLP",
        "width": 8,
        "num_blocks": 1,
        "embedding_width": 4,
        "num_conditions": 5,
    }
    assert config["preconditioning"] == {"name": "edm", "data_std": 0.7}
    assert config["event_shape"] == [4, 4, 1]
    assert config["null_condition"] == 5
    assert config["training"] == {"steps": 3, "seed": 1}
    arrays = safetensors.numpy.load_file(saved / WEIGHTS_FILE)
    assert config["weights"]["parameters"] == sum(a.size for a in arrays.values())


def test_saving_again_replaces_the_model_and_keeps_other_files(folder):
    (folder / "notes.txt").write_text("mine")
    model = build(NETWORKS["unet"])
    save(model, folder)
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE, "notes.txt"]
    assert jax.tree.structure(load(folder)) == jax.tree.structure(model)


def test_a_kill_between_the_two_files_is_noticed(folder, tmp_path):
    """New weights under the old configuration are refused, not misread."""
    other = build(NETWORKS["mlp, conditional"])
    weights = lambda m: m.raw_score.network.network.variables  # noqa: E731
    save(
        eqx.tree_at(weights, other, replace_fn=lambda v: jax.tree.map(jnp.sin, v)),
        tmp_path / "other",
    )
    shutil.copy(tmp_path / "other" / WEIGHTS_FILE, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match="damaged or exchanged"):
        load(folder)


def edit(folder, change):
    config = json.loads((folder / CONFIG_FILE).read_text())
    change(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def rewrite(folder, change):
    """Change the arrays, and the configuration's hash with them."""
    arrays = safetensors.numpy.load_file(folder / WEIGHTS_FILE)
    change(arrays)
    data = safetensors.numpy.save(arrays)
    rehash(folder, data)


def rehash(folder, data):
    import hashlib

    (folder / WEIGHTS_FILE).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit(folder, lambda c: c["weights"].update(sha256=digest))


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


def truncate(folder):
    data = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(data[:-7])


BIAS = "out/bias"
DAMAGE = {
    "no configuration": (
        lambda f: (f / CONFIG_FILE).unlink(),
        r"model: expected a file config\.json, found none",
    ),
    "no weights": (
        lambda f: (f / WEIGHTS_FILE).unlink(),
        r"model\.safetensors: expected the weights, found: No such file",
    ),
    "not JSON": (
        lambda f: (f / CONFIG_FILE).write_text('{"format": '),
        r"config\.json: expected JSON, found: Expecting value",
    ),
    "not text": (
        lambda f: (f / CONFIG_FILE).write_bytes(b"\xff\xfe\x00\x80"),
        r"config\.json: expected JSON, found",
    ),
    "deep JSON": (
        lambda f: (f / CONFIG_FILE).write_text("[" * 100_000),
        r"config\.json: expected JSON, found",
    ),
    "huge JSON": (
        lambda f: (f / CONFIG_FILE).write_bytes(b" " * (2**20 + 1)),
        r"config\.json: expected JSON, found: more than 1048576 bytes",
    ),
    "a list": (
        lambda f: (f / CONFIG_FILE).write_text("[]"),
        r"config\.json: expected a JSON object, found list",
    ),
    "foreign format": (setter("format", value="else"), r"format: expected 'memjax', found 'else'"),
    "no format": (lambda f: edit(f, lambda c: c.pop("format")), r"format: expected .* found None"),
    "newer version": (setter("version", value=2), r"version: expected 1, found 2"),
    "unknown network": (
        setter("network", "name", value="Transformer"),
        r"network\.name: expected one of ResidualMLP, UNet, LinenUNet2D, found 'Transformer'",
    ),
    "unhashable network": (setter("network", "name", value=[1]), r"network\.name: expected one of"),
    "network is text": (
        setter("network", value="mlp"),
        r"network: expected an object, found 'mlp'",
    ),
    "unknown argument": (
        setter("network", "depth", value=3),
        r"network: expected arguments of ResidualMLP, found 'depth'",
    ),
    "missing argument": (
        lambda f: edit(f, lambda c: c["network"].pop("width")),
        r"expected a field network\.width, found none",
    ),
    "width of no network": (
        setter("network", "width", value=10**9),
        r"network\.width: expected an integer from 1 to 65536, found 1000000000",
    ),
    "depth of no network": (
        setter("network", "num_blocks", value=60_000),
        r"network\.num_blocks: expected at most 64 blocks, found 60000",
    ),
    "width is true": (setter("network", "width", value=True), r"network\.width: .*found True"),
    "no event shape": (
        lambda f: edit(f, lambda c: c.pop("event_shape")),
        r"expected a field event_shape, found none",
    ),
    "negative event shape": (
        setter("event_shape", value=[4, -4, 1]),
        r"event_shape: expected an integer from 1",
    ),
    "another event shape": (
        setter("event_shape", value=[4, 4, 3]),
        r"model\.safetensors: in/kernel: expected float32\[48, 8\], found float32\[16, 8\]",
    ),
    "unknown schedule": (
        setter("schedule", "schedule", value="sine"),
        r"schedule: expected a known schedule, found .*'sine'",
    ),
    "schedule of a list": (
        setter("schedule", "schedule", value=[]),
        r"schedule: expected a known schedule",
    ),
    "schedule with negative noise": (
        setter("schedule", "sigma_min", value=-1.0),
        r"schedule: expected a known schedule, found sigma_min",
    ),
    "unknown prediction": (
        setter("prediction", value="noise"),
        r"config\.json: prediction: expected one of .* got 'noise'",
    ),
    "unknown preconditioning": (
        setter("preconditioning", "name", value="other"),
        r"preconditioning\.name: expected 'edm', found 'other'",
    ),
    "preconditioning without scale": (
        lambda f: edit(f, lambda c: c["preconditioning"].pop("data_std")),
        r"expected a field preconditioning\.data_std, found none",
    ),
    "data_std of NaN": (
        setter("data_std", value=float("nan")),
        r"data_std: expected a positive number, found nan",
    ),
    "data_std is text": (
        setter("data_std", value="0.7"),
        r"data_std: expected a positive number, found '0\.7'",
    ),
    "sigma_min above sigma_max": (
        setter("sigma_min", value=100.0),
        r"config\.json: sigma_min, sigma_max: expected",
    ),
    "null condition of another network": (
        setter("null_condition", value=4),
        r"null_condition: expected the network's number of conditions, .*found 4",
    ),
    "weights elsewhere": (
        setter("weights", "file", value="../secret"),
        r"weights\.file: expected 'model\.safetensors', found '\.\./secret'",
    ),
    "parameter count": (
        setter("weights", "parameters", value=7),
        r"weights\.parameters: expected \d+, found 7",
    ),
    "no hash": (
        lambda f: edit(f, lambda c: c["weights"].pop("sha256")),
        r"sha256: expected None, found",
    ),
    "a flipped bit": (flip, r"model\.safetensors: sha256: expected [0-9a-f]{64}, found"),
    "truncated": (truncate, r"model\.safetensors: sha256: expected .* damaged or exchanged"),
    "empty weights": (
        lambda f: (f / WEIGHTS_FILE).write_bytes(b""),
        r"sha256: expected .* \(0 bytes\)",
    ),
    "not safetensors": (
        lambda f: rehash(f, b"PK\x03\x04 surely an archive"),
        r"model\.safetensors: expected safetensors, found",
    ),
    "a pickle": (
        lambda f: rehash(f, pickle.dumps({"a": 1})),
        r"model\.safetensors: expected safetensors, found",
    ),
    "missing array": (
        lambda f: rewrite(f, lambda a: a.pop(BIAS)),
        r"model\.safetensors: expected an array 'out/bias', found none",
    ),
    "extra array": (
        lambda f: rewrite(f, lambda a: a.update(extra=np.zeros(2, np.float32))),
        r"model\.safetensors: expected no array 'extra', found one",
    ),
    "wrong shape": (
        lambda f: rewrite(f, lambda a: a.update({BIAS: np.zeros(15, np.float32)})),
        r"out/bias: expected float32\[16\], found float32\[15\]",
    ),
    "wrong dtype": (
        lambda f: rewrite(f, lambda a: a.update({BIAS: np.zeros(16, np.float16)})),
        r"out/bias: expected float32\[16\], found float16\[16\]",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_in_one_line(name, folder):
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert "model" in str(caught.value)
    assert len(str(caught.value)) < 700


def test_mutated_headers_never_crash(folder):
    """Bytes of the safetensors header changed at random, with a hash that fits."""
    rng = np.random.default_rng(0)
    original = (folder / WEIGHTS_FILE).read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    messages = []
    for _ in range(100):
        data = bytearray(original)
        for position in rng.integers(0, header, 3):
            data[position] = rng.integers(0, 256)
        rehash(folder, bytes(data))
        try:
            load(folder)
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > 90
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".pkl", ".PT"])
def test_pickles_are_refused_unread(suffix, tmp_path):
    """By name, as a file or in a folder; the canary inside never runs."""
    canary = tmp_path / "canary"

    class Canary:
        def __reduce__(self):
            return (canary.write_text, ("fired",))

    folder = tmp_path / "model"
    folder.mkdir()
    file = folder / f"model{suffix}"
    file.write_bytes(pickle.dumps(Canary()))
    for path in (file, folder):
        with pytest.raises(CheckpointError, match=r"convert it .*safetensors\.torch\.save_file"):
            load(path)
    assert not canary.exists()


@pytest.mark.parametrize(("make", "found"), [(None, "nothing"), ("file", "a file")])
def test_no_folder(make, found, tmp_path):
    path = tmp_path / "model"
    if make:
        path.write_text("")
    with pytest.raises(
        CheckpointError, match=f"expected the folder of a saved model, found {found}"
    ):
        load(path)


def test_save_into_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(build(NETWORKS["mlp"]), tmp_path / "file")


def test_only_our_own_models_are_saved(tmp_path):
    model = build(NETWORKS["mlp"])
    facts = {"sigma_min": 0.1, "sigma_max": 1.0, "data_std": 1.0}
    schedule = VarianceExploding()
    foreign = from_prediction(lambda x, t, c: x, prediction="denoiser", schedule=schedule)
    cases = {
        "expected the score of a network": Model(lambda x, s, c: -x, SHAPE, **facts),
        "expected a LinenNetwork": Model(foreign, SHAPE, **facts),
        "expected a model of pixels": Model(model.raw_score, SHAPE, decode=jnp.tanh, **facts),
        "expected as null condition": Model(
            model.raw_score, SHAPE, null_condition=jnp.int32(2), **facts
        ),
    }
    for message, model in cases.items():
        with pytest.raises(InputError, match=message):
            save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
