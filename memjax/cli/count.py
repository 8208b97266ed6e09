"""``memjax count``: how often each image stands in a model's training set."""

import json
import math
from pathlib import Path
from typing import Any

import click

from memjax.cli._choices import (
    check_folder,
    check_paths,
    text_rows,
    text_table,
    write_table,
    writing,
)
from memjax.cli.app import COMPLETED, cli, console, messages
from memjax.cli.conditions import image_shape, load_model, read_conditions
from memjax.cli.progress import progress_bar

SHOWN, PICTURES = 20, 48
TABLE_TITLE = "Images, the most often stored first"


@cli.command()
@click.argument("model", metavar="digits|MODEL_DIR")
@click.option(
    "--data", metavar="PATH", help="The training images: a folder, .npy or .npz; each stands once."
)
@click.option("--conditions", metavar="FILE", help=".npy of whole numbers, one per image.")
@click.option("--out", metavar="DIR", help="Output folder (digits: memjax-count).")
@click.option(
    "--passes",
    type=click.IntRange(1),
    default=42,
    show_default=True,
    help="Over the images in each run of further training.",
)
@click.option(
    "--rounds",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Before the last; 1, with 4 runs, tells more, for five times the work.",
)
@click.option(
    "--runs", type=click.IntRange(1), default=1, show_default=True, help="Of the last round."
)
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True)
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, min_open=True),
    default=5e-4,
    show_default=True,
    help="Of Adam.",
)
@click.option("--value-range", type=float, nargs=2, help="Black and white in float arrays.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
def count(
    model: str,
    data: str | None,
    conditions: str | None,
    out: str | None,
    passes: int,
    rounds: int,
    runs: int,
    batch_size: int,
    learning_rate: float,
    value_range: tuple[float, float] | None,
    seed: int,
) -> int:
    """Estimate how often each image stands in a model's training set.

    The model is trained further on the images, each as often as it seems to stand there: of those
    that stand there more often it loses what it has stored. --data must be nearly all of the
    training set; images beside it come out below one. Numbers are relative to the typical image,
    which counts once; z says by how many standard errors an image lies above it. "digits" runs a
    small model of which the truth is known (trained once; it is cached).

    Writes table.csv, settings.json, figures/*.png and report.html into --out.

    Exit status: 0 completed, 2 bad usage or input, 4 incomplete.
    """
    from memjax.auditing.counting import count_images, digits_counts
    from memjax.data.images import load_images

    if model == "digits":
        if data is not None or conditions is not None:
            raise click.UsageError("'digits' brings its own images; drop --data and --conditions")
    elif data is None:
        raise click.UsageError("--data is missing: the training images")
    elif out is None:
        raise click.UsageError("--out DIR is missing: where to write the results")
    folder = check_folder(out or "memjax-count", "figures")
    check_paths(None if model == "digits" else model, data=data, conditions=conditions)

    with progress_bar(messages) as progress:
        labels = None
        if model == "digits":
            given = digits_counts(seed, progress)
        else:
            own = load_model(model)
            images = load_images(
                str(data), event_shape=image_shape(own, model), value_range=value_range
            )
            labels = read_conditions(conditions, len(images), own, model)
            given = {"model": own, "images": images, "times": None}
        images = given["images"]
        usable = int(images.ok.sum())
        found = count_images(
            given["model"],
            images,
            labels,
            steps=max(1, round(passes * usable / min(batch_size, max(usable, 1)))),
            rounds=rounds,
            runs=runs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            seed=seed,
            progress=progress,
        )
    settings = {
        "model": Path(model).name,
        "data": "digits" if data is None else Path(data).name,
        "passes": passes,
        "rounds": rounds,
        "runs": runs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "products": int(found.cost.total),
    }
    table = _rows(given, found)
    _write(folder, given, table, settings)
    _show(folder, given, table, settings)
    return COMPLETED


def _rows(given: dict[str, Any], found: Any) -> list[dict[str, Any]]:
    """The table, by rank; rows without an estimate last, without a rank."""
    import numpy as np

    from memjax._core.status import Status

    images, times = given["images"], given["times"]
    order = np.argsort(-found.value, kind="stable")  # NaN last
    table = []
    for rank, i in enumerate(order.tolist(), 1):
        ok, value, error = found.status[i] == Status.OK, found.value[i], found.standard_error[i]
        row: dict[str, Any] = {
            "rank": rank if ok else None,
            "row": i,
            "id": images.ids[i],
            "status": Status(int(found.status[i])).label,
            "times": math.exp(value) if ok else None,
            "log_times": float(value) if ok else None,
            "standard_error": float(error) if ok else None,
            "z": float(value / error) if ok and error > 0 else None,
            "held_at": int(found.held_at[i]),
            "reason": images.reasons[i],
        }
        if times is not None:
            row["truly"] = int(times[i])
        table.append(row)
    return table


def _write(
    folder: Path, given: dict[str, Any], table: list[dict[str, Any]], settings: dict[str, Any]
) -> None:
    """All files of the results, each whole."""
    import numpy as np

    from memjax._core.files import write_atomically
    from memjax.report._counts import draw_counts
    from memjax.report._extraction import CandidatePicture, draw_candidates
    from memjax.report._figures import render
    from memjax.report._images import thumbnail
    from memjax.report._pictures import Chart, PageTable, picture_page

    shown = [row for row in table if row["rank"] is not None]
    pictures = [
        CandidatePicture(
            f"{row['rank']}:  {row['times']:.{int(row['times'] < 10)}f}\u00d7",
            thumbnail(given["images"].images[row["row"]]),
        )
        for row in shown[:PICTURES]
    ]
    estimates = np.array([row["times"] for row in shown], float)
    truth = None if given["times"] is None else np.array([row["truly"] for row in shown])
    with writing(folder, "figures"):
        charts, drawn = [], []
        if shown:
            ranking = render(draw_counts, estimates, truth)
            write_atomically(folder / "figures" / "ranking.png", ranking)
            charts = [Chart(ranking, "How often", "Every image by its rank; 1 is typical.")]
            drawn = [render(draw_candidates, pictures, "")]
            write_atomically(folder / "figures" / "images.png", drawn[0])
        write_table(folder / "table.csv", table)
        text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
        write_atomically(folder / "settings.json", text.encode())
        page = picture_page(
            "count",
            f"How often does each image stand in the training set of {settings['model']}?",
            "Trained further on images that count too seldom, a model loses what it has stored of "
            "them. Estimates are relative to the typical image, which counts once. z: how many "
            "standard errors above once; how often above depends on the model.",
            {name.replace("_", " "): value for name, value in settings.items()},
            drawn,
            "The images stored most often",
            [PageTable(TABLE_TITLE, *text_rows(table, _columns(given)))],
            charts,
        )
        write_atomically(folder / "report.html", page)


def _columns(given: dict[str, Any]) -> dict[str, str]:
    """Columns of the table that are shown, with their titles."""
    columns = {"id": "image", "rank": "rank", "times": "times", "z": "z"}
    known = {} if given["times"] is None else {"truly": "truly"}
    return columns | known | {"status": "status"}


def _show(
    folder: Path, given: dict[str, Any], table: list[dict[str, Any]], settings: dict[str, Any]
) -> None:
    """The table, and where everything lies."""
    import numpy as np

    text_table(TABLE_TITLE, table[:SHOWN], _columns(given))
    if len(table) > SHOWN:
        console.print(f"({len(table) - SHOWN:,} more images in the table)")
    failed = sum(row["rank"] is None for row in table)
    if failed:
        console.print(f"{failed:,} images have no estimate")
    if given["times"] is not None:
        for times in np.unique(given["times"]).tolist():
            of = [row["times"] for row in table if row["truly"] == times and row["rank"]]
            console.print(
                f"truly {times:2d} times: {len(of):,} images, median estimate {np.median(of):.2g}"
            )
    console.print(f"cost: {settings['products']:,} network products an image")
    for what, path in (("table", "table.csv"), ("figures", "figures"), ("report", "report.html")):
        console.print(f"{what + ':':9}{folder / path}", markup=False, soft_wrap=True)
