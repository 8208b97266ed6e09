"""What the page says, and what it is made of."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import html5lib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import memjax
from memjax._core.status import Status
from memjax.report import build_report
from memjax.report._folder import read_audit
from memjax.report._page import STATUS_WORDS

VARIANTS = {
    "complete": {"rows": 120, "calibration": ("duplication", "membership")},
    "no truth": {"rows": 120, "truth": None, "calibration": ("membership",)},
    "split only": {"rows": 120, "truth": "split"},
    "no calibration": {"rows": 120, "calibration": ()},
    "no samples": {"rows": 120, "samples": 0},
    "ranking only": {"rows": 50, "truth": None, "calibration": (), "samples": 0, "failed": 0},
    "failed rows": {"rows": 120, "failed": 110},
    "incomplete": {"rows": 50, "state": "incomplete"},
    "one detector": {"rows": 50, "detectors": 1},
    "many detectors": {"rows": 50, "detectors": 12},
    "ten rows": {"rows": 10, "failed": 1},
    "one row": {"rows": 1, "failed": 0},
    "RGB 64": {"rows": 50, "size": 64, "channels": 3},
    "RGB 256": {"rows": 50, "size": 256, "channels": 3, "gallery": 4},
    "two channels": {"rows": 50, "channels": 2},
}


def parse(page: bytes):
    """The DOM; any parse error of the HTML standard is an exception."""
    parser = html5lib.HTMLParser(strict=True, namespaceHTMLElements=False)
    return parser.parse(page.decode("utf-8"))


def words(page: bytes) -> str:
    body = parse(page).find("body")
    return " ".join(" ".join(body.itertext()).split())


@pytest.mark.parametrize("name", VARIANTS)
def test_builds(write, tmp_path, name):
    options = VARIANTS[name]
    folder = write(tmp_path / "audit", **{"gallery": 14, **options})
    before = {path.name for path in folder.iterdir()}
    report = build_report(folder)
    assert report == folder / "report.html"
    assert {path.name for path in folder.iterdir()} == before | {"report.html", "figures"}
    figures = {path.name for path in (folder / "figures").iterdir()}
    expected = {"ranking.png", "distribution.png", "gallery.png"}
    truth = options.get("truth", "multiplicity")
    assert figures == expected | ({"metrics.png"} if truth else set())

    page = report.read_bytes()
    assert len(page) < 10_000_000
    document = parse(page)
    # One page, nothing outside it: sources are data, links are its own sections.
    ids = {node.get("id") for node in document.iter() if node.get("id")}
    for node in document.iter():
        assert node.tag not in {"script", "link", "iframe", "object", "embed", "form", "base"}
        assert not [name for name in node.attrib if name.startswith("on") or name == "style"]
        if node.get("src"):
            assert node.get("src").startswith("data:image/png;base64,")
            Image.open(io.BytesIO(base64.b64decode(node.get("src").split(",")[1]))).verify()
        if node.get("href"):
            assert node.get("href")[0] == "#"
            assert node.get("href")[1:] in ids
        if node.tag == "img":
            assert node.get("alt")
        if node.tag == "table":
            assert node.find("caption") is not None
            assert [cell for cell in node.iter("th") if cell.get("scope")]
    assert b"url(" not in page
    assert b"@import" not in page


def test_content_security_policy_names_the_style_by_its_hash(write, tmp_path):
    page = build_report(write(tmp_path, rows=20)).read_text(encoding="utf-8")
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    rules = [rule.split() for rule in policy.split(";")]
    assert rules == [
        ["default-src", "'none'"],
        ["img-src", "data:"],
        ["style-src", f"'sha256-{digest}'"],
        ["base-uri", "'none'"],
        ["form-action", "'none'"],
    ]
    # The policy stands before anything that it must govern.
    assert page.index("Content-Security-Policy") < page.index("<style>")


def test_same_files_give_the_same_bytes_in_any_process(write, tmp_path):
    folder = write(tmp_path / "one", rows=100, gallery=4)
    copy = tmp_path / "two"
    shutil.copytree(folder, copy)
    build_report(folder)
    first = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    build_report(folder)  # again, over what is there
    # A reader's own matplotlib settings, another hash seed, another working directory.
    (tmp_path / "matplotlibrc").write_text("font.size: 30\naxes.facecolor: red\n")
    code = """if True:
        import sys
        from memjax.report import build_report
        build_report(sys.argv[1])
        assert "matplotlib.pyplot" not in sys.modules
    """
    subprocess.run(
        [sys.executable, "-c", code, str(copy)],
        check=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(memjax.__file__).parents[1]),
            "PYTHONHASHSEED": "7",
            "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
            "TZ": "Asia/Tokyo",
            "LC_ALL": "C",
        },
    )
    for root in (folder, copy):
        again = {path.name: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        assert again == first


def test_drawing_leaves_matplotlib_settings_alone(write, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"font.size": 17.0}):
        build_report(write(tmp_path, rows=20))
        assert matplotlib.rcParams["font.size"] == 17.0


def test_words_are_exact(write, tmp_path):
    folder = write(tmp_path, rows=600, gallery=4, calibration=("duplication", "membership"))
    metrics = json.loads((folder / "metrics.json").read_text())
    text = words(build_report(folder).read_bytes())
    table = pq.read_table(folder / "table.parquet")
    stored = metrics["stored"]["rows"]
    assert f"{stored} stored" in text
    assert "At least one of 4,096 generated samples reproduces each of them" in text
    assert "copy rule d1/d2 < 1/3" in text
    for meaning, evidence in [
        ("duplication", "the row occurs more than once in the training set"),
        ("membership", "the model was trained on the row"),
    ]:
        flags = table[f"flag_{meaning}_flipd"].to_pylist()
        flagged, tested = flags.count(True), len(flags) - flags.count(None)
        assert f"{flagged} flagged: {meaning} Of {tested} rows tested by FLIPD" in text
        assert f"A flag is evidence that {evidence}." in text
    assert "AUROC against known truth" in text
    assert "not resolvable" in text
    assert "This audit is incomplete" not in text


def test_nothing_is_claimed_without_its_grounds(write, tmp_path):
    text = words(
        build_report(
            write(tmp_path, rows=60, truth=None, calibration=(), samples=0, failed=0)
        ).read_bytes()
    )
    assert "No calibration images were given" in text
    assert "no row is flagged" in text
    assert "this report calls no row stored" in text
    assert "The truth about these images is not known" in text
    assert "None: every row was scored." in text
    for claim in ("flagged:", "is evidence", "conformal", "AUROC against"):
        assert claim not in text
    assert text.count("Not claimed here") == 2


def test_nothing_stored_is_not_called_safe(write, tmp_path):
    folder = write(tmp_path, rows=60, gallery=4)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["stored"] = {"rows": 0, "by_multiplicity": None}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    text = words(build_report(folder).read_bytes())
    assert "None of 4,096 generated samples reproduces a row" in text
    assert "This does not show that nothing is memorized." in text


def test_incomplete_and_failed_rows_are_said(write, tmp_path):
    folder = write(tmp_path, rows=150, failed=120, state="incomplete", gallery=4)
    text = words(build_report(folder).read_bytes())
    assert "This audit is incomplete." in text
    assert "30 ranked, 120 failed" in text
    assert "Rows without a score: 120." in text
    assert "The first 100 are listed" in text
    assert "the file could not be read as an image" in text


def test_every_failure_has_words():
    silent = {Status.OK}
    assert set(STATUS_WORDS) == set(Status) - silent


def test_a_row_that_fails_says_why(write, tmp_path):
    folder = write(tmp_path, rows=20, failed=2)
    table = pq.read_table(folder / "table.parquet")
    reasons = [f"<b>reason</b> {i}" if s != "ok" else None for i, s in
               enumerate(table["status"].to_pylist())]  # fmt: skip
    pq.write_table(table.append_column("reason", pa.array(reasons)), folder / "table.parquet")
    page = build_report(folder).read_bytes()
    assert words(page).count("<b>reason</b>") == 2


def test_all_rows_failed(write, tmp_path):
    folder = write(tmp_path, rows=20, failed=0, truth=None, calibration=(), samples=0)
    table = pq.read_table(folder / "table.parquet")
    changed = {
        name: pa.nulls(20, table[name].type) if name.startswith(("flipd", "rank")) else table[name]
        for name in table.column_names
    }
    changed["status"] = pa.array(["nonfinite"] * 20)
    changed["flipd_status"] = changed["status"]
    pq.write_table(pa.table(changed), folder / "table.parquet")
    empty = np.zeros((0, 8, 8, 1), np.float32)
    np.savez(
        folder / "gallery.npz",
        rows=np.zeros(0, np.int64),
        images=empty,
        nearest_samples=empty,
        nearest_distance=np.zeros(0),
    )
    (folder / "figures").mkdir()
    (folder / "figures" / "ranking.png").write_bytes(b"of an earlier state")
    (folder / "figures" / "mine.png").write_bytes(b"not ours")
    text = words(build_report(folder).read_bytes())
    assert "No row was ranked" in text
    assert "Rows without a score: 20." in text
    assert [path.name for path in (folder / "figures").iterdir()] == ["mine.png"]


def test_a_detector_that_fails_on_scored_rows_is_counted(write, tmp_path):
    folder = write(tmp_path, rows=30, failed=2)
    table = pq.read_table(folder / "table.parquet")
    labels = ["nonfinite" if i < 5 else s for i, s in enumerate(table["status"].to_pylist())]
    index = table.column_names.index("score_norm_status")
    table = table.set_column(index, "score_norm_status", pa.array(labels))
    fine = sum(s == "ok" for s in table["status"].to_pylist()[:5])
    pq.write_table(table, folder / "table.parquet")
    assert f"Score norm nonfinite a NaN or an infinity appeared in the input or inside the model {fine}" in words(build_report(folder).read_bytes())  # fmt: skip # noqa: E501


def test_calibration_images_from_elsewhere_are_not_audited(write, tmp_path):
    folder = write(tmp_path, rows=100, failed=3, external=40, gallery=4)
    text = words(build_report(folder).read_bytes())
    assert "57 ranked, 3 failed" in text
    assert "Rows without a score: 3." in text
    assert "First 57 ranks" in text
    audit = read_audit(folder)
    (calibration,) = audit.calibrations
    assert calibration.calibrates.sum() == 40
    assert np.isfinite(audit.scores[calibration.calibrates]).all()
    assert not audit.ranked[calibration.calibrates].any()


def test_rows_where_no_copy_was_sought_are_neither_stored_nor_not(write, tmp_path):
    folder = write(tmp_path, rows=100, gallery=4)
    table = pq.read_table(folder / "table.parquet")
    index = table.column_names.index("stored")
    none = pa.array([None] * 99 + [False], pa.bool_())
    pq.write_table(table.set_column(index, "stored", none), folder / "table.parquet")
    text = words(build_report(folder).read_bytes())
    assert "not reproduced" not in text


def test_flags_that_could_not_be(write, tmp_path):
    folder = write(tmp_path, rows=60, gallery=4)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["flags"][0]["resolvable"] = False
    (folder / "metrics.json").write_text(json.dumps(metrics))
    text = words(build_report(folder).read_bytes())
    assert "too few calibration images for any flag at this rate" in text


def test_gallery_shows_the_pixels(write, tmp_path):
    folder = write(tmp_path, rows=60, gallery=15)
    page = build_report(folder).read_bytes()
    with np.load(folder / "gallery.npz") as gallery:
        images, nearest = gallery["images"], gallery["nearest_samples"]
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(node.get("src").split(",")[1]))))
        for node in parse(page).iter("img")
        if node.get("class")
    ]
    assert len(shown) == 2 * len(images)
    wanted = np.stack([images, nearest], axis=1).reshape(-1, 8, 8)
    np.testing.assert_array_equal(np.stack(shown), np.rint((wanted + 1) * 127.5).astype(np.uint8))
    assert b'class="pixelated"' in page


def test_absent_entries_read_as_not_recorded(write, tmp_path):
    folder = write(tmp_path, rows=30)
    manifest = json.loads((folder / "manifest.json").read_text())
    kept = {key: manifest[key] for key in ("detectors", "primary", "calibrations")}
    kept["detectors"] = [{"name": entry["name"]} for entry in kept["detectors"]]
    kept["calibrations"] = [{"meaning": "duplication"}]
    (folder / "manifest.json").write_text(json.dumps(kept))
    (folder / "metrics.json").write_text("{}")
    text = words(build_report(folder).read_bytes())
    assert "an unnamed model" in text
    assert "numerical self-check not recorded" in text


def test_output_stays_inside_the_folder(write, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept.html").write_text("kept")
    folder = write(tmp_path / "audit", rows=20)
    (folder / "report.html").symlink_to(outside / "kept.html")
    build_report(folder)
    assert (outside / "kept.html").read_text() == "kept"
    assert not (folder / "report.html").is_symlink()
    assert sorted(path.name for path in outside.iterdir()) == ["kept.html"]
