"""Published weights: equal to what the reference reader finds, or one line that says why not."""

import hashlib
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from memjax._core.errors import CheckpointError, InputError
from memjax.checkpoints._safetensors import (
    parse_weights,
    read_json,
    read_weights,
    refuse_pickle,
    weight_shapes,
)

STEM = "diffusion_pytorch_model"
HWIO = (2, 3, 1, 0)


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {
        "conv.weight": rng.normal(size=(5, 3, 3, 2)).astype(dtype),
        "conv.bias": rng.normal(size=5).astype(dtype),
        "linear.weight": rng.normal(size=(4, 7)).astype(dtype),
        "scale": np.array(0.25, dtype),
        "position_ids": np.arange(77)[None],
    }


def permuted(array):
    return array.transpose(HWIO) if array.ndim == 4 else array


def write(folder, tensors, name=f"{STEM}.safetensors"):
    folder.mkdir(exist_ok=True)
    data = safetensors.numpy.save(tensors)
    (folder / name).write_bytes(data)
    return data


def write_shards(folder, tensors, *, num=2, infix="", variant=""):
    folder.mkdir(exist_ok=True)
    names, places = list(tensors), {}
    for k in range(num):
        part = {name: tensors[name] for name in names[k::num]}
        file = f"{STEM}{infix}-{k + 1:05d}-of-{num:05d}.safetensors"
        write(folder, part, file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{STEM}.safetensors.index{variant}.json").write_text(json.dumps(index))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, jnp.bfloat16])
@pytest.mark.parametrize("keep", [True, False])
def test_equal_to_the_reference_reader(dtype, keep, tmp_path):
    data = write(tmp_path, arrays(dtype))
    expected = safetensors.flax.load_file(tmp_path / f"{STEM}.safetensors")
    weights = read_weights(tmp_path, dtype=None if keep else jnp.float32)
    assert weights.arrays.keys() == expected.keys()
    for name, found in weights.arrays.items():
        wanted = permuted(expected[name])
        if not keep and name != "position_ids":
            wanted = wanted.astype(jnp.float32)
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)
    assert weights.sha256 == hashlib.sha256(data).hexdigest()
    assert weights.files == (tmp_path / f"{STEM}.safetensors",)


def test_every_stored_type(tmp_path, x64):
    rng = np.random.default_rng(1)
    kinds = [np.float16, np.float32, np.float64, np.int8, np.int16, np.int32, np.int64]
    kinds += [np.uint8, np.uint16, np.uint32, np.uint64, jnp.bfloat16, np.bool_]
    tensors = {str(np.dtype(k)): rng.integers(0, 2, (3, 2)).astype(k) for k in kinds}
    data = write(tmp_path, tensors)
    found = read_weights(tmp_path, dtype=None).arrays
    shapes = weight_shapes(tmp_path)
    stored = parse_weights(data, tmp_path)
    for name, wanted in tensors.items():
        for array in (found[name], stored[name], shapes[name]):
            assert array.dtype == wanted.dtype
            assert array.shape == wanted.shape
        np.testing.assert_array_equal(found[name], wanted)
        np.testing.assert_array_equal(stored[name], wanted)


def test_sixteen_bits_become_float32_exactly(tmp_path):
    """All finite float16 and bfloat16 numbers, against the definition of the formats."""
    bits = np.arange(2**16, dtype=np.uint16)
    tensors = {"half": bits.view(np.float16), "brain": bits.view(jnp.bfloat16)}
    write(tmp_path, tensors)
    found = read_weights(tmp_path).arrays
    for name, mantissa, bias in [("half", 10, 15), ("brain", 7, 127)]:
        sign = np.where(bits >> 15, -1.0, 1.0)
        exponent = (bits.astype(np.int64) & 0x7FFF) >> mantissa
        fraction = (bits & (2**mantissa - 1)) / 2.0**mantissa
        normal = exponent > 0
        value = sign * (normal + fraction) * 2.0 ** (np.where(normal, exponent, 1) - bias)
        finite = exponent < 2 * bias + 1
        np.testing.assert_array_equal(np.asarray(found[name])[finite], value[finite])
        assert not np.any(np.isfinite(found[name])[~finite])


def test_shapes_without_the_numbers(tmp_path):
    write(tmp_path, arrays(np.float16))
    shapes, weights = weight_shapes(tmp_path), read_weights(tmp_path, dtype=None).arrays
    assert {name: s.shape for name, s in shapes.items()} == {n: a.shape for n, a in weights.items()}
    assert shapes["conv.weight"] == jax.ShapeDtypeStruct((3, 2, 3, 5), np.float16)
    # A header that claims a petabyte of numbers costs nothing, and is refused.
    file = tmp_path / f"{STEM}.safetensors"
    entry = {"dtype": "F32", "shape": [2**48], "data_offsets": [0, 2**50]}
    file.write_bytes(safetensors_file({"a": entry}, b""))
    for read in (weight_shapes, read_weights):
        with pytest.raises(CheckpointError, match=f"expected {2**50} bytes of arrays, found 0"):
            read(tmp_path)


@pytest.mark.parametrize(("infix", "variant"), [("", ""), (".fp16", ".fp16")])
def test_shards(infix, variant, tmp_path):
    tensors = arrays()
    write_shards(tmp_path, tensors, num=3, infix=infix, variant=variant)
    weights = read_weights(tmp_path, variant=variant[1:] or None)
    assert weights.arrays.keys() == tensors.keys() == weight_shapes(tmp_path).keys()
    for name, array in weights.arrays.items():
        np.testing.assert_array_equal(array, permuted(tensors[name]))
    lines = [
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in weights.files
    ]
    assert weights.sha256 == hashlib.sha256("".join(lines).encode()).hexdigest()
    assert len(lines) == 3


def test_variants(tmp_path):
    single, half = {"a": np.ones(2, np.float32)}, {"a": np.zeros(2, np.float16)}
    write(tmp_path, half, f"{STEM}.fp16.safetensors")
    # The only one there is needs no name; with a plain one beside it, it does.
    assert read_weights(tmp_path).arrays["a"][0] == 0
    write(tmp_path, single)
    write(tmp_path, single, f"{STEM}.non_ema.safetensors")
    assert read_weights(tmp_path).arrays["a"][0] == 1
    assert read_weights(tmp_path, variant="fp16").arrays["a"][0] == 0
    assert weight_shapes(tmp_path, variant="fp16")["a"].dtype == np.float16
    with pytest.raises(
        CheckpointError, match=r"expected a file .*\.bf16\.safetensors or .*neither"
    ):
        read_weights(tmp_path, variant="bf16")
    (tmp_path / f"{STEM}.safetensors").unlink()
    with pytest.raises(CheckpointError, match="or one variant of it, found fp16, non_ema"):
        read_weights(tmp_path)
    for name in ("../x", "", "a/b"):
        with pytest.raises(InputError, match="variant: expected a name"):
            read_weights(tmp_path, variant=name)


def test_other_stems(tmp_path):
    write(tmp_path, {"a": np.ones(2, np.float32)}, "model.safetensors")
    assert read_weights(tmp_path, "model").arrays["a"].shape == (2,)
    with pytest.raises(CheckpointError, match=f"expected a file {STEM}.safetensors"):
        read_weights(tmp_path)


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**40])
def test_integers_are_never_wrapped(value, tmp_path):
    write(tmp_path, {"a": np.array([0, value])})
    if jax.config.jax_enable_x64:
        assert read_weights(tmp_path).arrays["a"][1] == value
        return
    with pytest.raises(CheckpointError, match="expected numbers of 32 bits in 'a', found larger"):
        read_weights(tmp_path)


def test_only_floating_types_can_be_asked_for(tmp_path):
    write(tmp_path, arrays())
    with pytest.raises(InputError, match="dtype: expected a floating-point type"):
        read_weights(tmp_path, dtype=jnp.int32)


def test_a_large_model_is_not_held_twice(tmp_path):
    """Peak of memory under NumPy's and Python's eyes: the largest array, stored and converted."""
    import tracemalloc

    tensors = {f"a{i}": np.zeros(2**18, np.float16) for i in range(16)}
    write(tmp_path, tensors)
    read_weights(tmp_path)  # what is imported and compiled on first use
    tracemalloc.start()
    weights = read_weights(tmp_path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(weights.arrays) == 16
    assert peak - kept < 4 * 2**20 * 1.5
    assert peak < 16 * 2**20 * 1.2


# Links: what the Hugging Face cache is made of, and nothing else.


def test_the_hugging_face_cache_is_followed(tmp_path):
    cache = tmp_path / "models--someone--something"
    unet = cache / "snapshots" / "0123abcd" / "unet"
    unet.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "ffff").write_bytes(safetensors.numpy.save(arrays()))
    (unet / f"{STEM}.safetensors").symlink_to("../../../blobs/ffff")
    assert len(read_weights(unet).arrays) == 5


@pytest.mark.parametrize("where", ["outside", "above", "absolute", "circle", "nowhere", "folder"])
def test_links_out_are_not_followed(where, tmp_path):
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(safetensors.numpy.save(arrays()))
    file = folder / f"{STEM}.safetensors"
    target = {
        "outside": "../outside.safetensors",
        "above": "..",
        "absolute": str(outside),
        "circle": file.name,
        "nowhere": "missing.safetensors",
        "folder": "inner",
    }[where]
    file.symlink_to(target)
    for read in (read_weights, weight_shapes):
        with pytest.raises(CheckpointError, match=f"{file.name}: expected the weights, found"):
            read(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / f"{STEM}.safetensors")
    with pytest.raises(CheckpointError, match="found: not a regular file"):
        read_weights(tmp_path)


# Damage


def safetensors_file(header, data, *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **extra):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **extra}


GOOD = {"a": entry(), "b": entry("U8", (3, 2), (8, 14))}
DATA = bytes(14)
BAD_FILES = {
    "nothing": (b"", "expected safetensors, found 0 bytes"),
    "half a length": (b"\0\0\0", "expected safetensors, found 3 bytes"),
    "length zero": (bytes(16), "a header of 0 bytes"),
    "length beyond the file": (safetensors_file(GOOD, DATA, length=10**6), "a header of 1000000"),
    "largest length": (b"\xff" * 16, f"a header of {2**64 - 1} bytes in a file of 16"),
    "huge header": (safetensors_file(b" " * (2**22 + 1), b""), f"a header of {2**22 + 1} bytes"),
    "not JSON": (safetensors_file(b"{]", b""), "found no header: Expecting property name"),
    "not text": (safetensors_file(b"{\xff}", b""), "found no header: 'utf-8' codec"),
    "deep JSON": (safetensors_file(b"[" * 50_000 + b"]" * 50_000, b""), "found no header: "),
    "deeper than sense": (
        safetensors_file(b'{"a":' + b"[" * 40 + b"]" * 40 + b"}", b""),
        "nested more than 32 deep",
    ),
    "a number of a million digits": (safetensors_file(b"1" * 10**6, b""), "found no header: "),
    "a list": (safetensors_file([], b""), "found a header of list"),
    "a name twice": (
        safetensors_file(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
        "a name given twice",
    ),
    "an entry of text": (safetensors_file({"a": "F32"}, b""), "a: expected an object of"),
    "a field more": (safetensors_file({"a": entry(x=1)}, bytes(8)), "a: expected an object of"),
    "a field less": (safetensors_file({"a": {"dtype": "F32"}}, b""), "a: expected an object of"),
    "unknown type": (safetensors_file({"a": entry("F8_E5M2")}, bytes(8)), "a type among F64, .*F8"),
    "a list as type": (safetensors_file({"a": entry([])}, bytes(8)), "a type among"),
    "negative size": (safetensors_file({"a": entry(shape=(-2,))}, bytes(8)), "positive sizes"),
    "size zero": (
        safetensors_file({"a": entry(shape=(0,), offsets=(0, 0))}, b""),
        "positive sizes",
    ),
    "size of a half": (safetensors_file({"a": entry(shape=(2.0,))}, bytes(8)), "positive sizes"),
    "size true": (safetensors_file({"a": entry(shape=(True, 2))}, bytes(8)), "positive sizes"),
    "shape of text": (
        safetensors_file({"a": entry() | {"shape": "2"}}, bytes(8)),
        "a shape of at most 8 positive sizes, found '2'",
    ),
    "nine axes": (safetensors_file({"a": entry(shape=(1,) * 9)}, bytes(8)), "at most 8"),
    "sizes that overflow": (
        safetensors_file({"a": entry(shape=(2**32, 2**32), offsets=(0, 0))}, b""),
        r"expected the bytes of F32\[4294967296, 4294967296\], found bytes \[0, 0\]",
    ),
    "offsets too short": (safetensors_file({"a": entry(offsets=(0, 4))}, bytes(4)), "the bytes of"),
    "offsets reversed": (safetensors_file({"a": entry(offsets=(8, 0))}, bytes(8)), "the bytes of"),
    "offsets negative": (safetensors_file({"a": entry(offsets=(-8, 0))}, b""), "begins and ends"),
    "three offsets": (safetensors_file({"a": entry(offsets=(0, 4, 8))}, b""), "begins and ends"),
    "overlap": (
        safetensors_file({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        "expected arrays one after the other, found 'b' at byte 4, not at 8",
    ),
    "the same bytes twice": (
        safetensors_file({"a": entry(), "b": entry()}, bytes(8)),
        "expected arrays one after the other",
    ),
    "a hole": (
        safetensors_file({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
        "expected arrays one after the other, found 'b' at byte 12, not at 8",
    ),
    "a hole in front": (
        safetensors_file({"a": entry(offsets=(4, 12))}, bytes(12)),
        "'a' at byte 4",
    ),
    "truncated": (safetensors_file(GOOD, DATA[:-1]), "expected 14 bytes of arrays, found 13"),
    "too long": (safetensors_file(GOOD, DATA + b"x"), "expected 14 bytes of arrays, found 15"),
    "no name": (safetensors_file({"": entry()}, bytes(8)), "printable names of arrays, found ''"),
    "a line break": (safetensors_file({"a\nb": entry()}, bytes(8)), r"found 'a\\nb'"),
    "a lone surrogate": (
        safetensors_file(b'{"\\ud800":%b}' % json.dumps(entry()).encode(), bytes(8)),
        "printable names",
    ),
    "a long name": (safetensors_file({"a" * 10**5: entry()}, bytes(8)), "printable names"),
    "a truth of seven": (
        safetensors_file({"a": entry("BOOL", (1,), (0, 1))}, b"\7"),
        "expected zeros and ones in 'a', found 7",
    ),
    "an archive of pickles": (b"PK\x03\x04" + bytes(60), r"convert it .*safetensors\.torch"),
    "a pickle": (b"\x80\x04\x95\x10\0\0\0\0\0\0\0}.", r"convert it .*safetensors\.torch"),
}


def test_what_damage_is_measured_against_is_sound(tmp_path):
    (tmp_path / f"{STEM}.safetensors").write_bytes(safetensors_file(GOOD, DATA))
    assert read_weights(tmp_path).arrays.keys() == GOOD.keys()
    padded = json.dumps(GOOD | {"__metadata__": {"format": "pt"}}).encode() + b"     "
    (tmp_path / f"{STEM}.safetensors").write_bytes(safetensors_file(padded, DATA))
    assert read_weights(tmp_path).arrays.keys() == GOOD.keys()


@pytest.mark.parametrize("name", BAD_FILES)
def test_damage_is_named_in_one_line(name, tmp_path):
    data, message = BAD_FILES[name]
    (tmp_path / f"{STEM}.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weights(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / STEM}.safetensors: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


def edit_index(change):
    def damage(folder):
        file = folder / f"{STEM}.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index)
        file.write_text(json.dumps(index))

    return damage


def place(where):
    return edit_index(lambda index: index["weight_map"].update(scale=where))


FIRST = f"{STEM}-00001-of-00002.safetensors"
BAD_SHARDS = {
    "a shard is missing": (
        lambda f: (f / FIRST).unlink(),
        f"{FIRST}: expected the weights, found: No",
    ),
    "an array is missing": (
        edit_index(lambda index: index["weight_map"].update(more=FIRST)),
        f"{FIRST}: expected an array 'more', as the index says, found none",
    ),
    "an array is in another shard": (
        place(f"{STEM}-00001-of-00002.safetensors"),
        "expected an array 'scale', as the index says, found none",
    ),
    "an array too many": (
        edit_index(lambda index: index["weight_map"].pop("scale")),
        "expected the arrays that the index lists, found 'scale' too",
    ),
    "a way up": (place("../x.safetensors"), "expected names of safetensors files in this folder"),
    "an absolute path": (place("/etc/passwd"), "found '/etc/passwd'"),
    "a folder below": (place("a/x.safetensors"), "in this folder, found 'a/x.safetensors'"),
    "a backslash": (place("..\\x.safetensors"), "in this folder"),
    "a hidden file": (place(".x.safetensors"), "in this folder"),
    "a pickle": (place("pytorch_model.bin"), "in this folder, found 'pytorch_model.bin'"),
    "a zero byte": (place("a\0.safetensors"), "in this folder"),
    "no name": (place(""), "in this folder, found ''"),
    "a number": (place(3), "in this folder, found 3"),
    "no map": (
        edit_index(lambda index: index.pop("weight_map")),
        "an object weight_map, found None",
    ),
    "an empty map": (edit_index(lambda index: index["weight_map"].clear()), "weight_map, found {}"),
    "a list": (edit_index(lambda index: index.update(weight_map=[1])), r"weight_map, found \[1\]"),
    "one file too": (
        lambda f: write(f, arrays()),
        "found both: remove the one that is out of date",
    ),
}


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_damaged_shards_are_named_in_one_line(name, tmp_path):
    damage, message = BAD_SHARDS[name]
    write_shards(tmp_path, arrays())
    damage(tmp_path)
    for read in (read_weights, weight_shapes):
        with pytest.raises(CheckpointError, match=message) as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)


# Configurations


def test_json(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('\ufeff{"a": [1, -Infinity, {"b": null}], "c": "]]]["}')
    assert read_json(file) == {"a": [1, -math.inf, {"b": None}], "c": "]]]["}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected JSON, found: Expecting value"),
        ("[]", "expected a JSON object, found list"),
        ('{"a": 1, "a": 2}', "expected JSON, found: a name given twice"),
        ('{"a": ' + "[" * 33 + "]" * 33 + "}", "found: nested more than 32 deep"),
        ("{" + " " * 2**20 + "}", "more than 1048576 bytes"),
    ],
)
def test_bad_json(text, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_json(file)


def test_missing_json(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: expected JSON, found: No such file"):
        read_json(tmp_path / "config.json")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="expected JSON, found: not a regular file"):
        read_json(tmp_path / "folder")


def test_pickles_are_refused_by_name(tmp_path):
    (tmp_path / "README.md").write_text("")
    refuse_pickle(tmp_path)
    refuse_pickle(tmp_path / "README.md")
    refuse_pickle(tmp_path / "nothing")
    (tmp_path / f"{STEM}.bin").write_text("")
    with pytest.raises(CheckpointError, match=f"{STEM}.bin: expected safetensors, found .bin"):
        refuse_pickle(tmp_path)
    with pytest.raises(CheckpointError, match="convert it"):
        read_weights(tmp_path)
    with pytest.raises(CheckpointError, match=r"found \.CKPT, which may be a pickle"):
        read_weights(tmp_path / "sd.CKPT")
    with pytest.raises(CheckpointError, match="expected the folder of a model, found nothing"):
        read_weights(tmp_path / "elsewhere")
