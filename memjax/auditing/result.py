"""What an audit found, in memory and on disk."""

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from memjax._core.errors import InputError, require
from memjax._core.files import write_atomically
from memjax._core.text import neutralize_csv_cell


class AuditResult(NamedTuple):
    """A finished audit.

    Attributes:
        table: ``pyarrow.Table``, one row per audited image in the order of the data, then one per
            calibration image from elsewhere. For each detector ``D``: ``D`` (oriented: larger =
            more memorized), ``D_raw``, ``D_se``, ``D_status``, ``D_rank``; ``rank`` is that of
            the primary detector. For each calibration ``C``: ``role_C``, ``p_C_D``,
            ``flag_C_D``. ``stored`` and ``copies`` are null where no samples were drawn.
        metrics: what the scores are worth against the truth, where it is known, with intervals.
        manifest: versions, hashes, seeds, parameters, costs: what is needed to repeat the audit.
        gallery: pictures of the first rows and of their nearest samples.
    """

    table: Any
    metrics: dict[str, Any]
    manifest: dict[str, Any]
    gallery: dict[str, np.ndarray]

    def top(self, n: int = 10) -> list[dict[str, Any]]:
        """The n rows ranked first, most memorized first, as dictionaries.

        Args:
            n: how many.

        Returns:
            At most n rows; failed rows have no rank and are never among them.
        """
        ranks = self.table.column("rank").to_numpy(zero_copy_only=False).astype(float)
        ranked = np.flatnonzero(np.isfinite(ranks))
        best = ranked[np.argsort(ranks[ranked], kind="stable")][:n]
        return self.table.take(best).to_pylist()

    def write(self, folder: str | Path) -> Path:
        """Write ``table.parquet``, ``table.csv``, ``metrics.json``, ``manifest.json``, gallery.

        Each file appears whole or not at all; the manifest, which says that the audit is
        completed, comes last. In the csv, cells a spreadsheet would take for formulas are
        quoted.

        Args:
            folder: created if missing.

        Returns:
            The folder.

        Raises:
            InputError: the folder cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / "table.parquet", _parquet(self.table))
            write_atomically(folder / "table.csv", _csv(self.table))
            write_atomically(folder / "gallery.npz", _npz(self.gallery))
            write_atomically(folder / "metrics.json", to_json(self.metrics))
            write_atomically(folder / "manifest.json", to_json(self.manifest))
        except OSError as error:
            raise InputError(f"out: cannot write to {folder}: {error.strerror}") from None
        return folder


def to_json(value: Any) -> bytes:
    """Readable JSON; NaN and infinity, which JSON lacks, become null.

    Args:
        value: nested dictionaries, lists, strings, numbers and NumPy scalars.

    Returns:
        UTF-8 text with a final line feed.
    """

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            return {str(key): plain(entry) for key, entry in item.items()}
        if isinstance(item, (list, tuple)):
            return [plain(entry) for entry in item]
        if isinstance(item, np.generic):
            item = item.item()
        if isinstance(item, float) and not np.isfinite(item):
            return None
        return item

    text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", errors="replace")


def _parquet(table: Any) -> bytes:
    parquet = require("pyarrow.parquet", "audit")
    sink = io.BytesIO()
    parquet.write_table(table, sink)
    return sink.getvalue()


def _csv(table: Any) -> bytes:
    pa = require("pyarrow", "audit")
    csv = require("pyarrow.csv", "audit")
    columns = []
    for column in table.columns:
        if pa.types.is_string(column.type):
            cells = column.to_pylist()
            column = pa.array([c if c is None else neutralize_csv_cell(c) for c in cells])
        columns.append(column)
    sink = io.BytesIO()
    csv.write_csv(pa.table(columns, names=table.column_names), sink)
    return sink.getvalue()


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    sink = io.BytesIO()
    np.savez_compressed(sink, **arrays)  # type: ignore[arg-type]
    return sink.getvalue()
