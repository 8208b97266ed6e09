"""The page of a command that shows pictures and a table, such as ``memjax localize``."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from memjax import __version__
from memjax._core.text import one_line
from memjax.report._images import data_uri
from memjax.report._template import fill

MAX_ROWS = 1000
"""Rows of a table that are shown."""


class PageTable(NamedTuple):
    """A table of text.

    Attributes:
        caption: what it shows.
        columns: titles; the first column names the row.
        rows: one text a column.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


class Chart(NamedTuple):
    """A picture of numbers.

    Attributes:
        png: the file.
        title: what it shows.
        text: how to read it.
    """

    png: bytes
    title: str
    text: str


def picture_page(
    command: str,
    heading: str,
    lede: str,
    facts: Mapping[str, object],
    pictures: Sequence[bytes],
    alt: str,
    tables: Sequence[PageTable],
    charts: Sequence[Chart] = (),
) -> bytes:
    """A page with pictures and tables, as UTF-8.

    Args:
        command: that made it, such as ``"localize"``.
        heading: the question it answers.
        lede: a sentence or two on how to read it.
        facts: settings by name.
        pictures: PNG files.
        alt: what they show, in words.
        tables: at most ``MAX_ROWS`` rows of each are shown.
        charts: shown before the pictures.

    Returns:
        One file that loads nothing else and runs no script; all text is escaped.
    """
    shown = []
    for table in tables:
        rows = [[one_line(cell, limit=120) for cell in row] for row in table.rows[:MAX_ROWS]]
        more = len(table.rows) - len(rows)
        caption = table.caption + (f" ({more:,} more rows in table.csv)" if more else "")
        shown.append(PageTable(caption, table.columns, rows))
    return fill(
        "pictures.html.jinja",
        command=command,
        heading=one_line(heading, limit=200),
        lede=lede,
        facts=[(name, one_line(str(value), limit=200)) for name, value in facts.items()],
        pictures=[data_uri(picture) for picture in pictures],
        alt=alt,
        tables=shown,
        charts=[{**chart._asdict(), "png": data_uri(chart.png)} for chart in charts],
        version=__version__,
    )
