"""``memjax audit``: from a model and images to a ranked, reviewable report."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich import box
from rich.table import Table
from rich.text import Text

from memjax._core.text import one_line
from memjax.cli.app import COMPLETED, FINDINGS, INCOMPLETE, cli, console, existing, messages
from memjax.cli.conditions import image_shape, load_model, read_conditions
from memjax.cli.progress import progress_bar

MEANINGS = {
    "membership": "evidence of having been trained on",
    "duplication": "evidence of having been trained on more than once",
}

SHOWN_FAILURES = 10
NARROWEST = 80
"""Columns that the table of rows takes at least: a shorter terminal breaks its lines."""


@cli.command()
@click.argument("model", metavar="digits|MODEL_DIR")
@click.option("--data", metavar="PATH", help="Images to audit: a folder, .npy or .npz.")
@click.option(
    "--calibration", metavar="PATH", help="Images to calibrate flags with; without, a ranking only."
)
@click.option(
    "--calibration-means",
    type=click.Choice(list(MEANINGS)),
    default="membership",
    show_default=True,
    help="membership: calibration images were not trained on. duplication: they are training "
    "images known to occur once.",
)
@click.option(
    "--baseline",
    metavar="MODEL_DIR",
    help="Another saved model, for detectors that compare two: an earlier checkpoint, or a model "
    "that was not trained on the images.",
)
@click.option(
    "--conditions",
    metavar="PATH",
    help="For a conditional model: .npy of one whole number per image, or .txt of one prompt per "
    "line, in their order.",
)
@click.option(
    "--calibration-conditions", metavar="PATH", help="The same for the calibration images."
)
@click.option("--out", metavar="DIR", help="Output folder (digits: memjax-digits).")
@click.option(
    "--detector",
    "detectors",
    multiple=True,
    metavar="NAME[@LEVEL]",
    help="Repeatable; the first ranks. LEVEL is the noise in standard deviations of the data. "
    "'all': every one that can run. 'memjax detectors' lists them.",
)
@click.option(
    "--fdr",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.1,
    show_default=True,
    help="Expected share of false flags among the flags.",
)
@click.option(
    "--samples",
    type=click.IntRange(0),
    default=1024,
    show_default=True,
    help="Samples drawn to see what comes out (digits: always 4096).",
)
@click.option("--value-range", type=float, nargs=2, help="Black and white in float arrays.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--chunk-size", type=click.IntRange(1), help="Rows evaluated together.")
@click.option(
    "--fail-on-findings", is_flag=True, help="Exit status 3 if the first detector flags a row."
)
def audit(
    model: str,
    data: str | None,
    calibration: str | None,
    calibration_means: str,
    baseline: str | None,
    conditions: str | None,
    calibration_conditions: str | None,
    out: str | None,
    detectors: tuple[str, ...],
    fdr: float,
    samples: int,
    value_range: tuple[float, float] | None,
    seed: int,
    chunk_size: int | None,
    fail_on_findings: bool,
) -> int:
    """Audit a model: rank images by how strongly it has memorized them.

    "digits" trains a small model on handwritten digits of which some are planted several times
    (once; it is cached), and audits that: see what memjax does in two minutes. Otherwise name the
    folder of a saved model and the images with --data.

    Writes table.parquet, table.csv, metrics.json, manifest.json, figures and report.html into
    --out. Interrupted? The same command goes on where it stopped.

    Exit status: 0 completed, 2 bad usage or input, 3 something flagged (--fail-on-findings),
    4 incomplete.
    """
    from memjax.auditing.plan import ALL, parse_detector

    for spec in detectors:  # before anything expensive
        if spec != ALL:
            parse_detector(spec)
    common = {
        "detectors": detectors or None,
        "fdr": fdr,
        "seed": seed,
        "chunk_size": chunk_size,
    }
    if model == "digits":
        if data or calibration or baseline or conditions or calibration_conditions:
            raise click.UsageError(
                "'digits' brings its own images; drop --data, --calibration, --baseline, "
                "--conditions and --calibration-conditions"
            )
        folder = Path(out or "memjax-digits")
        run = _digits(folder, seed, common)
    else:
        if data is None:
            raise click.UsageError("--data PATH is missing: the images to audit")
        if out is None:
            raise click.UsageError("--out DIR is missing: where to write the results")
        folder = Path(out)
        paths = _Paths(model, data, calibration, baseline, conditions, calibration_conditions)
        run = _own(paths, calibration_means, folder, samples, value_range, common)

    try:
        with progress_bar(messages) as progress:
            result = run(progress)
    except KeyboardInterrupt:
        messages.print(
            f"memjax: interrupted; finished chunks are kept in {folder}, and the same command "
            "goes on from there",
            markup=False,
            soft_wrap=True,
        )
        return INCOMPLETE

    from memjax.report.build import build_report

    page = build_report(folder)
    _show(result, folder, page)
    primary = result.manifest["primary"]
    flagged = sum(e["flagged"] for e in result.metrics["flags"] if e["detector"] == primary)
    return FINDINGS if fail_on_findings and flagged else COMPLETED


def _names(model: str, data: str, baseline: str | None = None) -> dict[str, str]:
    command = shlex.join(["memjax", *sys.argv[1:]])
    named = {} if baseline is None else {"baseline": baseline}
    return {"model": model, "data": data, "command": command, **named}


def _digits(folder: Path, seed: int, common: dict[str, Any]) -> Callable[..., Any]:
    def run(progress: Callable[..., None]) -> Any:
        from memjax.auditing.digits import digits_audit
        from memjax.auditing.run import audit as audit_model

        return audit_model(
            **digits_audit(seed, progress),
            **common,
            out=folder,
            names=_names("the graded digits model", "scikit-learn digits, 8x8"),
            progress=progress,
        )

    return run


class _Paths(NamedTuple):
    """What the user named."""

    model: str
    data: str
    calibration: str | None
    baseline: str | None
    conditions: str | None
    calibration_conditions: str | None

    def check(self) -> None:
        """Every one of them is there."""
        for name, path in self._asdict().items():
            if path is not None:
                option = "MODEL_DIR" if name == "model" else f"--{name.replace('_', '-')}"
                existing(path, option)
        if self.calibration_conditions is not None and self.calibration is None:
            raise click.UsageError("--calibration-conditions: there is no --calibration")


def _own(
    paths: _Paths,
    meaning: str,
    folder: Path,
    samples: int,
    value_range: tuple[float, float] | None,
    common: dict[str, Any],
) -> Callable[..., Any]:
    paths.check()

    def run(progress: Callable[..., None]) -> Any:
        from memjax.auditing.plan import Calibration
        from memjax.auditing.run import audit as audit_model
        from memjax.data.images import load_images

        model = load_model(paths.model)
        shape = image_shape(model, paths.model)
        images = load_images(paths.data, event_shape=shape, value_range=value_range)
        calibrations = ()
        if paths.calibration is not None:
            others = load_images(paths.calibration, event_shape=shape, value_range=value_range)
            given = paths.calibration_conditions
            conditions = read_conditions(given, len(others), model, paths.model)
            calibrations = (Calibration(meaning, images=others, conditions=conditions),)
        return audit_model(
            model,
            images,
            calibrations=calibrations,
            conditions=read_conditions(paths.conditions, len(images), model, paths.model),
            baseline=None if paths.baseline is None else load_model(paths.baseline),
            num_samples=samples,
            **common,
            out=folder,
            names=_names(
                Path(paths.model).name,
                Path(paths.data).name,
                None if paths.baseline is None else Path(paths.baseline).name,
            ),
            progress=progress,
        )

    return run


def _show(result: Any, folder: Path, page: Path) -> None:
    primary = result.manifest["primary"]
    top = result.top(10)
    table = _table(None)
    shown = [("rank", "rank", "right"), ("image", "id", "left"), ("value", primary, "right")]
    shown += [
        (f"p {short}", f"p_{meaning}_{primary}", "right")
        for meaning, short in (("membership", "member"), ("duplication", "dup."))
        if top and f"p_{meaning}_{primary}" in top[0]
    ]
    shown += [
        (title, key, "right")
        for title, key in (("stored", "stored"), ("copies", "copies"), ("times", "multiplicity"))
        if top and top[0].get(key) is not None
    ]
    for title, key, justify in shown:
        name = key == "id"  # gives way where lines are short: a number cut off would be another one
        width = 12 if name else None
        table.add_column(title, justify=justify, min_width=width, overflow="fold", no_wrap=not name)  # type: ignore[arg-type]
    for row in top:
        table.add_row(*(Text(_cell(row[key])) for _, key, _ in shown))
    # A title of the table's own would be broken where the table is short.
    console.print(Text(f"Most suspicious by {primary}", style="table.title"), soft_wrap=True)
    console.print(table, width=max(console.width, NARROWEST), crop=False)

    _show_metrics(result.metrics["contrasts"])
    for entry in result.metrics["flags"]:
        if entry["detector"] == primary:
            console.print(_flag_sentence(entry), markup=False)
    stored = result.metrics["stored"]
    if stored is not None:
        console.print(
            f"stored: {stored['images']} images are reproduced by {stored['copying_samples']:,} of "
            f"{stored['samples']:,} samples (copy rule d1/d2 < 1/3)",
            markup=False,
        )
    _show_failed(result.table)
    console.print(f"report: {page}", markup=False, soft_wrap=True)
    console.print(f"table:  {folder / 'table.csv'} (and .parquet)", markup=False, soft_wrap=True)


def _show_failed(table: Any) -> None:
    """Name the rows that could not be read, one line each, and count the rest."""
    columns = (table.column(name).to_pylist() for name in ("id", "status", "reason"))
    failed = [row for row in zip(*columns, strict=True) if row[1] != "ok"]
    for name, status, reason in failed[:SHOWN_FAILURES]:
        line = one_line(f"memjax: {name}: {status}: {reason or 'see the table'}")
        messages.print(line, markup=False, soft_wrap=True)
    if failed:
        console.print(
            f"rows without a result: {len(failed):,} (they keep their place in the table)"
        )


def _table(title: str | None) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _show_metrics(contrasts: list[dict[str, Any]]) -> None:
    for positives in ("repeated 4 times or more", "seen once"):
        chosen = [entry for entry in contrasts if entry["positives"] == positives]
        if not chosen:
            continue
        negatives = chosen[0]["negatives"]
        table = _table(f"{positives.capitalize()} against {negatives} (95 % intervals)")
        table.add_column("detector", no_wrap=True)
        table.add_column("AUROC", justify="right", no_wrap=True)
        table.add_column("TPR at 1 % FPR", justify="right", no_wrap=True)
        for entry in chosen:
            rate = _interval(entry["tpr_at_fpr"][0])
            table.add_row(entry["detector"], _interval(entry["auroc"]), rate)
        console.print(table)


def _interval(entry: dict[str, Any]) -> str:
    if entry.get("resolvable") is False:
        return "not resolvable"
    return f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"


def _flag_sentence(entry: dict[str, Any]) -> str:
    sentence = (
        f"flagged for {entry['meaning']} ({MEANINGS[entry['meaning']]}): {entry['flagged']:,} of "
        f"{entry['tested']:,} tested images, at false-discovery rate {entry['fdr']:g}"
    )
    if not entry["resolvable"]:
        sentence += "; too few calibration images for any flag"
    elif entry["true"] is not None:
        sentence += f"; {entry['true']:,} of them rightly"
    return sentence


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}"
    return one_line(str(value), limit=60)
