"""Read a finished audit folder into plain arrays and records, and nothing more than is shown."""

import dataclasses
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from memjax._core.errors import InputError, require
from memjax._core.text import one_line
from memjax.report._record import Record, read_json

TABLE_ROWS = 100
"""Rows of the table on the page; the whole table stays in table.csv and table.parquet."""
FAILED_ROWS = 100
"""Failed rows listed by name; all are counted."""
GALLERY_ROWS = 40
"""Images shown, so that the page stays below 10 MB whatever their size."""
_FINE_GROUPS = 8
"""More distinct multiplicities than this are shown in ranges that double."""


@dataclasses.dataclass(frozen=True)
class Detector:
    """One detector of the audit.

    Attributes:
        name: its name in metrics.json.
        title: its name on the page, unlike any other detector's.
        column: prefix of its columns in the table.
        record: its entry in the manifest.
    """

    name: str
    title: str
    column: str
    record: Record


@dataclasses.dataclass(frozen=True)
class Calibration:
    """One kind of flag and, per row, its part in it.

    Attributes:
        meaning: ``"membership"`` or ``"duplication"``.
        record: its entry in the manifest.
        calibrates: rows that served as calibration images.
        tested: rows that got a p-value of the primary detector.
        flagged: rows flagged by the primary detector.
    """

    meaning: str
    record: Record
    calibrates: Bool[np.ndarray, "n"]
    tested: Bool[np.ndarray, "n"]
    flagged: Bool[np.ndarray, "n"]


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that are alike in the known truth; ``trained`` is False for images never trained on."""

    label: str
    trained: bool
    member: Bool[np.ndarray, "n"]


@dataclasses.dataclass(frozen=True)
class Gallery:
    """Images of the first rows and, where samples were drawn, the sample nearest to each."""

    rows: Int[np.ndarray, "k"]
    images: Float[np.ndarray, "k height width channels"]
    nearest: Float[np.ndarray, "k height width channels"]
    distance: Float[np.ndarray, "k"]


@dataclasses.dataclass(frozen=True)
class Audit:
    """What the page and the figures are made of.

    Attributes:
        manifest: manifest.json.
        metrics: metrics.json.
        detectors: in the manifest's order.
        primary: the detector that ranks.
        calibrations: kinds of flags, possibly none.
        scores: primary detector, larger = more memorized, NaN where there is none. Calibration
            images from elsewhere have a score, but no rank.
        ranks: by the primary detector from 1, NaN where there is none.
        ranked: rows that have a rank.
        stored: rows reproduced by a generated sample, ``None`` if none were drawn.
        groups: rows by known truth, in order of increasing multiplicity; empty if unknown.
        grouping: what the groups' labels count.
        failed: number of audited rows without a rank.
        statuses: ``("", status label, rows)`` of failed rows, and ``(detector title, status
            label, rows)`` of detectors that failed on ranked rows.
        top: table entries of the first ranks, in order.
        failures: table entries of the first failed rows, in order.
        gallery: images by rank.
        shown: table entries of the gallery's rows, in order.
    """

    manifest: Record
    metrics: Record
    detectors: tuple[Detector, ...]
    primary: Detector
    calibrations: tuple[Calibration, ...]
    scores: Float[np.ndarray, "n"]
    ranks: Float[np.ndarray, "n"]
    ranked: Bool[np.ndarray, "n"]
    stored: Bool[np.ndarray, "n"] | None
    groups: tuple[Group, ...]
    grouping: str
    failed: int
    statuses: tuple[tuple[str, str, int], ...]
    top: tuple[dict[str, Any], ...]
    failures: tuple[dict[str, Any], ...]
    gallery: Gallery
    shown: tuple[dict[str, Any], ...]


class _Table:
    """Columns of table.parquet, each read only when asked for."""

    def __init__(self, path: Path):
        self._arrow = require("pyarrow", "audit")
        self._parquet = require("pyarrow.parquet", "audit")
        try:
            self._file = self._parquet.ParquetFile(path)
        except (self._arrow.ArrowException, OSError) as error:
            raise self._fault(error) from None
        self.names = frozenset(self._file.schema_arrow.names)

    def _fault(self, error: Exception) -> InputError:
        return InputError(
            "table.parquet: expected a Parquet table, found "
            f"{one_line(str(error) or type(error).__name__, limit=200)}"
        )

    def _column(self, name: str) -> Any:
        if name not in self.names:
            raise InputError(f"table.parquet: expected a column {one_line(name)!r}, found none")
        try:
            return self._file.read(columns=[name]).column(name)
        except (self._arrow.ArrowException, OSError) as error:
            raise self._fault(error) from None

    def _converted(self, name: str, kind: Any, missing: Any) -> np.ndarray:
        try:
            column = self._column(name).cast(kind)
        except self._arrow.ArrowException as error:
            raise InputError(
                f"table.parquet: column {one_line(name)!r}: expected {kind}, found "
                f"{one_line(str(error), limit=200)}"
            ) from None
        return column.fill_null(missing).to_numpy()

    def numbers(self, name: str) -> Float[np.ndarray, "n"]:
        """A column as float64, NaN where null."""
        return self._converted(name, self._arrow.float64(), float("nan"))

    def integers(self, name: str) -> Int[np.ndarray, "n"]:
        """A column as int64, -1 where null."""
        return self._converted(name, self._arrow.int64(), -1)

    def truths(self, name: str) -> Bool[np.ndarray, "n"]:
        """A column of truth values, False where null."""
        return self._converted(name, self._arrow.bool_(), False)

    def known(self, name: str) -> bool:
        """Whether a column exists and is not null throughout."""
        return name in self.names and self._column(name).null_count < self._file.metadata.num_rows

    def coded(self, name: str) -> tuple[Int[np.ndarray, "n"], list[str]]:
        """A column of text as codes and labels in alphabetical order; code -1 where null."""
        try:
            column = self._column(name).combine_chunks().dictionary_encode()
            labels = [str(label) for label in column.dictionary.to_pylist()]
            codes = column.indices.fill_null(-1).to_numpy().astype(np.int64)
        except (self._arrow.ArrowException, UnicodeDecodeError) as error:
            raise self._fault(error) from None
        order = sorted(range(len(labels)), key=labels.__getitem__)
        renumbered = np.full(len(labels) + 1, -1)  # the last entry is where code -1 looks
        renumbered[order] = np.arange(len(labels))
        return renumbered[codes], [labels[index] for index in order]

    def entries(self, rows: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Whole table entries (but hashes and raw scores) of the given row numbers."""
        names = [
            n
            for n in self._file.schema_arrow.names
            if n != "sha256" and not n.endswith(("_raw", "_se"))
        ]
        wanted = self._arrow.array(sorted(set(rows)), self._arrow.int64())
        compute = require("pyarrow.compute", "audit")
        found: dict[int, dict[str, Any]] = {}
        try:
            for batch in self._file.iter_batches(columns=names):
                keep = compute.is_in(batch.column("row").cast(wanted.type), value_set=wanted)
                found.update((entry["row"], entry) for entry in batch.filter(keep).to_pylist())
        except (self._arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._fault(error) from None
        missing = sorted(set(rows) - found.keys())
        if missing:
            raise InputError(f"table.parquet: expected a row {missing[0]}, found none")
        return found


def _detectors(manifest: Record) -> tuple[tuple[Detector, ...], Detector]:
    records = manifest.records("detectors")
    names = [str(record.values.get("name")) for record in records]
    titles = [record.text("title", limit=60) or one_line(name) for record, name in
              zip(records, names, strict=True)]  # fmt: skip
    detectors = tuple(
        Detector(
            name=name,
            # One detector at two noise levels is told apart by its name.
            title=title if titles.count(title) == 1 else f"{title} ({one_line(name, limit=40)})",
            column=str(record.values.get("column") or name),
            record=record,
        )
        for record, name, title in zip(records, names, titles, strict=True)
    )
    primary = manifest.values.get("primary")
    for detector in detectors:
        if detector.name == primary:
            return detectors, detector
    raise InputError(
        f"manifest.json: primary: expected the name of one of {len(detectors)} detectors, "
        f"found {one_line(repr(primary), limit=100)}"
    )


def _calibrations(manifest: Record, table: _Table, primary: Detector) -> tuple[Calibration, ...]:
    out = []
    for record in manifest.records("calibrations"):
        meaning = record.values.get("meaning")
        if meaning not in ("membership", "duplication"):
            raise InputError(
                f"{record.place}: meaning: expected 'membership' or 'duplication', "
                f"found {one_line(repr(meaning), limit=100)}"
            )
        codes, labels = table.coded(f"role_{meaning}")
        out.append(
            Calibration(
                meaning=meaning,
                record=record,
                calibrates=codes == _code("calibration", labels),
                tested=np.isfinite(table.numbers(f"p_{meaning}_{primary.column}")),
                flagged=table.truths(f"flag_{meaning}_{primary.column}"),
            )
        )
    return tuple(out)


def _groups(table: _Table) -> tuple[Group, ...]:
    if table.known("multiplicity"):
        values = table.numbers("multiplicity")
        distinct = np.unique(values[np.isfinite(values)])
        if len(distinct) <= _FINE_GROUPS:
            ranges = [(int(value), int(value)) for value in distinct]
        else:
            tops = 2 ** np.arange(int(np.ceil(np.log2(distinct[-1]))) + 1)
            ranges = [(0, 0), (1, 1), *((int(t) // 2 + 1, int(t)) for t in tops[1:])]
        return tuple(
            Group(_multiplicity_label(low, high), high > 0, (values >= low) & (values <= high))
            for low, high in ranges
            if np.any((values >= low) & (values <= high))
        )
    if table.known("split"):
        codes, labels = table.coded("split")
        names = {"heldout": "held out", "train": "trained on"}
        return tuple(
            Group(names.get(label, one_line(label, limit=20)), label != "heldout", codes == code)
            for code, label in enumerate(labels[:_FINE_GROUPS])
        )
    return ()


def _multiplicity_label(low: int, high: int) -> str:
    if high == 0:
        return "held out"
    return f"{low}\u00d7" if low == high else f"{low}\u2013{high}\u00d7"


def _gallery(path: Path) -> Gallery:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in
                      ("rows", "images", "nearest_samples", "nearest_distance")}  # fmt: skip
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            "gallery.npz: expected arrays rows, images, nearest_samples, nearest_distance, "
            f"found {one_line(str(error) or type(error).__name__, limit=200)}"
        ) from None
    except NotImplementedError as error:  # an unknown compression in the zip directory
        raise InputError(f"gallery.npz: {one_line(str(error), limit=200)}") from None
    rows, images, nearest, distance = arrays.values()
    right = (
        rows.ndim == 1
        and np.issubdtype(rows.dtype, np.integer)
        and images.ndim == 4
        and images.shape[0] == len(rows)
        and min(images.shape[1:]) > 0
        and nearest.shape == images.shape
        and distance.shape == rows.shape
        and all(a.dtype.kind == "f" for a in (images, nearest, distance))
    )
    if not right:
        shapes = ", ".join(f"{name} {a.dtype}{list(a.shape)}" for name, a in arrays.items())
        raise InputError(
            "gallery.npz: expected rows int[k], images and nearest_samples float[k, height, "
            f"width, channels], nearest_distance float[k], found {shapes}"
        )
    k = min(len(rows), GALLERY_ROWS)
    return Gallery(rows[:k], images[:k], nearest[:k], distance[:k])


def _code(label: str, labels: list[str]) -> int:
    """The code of a label, or one that no row has."""
    return labels.index(label) if label in labels else -2


def _tally(
    title: str, codes: np.ndarray, labels: list[str], rows: np.ndarray
) -> list[tuple[str, str, int]]:
    counts = [(label, int((rows & (codes == code)).sum())) for code, label in enumerate(labels)]
    return [
        (title, one_line(label, limit=60), count)
        for label, count in counts
        if label != "ok" and count
    ]


def read_audit(folder: Path) -> Audit:
    """Read what the report shows from an audit folder.

    Args:
        folder: folder with manifest.json, metrics.json, table.parquet and gallery.npz.

    Returns:
        The audit; memory is a few columns of the table and at most 40 images.

    Raises:
        InputError: the folder or a file is missing, damaged or not as auditing writes it.
        MissingExtraError: pyarrow is not installed.
    """
    if not folder.is_dir():
        raise InputError(f"audit_dir: expected a folder, found none at {one_line(str(folder))}")
    for name in ("manifest.json", "metrics.json", "table.parquet", "gallery.npz"):
        if not (folder / name).is_file():
            raise InputError(
                f"audit_dir: expected the file {name} of a finished audit, found none in "
                f"{one_line(str(folder))}"
            )
    manifest = read_json(folder / "manifest.json")
    metrics = read_json(folder / "metrics.json")
    detectors, primary = _detectors(manifest)
    table = _Table(folder / "table.parquet")
    gallery = _gallery(folder / "gallery.npz")

    row_numbers = table.integers("row")
    ranks = table.numbers("rank")
    scores = table.numbers(primary.column)
    ranked = np.isfinite(ranks)
    failed = ~ranked
    if "source" in table.names:  # calibration images from elsewhere are not audited
        codes, labels = table.coded("source")
        failed &= codes != _code("calibration", labels)
    first = np.argsort(np.where(ranked, ranks, np.inf), kind="stable")
    top = row_numbers[first[: min(TABLE_ROWS, int(ranked.sum()))]].tolist()
    failures = row_numbers[np.flatnonzero(failed)[:FAILED_ROWS]].tolist()
    entries = table.entries([*top, *failures, *gallery.rows.tolist()])
    statuses = _tally("", *table.coded("status"), failed)
    for detector in detectors:
        statuses += _tally(detector.title, *table.coded(f"{detector.column}_status"), ranked)
    return Audit(
        manifest=manifest,
        metrics=metrics,
        detectors=detectors,
        primary=primary,
        calibrations=_calibrations(manifest, table, primary),
        scores=np.where(np.isfinite(scores), scores, np.nan),
        ranks=ranks,
        ranked=ranked,
        stored=table.truths("stored") if table.known("stored") else None,
        groups=_groups(table),
        grouping=(
            "known truth: times in the training set"
            if table.known("multiplicity")
            else "known truth"
        ),
        failed=int(failed.sum()),
        statuses=tuple(statuses),
        top=tuple(entries[row] for row in top),
        failures=tuple(entries[row] for row in failures),
        gallery=gallery,
        shown=tuple(entries[row] for row in gallery.rows.tolist()),
    )
