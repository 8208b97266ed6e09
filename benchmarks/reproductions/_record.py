"""A reproduction: numbers, statements about them, and a figure that shows both."""

import argparse
import json
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import harness
from memjax._core.files import write_atomically

WIDTH = 11.0
STORED, OTHER, EXACT = "#D55E00", "#0072B2", "0.25"
"""Colors: what is stored, what is not, what is exact."""


class Statement(NamedTuple):
    """What a paper says, and what was found.

    Attributes:
        expected: in the paper.
        measured: here, with numbers.
        holds: whether the second bears the first out.
        why: where it does not, or only in part: the reason.
    """

    expected: str
    measured: str
    holds: bool
    why: str = ""


class Reproduction(NamedTuple):
    """One figure of a paper.

    Attributes:
        name: of the module, the files and the command.
        title: of the figure.
        source: the paper.
        differences: where our setting is not the paper's, and why.
        compute: ``(quick, seed) -> (numbers, statements)``; the numbers are what the figure
            draws, arrays allowed.
        draw: ``(subfigure, numbers)`` draws the panels, from what a JSON holds.
        height: of the panels, in inches.
    """

    name: str
    title: str
    source: str
    differences: str
    compute: Callable[[bool, int], tuple[Mapping[str, Any], list[Statement]]]
    draw: Callable[[Any, Mapping[str, Any]], None]
    height: float = 3.6


def run(
    reproduction: Reproduction,
    *,
    quick: bool = False,
    seed: int = 0,
    results: Path = harness.RESULTS,
    figures: Path = harness.FIGURES,
) -> dict[str, Any]:
    """Compute a reproduction, write its record and its figure, and return the record."""
    start = time.perf_counter()
    numbers, statements = reproduction.compute(quick, seed)
    record = {
        "reproduction": reproduction.name,
        "source": reproduction.source,
        "differences": reproduction.differences,
        "quick": quick,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "statements": [statement._asdict() for statement in statements],
        "numbers": jsonable(numbers),
        **harness.machine(),
    }
    stem = f"reproduction-{reproduction.name}" + (".quick" if quick else "")
    for folder in (results, figures):
        folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False)
    write_atomically(results / f"{stem}.json", (text + "\n").encode())
    figure(reproduction, record).savefig(figures / f"{stem}.png", dpi=150)
    return record


def jsonable(value: Any) -> Any:
    """Arrays as lists, numbers to five digits, what is not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, str | bool | int):
        return value
    if np.ndim(value):
        return [jsonable(item) for item in value]
    if np.asarray(value).dtype.kind in "bi":
        return np.asarray(value).item()
    number = float(value)
    return float(f"{number:.5g}") if np.isfinite(number) else None


def figure(reproduction: Reproduction, record: Mapping[str, Any]):
    """The panels, and below them what the paper says and what was measured."""
    from matplotlib.figure import Figure

    lines = []
    for statement in record["statements"]:
        mark = "HOLDS" if statement["holds"] else "DIFFERS"
        lines += _wrapped(f"{mark:<8}paper: {statement['expected']}", 8)
        lines += _wrapped(f"        here:  {statement['measured']}", 15)
        if statement["why"]:
            lines += _wrapped(f"        why:   {statement['why']}", 15)
    lines += _wrapped(f"setting: {record['differences']}", 8)
    line_height = 0.134
    below = line_height * len(lines) + 0.35
    out = Figure(figsize=(WIDTH, reproduction.height + below + 0.4), layout="constrained")
    panels, notes = out.subfigures(2, 1, height_ratios=(reproduction.height + 0.4, below))
    panels.suptitle(f"{reproduction.title}   [{reproduction.source}]", fontsize=10)
    reproduction.draw(panels, record["numbers"])
    notes.text(0.012, 0.98, "\n".join(lines), va="top", family="monospace", fontsize=7.6)
    command = f"python -m benchmarks.reproductions.{reproduction.name} --seed {record['seed']}"
    if record["quick"]:
        command += " --quick"
    commit = (record["git"]["commit"] or "unknown")[:8] + ("+" if record["git"]["dirty"] else "")
    caption = f"{command} | {record['seconds']:.0f} s | jaxlib {record['versions']['jaxlib']}"
    notes.text(
        0.995, 0.01, f"{caption} | {commit}", ha="right", va="bottom", fontsize=7, color="0.4"
    )
    return out


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(
        text, 154, subsequent_indent=" " * indent, drop_whitespace=True, replace_whitespace=False
    )


def main(reproductions: list[Reproduction], arguments: list[str] | None = None) -> int:
    """Command line of one reproduction or of all."""
    parser = argparse.ArgumentParser(description="Reproduce figures of the papers.")
    parser.add_argument("--quick", action="store_true", help="seconds: to see that it runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=harness.RESULTS)
    parser.add_argument("--figures", type=Path, default=harness.FIGURES)
    chosen = vars(parser.parse_args(arguments))
    for reproduction in reproductions:
        record = run(reproduction, **chosen)
        print(f"{reproduction.name} ({record['seconds']} s): {reproduction.source}")
        for statement in record["statements"]:
            mark = "holds  " if statement["holds"] else "DIFFERS"
            print(f"    {mark} {statement['expected']}\n            {statement['measured']}")
            if statement["why"]:
                print(f"            {statement['why']}")
    return 0
