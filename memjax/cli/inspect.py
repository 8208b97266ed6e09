"""``memjax inspect``: what a folder holds, and what working with it takes."""

import json
import math
import sys
from typing import Any

import click
from rich import box
from rich.table import Table
from rich.text import Text

from memjax._core.text import one_line
from memjax.cli.app import COMPLETED, cli, console, existing

SAMPLES = 1024
"""Samples that an audit draws unless told otherwise."""
EVALUATIONS = 2 * 18 - 1
"""Evaluations of the network for each of them."""


@cli.command()
@click.argument("path", metavar="PATH")
@click.option("--variant", metavar="NAME", help="Of the weights' files, such as fp16.")
@click.option("--measure", is_flag=True, help="Read the weights and time the network.")
@click.option(
    "--images",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Images of the audit whose time is told.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def inspect(path: str, variant: str | None, measure: bool, images: int, as_json: bool) -> int:
    """Say what model a folder holds, whether memjax can load it, and what an audit of it takes.

    PATH is a model that memjax saved, or a folder of diffusers: a pipeline or one network. Only
    headers are read, no code is run and nothing is unpickled. Times are lower bounds unless the
    network is timed with --measure.
    """
    existing(path, "PATH")
    from memjax.checkpoints.inspect import inspect_model

    found = inspect_model(path, variant=variant, measure=measure)
    audit = None if found.problem else _audit(found, images)
    if as_json:
        record = _jsonable(found) | {"commands": _commands(found), "audit": audit}
        json.dump(record, sys.stdout, indent=2, allow_nan=False)
        sys.stdout.write("\n")
        return COMPLETED
    _show(found, audit)
    return COMPLETED


def _commands(found: Any) -> list[str]:
    """Those that take this folder."""
    if found.problem or len(found.event_shape) != 3:
        return []
    commands = ["audit", "localize"]
    if not found.condition or found.null_condition:
        commands.append("sample")
    if found.network == "UNet2DModel":
        commands.append("export")
    return commands


def _audit(found: Any, images: int) -> dict[str, Any]:
    """What an audit by the default detectors would do, and take."""
    import numpy as np

    from memjax.auditing.plan import Given, default_chunk_size, default_detectors, evaluated
    from memjax.detect.plan import cost

    d = int(np.prod(found.event_shape))
    given = Given(conditions=bool(found.condition), baseline=False, images=images)
    able = default_detectors(found.event_shape, given)
    products = cost(tuple(evaluated(detector) for _, detector in able), d).total
    rows, work = default_chunk_size(d), found.work
    samples = SAMPLES if "sample" in _commands(found) else 0
    return {
        "images": images,
        "detectors": [name for name, _ in able],
        "products_per_image": int(products),
        "samples": samples,
        "seconds": work.seconds * (images * products + samples * EVALUATIONS),
        "rows_per_chunk": rows,
        "bytes": work.weight_bytes + rows * work.row_bytes,
    }


def _show(found: Any, audit: dict[str, Any] | None) -> None:
    parts = _table("part", "class", "parameters", "stored as", "size", right=(2, 4))
    for part in found.parts:
        if part.problem:
            stored = ("", Text(part.problem), "")
        else:
            size = _size(part.num_bytes)
            stored = (f"{part.parameters:,}", ", ".join(part.dtypes), size)
        parts.add_row(Text(part.name), Text(part.kind), *stored)
    console.print(f"{found.path}: {found.kind}", markup=False, soft_wrap=True)
    console.print(parts)
    if audit is None:
        console.print("memjax makes no model of it:", found.problem, markup=False, soft_wrap=True)
        return
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(found, audit):
        facts.add_row(name, Text(value))
    console.print(facts)
    for note in found.notes:
        console.print("note:", note, markup=False, soft_wrap=True)


def _facts(found: Any, audit: dict[str, Any]) -> list[tuple[str, str]]:
    shape = " x ".join(map(str, found.event_shape))
    sees = f"latents, {shape}" if found.latent else f"pixels, {shape}"
    if found.latent and found.image_shape:
        sees += f", of images {' x '.join(map(str, found.image_shape))}"
    condition = found.condition or "none"
    if found.condition:
        condition += "; with a null condition" if found.null_condition else "; no null condition"
    work = found.work
    least = "" if work.measured else "at least "
    how = "measured" if work.measured else "at a large matrix product's rate; --measure times it"
    samples = f", {audit['samples']:,} samples" if audit["samples"] else ""
    return [
        ("network", f"{found.network}, predicts {found.prediction}"),
        ("schedule", repr(found.schedule)),
        (
            "noise",
            f"sigma {found.sigma_min:.3g} to {found.sigma_max:.4g}, in the coordinates "
            "x = x_t / alpha_t, sigma = sigma_t / alpha_t",
        ),
        ("sees", sees),
        ("condition", condition),
        (
            "evaluation",
            f"{work.flops / 1e9:.3g} GFLOP, {least}{_duration(work.seconds)} here ({how})",
        ),
        ("commands", ", ".join(_commands(found)) or "none: no model of images"),
        ("detectors", ", ".join(audit["detectors"])),
        (
            "an audit",
            f"of {audit['images']:,} images by these: {audit['products_per_image']:,} products "
            f"an image{samples}: {least}{_duration(audit['seconds'])} here",
        ),
        (
            "memory",
            f"at least {_size(audit['bytes'])}: weights {_size(work.weight_bytes)}, and "
            f"{_size(work.row_bytes)} for each of {audit['rows_per_chunk']} rows linearized "
            "together",
        ),
    ]


def _table(*titles: str, right: tuple[int, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, title in enumerate(titles):
        table.add_column(title, justify="right" if i in right else "left", overflow="fold")
    return table


def _size(num_bytes: int) -> str:
    """Bytes in the largest unit of which there is one."""
    power = min(int(math.log(max(num_bytes, 1), 1024)), 4)
    return f"{num_bytes / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _duration(seconds: float | int) -> str:
    """Seconds in the unit that people would use."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1000 * seconds:.3g} ms" if seconds < 0.1 else f"{seconds:.3g} s"


def _jsonable(value: Any) -> Any:
    """NamedTuples as objects, a schedule as its configuration."""
    from memjax.diffusion.schedule import Schedule

    if isinstance(value, Schedule):
        return value.to_config()
    if isinstance(value, tuple):
        if hasattr(value, "_fields"):
            return {name: _jsonable(getattr(value, name)) for name in value._fields}  # pyright: ignore[reportAttributeAccessIssue]
        return [_jsonable(item) for item in value]
    return one_line(value, limit=1000) if isinstance(value, str) else value
