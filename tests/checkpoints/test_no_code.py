"""Loading a checkpoint runs no code: what the package calls, what hostile files achieve.

Every hostile file carries a canary, code that leaves a file behind where it is run. None does, and
each file gives one typed line within a second of processor time.
"""

import ast
import io
import json
import os
import pickle
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from memjax._core.errors import MemjaxError
from memjax.checkpoints._safetensors import parse_weights, read_weights
from memjax.checkpoints.inspect import inspect_model
from memjax.checkpoints.loading import load
from memjax.data.images import load_images

PACKAGE = Path(__file__).parents[2] / "memjax"
SECONDS = 1.0  # of processor time, so that a busy machine does not fail the test
STEM = "diffusion_pytorch_model"

# What the package calls

READERS = {
    *("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"),
    *("code", "codeop", "runpy", "subprocess", "ctypes", "imp", "yaml", "orbax", "h5py"),
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    ("torch", "load"),
    ("torch", "hub"),
    ("torch", "jit"),
    ("os", "system"),
    ("os", "popen"),
    ("numpy", "loads"),
    ("importlib", "util"),
    ("sys", "path"),
}


def dangers(source):
    """Every place of a module that could run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [a.name for a in names if a.name.split(".")[0] in READERS]
            case ast.ImportFrom(module=str(module), names=names):
                found += [module] if module.split(".")[0] in READERS else []
                found += [f"{module}.{a.name}" for a in names if (module, a.name) in ATTRIBUTES]
            case ast.Name(id=name) if name in BUILTINS:
                found.append(name)
            case ast.Attribute(value=ast.Name(id=module), attr=name) if (
                {"np": "numpy"}.get(module, module),
                name,
            ) in ATTRIBUTES:
                found.append(f"{module}.{name}")
            case ast.keyword(arg="allow_pickle", value=value) if not (
                isinstance(value, ast.Constant) and value.value is False
            ):
                found.append("allow_pickle")
            case ast.keyword(arg="weights_only" | "trust_remote_code"):
                found.append(str(node.arg))
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[argument, *_]):
                # The one importer of the package is handed names that stand in the source.
                found += [] if isinstance(argument, ast.Name | ast.Constant) else ["import_module"]
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.glob("**/*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_the_source_reads_no_code(path):
    assert dangers(path.read_text()) == []


def test_optional_packages_are_named_in_the_source():
    """``require`` alone imports by name, and where files are read each name is a constant."""
    given = []
    for path in PACKAGE.glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=ast.Attribute(attr="import_module"), args=[argument]):
                    assert path.name == "errors.py"
                case ast.Call(func=ast.Name(id="require"), args=[argument, _]) if (
                    path.parent.name in ("checkpoints", "data", "networks")
                ):
                    given.append(type(argument))
    assert set(given) == {ast.Constant}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "import torch\nx = torch.load(f)",
        "from torch import load",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "eval(text)",
        "f = exec",
        "__import__(name)",
        "importlib.import_module(config['library'])",
        "os.system(text)",
        "torch.load(f, weights_only=True)",
        "import yaml",
        "torch.hub.load(x)",
    ],
)
def test_the_scan_sees(source):
    assert dangers(source)


def test_the_scan_lets_pass():
    assert not dangers("re.compile(x)\nnp.load(f, allow_pickle=False)\nmodel.eval()\njnp.load")


# What hostile files achieve


class Canary:
    """Something whose unpickling leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def code(canary):
    """A line of Python that leaves the same file behind."""
    return f"__import__('pathlib').Path({str(canary)!r}).write_text('fired')"


def archive(canary):
    """What torch.save writes: an archive with a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Canary(canary), 2))
        file.writestr("archive/version", "3\n")
    return buffer.getvalue()


def objects(canary):
    """An array of objects, which NumPy stores as a pickle."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([Canary(canary)], object), allow_pickle=True)
    return buffer.getvalue()


def archived_objects(canary):
    buffer = io.BytesIO()
    np.savez(buffer, images=np.array([Canary(canary)], object), allow_pickle=True)
    return buffer.getvalue()


def module(canary):
    return f"{code(canary)}\nclass Evil:\n    pass\n".encode()


PAYLOADS = {
    **{f"pickle {k}": lambda c, k=k: pickle.dumps(Canary(c), k) for k in range(6)},
    "archive": archive,
    "objects": objects,
    "archived objects": archived_objects,
    "module": module,
}
NETWORK = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "block_out_channels": [4],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"],
    "norm_num_groups": 2,
}
SCHEDULER = {"_class_name": "DDPMScheduler"}
INDEX = {
    "_class_name": "DDPMPipeline",
    "unet": ["diffusers", "UNet2DModel"],
    "scheduler": ["diffusers", "DDPMScheduler"],
}


def single(root, *, config=NETWORK, scheduler=SCHEDULER, weights=None):
    """The folder of one network; the last argument is what stands for its weights."""
    root.mkdir()
    (root / "config.json").write_text(json.dumps(config))
    (root / "scheduler_config.json").write_text(json.dumps(scheduler))
    arrays = safetensors.numpy.save({"conv_in.weight": np.zeros((4, 3, 3, 3), np.float32)})
    (root / f"{STEM}.safetensors").write_bytes(arrays if weights is None else weights)
    return root


def pipeline(root, *, index=INDEX):
    root.mkdir()
    single(root / "unet")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    (root / "model_index.json").write_text(json.dumps(index))
    return root


SUFFIXES = (
    *("bin", "ckpt", "dill", "h5", "joblib", "json", "msgpack", "npy", "npz", "onnx", "pickle"),
    *("pkl", "pt", "pt2", "pth", "PT", "safetensors", "sav", "tar", "zip"),
)


def hostile_files():
    """Cases by name: (root, canary) -> what to load."""
    cases = {}

    def lone(suffix):
        def make(root, canary):
            root.mkdir()
            file = root / f"model.{suffix}"
            file.write_bytes(pickle.dumps(Canary(canary)))
            return file

        return make

    def only_weights(name, payload):
        def make(root, canary):
            single(root)
            (root / f"{STEM}.safetensors").unlink()
            (root / name).write_bytes(PAYLOADS[payload](canary))
            return root

        return make

    def in_place_of(name, payload):
        def make(root, canary):
            (pipeline if name == "model_index.json" else single)(root)
            (root / name).write_bytes(PAYLOADS[payload](canary))
            return root

        return make

    def edited(part, **given):
        """Options of the network's "config" or of its "scheduler", some made from the canary."""
        base = {"config": NETWORK, "scheduler": SCHEDULER}[part]

        def make(root, canary):
            values = {
                name: value(canary) if callable(value) else value for name, value in given.items()
            }
            single(root, **{part: base | values})
            (root / "evil.py").write_bytes(module(canary))
            return root

        return make

    def indexed(**options):
        def make(root, canary):
            pipeline(root, index=INDEX | options)
            for folder in (root, root / "unet"):
                (folder / "evil.py").write_bytes(module(canary))
            return root

        return make

    def sharded(place):
        def make(root, canary):
            single(root)
            (root / f"{STEM}.safetensors").unlink()
            (root.parent / "evil.bin").write_bytes(pickle.dumps(Canary(canary)))
            index = {"weight_map": {"conv_in.weight": place}}
            (root / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
            return root

        return make

    def linked(name):
        def make(root, canary):
            single(root)
            (root.parent / "evil.bin").write_bytes(pickle.dumps(Canary(canary)))
            (root / name).unlink()
            (root / name).symlink_to("../evil.bin")
            return root

        return make

    def piped(name):
        def make(root, canary):
            single(root)
            (root / name).unlink()
            os.mkfifo(root / name)
            return root

        return make

    def data(suffix, payload):
        def make(root, canary):
            root.mkdir()
            file = root / f"images.{suffix}"
            file.write_bytes(PAYLOADS[payload](canary))
            return file

        return make

    for suffix in SUFFIXES:
        cases[f"a pickle called .{suffix}"] = load, lone(suffix)
    for name in ("pytorch_model.bin", f"{STEM}.bin", f"{STEM}.fp16.bin", "unet.ckpt", "w.pth"):
        cases[f"only {name}"] = load, only_weights(name, "archive")
    for payload in PAYLOADS:
        cases[f"{payload} as weights"] = load, in_place_of(f"{STEM}.safetensors", payload)
    for name in ("config.json", "scheduler_config.json", "model_index.json"):
        for payload in ("pickle 0", "pickle 5", "archive"):
            cases[f"{payload} as {name}"] = load, in_place_of(name, payload)
    options = {
        "auto_map": {"AutoModel": "evil.Evil"},
        "_class_name": "evil.Evil",
        "act_fn": code,
        "sample_size": code,
        "norm_eps": lambda c: f"!!python/object/apply:os.system ['touch {c}']",
        "block_out_channels": lambda c: [code(c)],
        "down_block_types": ["evil.Evil"],
        "custom_code": code,
    }
    for name, value in options.items():
        cases[f"{name} of a network"] = load, edited("config", **{name: value})
    cases["a class in two words"] = load, edited("config", _class_name=["evil", "Evil"])
    cases["an object to build"] = load, edited("config", _class_name=None, _target_="evil.Evil")
    for name, value in {
        "_class_name": "evil.Evil",
        "beta_schedule": code,
        "beta_end": code,
        "trained_betas": code,
        "prediction_type": code,
    }.items():
        cases[f"{name} of a scheduler"] = load, edited("scheduler", **{name: value})
    for name, value in {
        "_class_name": ["evil", "Evil"],
        "unet": ["evil", "Evil"],
        "../../evil": ["diffusers", "UNet2DModel"],
    }.items():
        cases[f"{name} of a pipeline"] = load, indexed(**{"unet": None, name: value})
    for place in ("../evil.bin", "/etc/passwd", "..\\evil.safetensors", "evil.bin", "a/../../evil"):
        cases[f"a shard at {place}"] = load, sharded(place)
    for name in ("config.json", "scheduler_config.json", f"{STEM}.safetensors"):
        cases[f"{name} is a link out"] = load, linked(name)
        if hasattr(os, "mkfifo"):
            cases[f"{name} is a pipe"] = load, piped(name)
    for suffix, payload in [
        ("npy", "objects"),
        ("npz", "archived objects"),
        ("npz", "archive"),
        ("npy", "pickle 5"),
    ]:
        cases[f"{payload} as images.{suffix}"] = load_images, data(suffix, payload)
    return cases


CASES = hostile_files()


def test_there_are_enough_cases():
    assert len(CASES) >= 60


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_canary_sings_when_code_is_run(payload, tmp_path):
    """Read in the unsafe ways that others use, each payload does leave its file behind."""
    canary, data = tmp_path / "canary", PAYLOADS[payload](tmp_path / "canary")
    match payload:
        case "archive":
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                pickle.loads(file.read("archive/data.pkl")).close()
        case "objects":
            np.load(io.BytesIO(data), allow_pickle=True)[0].close()
        case "archived objects":
            np.load(io.BytesIO(data), allow_pickle=True)["images"][0].close()
        case "module":
            exec(data)
        case _:
            pickle.loads(data).close()
    assert canary.exists()


def attempt(read, *arguments, **options):
    """(what is read, None), or (None, the line that says why not)."""
    try:
        return read(*arguments, **options), None
    except MemjaxError as error:
        return None, str(error)


@pytest.mark.parametrize("name", CASES)
def test_hostile_files_run_nothing(name, tmp_path, monkeypatch):
    read, make = CASES[name]
    canary = tmp_path / "canary"
    path = make(tmp_path / "model", canary)
    # Where a file beside the weights could be imported by accident.
    monkeypatch.chdir(path if path.is_dir() else path.parent)
    monkeypatch.syspath_prepend(".")
    start = time.process_time()
    with pytest.raises(MemjaxError) as caught:
        read(path)
    assert time.process_time() - start < SECONDS
    message = str(caught.value)
    assert "\n" not in message
    assert str(tmp_path) in message or "images" in message
    assert len(message) < 1000
    if read is load:
        found, error = attempt(inspect_model, path)
        assert "\n" not in (error or found.problem)
    assert not canary.exists()


# Mutated headers


def corpus():
    rng = np.random.default_rng(0)
    arrays = {
        "conv.weight": rng.normal(size=(2, 3, 3, 3)).astype(np.float32),
        "half": rng.normal(size=(4, 5)).astype(np.float16),
        "position_ids": np.arange(7, dtype=np.int32)[None],
        "mask": np.array([True, False, True]),
        "bytes": np.arange(9, dtype=np.uint8),
        "scale": np.array(2.0, np.float32),
    }
    return [
        safetensors.numpy.save(arrays, metadata={"format": "pt", "note": "x" * 40}),
        safetensors.numpy.save({"a": np.ones(2, np.float32)}),
    ]


NUMBERS = [-1, 0, 1, 2, 7, 8, 2**31, 2**32, 2**53, 2**63, 2**64, 10**30, 1.5, None, "8", [], True]
TYPES = ["F32", "F16", "BF16", "I32", "I64", "U8", "BOOL", "F64", "F8_E4M3", "C64", "", "f32", 3]


def mutate(rng, data):
    """One to three injuries of the bytes or of the meaning of a header."""
    out = bytearray(data)
    size = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.5:
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, min(8 + size, len(out))))
            match int(rng.integers(0, 5)):
                case 0:
                    out[at] ^= 1 << int(rng.integers(0, 8))
                case 1:
                    out[at] = int(rng.integers(0, 256))
                case 2:
                    del out[at : at + int(rng.integers(1, 20))]
                case 3:
                    out[at:at] = bytes(rng.integers(32, 127, int(rng.integers(1, 20))).tolist())
                case _:
                    out[at] = int(rng.choice(list(b'0123456789[]{}",:')))
        return bytes(out)
    header = json.loads(data[8 : 8 + size])
    for _ in range(rng.integers(1, 4)):
        name = str(rng.choice([n for n in header if n != "__metadata__"]))
        record = header[name]
        match int(rng.integers(0, 7)):
            case 0:
                record["shape"] = [
                    NUMBERS[i] for i in rng.integers(0, len(NUMBERS), rng.integers(0, 4))
                ]
            case 1:
                record["data_offsets"][int(rng.integers(0, 2))] = NUMBERS[
                    int(rng.integers(0, len(NUMBERS)))
                ]
            case 2:
                record["dtype"] = TYPES[int(rng.integers(0, len(TYPES)))]
            case 3:
                header[name] = header[str(rng.choice(list(header)))]
                break
            case 4:
                record.pop(str(rng.choice(list(record))))
                break
            case 5 if len(header) > 1:
                del header[name]
                break
            case _:
                header[name + "\u202e\n"[: int(rng.integers(0, 3))]] = header.pop(name)
    text = json.dumps(header).encode()
    text += b" " * int(rng.integers(0, 9))
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


@pytest.mark.parametrize("count", [2_000, pytest.param(50_000, marks=pytest.mark.nightly)])
def test_mutated_headers(count, tmp_path):
    """Refused in one line, or read as the reference implementation reads it, bit by bit."""
    rng = np.random.default_rng(3)
    files, file = corpus(), tmp_path / f"{STEM}.safetensors"
    outcomes = {"read": 0, "refused": 0}
    for i in range(count):
        data = mutate(rng, files[i % len(files)])
        start = time.process_time()
        found, message = attempt(parse_weights, data, file)
        file.write_bytes(data)
        weights, again = attempt(read_weights, tmp_path, dtype=None)
        assert time.process_time() - start < SECONDS, data
        outcomes["refused" if found is None else "read"] += 1
        if found is None:
            assert message == again
            assert message.startswith(f"{file}: ")
            assert message.isprintable()
            continue
        if weights is None:
            assert "expected numbers of 32 bits" in again
        else:
            assert weights.arrays.keys() == found.keys()
        reference = dict(safetensors.deserialize(data))
        assert found.keys() == reference.keys()
        for name, array in found.items():
            assert array.tobytes() == bytes(reference[name]["data"])
            assert list(array.shape) == reference[name]["shape"]
    # The corpus is neither all dead on arrival nor harmless.
    assert all(hits > count / 50 for hits in outcomes.values()), outcomes
