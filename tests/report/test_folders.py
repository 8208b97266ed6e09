"""A folder that is not a finished audit gets one line that names the fault, and keeps its files."""

import contextlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from memjax._core.errors import InputError
from memjax.report import build_report


@pytest.fixture
def folder(write, tmp_path):
    return write(tmp_path / "audit", rows=20)


def refused(folder, *parts):
    before = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
    with pytest.raises(InputError) as caught:
        build_report(folder)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    for part in parts:
        assert part in message
    after = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else None
    assert after == before


def test_no_folder(tmp_path):
    refused(tmp_path / "nowhere", "audit_dir", "nowhere")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "audit_dir", "file")


@pytest.mark.parametrize("name", ["manifest.json", "metrics.json", "table.parquet", "gallery.npz"])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "garbage", "folder"])
def test_missing_or_damaged_file(folder, name, damage):
    path = folder / name
    content = path.read_bytes()
    path.unlink()
    match damage:
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(content[: len(content) // 2])
        case "garbage":
            path.write_bytes(b"\xff\x00 garbage" * 100)
        case "folder":
            path.mkdir()
    refused(folder, name)


@pytest.mark.parametrize("seed", range(12))
def test_flipped_bytes_never_surprise(folder, seed):
    rng = np.random.default_rng(seed)
    name = ("table.parquet", "gallery.npz")[seed % 2]
    content = bytearray((folder / name).read_bytes())
    for place in rng.integers(0, len(content), 40):
        content[place] = rng.integers(0, 256)
    (folder / name).write_bytes(bytes(content))
    with contextlib.suppress(InputError):  # or damage that no format can notice
        build_report(folder)


def change(folder, name, **entries):
    values = json.loads((folder / name).read_text())
    values.update(entries)
    (folder / name).write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("name", "entries", "parts"),
    [
        ("manifest.json", {"detectors": "flipd"}, ("detectors", "a list", "text")),
        ("manifest.json", {"detectors": []}, ("primary", "flipd")),
        ("manifest.json", {"detectors": ["flipd"]}, ("detectors[0]", "an object", "text")),
        ("manifest.json", {"primary": None}, ("primary", "None")),
        ("manifest.json", {"primary": "x\ny" * 1000}, ("primary",)),
        ("manifest.json", {"calibrations": [{"meaning": "guilt"}]}, ("meaning", "guilt")),
        ("manifest.json", {"model": 3}, ("model", "an object", "a number")),
        ("manifest.json", {"samples": {"count": "many"}}, ("samples", "count")),
        ("metrics.json", {"contrasts": [[]]}, ("contrasts[0]", "a list")),
        ("metrics.json", {"contrasts": [{"auroc": 1}]}, ("auroc", "an object")),
        ("metrics.json", {"stored": True}, ("stored",)),
        ("metrics.json", {"truth": 1}, ("truth", "text")),
    ],
)
def test_wrong_entry_is_named(folder, name, entries, parts):
    change(folder, name, **entries)
    refused(folder, name, *parts)


def test_calibration_without_columns(folder):
    change(folder, "manifest.json", calibrations=[{"meaning": "membership"}])
    refused(folder, "table.parquet", "role_membership")


def test_json_that_is_not_an_object(folder):
    (folder / "metrics.json").write_text("[]")
    refused(folder, "metrics.json", "an object", "a list")
    (folder / "metrics.json").write_text("[" * 100_000)
    refused(folder, "metrics.json")


@pytest.mark.parametrize(
    "name", ["row", "status", "rank", "flipd", "flipd_status", "role_duplication",
             "p_duplication_flipd", "flag_duplication_flipd"],
)  # fmt: skip
def test_missing_column_is_named(folder, name):
    table = pq.read_table(folder / "table.parquet")
    pq.write_table(table.drop_columns([name]), folder / "table.parquet")
    refused(folder, "table.parquet", name)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("flipd", ["a"] * 20),
        ("rank", [b"x"] * 20),
        ("status", list(range(20))),
        ("stored", ["maybe"] * 20),
        ("row", [None] * 20),
    ],
)
def test_column_of_another_type(folder, name, values):
    table = pq.read_table(folder / "table.parquet")
    index = table.column_names.index(name)
    pq.write_table(table.set_column(index, name, pa.array(values)), folder / "table.parquet")
    if name == "status":
        build_report(folder)  # numbers are shown as the labels they are not
    else:
        refused(folder, "table.parquet")


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": np.arange(3)},
        {"rows": np.array([[0]])},
        {"rows": np.array([0.0])},
        {"images": np.zeros((1, 8, 8), np.float32)},
        {"images": np.zeros((1, 8, 8, 1), np.uint8)},
        {"images": np.zeros((1, 0, 8, 1), np.float32)},
        {"nearest_samples": np.zeros((1, 4, 4, 1), np.float32)},
        {"nearest_distance": np.zeros(2)},
        {"rows": np.array([12345])},
        {"images": np.array([None])},
    ],
)
def test_gallery_of_another_shape(folder, changes):
    arrays = {
        "rows": np.array([0]),
        "images": np.zeros((1, 8, 8, 1), np.float32),
        "nearest_samples": np.zeros((1, 8, 8, 1), np.float32),
        "nearest_distance": np.zeros(1),
    }
    np.savez(folder / "gallery.npz", **{**arrays, **changes})
    refused(folder)


def test_figures_that_lead_elsewhere(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "figures").symlink_to(tmp_path / "elsewhere")
    refused(folder, "figures", "link")
    (folder / "figures").unlink()
    (folder / "figures").write_text("")
    refused(folder, "figures")
