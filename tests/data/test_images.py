"""Reading images: what is exact, what is refused, and in which words."""

import hashlib
import io
import os
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from memjax._core.errors import InputError
from memjax._core.status import Status
from memjax.data.images import from_array, load_images

OK, CORRUPT, MISMATCH = (int(s) for s in (Status.OK, Status.INPUT_CORRUPT, Status.INPUT_MISMATCH))
RNG = np.random.default_rng(0)
COLOR = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
GRAY = COLOR[..., :1]


def unit(pixels, top=255):
    """The exact mapping, rounded once."""
    return (pixels.astype(np.float64) * 2 / top - 1).astype(np.float32)


def save(path, pixels, mode=None, **options):
    """Write an image file; the format follows the extension."""
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, mode).save(path, **options)


def row(images, name):
    return images.ids.index(name)


@pytest.mark.parametrize("extension", ["png", "bmp", "tif", "tiff", "webp", "PNG"])
def test_lossless_formats_are_exact(tmp_path, extension):
    save(tmp_path / f"a.{extension}", COLOR, **({"lossless": True} if extension == "webp" else {}))
    images = load_images(tmp_path)
    assert images.images.dtype == np.float32
    np.testing.assert_allclose(images.images[0], unit(COLOR), rtol=0, atol=6e-8)
    # The same gray level is the same number wherever it comes from.
    np.testing.assert_array_equal(images.images, from_array(COLOR[None]).images)
    assert images.images.min() >= -1
    assert images.images.max() <= 1


def test_equal_pixels_have_equal_hashes_in_every_format(tmp_path):
    # Few colors, so that a palette holds them all.
    pixels = np.repeat(COLOR[:2], 3, axis=0) // 128 * 128
    for extension in ("png", "bmp", "tiff", "gif"):
        save(tmp_path / f"a.{extension}", pixels)
    save(tmp_path / "a.webp", pixels, lossless=True)
    palette = Image.fromarray(pixels).quantize(256)
    np.testing.assert_array_equal(np.asarray(palette.convert("RGB")), pixels)
    palette.save(tmp_path / "palette.png")
    opaque = np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], axis=-1)
    save(tmp_path / "opaque.png", opaque)
    np.save(tmp_path / "array.npy", pixels[None])
    images = load_images(tmp_path)
    assert images.ok.all()
    assert len(images) == 7
    assert set(images.sha256) == set(load_images(tmp_path / "array.npy").sha256)
    assert len(set(images.sha256)) == 1


def test_the_hash_is_what_the_documentation_says():
    images = from_array(COLOR[None])
    data = b"6x5x3\n" + images.images[0].astype("<f4").tobytes()
    assert images.sha256 == (hashlib.sha256(data).hexdigest(),)


def test_shape_is_part_of_the_hash_and_the_sign_of_zero_is_not():
    flat = np.array([-1.0, 0.0, 0.5, 1.0], np.float32)
    square = from_array(flat.reshape(1, 2, 2)).sha256
    assert square != from_array(flat.reshape(1, 1, 4)).sha256
    flat[1] = -0.0
    assert square == from_array(flat.reshape(1, 2, 2)).sha256


def test_sixteen_bit_gray_is_exact_and_agrees_with_eight(tmp_path):
    save(tmp_path / "eight.png", GRAY)
    save(tmp_path / "sixteen.png", GRAY.astype(np.uint16) * 257)
    fine = RNG.integers(0, 65536, (6, 5, 1), dtype=np.uint16)
    save(tmp_path / "fine.png", fine)
    save(tmp_path / "fine.tif", fine)
    images = load_images(tmp_path)
    assert images.ok.all()
    assert images.sha256[0] == images.sha256[3]
    np.testing.assert_allclose(images.images[1], unit(fine, 65535), rtol=0, atol=6e-8)
    np.testing.assert_array_equal(images.images[1], images.images[2])


def test_bilevel_is_black_and_white(tmp_path):
    bits = GRAY > 127
    Image.fromarray(bits[..., 0]).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(load_images(tmp_path).images[0], np.where(bits, 1.0, -1.0))


def test_transparency_is_refused_not_flattened(tmp_path):
    save(tmp_path / "a.png", COLOR)
    see_through = np.concatenate([COLOR, np.full_like(COLOR[..., :1], 254)], axis=-1)
    save(tmp_path / "alpha.png", see_through)
    save(tmp_path / "key.png", COLOR, transparency=tuple(COLOR[0, 0].tolist()))
    palette = Image.fromarray(COLOR).quantize(4)
    palette.save(tmp_path / "palette.png", transparency=0)
    images = load_images(tmp_path)
    assert images.status.tolist() == [OK, MISMATCH, MISMATCH, MISMATCH]
    assert all("transparent" in reason for reason in images.reasons[1:])


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.fromarray(COLOR // 128 * 128), Image.fromarray(255 - COLOR)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(load_images(tmp_path).images[0], unit(COLOR // 128 * 128))


def test_folder_order_ids_and_what_is_passed_over(tmp_path):
    for name in ("b.png", "a.png", "sub/c.JPG", "sub/deep/er/d.png", ".hidden.png", "Z.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        Image.fromarray(COLOR).save(path)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".cache").mkdir()
    save(tmp_path / ".cache" / "e.png", COLOR)
    images = load_images(str(tmp_path))
    assert images.ids == ("Z.png", "a.png", "b.png", "sub/c.JPG", "sub/deep/er/d.png")
    assert images.ok.all()
    assert (images.labels == -1).all()


def test_content_decides_not_the_extension(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(COLOR).save(buffer, "PNG")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    np.save(tmp_path / "array.npy", COLOR[None])
    (tmp_path / "array.npy").rename(tmp_path / "array.bin")
    expected = from_array(COLOR[None]).images
    np.testing.assert_array_equal(load_images(tmp_path).images, expected)
    np.testing.assert_array_equal(load_images(tmp_path / "array.bin").images, expected)


def test_every_bad_row_keeps_its_place_and_says_why(tmp_path):
    save(tmp_path / "0.png", COLOR)
    save(tmp_path / "1.png", COLOR[:4])
    save(tmp_path / "2.png", GRAY)
    (tmp_path / "3.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    (tmp_path / "4.png").write_bytes(b"")
    (tmp_path / "5.png").write_text("not an image")
    Image.fromarray(COLOR).convert("CMYK").save(tmp_path / "6.jpg")
    save(tmp_path / "7.png", COLOR)
    images = load_images(tmp_path)
    bad = [MISMATCH, MISMATCH, CORRUPT, CORRUPT, CORRUPT, MISMATCH]
    assert images.status.tolist() == [OK, *bad, OK]
    assert images.status.dtype == np.int32
    assert images.reasons[1] == "shape [4, 5, 3], expected [6, 5, 3]"
    assert images.reasons[2] == "shape [6, 5, 1], expected [6, 5, 3]"
    assert "truncated" in images.reasons[3]
    assert "not one of PNG, JPEG" in images.reasons[4]
    assert "color mode CMYK" in images.reasons[6]
    for i, ok in enumerate(images.ok):
        assert np.isnan(images.images[i]).all() != ok
        assert (images.sha256[i] == "") != ok
        assert (images.reasons[i] == "") == ok
        assert "\n" not in images.reasons[i]


def test_majority_shape_or_the_one_asked_for(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", COLOR if i else COLOR[:4])
    assert load_images(tmp_path).status.tolist() == [MISMATCH, OK, OK]
    assert load_images(tmp_path, event_shape=(4, 5, 3)).status.tolist() == [OK, MISMATCH, MISMATCH]
    save(tmp_path / "3.png", COLOR[:4])
    # A tie goes to the shape of the earliest row.
    assert load_images(tmp_path).status.tolist() == [OK, MISMATCH, MISMATCH, OK]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX special files")
def test_special_files_and_links(tmp_path):
    folder, outside = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    outside.mkdir()
    save(folder / "a.png", COLOR)
    save(outside / "secret.png", COLOR)
    os.mkfifo(folder / "fifo.png")
    (folder / "folder.png").mkdir()
    save(folder / "folder.png" / "b.png", COLOR)
    (folder / "inside.png").symlink_to("a.png")
    (folder / "outside.png").symlink_to("../out/secret.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "nowhere.png").symlink_to("gone.png")
    (folder / "linked").symlink_to(outside)
    (folder / "again").symlink_to(".")
    images = load_images(folder)
    outcome = dict(zip(images.ids, images.status.tolist(), strict=True))
    assert outcome == {
        "a.png": OK,
        "circle.png": CORRUPT,
        "device.png": CORRUPT,
        "fifo.png": CORRUPT,
        "folder.png/b.png": OK,
        "inside.png": OK,
        "nowhere.png": CORRUPT,
        "outside.png": CORRUPT,
    }
    assert images.reasons[row(images, "fifo.png")] == "not a regular file"
    assert images.reasons[row(images, "outside.png")] == "a link out of the folder"
    # What the user names may itself be a link.
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert load_images(link).ids == images.ids


@pytest.mark.skipif(os.name != "posix", reason="names are Unicode elsewhere")
def test_a_name_that_is_not_unicode_becomes_an_id_that_is(tmp_path):
    save(tmp_path / "a.png", COLOR)
    with open(os.fsencode(tmp_path) + b"/\xff\n.png", "wb") as file:
        file.write((tmp_path / "a.png").read_bytes())
    images = load_images(tmp_path)
    assert images.ok.all()
    assert images.ids[1].encode() == b"\\xff\n.png"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(tmp_path):
    save(tmp_path / "a.png", COLOR)
    save(tmp_path / "b.png", COLOR)
    (tmp_path / "b.png").chmod(0)
    assert load_images(tmp_path).status.tolist() == [OK, CORRUPT]


@pytest.mark.parametrize("container", ["npy", "npz", "compressed"])
@pytest.mark.parametrize(
    ("stored", "channels"),
    [
        (COLOR[None], 3),
        (COLOR[None, ..., 0], 1),
        (np.asfortranarray(COLOR[None]), 3),
        (COLOR[None].astype(">u2") * 257, 3),
        (unit(COLOR[None]), 3),
        (unit(COLOR[None]).astype(">f8"), 3),
    ],
)
def test_arrays_are_exact(tmp_path, container, stored, channels):
    path = tmp_path / ("a.npy" if container == "npy" else "a.npz")
    if container == "npy":
        np.save(path, stored)
    else:
        (np.savez if container == "npz" else np.savez_compressed)(path, anything=stored)
    images = load_images(path)
    np.testing.assert_array_equal(images.images, from_array(COLOR[None, ..., :channels]).images)
    assert images.ids == ("row-0000",)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_range_of_floats_has_to_be_clear(dtype):
    pixels = np.linspace(0, 1, 24).reshape(2, 3, 4).astype(dtype)
    message = r"images: expected values in \[-1, 1\], found none below 0; give value_range=\(0, 1\)"
    with pytest.raises(InputError, match=message):
        from_array(pixels)
    np.testing.assert_allclose(
        from_array(pixels, value_range=(0, 1)).images[..., 0], 2 * pixels - 1, atol=1e-3
    )
    single = from_array(pixels, value_range=(-1, 1)).images[..., 0]
    np.testing.assert_array_equal(single, pixels.astype(np.float32))
    shifted = from_array(pixels - dtype(0.5)).images[..., 0]
    np.testing.assert_array_equal(shifted, (pixels - dtype(0.5)).astype(np.float32))


def test_rows_outside_the_range_and_rows_that_are_not_finite():
    pixels = np.zeros((5, 2, 2), np.float32)
    pixels[0] = -1
    pixels[1, 0, 0] = np.nan
    pixels[2, 1, 1] = -np.inf
    pixels[3, 0, 1] = 1.01
    pixels[4, 0, 1] = 1 + 2**-23
    images = from_array(pixels)
    assert images.status.tolist() == [OK, CORRUPT, CORRUPT, MISMATCH, OK]
    assert images.reasons[1:4] == (
        "pixels are not finite",
        "pixels are not finite",
        "pixel values leave the range [-1, 1]",
    )
    assert np.isnan(images.images[1:4]).all()


def test_ids_and_labels():
    pixels = np.zeros((2, 2, 2), np.uint8)
    images = from_array(pixels, ids=["x", "y"], labels=np.array([3, 1]))
    assert images.ids == ("x", "y")
    assert images.labels.tolist() == [3, 1]
    for ids in (["x"], ["x", "x"]):
        with pytest.raises(InputError, match="ids: expected 2 distinct names, found 1"):
            from_array(pixels, ids=ids)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (
            np.zeros((2, 2), np.uint8),
            r"images: expected shape \[n, height, width\] or .* found \[2, 2\]",
        ),
        (np.zeros((0, 2, 2), np.uint8), r"without empty axes, found \[0, 2, 2\]"),
        (np.zeros((1, 2, 0, 3)), r"without empty axes, found \[1, 2, 0, 3\]"),
        (np.zeros((1, 2, 2), np.int64), "images: expected uint8, uint16 or floats, found int64"),
        (np.zeros((1, 2, 2), np.uint32), "images: expected uint8, uint16 or floats, found uint32"),
        (np.full((2, 2, 2), np.nan), "found none"),
        (np.full((2, 2, 2), -9.0), r"found none among 2 \(first: row-0000: pixel values leave"),
    ],
)
def test_unusable_arrays(pixels, message):
    with pytest.raises(InputError, match=message):
        from_array(pixels)


@pytest.mark.parametrize("value_range", [(1, 0), (0, 0), (float("nan"), 1)])
def test_unusable_range(value_range):
    with pytest.raises(InputError, match=r"value_range: expected \(low, high\)"):
        from_array(np.zeros((1, 2, 2)), value_range=value_range)


def header(shape="(1, 2, 2)", dtype="'|u1'"):
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def archive(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)
    return buffer.getvalue()


GOOD = header() + b"abcd"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a folder of images, a .npy or a .npz file, found neither"),
        (b"text", "found neither"),
        (
            header(dtype="'|O'") + b"cos\nsystem\n(S'true'\ntR.",
            "array of numbers, found dtype object",
        ),
        (header(dtype="[('a', '|u1')]") + b"abcd", "expected an array of numbers"),
        (header(dtype="'<U1'") + b"abcd" * 4, "expected an array of numbers, found dtype <U1"),
        (header() + b"abc", r"expected 4 bytes of pixels for shape \(1, 2, 2\), found 3"),
        (header("(9999999999999, 9999999, 9)"), "expected .* bytes of pixels"),
        (header("(-1, -2, 2)") + b"abcd", r"without empty axes, found shape \(-1, -2, 2\)"),
        (header("(0, 2, 2)"), "without empty axes"),
        (header("()") + b"a", "expected shape"),
        (header("('a',)"), "expected an intact .npy or .npz file"),
        (b"\x93NUMPY\x07\x00" + GOOD[8:], "expected a .npy array"),
        (b"\x93NUMPY\x01", "expected a .npy array"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f", "header of at most 10000 bytes, found 2147483647"),
        (archive(a=GOOD, b=GOOD), "expected one array, or one of several named 'images'"),
        (archive(), "found neither"),
        (archive(a=GOOD[:-1]), "expected 4 bytes of pixels"),
        (archive(a=GOOD)[:-30], "expected an intact .npy or .npz file"),
        (archive(a=b"text"), "expected a .npy array"),
    ],
)
def test_damaged_array_files(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_images(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_the_array_named_images_is_taken(tmp_path):
    path = tmp_path / "a.npz"
    for name in ("images", "arr_0"):
        path.write_bytes(archive(labels=header() + b"zzzz", **{name: GOOD}))
        assert (
            load_images(path).images.ravel().tolist()
            == unit(np.frombuffer(b"abcd", np.uint8)).tolist()
        )


def test_unusual_compression_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as file:
        file.writestr("images.npy", GOOD)
    with pytest.raises(InputError, match="stored or deflated"):
        load_images(path)


def test_faults_of_the_whole_argument(tmp_path):
    with pytest.raises(InputError, match=r"gone: expected a folder .* found nothing"):
        load_images(tmp_path / "gone")
    with pytest.raises(InputError, match=r"expected images \(.bmp, .* found none in the folder"):
        load_images(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"found none among 1 \(first: a.png: not one of PNG"):
        load_images(tmp_path)
    np.save(tmp_path / "a.npy", COLOR[None])
    with pytest.raises(InputError, match=r"expected .* \(8, 8, 1\) .* found \(6, 5, 3\)"):
        load_images(tmp_path / "a.npy", event_shape=(8, 8, 1))
    with pytest.raises(InputError, match="found none among 1"):
        load_images(tmp_path, event_shape=(8, 8, 1))
