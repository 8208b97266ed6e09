"""``memjax mitigate``: other noises, or another embedding, for prompts that copy."""

import json
import re
from pathlib import Path
from typing import Any

import click

from memjax._core.errors import InputError
from memjax.cli._choices import (
    check_folder,
    check_paths,
    npz_file,
    prompt_conditions,
    text_rows,
    text_table,
    write_table,
    writing,
)
from memjax.cli.app import COMPLETED, cli, console, messages
from memjax.cli.conditions import image_shape, load_model, usual_guidance
from memjax.cli.progress import progress_bar

PAGE_ROWS, PAGES = 16, 12
SHOWN = 20
"""Rows in the terminal's table."""
TABLE_TITLE = "Prompts before and after"
OBJECTIVES = ("pull", "exact", "gap", "paper", "algorithm", "released")


@cli.command()
@click.argument("model", metavar="digits|MODEL_DIR")
@click.option(
    "--prompts",
    metavar="PROMPTS",
    help="Whole numbers (0,5,7 or 0-19) or a text; or a .npy of numbers, a .txt with a prompt on "
    "every line.",
)
@click.option("--out", metavar="DIR", help="Output folder (digits: memjax-mitigate).")
@click.option(
    "--data", metavar="PATH", help="The training images, to count copies: a folder, .npy or .npz."
)
@click.option(
    "--method",
    type=click.Choice(["sail", "prompt"]),
    default="sail",
    show_default=True,
    help="sail: choose the initial noise. prompt: move the prompt's embedding.",
)
@click.option(
    "--objective",
    type=click.Choice(OBJECTIVES),
    default="pull",
    show_default=True,
    help="What a noise is judged by, for sail.",
)
@click.option(
    "--level",
    type=click.FloatRange(0, min_open=True),
    help="Noise level of the objective in standard deviations of the data [default: 2.5; prompt: "
    "the sampler's first].",
)
@click.option(
    "--share",
    type=click.FloatRange(0, min_open=True),
    help="The threshold, as a share of the objective's median over random noises [default: 0.7; "
    "prompt: 0.4].",
)
@click.option("--threshold", type=float, help="The threshold itself, instead of --share.")
@click.option(
    "--samples", type=click.IntRange(1, 1024), default=8, show_default=True, help="Per prompt."
)
@click.option(
    "--budget",
    type=click.IntRange(1, 100_000),
    default=64,
    show_default=True,
    help="Noises tried for each prompt, for sail.",
)
@click.option(
    "--guidance",
    type=float,
    help="Weight of classifier-free guidance [default: 7.5 for text but for Flux, else 1].",
)
@click.option("--value-range", type=float, nargs=2, help="Black and white in float arrays.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
def mitigate(
    model: str,
    prompts: str | None,
    out: str | None,
    data: str | None,
    method: str,
    objective: str,
    level: float | None,
    share: float | None,
    threshold: float | None,
    samples: int,
    budget: int,
    guidance: float | None,
    value_range: tuple[float, float] | None,
    seed: int,
) -> int:
    """Draw samples that copy less, without training the model again.

    sail looks for initial noises from which the condition pulls the sampler but weakly; prompt
    moves the prompt's embedding until it does. "digits" runs a small model of which is known what
    it has stored (trained once; it is cached). Otherwise name the folder of a model that takes
    conditions, and --prompts.

    A prompt that only ever meant one image cannot be helped without losing what it asks for: look
    at the samples. With --data the table counts copies (d1/d2 < 1/3) before and after.

    Writes noises.npz (noises and objectives), samples.npz, figures/*.png, table.csv,
    settings.json and report.html into --out.

    Exit status: 0 completed, 2 bad usage or input, 4 incomplete.
    """
    from memjax.auditing.mitigation import digits_prompts, look_for_copies
    from memjax.auditing.mitigation import mitigate as search

    if share is not None and threshold is not None:
        raise click.UsageError("--share and --threshold: expected one of them")
    if samples > budget and method == "sail":
        raise click.UsageError("--budget: expected at least --samples")
    if model == "digits":
        if prompts is not None or data is not None:
            raise click.UsageError("'digits' brings its own prompts; drop --prompts and --data")
    elif prompts is None:
        raise click.UsageError("--prompts is missing: what to draw")
    elif out is None:
        raise click.UsageError("--out DIR is missing: where to write the results")
    folder = check_folder(out or "memjax-mitigate", "figures")
    check_paths(None if model == "digits" else model, data=data)

    with progress_bar(messages) as progress:
        if model == "digits":
            given = digits_prompts(seed, progress)
            guidance = 1.0 if guidance is None else guidance
        else:
            given, guidance = _own(model, str(prompts), data, guidance, value_range)
        found = search(
            given["model"],
            given["conditions"],
            method=method,  # type: ignore[arg-type]
            objective=objective,
            level=level,
            share=share,
            threshold=threshold,
            num_samples=samples,
            budget=budget,
            guidance=guidance,
            seed=seed,
            progress=progress,
        )
    copies = None
    if given["images"] is not None:
        copies = tuple(look_for_copies(s, given["images"]) for s in (found.before, found.after))
    settings = {
        "model": Path(model).name,
        "method": method,
        "objective": objective if method == "sail" else "gap",
        "level": level,
        "share": share,
        "threshold": threshold,
        "samples": samples,
        "budget": budget,
        "guidance": guidance,
        "seed": seed,
    }
    table = [_row(i, given, found, copies) for i in range(len(given["ids"]))]
    _write(folder, given, found, copies, table, settings)
    _show(folder, given, table, copies is not None)
    return COMPLETED


def _own(
    model_dir: str,
    prompts: str,
    data: str | None,
    guidance: float | None,
    value_range: tuple[float, float] | None,
) -> tuple[dict[str, Any], float]:
    """The model, its prompts and training images; and the weight of the guidance."""
    from memjax.data.images import load_images

    model = load_model(model_dir)
    shape = image_shape(model, model_dir)
    ids, conditions = prompt_conditions(prompts, model, model_dir)
    if model.null_condition is None:
        raise InputError(f"{model_dir}: expected a model that can do without a condition too")
    images = None
    if data is not None:
        known = load_images(data, event_shape=shape, value_range=value_range)
        images = known.images[known.ok]
    guidance = usual_guidance(model) if guidance is None else guidance
    return {"model": model, "conditions": conditions, "ids": ids, "images": images}, guidance


def _row(i: int, given: dict[str, Any], found: Any, copies: Any) -> dict[str, Any]:
    """What the table says of one prompt."""
    import numpy as np

    def middle(values: np.ndarray) -> float | None:
        known = values[np.isfinite(values)]
        return float(np.median(known)) if len(known) else None

    accepted = found.accepted[i]
    row: dict[str, Any] = {
        "row": i,
        "id": given["ids"][i],
        "status": "accepted" if accepted.all() else "partly" if accepted.any() else "not found",
        "accepted": int(accepted.sum()),
        "candidates": int(found.candidates[i]),
        "objective_before": middle(found.objective_before[i]),
        "objective_after": middle(found.objective_after[i]),
        "threshold": float(found.threshold[i]),
        "moved": middle(found.moved[i]),
        "products": int(found.products[i]),
    }
    if copies is not None:
        before, after = (part.is_copy[i] for part in copies)
        row["copies_before"] = float(before.mean())
        row["copies_after"] = float(after.mean())
        row["copies_accepted"] = float(after[accepted].mean()) if accepted.any() else None
    if copies is not None and "owners" in given:
        for when, part in zip(("before", "after"), copies, strict=True):
            own = given["owners"][part.nearest[i]] == given["conditions"][i]
            row[f"own_{when}"] = float((own & (part.nearest[i] >= 0)).mean())
    return row


def _write(
    folder: Path,
    given: dict[str, Any],
    found: Any,
    copies: Any,
    table: list[dict[str, Any]],
    settings: dict[str, Any],
) -> None:
    """All files of the results, each whole."""
    import jax
    import numpy as np

    from memjax._core.files import write_atomically
    from memjax.report._figures import render
    from memjax.report._images import thumbnail
    from memjax.report._maps import SampleRow, draw_samples

    ids = [name.encode("utf-8", "replace").decode() for name in given["ids"]]
    noises: dict[str, Any] = {
        "ids": np.array(ids),
        "settings": np.array(json.dumps(settings, sort_keys=True)),
        "before": found.noises_before,
        "after": found.noises_after,
    }
    names = ("accepted", "objective_before", "objective_after", "threshold", "moved")
    noises |= {name: getattr(found, name) for name in names}
    for k, leaf in enumerate(jax.tree.leaves(found.conditions)):
        noises[f"condition_{k}"] = leaf
    images: dict[str, Any] = {"ids": noises["ids"], "before": found.before, "after": found.after}
    if copies is not None:
        before, after = copies
        images |= {"copy_before": before.is_copy, "copy_after": after.is_copy}
        marks, meaning = (before.is_copy, after.is_copy), "a copy of a training image"
    else:
        marks = (np.zeros_like(found.accepted), ~found.accepted)
        meaning = "not accepted"
    figures = folder / "figures"
    with writing(folder, figures.name):
        for path in figures.iterdir():  # of an earlier call, which may have had more prompts
            if re.fullmatch(r"samples-\d{2}\.png", path.name):
                path.unlink()
        drawn = []
        for page in range(min(PAGES, -(-len(ids) // PAGE_ROWS))):
            rows = [
                SampleRow(
                    given["ids"][i],
                    [thumbnail(image) for image in found.before[i]],
                    [thumbnail(image) for image in found.after[i]],
                    (marks[0][i].tolist(), marks[1][i].tolist()),
                )
                for i in range(page * PAGE_ROWS, min(len(ids), (page + 1) * PAGE_ROWS))
            ]
            drawn.append(render(draw_samples, rows, meaning))
            write_atomically(figures / f"samples-{page + 1:02d}.png", drawn[-1])
        write_atomically(folder / "noises.npz", npz_file(noises))
        write_atomically(folder / "samples.npz", npz_file(images))
        write_table(folder / "table.csv", table)
        text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
        write_atomically(folder / "settings.json", text.encode())
        write_atomically(folder / "report.html", _page(table, drawn, meaning, settings))


def _page(
    table: list[dict[str, Any]], pictures: list[bytes], meaning: str, settings: dict[str, Any]
) -> bytes:
    """The report: settings, pictures, and the table."""
    from memjax.report._pictures import PageTable, picture_page

    titles = {
        "level": "noise level, in standard deviations of the data",
        "share": "share of the pull asked for",
        "samples": "samples of each prompt",
        "budget": "candidates at most",
        "guidance": "guidance of the sampler",
    }
    facts = {titles.get(name, name): value for name, value in settings.items() if value is not None}
    return picture_page(
        "mitigate",
        f"What does {settings['model']} draw from other noises?"
        if settings["method"] == "sail"
        else f"What does {settings['model']} draw from other embeddings?",
        "Samples of each prompt before and after, from as many noises. A frame marks "
        f"{meaning}. The objective is how much the prompt pulls; smaller is better.",
        facts,
        pictures,
        "Samples of each prompt before and after",
        [PageTable(TABLE_TITLE, *text_rows(table, _columns(table)))],
    )


def _columns(table: list[dict[str, Any]]) -> dict[str, str]:
    """Columns of the table that are shown, with their titles."""
    columns = {"id": "prompt", "status": "status", "accepted": "accepted"}
    columns |= {"objective_before": "objective", "objective_after": "after"}
    for name, title in (("copies", "copies"), ("own", "own")):
        if f"{name}_before" in table[0]:
            columns |= {f"{name}_before": title, f"{name}_after": "after"}
    return columns


def _show(folder: Path, given: dict[str, Any], table: list[dict[str, Any]], counted: bool) -> None:
    """The table, sums, and where everything lies."""
    import numpy as np

    text_table(TABLE_TITLE, table[:SHOWN], _columns(table))
    if len(table) > SHOWN:
        console.print(f"({len(table) - SHOWN:,} more prompts in the table)")
    if counted:
        kinds = np.array(given.get("kinds", ["all"] * len(table)))
        for kind in dict.fromkeys(kinds.tolist()):
            of = [row for row, own in zip(table, kinds == kind, strict=True) if own]
            before, after = (
                np.mean([row[f"copies_{when}"] for row in of]) for when in ("before", "after")
            )
            console.print(
                f"copies ({kind} prompts): {before:.1%} of the samples before, {after:.1%} after"
            )
    if "owners" in given:
        console.print("own: the nearest training image is one of the prompt's")
    products = np.mean([row["products"] for row in table])
    console.print(f"cost: {products:,.0f} network products a prompt, beside those of samples")
    for what, path in (
        ("noises", "noises.npz"),
        ("samples", "samples.npz"),
        ("table", "table.csv"),
    ):
        console.print(f"{what + ':':9}{folder / path}", markup=False, soft_wrap=True)
    console.print(f"figures: {folder / 'figures'}", markup=False, soft_wrap=True)
    console.print(f"report:  {folder / 'report.html'}", markup=False, soft_wrap=True)
