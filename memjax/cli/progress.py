"""Progress bars with the time left, fed by the library's progress callbacks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Report(Protocol):
    """Tell how far a stage of the work has come."""

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Show ``done`` of ``total``, with a note beside the bar."""
        ...


@contextmanager
def progress_bar(console: Console) -> Iterator[Report]:
    """One bar per stage of a long task, on standard error.

    Args:
        console: where to draw; on something that is no terminal each finished stage is one line.

    Yields:
        A ``Report``, to be called as work goes on.
    """
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
    )
    tasks: dict[str, int] = {}

    def report(stage: str, done: int, total: int, note: str = "") -> None:
        if stage not in tasks:
            tasks[stage] = bars.add_task(stage, total=total, note=note)  # type: ignore[assignment]
        bars.update(tasks[stage], completed=done, total=total, note=note)  # type: ignore[arg-type]
        if done == total and not console.is_terminal:
            console.print(f"{stage}: {done} of {total} {note}".rstrip(), markup=False)

    with bars:
        yield report
