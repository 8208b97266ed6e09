"""What commands with pictures and tables share: what is typed, folders, tables."""

import csv
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.table import Table
from rich.text import Text

from memjax._core.errors import InputError
from memjax._core.files import write_atomically
from memjax._core.text import neutralize_csv_cell, one_line
from memjax.cli.app import console, existing
from memjax.cli.conditions import as_labels, encode_prompts, read_conditions

_NUMBERS = re.compile(r"\d{1,9}(-\d{1,9})?(,\d{1,9}(-\d{1,9})?)*", re.ASCII)
_MOST = 100_000
"""Prompts at most."""


def check_folder(out: str, *parts: str) -> Path:
    """The output folder, if it and its parts are folders of their own, or not there yet."""
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise click.BadParameter(f"{out} is not a folder", param_hint="--out")
    for part in parts:
        inside = folder / part
        if inside.is_symlink() or (inside.exists() and not inside.is_dir()):
            raise click.BadParameter(f"{inside} is a link or a file", param_hint="--out")
    return folder


def check_paths(model: str | None, **options: str | None) -> None:
    """Everything that is named is there."""
    if model is not None:
        existing(model, "MODEL_DIR")
    for name, path in options.items():
        if path is not None:
            existing(path, f"--{name.replace('_', '-')}")


def parse_numbers(option: str, text: str, *, zero: bool = False) -> list[float]:
    """Positive numbers between commas, or also zeros."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < number < math.inf or (number == 0 and zero) for number in found):
        shown, kind = one_line(text, limit=80), "numbers from 0 up" if zero else "positive numbers"
        raise click.BadParameter(
            f"expected {kind} between commas, got {shown!r}", param_hint=option
        )
    return found


def prompt_conditions(prompts: str, model: Any, model_dir: str) -> tuple[tuple[str, ...], Any]:
    """Names and conditions of the prompts that the user typed, or that stand in a file.

    Args:
        prompts: whole numbers and ranges of them (``0,5,7-9``), a ``.npy`` or ``.txt`` file, or
            the one text that is meant.
        model: what they are for.
        model_dir: its folder, with the text encoders.

    Returns:
        A name for each, and conditions with a leading axis.

    Raises:
        InputError: they do not fit the model.
    """
    import numpy as np

    from memjax.networks.unet2d_condition import TextCondition

    takes_text = isinstance(model.null_condition, TextCondition)
    suffix = Path(prompts).suffix.lower() if len(prompts) < 4096 else ""
    if suffix in (".npy", ".txt"):
        count, names = _listed(existing(prompts, "--prompts"), suffix)
        return names, read_conditions(prompts, count, model, model_dir)
    if takes_text:
        return (one_line(prompts, limit=200),), encode_prompts(
            [prompts], model, model_dir, "--prompts"
        )
    if not _NUMBERS.fullmatch(prompts):
        shown = one_line(prompts, limit=80)
        raise click.BadParameter(
            f"expected whole numbers such as 0,5,7 or 0-19 for this model, got {shown!r}",
            param_hint="--prompts",
        )
    numbers: list[int] = []
    for part in prompts.split(","):
        first, _, last = part.partition("-")
        end = int(last or first)
        if end < int(first) or len(numbers) + end - int(first) >= _MOST:
            raise click.BadParameter(f"cannot read the range {part}", param_hint="--prompts")
        numbers += range(int(first), end + 1)
    return _names(numbers), as_labels(np.array(numbers), model, "--prompts")


def _listed(path: Path, suffix: str) -> tuple[int, tuple[str, ...]]:
    """How many prompts stand in a file, and their names."""
    if suffix == ".npy":
        from memjax.data._array_file import read_array

        found = read_array(path)
        if found.dtype.kind not in "iu" or found.ndim != 1 or len(found) > _MOST:
            raise InputError(
                f"{path}: expected at most {_MOST} whole numbers, found {found.dtype}"
                f"{list(found.shape)}"
            )
        return len(found), _names(found.tolist())
    try:
        lines = path.read_text("utf-8").removesuffix("\n").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected text, found: {one_line(str(error))}") from None
    if len(lines) > _MOST:
        raise InputError(f"{path}: expected at most {_MOST} prompts, found {len(lines)}")
    return len(lines), tuple(one_line(line, limit=200) for line in lines)


def _names(numbers: Sequence[int]) -> tuple[str, ...]:
    width = len(str(max(numbers)))
    return tuple(f"prompt {number:0{width}d}" for number in numbers)


@contextmanager
def writing(folder: Path, *parts: str) -> Iterator[None]:
    """Make the folder and its parts; what cannot be written is one line."""
    try:
        for path in (folder, *(folder / part for part in parts)):
            path.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(f"--out: cannot write to {folder}: {error.strerror}") from None


def npz_file(arrays: dict[str, Any]) -> bytes:
    """Arrays as a compressed .npz file, the same bytes for the same arrays."""
    import numpy as np

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def write_table(
    path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str] | None = None
) -> None:
    """Write rows with the same keys as CSV that no spreadsheet takes for formulas.

    Args:
        path: the file.
        rows: at least one, or else ``columns``.
        columns: names of the columns, for a table that may have no row.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(rows[0] if columns is None else columns)
    writer.writerows([_csv_cell(value) for value in row.values()] for row in rows)
    write_atomically(path, stream.getvalue().encode("utf-8", "replace"))


def _csv_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, bool):
        return "true" if value else "false"
    return neutralize_csv_cell(one_line(str(value)))


def text_table(title: str, rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> None:
    """Show some columns of rows on the terminal, the first as text, by their titles."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for k, name in enumerate(columns.values()):
        if k:
            table.add_column(name, justify="right", no_wrap=True)
        else:  # gives way where lines are short: a number cut off would be another one
            table.add_column(name, min_width=12, overflow="fold")
    for cells in text_rows(rows, columns)[1]:
        table.add_row(*(Text(cell) for cell in cells))
    console.print(Text(title, style="table.title"), soft_wrap=True)
    console.print(table, width=max(console.width, 80), crop=False)


def text_rows(
    rows: Sequence[dict[str, Any]], columns: dict[str, str]
) -> tuple[list[str], list[list[str]]]:
    """Titles, and some columns of rows as text."""
    return list(columns.values()), [[_text_cell(row[key]) for key in columns] for row in rows]


def _text_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return one_line(str(value), limit=60)
