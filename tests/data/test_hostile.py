"""Hostile files: no crash, no hang, no exhaustion, and no harm to the rows beside them."""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.data.images import load_images

SECONDS = 2.0  # of processor time, so that a busy machine does not fail the test
MEGABYTES = 512
ALL = (1_000, pytest.param(20_000, marks=pytest.mark.nightly))
ALLOWED = {Status.OK, Status.INPUT_CORRUPT, Status.INPUT_MISMATCH}


def encoded(kind, pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def seeds():
    """Small valid files of every kind and of many dialects."""
    rng = np.random.default_rng(0)
    color = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    gray = color[..., 0]
    alpha = np.concatenate([color, color[..., :1]], axis=-1)
    indexed = io.BytesIO()
    Image.fromarray(color).quantize(16).save(indexed, "PNG")
    animation = io.BytesIO()
    frames = [Image.fromarray(color), Image.fromarray(255 - color)]
    frames[0].save(animation, "GIF", save_all=True, append_images=frames[1:])
    npz, packed, npy = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(npz, images=color[None])
    np.savez_compressed(packed, images=color[None], other=gray)
    np.save(npy, (color[None] / 127.5 - 1).astype(np.float32))
    return {
        "png": [
            encoded("PNG", color),
            encoded("PNG", gray.astype(np.uint16) * 257),
            encoded("PNG", alpha),
            indexed.getvalue(),
        ],
        "jpg": [encoded("JPEG", color), encoded("JPEG", gray, progressive=True)],
        "webp": [encoded("WEBP", color), encoded("WEBP", alpha, lossless=True)],
        "gif": [animation.getvalue()],
        "bmp": [encoded("BMP", color)],
        "tif": [
            encoded("TIFF", color, compression=c) for c in ("raw", "tiff_lzw", "jpeg", "packbits")
        ],
        "npz": [npz.getvalue(), packed.getvalue()],
        "npy": [npy.getvalue()],
    }


def fix_checksums(data):
    """Make a mutated PNG pass its chunk checksums, so that the damage reaches the decoder."""
    out, at = bytearray(data[:8]), 8
    while at + 12 <= len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        if at + 12 + size > len(data):
            break
        body = data[at + 4 : at + 8 + size]
        out += data[at : at + 4] + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + size
    return bytes(out) + data[at:]


def mutate(rng, data, others):
    """One to three random injuries: bits, bytes, words, lengths, order."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        at = int(rng.integers(0, max(1, len(out))))
        # Headers decide sizes: hit them as often as all the rest.
        if rng.random() < 0.5:
            at = int(rng.integers(0, max(1, min(len(out), 64))))
        match int(rng.integers(0, 7)):
            case 0 if out:
                out[at] ^= 1 << int(rng.integers(0, 8))
            case 1 if out:
                out[at] = int(rng.integers(0, 256))
            case 2:
                extreme = [b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"]
                out[at : at + 4] = extreme[int(rng.integers(0, 4))]
            case 3:
                del out[at:]
            case 4:
                del out[at : at + int(rng.integers(1, 40))]
            case 5:
                out[at:at] = rng.integers(
                    0, 256, int(rng.integers(1, 40)), dtype=np.uint8
                ).tobytes()
            case _:
                other = others[int(rng.integers(0, len(others)))]
                out[at : at + 60] = other[at : at + 60]
    return bytes(out)


@pytest.mark.parametrize("count", ALL)
def test_mutated_files(tmp_path, count):
    rng = np.random.default_rng(1)
    corpus = seeds()
    kinds = list(corpus)
    everything = [data for files in corpus.values() for data in files]
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "0-good.png").write_bytes(corpus["png"][0])
    good = load_images(folder)
    outcomes: dict = {"array": 0, "refused": 0} | dict.fromkeys(ALLOWED, 0)
    for i in range(count):
        kind = kinds[i % len(kinds)]
        data = mutate(rng, corpus[kind][int(rng.integers(0, len(corpus[kind])))], everything)
        if kind == "png" and rng.random() < 0.7:
            data = fix_checksums(data)
        start = time.process_time()
        if kind in ("npy", "npz"):
            path = tmp_path / f"case.{kind}"
            path.write_bytes(data)
            try:
                assert set(load_images(path).status.tolist()) <= ALLOWED
                outcomes["array"] += 1
            except InputError as error:
                message = str(error)
                outcomes["refused"] += 1
                assert message.startswith(f"{path}: ")
                assert "\n" not in message
        else:
            path = folder / f"case.{kind}"
            path.write_bytes(data)
            images = load_images(folder, event_shape=good.event_shape)
            assert images.ids == ("0-good.png", f"case.{kind}")
            np.testing.assert_array_equal(images.images[0], good.images[0])
            assert images.sha256[0] == good.sha256[0]
            status = int(images.status[1])
            assert status in ALLOWED
            assert (images.reasons[1] == "") == (status == Status.OK)
            assert "\n" not in images.reasons[1]
            outcomes[Status(status)] += 1
            path.unlink()
        assert time.process_time() - start < SECONDS, data
    # The corpus is neither all dead on arrival nor harmless.
    assert all(hits > count / 100 for hits in outcomes.values()), outcomes


def chunk(tag, body):
    return struct.pack(">I", len(body)) + tag + body + struct.pack(">I", zlib.crc32(tag + body))


def png(width, height, *, rows=None, extra=b""):
    """A black RGB image that declares one size and holds pixels for ``rows`` rows."""
    packer = zlib.compressobj(9)
    line = bytes(3 * width + 1) if rows != 0 else b""
    data = b"".join(packer.compress(line) for _ in range(height if rows is None else rows))
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + extra
        + chunk(b"IDAT", data + packer.flush())
        + chunk(b"IEND", b"")
    )


def tiff_of_one_huge_tile(compression):
    strip = zlib.compress(bytes(2**20))
    tags = [
        (256, 16),
        (257, 16),
        (258, 8),
        (259, compression),
        (262, 1),
        (277, 1),
        (322, 2**15),
        (323, 2**15),
        (324, 200),
        (325, len(strip)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(200, b"\0") + strip


def progressive_jpeg(scans):
    """A progressive JPEG whose last scan is repeated: a pass over the image for some 30 bytes."""
    data = encoded("JPEG", np.full((2896, 2896, 3), 99, np.uint8), progressive=True, quality=95)
    last = data.rfind(b"\xff\xda")
    return data[:-2] + data[last:-2] * scans + b"\xff\xd9"


def npz_bomb(path, *, shape, megabytes):
    text = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        text, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as member:
            member.write(text.getvalue())
            for _ in range(megabytes):
                member.write(bytes(2**20))


# What each bomb must come to: a status, or None for an `InputError` on the whole file.
BOMBS = {
    "largest.png": Status.OK,
    "largest.webp": Status.OK,
    "noise.jpg": Status.OK,
    "pixels.png": Status.INPUT_CORRUPT,
    "claim.png": Status.INPUT_CORRUPT,
    "pixels.webp": Status.INPUT_CORRUPT,
    "text.png": Status.INPUT_CORRUPT,
    "profile.png": Status.INPUT_CORRUPT,
    "chunks.png": Status.INPUT_CORRUPT,
    "scans.jpg": Status.INPUT_CORRUPT,
    "tile-lzw.tif": Status.INPUT_CORRUPT,
    "tile-deflate.tif": Status.INPUT_CORRUPT,
    "fat.png": Status.INPUT_CORRUPT,
    "bomb.npz": None,
    "claim.npz": None,
    "small.npz": Status.OK,
    "header.npy": None,
    "nested.npy": None,
}

PROBE = """
import json, pathlib, resource, sys, time
import PIL.Image
from memjax._core.errors import InputError
from memjax.data.images import load_images

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024

PIL.Image.init()
resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
for path in map(pathlib.Path, sys.argv[1:]):
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before, start = peak(), time.process_time()
    try:
        images = load_images(path)
        status = int(images.status[-1])
        del images
    except InputError as error:
        status = 6 if "found none among 1" in str(error) else None
    print(json.dumps([path.name, status, time.process_time() - start, peak() - before]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads memory from Linux")
def test_bombs_cost_little(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (2896, 2896, 3), dtype=np.uint8)
    black = np.zeros((2896, 2896, 3), np.uint8)
    zeros = zlib.compress(bytes(2**27), 9)
    content = {
        "largest.png": png(2896, 2896),
        "largest.webp": encoded("WEBP", black, lossless=True, method=0),
        "noise.jpg": encoded("JPEG", noise, quality=95, progressive=True),
        "pixels.png": png(20_000, 20_000, rows=5_000),
        "claim.png": png(2**31 - 1, 2**31 - 1, rows=0),
        # RIFF, VP8X with a canvas of 16,384 x 16,384, then nothing of substance.
        "pixels.webp": b"RIFF\x32\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\x3f\0\xff\x3f\0" + bytes(28),
        "text.png": png(8, 8, extra=chunk(b"zTXt", b"a\0\0" + zeros)),
        "profile.png": png(8, 8, extra=chunk(b"iCCP", b"a\0\0" + zeros)),
        "chunks.png": png(8, 8, extra=chunk(b"tEXt", b"a\0b") * 1_000_000),
        "scans.jpg": progressive_jpeg(3000),
        "tile-lzw.tif": tiff_of_one_huge_tile(5),
        "tile-deflate.tif": tiff_of_one_huge_tile(8),
        "fat.png": png(8, 8) + bytes(2**26),
        "header.npy": b"\x93NUMPY\x02\0" + struct.pack("<I", 2**25) + b" " * 2**25,
        "nested.npy": b"\x93NUMPY\x01\0" + struct.pack("<H", 9000) + b"(" * 9000,
    }
    paths = []
    for name in BOMBS:
        suffix = Path(name).suffix
        folder = tmp_path / name if suffix not in (".npy", ".npz") else tmp_path
        folder.mkdir(exist_ok=True)
        if name in content:
            (folder / name).write_bytes(content[name])
        paths.append(folder if suffix not in (".npy", ".npz") else folder / name)
    npz_bomb(tmp_path / "bomb.npz", shape=(1024, 1024, 1024), megabytes=1024)
    npz_bomb(tmp_path / "claim.npz", shape=(2**40, 1024, 1024), megabytes=1)
    npz_bomb(tmp_path / "small.npz", shape=(32, 1024, 1024), megabytes=32)

    result = subprocess.run(
        [sys.executable, "-c", PROBE, *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    shutil.rmtree(tmp_path)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert {name: status for name, status, _, _ in found} == BOMBS
    for name, _, seconds, megabytes in found:
        assert seconds < SECONDS, name
        assert megabytes < MEGABYTES, name
