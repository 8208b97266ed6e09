"""Build the figures and the page of a finished audit, from its files alone."""

import os
from pathlib import Path

import numpy as np

from memjax._core.errors import InputError, require
from memjax._core.text import one_line
from memjax.report._figures import (
    draw_distribution,
    draw_gallery,
    draw_metrics,
    draw_ranking,
    render,
)
from memjax.report._folder import read_audit
from memjax.report._images import data_uri, png, thumbnail
from memjax.report._page import render_page

_EXTRAS = ("matplotlib", "jinja2", "pyarrow", "PIL")


def build_report(audit_dir: str | os.PathLike[str]) -> Path:
    """Write ``figures/*.png`` and ``report.html`` of a finished audit.

    Reads manifest.json, metrics.json, table.parquet and gallery.npz in the folder, computes no
    metric of its own, and may be called again at any time: the same files give the same bytes.
    The page is one file that loads nothing else, runs no script, and treats every name in the
    audit as text; beside the folder's own files nothing is written.

    Args:
        audit_dir: the folder that an audit wrote.

    Returns:
        Path of report.html, at most some 10 MB however many rows were audited.

    Raises:
        InputError: the folder or one of its files is missing, damaged, or not what an audit
            writes; nothing is written then.
        MissingExtraError: the ``audit`` extra is not installed.

    What does not raise: entries that are absent or null in the manifest or the metrics are shown
    as not recorded.
    """
    for package in _EXTRAS:
        require(package, "audit")
    folder = Path(audit_dir)
    audit = read_audit(folder)
    figures_dir = folder / "figures"
    if figures_dir.is_symlink() or (figures_dir.exists() and not figures_dir.is_dir()):
        raise InputError(
            "audit_dir: expected figures to be a folder of its own, found a link or file at "
            f"{one_line(str(figures_dir))}"
        )

    images = [thumbnail(image) for image in audit.gallery.images]
    nearest = [
        thumbnail(sample) if np.isfinite(sample).all() else None
        for sample in audit.gallery.nearest
    ]
    figures: dict[str, bytes | None] = {
        "ranking": render(draw_ranking, audit) if audit.failed < len(audit.ranks) else None,
        "distribution": (
            render(draw_distribution, audit) if audit.failed < len(audit.ranks) else None
        ),
        "metrics": render(draw_metrics, audit) if audit.metrics.items("contrasts") else None,
        "gallery": render(draw_gallery, audit, images, nearest) if images else None,
    }
    page = render_page(
        audit,
        [data_uri(png(image)) for image in images],
        [None if sample is None else data_uri(png(sample)) for sample in nearest],
        {
            name: data_uri(figure)
            for name, figure in figures.items()
            if figure is not None and name != "gallery"
        },
    )

    figures_dir.mkdir(exist_ok=True)
    for name, figure in figures.items():
        path = figures_dir / f"{name}.png"
        if figure is None:
            path.unlink(missing_ok=True)  # left by an earlier state of the audit
        else:
            _write(path, figure)
    return _write(folder / "report.html", page)


def _write(path: Path, content: bytes) -> Path:
    """Replace a file in one step: a reader sees the old content or the new, never a part."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.unlink(missing_ok=True)
    try:
        with part.open("xb") as file:  # "x": never through a link that someone left there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return path
