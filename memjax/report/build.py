"""Build the figures and the page of a finished audit, from its files alone."""

import os
from pathlib import Path

import numpy as np

from memjax._core.errors import InputError, require
from memjax._core.files import write_atomically
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
            writes (nothing is written then), or the folder cannot be written to.
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
        thumbnail(sample) if np.isfinite(sample).all() else None for sample in audit.gallery.nearest
    ]
    figures: dict[str, bytes | None] = {
        "ranking": render(draw_ranking, audit) if audit.ranked.any() else None,
        "distribution": render(draw_distribution, audit) if audit.ranked.any() else None,
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

    report = folder / "report.html"
    try:
        figures_dir.mkdir(exist_ok=True)
        for name, figure in figures.items():
            path = figures_dir / f"{name}.png"
            if figure is None:
                path.unlink(missing_ok=True)  # left by an earlier state of the audit
            else:
                write_atomically(path, figure)
        write_atomically(report, page)
    except OSError as error:
        raise InputError(
            f"audit_dir: cannot write to {one_line(str(folder))}: {error.strerror}"
        ) from None
    return report
