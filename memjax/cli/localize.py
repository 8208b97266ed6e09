"""``memjax localize``: which pixels of an image are stored."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from memjax._core.errors import InputError
from memjax.cli._choices import (
    check_folder,
    check_paths,
    npz_file,
    parse_numbers,
    prompt_conditions,
    text_rows,
    text_table,
    write_table,
    writing,
)
from memjax.cli.app import COMPLETED, cli, console, messages
from memjax.cli.conditions import image_shape, load_model, read_conditions, usual_guidance
from memjax.cli.progress import progress_bar

PAGE_ROWS, PAGES = 8, 12
SHOWN = 20
"""Rows in the terminal's table."""
TABLE_TITLE = "Stored share of each row's pixels, by {}"
QUALITY_TITLE = "Half-stored prompts, pixels that vary (95 % intervals); IoU of all pixels"
_DIGITS_MAP = "curvature_over_others"


@cli.command()
@click.argument("model", metavar="digits|MODEL_DIR")
@click.option(
    "--prompts",
    metavar="PROMPTS",
    help="Maps along the trajectories on which samples of these come about: whole numbers (0,5,7 "
    "or 0-19) or a text; or a .npy of numbers, a .txt with a prompt on every line.",
)
@click.option(
    "--data", metavar="PATH", help="Maps at these images with noise: a folder, .npy or .npz."
)
@click.option(
    "--conditions", metavar="PATH", help="For --data: .npy of numbers, or .txt of prompts."
)
@click.option(
    "--baseline",
    metavar="MODEL_DIR",
    help="A weaker model under the same conditions, such as an earlier checkpoint.",
)
@click.option("--out", metavar="DIR", help="Output folder (digits: memjax-localize).")
@click.option(
    "--map",
    "chosen",
    metavar="NAME",
    help="What masks are made of, such as curvature_over_others [default: curvature over the "
    "baseline, else over no condition, else over the other rows; digits: over the other rows].",
)
@click.option(
    "--levels",
    metavar="A,B,...",
    help="Noise levels in standard deviations of the data; masks are made of the mean over their "
    "logarithm [default: seven from 0.15 to 2.5].",
)
@click.option(
    "--draws",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Noises, or trajectories, that maps are averaged over.",
)
@click.option(
    "--products",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Probes for samples of more than 4,096 numbers; up to there maps are exact.",
)
@click.option(
    "--smooth",
    type=click.FloatRange(0),
    default=0.65,
    show_default=True,
    help="Blur the mean by so many pixels before the threshold.",
)
@click.option("--threshold", type=float, help="A pixel above it is called stored.")
@click.option(
    "--calibration",
    metavar="FILE",
    help="Rows whose stored pixels are known: .npz with 'masks' [n, h, w] and, for --data, their "
    "'images'. The threshold with the largest intersection over union there is taken.",
)
@click.option("--calibration-conditions", metavar="PATH", help="Their conditions.")
@click.option(
    "--guidance",
    type=float,
    help="Of the sampler, for --prompts [default: 7.5 for text, else 1].",
)
@click.option("--value-range", type=float, nargs=2, help="Black and white in float arrays.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--chunk-size", type=click.IntRange(1), help="Products evaluated together.")
def localize(
    model: str,
    prompts: str | None,
    data: str | None,
    conditions: str | None,
    baseline: str | None,
    out: str | None,
    chosen: str | None,
    levels: str | None,
    draws: int,
    products: int,
    smooth: float,
    threshold: float | None,
    calibration: str | None,
    calibration_conditions: str | None,
    guidance: float | None,
    value_range: tuple[float, float] | None,
    seed: int,
    chunk_size: int | None,
) -> int:
    """Show which pixels of an image a model has stored.

    A map says of every pixel which share of its variance is gone that it has without the
    condition, in a weaker model, or under the other prompts. "digits" runs a small model of which
    is known what it has stored (trained once; it is cached). Otherwise name the folder of a model,
    and --prompts or --data.

    Without --threshold or --calibration a mask is a convention: the mean over noise levels exceeds
    0.1 (0.5 for the curvature alone, 0 over the other rows). Nothing is known of its errors.

    Writes maps.npz (every map, signed, by level and channel, with standard errors), masks/*.png,
    figures/*.png, table.csv, settings.json and report.html into --out.

    Exit status: 0 completed, 2 bad usage or input, 4 incomplete.
    """
    from memjax.auditing.localization import (
        UNITS,
        available_maps,
        best_map,
        digits_rows,
        judge,
    )
    from memjax.auditing.localization import localize as make_maps

    if chosen is not None and chosen not in UNITS:
        raise click.BadParameter(f"expected one of {', '.join(UNITS)}", param_hint="--map")
    multiples = None if levels is None else parse_numbers("--levels", levels)
    if threshold is not None and calibration is not None:
        raise click.UsageError("--threshold and --calibration: expected one of them")
    if calibration_conditions is not None and calibration is None:
        raise click.UsageError("--calibration-conditions: there is no --calibration")
    brought = (prompts, data, conditions, baseline, calibration)
    if model == "digits":
        if any(option is not None for option in brought):
            raise click.UsageError(
                "'digits' brings its own prompts and baseline; drop --prompts, --data, "
                "--conditions, --baseline and --calibration"
            )
    elif (prompts is None) == (data is None):
        raise click.UsageError("expected either --prompts or --data: what to look at")
    elif conditions is not None and data is None:
        raise click.UsageError("--conditions: there is no --data")
    elif out is None:
        raise click.UsageError("--out DIR is missing: where to write the results")
    folder = check_folder(out or "memjax-localize", "masks", "figures")
    check_paths(
        None if model == "digits" else model,
        data=data,
        conditions=conditions,
        baseline=baseline,
        calibration=calibration,
        calibration_conditions=calibration_conditions,
    )

    with progress_bar(messages) as progress:
        if model == "digits":
            given = digits_rows(seed, progress)
            pictures = given.pop("pictures")
            if threshold is not None:
                given["calibration"] = None
        else:
            given, pictures = _own(
                model, prompts, data, conditions, baseline, calibration, calibration_conditions,
                value_range,
            )  # fmt: skip
        guidance = usual_guidance(given["model"]) if guidance is None else guidance
        possible = available_maps(**{k: v for k, v in given.items() if k != "model"})
        name = chosen or (_DIGITS_MAP if model == "digits" else best_map(possible))
        if name not in possible:
            raise InputError(f"--map: expected one of {', '.join(possible)} here, got {name}")
        found = make_maps(
            **given,
            threshold=threshold,
            levels=multiples,
            smoothing=smooth,
            num_draws=draws,
            num_products=products,
            guidance=guidance,
            chunk_size=chunk_size,
            seed=seed,
            progress=progress,
        )
        rows = given["rows"]
        if pictures is None:
            pictures = _draw(given["model"], rows.conditions, guidance, seed, progress)
    if model == "digits":
        baseline = "the same, trained for less long"
    settings = {
        "model": Path(model).name,
        "baseline": "the same, trained less"
        if model == "digits"
        else baseline and Path(baseline).name,
        "place": "noised images" if rows.images is not None else "trajectories of the sampler",
        "map": name,
        "unit": UNITS[name],
        "thresholds": found.thresholds,
        "threshold_from": _origin(threshold, found.calibrated),
        "sigmas": found.sigmas.tolist(),
        "data_std": given["model"].data_std,
        "smooth": smooth,
        "draws": draws,
        "products": products,
        "guidance": guidance,
        "seed": seed,
        "cost": {kind: int(count) for kind, count in found.cost._asdict().items()},
    }
    quality = None
    if rows.kinds is not None:
        import numpy as np

        quality = judge(found, rows, np.array(rows.kinds) == "template", smoothing=smooth)
        settings["quality"] = {
            of: {which: _numbers(one) for which, one in by.items()} for of, by in quality.items()
        }
    _write(folder, found, rows, pictures, name, settings)
    _show(folder, found, rows, name, settings)
    return COMPLETED


def _own(
    model_dir: str,
    prompts: str | None,
    data: str | None,
    conditions: str | None,
    baseline: str | None,
    calibration: str | None,
    calibration_conditions: str | None,
    value_range: tuple[float, float] | None,
) -> tuple[dict[str, Any], Any]:
    """Arguments of the library's ``localize``, and pictures of its rows if there are some."""
    import numpy as np

    from memjax.auditing.localization import Rows, encode_images
    from memjax.data._array_file import read_member
    from memjax.data.images import from_array, load_images

    model = load_model(model_dir)
    shape = image_shape(model, model_dir)
    pictures = None
    if data is not None:
        images = load_images(data, event_shape=shape, value_range=value_range)
        pictures = images.images
        latent = encode_images(model, pictures)
        given = read_conditions(conditions, len(images), model, model_dir)
        rows = Rows(images.ids, given, latent[:, None], images.status, images.reasons)
        if model.origin.assumed:
            std = float(np.std(latent[images.ok], dtype=np.float64))
            model = model.with_data_std(std, "measured on the images")
    else:
        assert prompts is not None
        ids, given = prompt_conditions(prompts, model, model_dir)
        rows = Rows(ids, given, None, np.zeros(len(ids), np.int32), ("",) * len(ids))
    known = None
    if calibration is not None:
        masks = read_member(Path(calibration), "masks") != 0
        if masks.ndim != 3:
            raise InputError(f"{calibration}: expected masks [n, h, w], found {list(masks.shape)}")
        latent, status = None, np.zeros(len(masks), np.int32)
        if data is not None:
            array = read_member(Path(calibration), "images")
            others = from_array(array, value_range=value_range)
            if others.event_shape != shape or len(others) != len(masks):
                raise InputError(
                    f"{calibration}: expected images of shape {list(shape)}, one for each of "
                    f"{len(masks)} masks, found {list(array.shape)}"
                )
            latent, status = encode_images(model, others.images)[:, None], others.status
        given = read_conditions(calibration_conditions, len(masks), model, model_dir)
        ids = tuple(f"calibration {i}" for i in range(len(masks)))
        known = Rows(ids, given, latent, status, ("",) * len(masks), masks)
    weaker = None if baseline is None else load_model(baseline)
    return {"model": model, "baseline": weaker, "rows": rows, "calibration": known}, pictures


def _draw(
    model: Any, conditions: Any, guidance: float, seed: int, progress: Callable[..., None]
) -> Any:
    """A sample of every prompt, to look at."""
    import jax
    import numpy as np

    from memjax.diffusion.sampling import decode_samples, sample

    samples = sample(
        model,
        len(jax.tree.leaves(conditions)[0]),
        key=seed,
        conditions=conditions,
        guidance=guidance,
        progress=lambda done, total: progress("drawing samples", done, total),
    )
    return np.asarray(decode_samples(model, samples))


def _origin(threshold: float | None, calibrated: bool) -> str:
    if threshold is not None:
        return "given"
    return "fitted to known masks" if calibrated else "convention, not calibrated"


def _numbers(quality: Any) -> dict[str, Any]:
    parts = {**quality.ranking._asdict(), **quality.overlap._asdict()}
    return {
        key: part._asdict() if hasattr(part, "_asdict") else part for key, part in parts.items()
    }


def _write(
    folder: Path, found: Any, rows: Any, pictures: Any, chosen: str, settings: dict[str, Any]
) -> None:
    """All files of the results, each whole."""
    import numpy as np

    from memjax._core.files import write_atomically
    from memjax.report._figures import render
    from memjax.report._images import png, thumbnail
    from memjax.report._maps import MapRow, draw_maps

    n, (height, width) = len(rows.ids), found.means[chosen].shape[1:]
    times = max(1, min(pictures.shape[1] // height, pictures.shape[2] // width))
    arrays: dict[str, Any] = {
        "ids": np.array([identity.encode("utf-8", "replace").decode() for identity in rows.ids]),
        "status": found.status,
        "sigmas": found.sigmas,
        "mask": found.masks[chosen],
        "settings": np.array(json.dumps(settings, sort_keys=True)),
    }
    for name, of in found.maps.items():
        arrays |= {f"{name}.{part}": values for part, values in of._asdict().items()}
        arrays |= {f"{name}.mean": found.means[name]}
        arrays |= {f"{name}.mean_standard_error": found.mean_errors[name]}
    for name, scan in found.scans.items():
        arrays |= {f"{name}.{part}": getattr(scan, part) for part in ("persistent", "released")}
    table = [_row(i, found, rows, chosen) for i in range(n)]
    usable = np.flatnonzero(found.status == 0)
    pages = [usable[k : k + PAGE_ROWS] for k in range(0, len(usable), PAGE_ROWS)][:PAGES]
    masks, figures = folder / "masks", folder / "figures"
    with writing(folder, masks.name, figures.name):
        _discard(masks, figures)
        for i in usable:
            mask = found.masks[chosen][i].repeat(times, 0).repeat(times, 1)
            write_atomically(masks / f"{i:05d}.png", png(255 * mask[..., None].astype(np.uint8)))
        drawn = []
        for number, page in enumerate(pages, start=1):
            shown = [
                MapRow(
                    rows.ids[i],
                    thumbnail(pictures[i]),
                    found.means[chosen][i],
                    found.masks[chosen][i],
                    None if rows.masks is None else rows.masks[i],
                )
                for i in page
            ]
            drawn.append(render(draw_maps, shown, settings["unit"]))
            write_atomically(figures / f"maps-{number:02d}.png", drawn[-1])
        write_atomically(folder / "maps.npz", npz_file(arrays))
        write_table(folder / "table.csv", table)
        text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
        write_atomically(folder / "settings.json", text.encode())
        page = _page(table, drawn, chosen, found.thresholds[chosen], settings)
        write_atomically(folder / "report.html", page)


def _page(
    table: list[dict[str, Any]],
    pictures: list[bytes],
    chosen: str,
    threshold: float,
    settings: dict[str, Any],
) -> bytes:
    """The report: settings, pictures, and the table."""
    from memjax.report._pictures import PageTable, picture_page

    columns = _columns(chosen, table)
    tables = [PageTable(TABLE_TITLE.format(chosen), *text_rows(table, columns))]
    if "quality" in settings:
        tables.append(PageTable(QUALITY_TITLE, *text_rows(*_quality(settings["quality"]))))
    facts = {
        "model": settings["model"],
        "weaker checkpoint": settings["baseline"] or "none",
        "made at": settings["place"],
        "map": chosen,
        "threshold": f"{threshold:.3g}, {settings['threshold_from']}",
        "noise levels": ", ".join(f"{sigma:.3g}" for sigma in settings["sigmas"]),
        "standard deviation of the data": f"{settings['data_std']:.3g}",
        "blur, pixels": settings["smooth"],
        "draws": settings["draws"],
        "guidance of the sampler": settings["guidance"],
        "seed": settings["seed"],
    }
    return picture_page(
        "localize",
        f"Which pixels has {settings['model']} stored?",
        "Red pixels are more pinned than the comparison explains, blue ones less; the mask is "
        f"where the map exceeds the threshold. Maps are the {settings['unit']}.",
        facts,
        pictures,
        "Image, map and mask of each row",
        tables,
    )


def _columns(chosen: str, table: list[dict[str, Any]]) -> dict[str, str]:
    """Columns of the table that are shown, with their titles."""
    columns = {"id": "row", "status": "status", "stored_share": "stored"}
    columns |= {f"{chosen}_mean": "map, mean", f"{chosen}_max": "map, max"}
    return columns | ({"true_share": "truth", "iou": "IoU"} if "iou" in table[0] else {})


def _discard(masks: Path, figures: Path) -> None:
    """Pictures of an earlier call, which may have had more rows."""
    for parent, pattern in ((masks, r"\d{5,}\.png"), (figures, r"maps-\d{2}\.png")):
        for path in parent.iterdir():
            if re.fullmatch(pattern, path.name):
                path.unlink()


def _row(i: int, found: Any, rows: Any, chosen: str) -> dict[str, Any]:
    """What the table says of one row."""
    from memjax._core.status import Status
    from memjax.evaluate.overlap import mask_iou

    status = Status(int(found.status[i]))
    row: dict[str, Any] = {"row": i, "id": rows.ids[i], "status": status.label}
    row |= {"reason": rows.reasons[i]}
    mask, ok = found.masks[chosen][i], status == Status.OK
    row["stored_share"] = float(mask.mean()) if ok else None
    for name, means in found.means.items():
        row[f"{name}_mean"] = float(means[i].mean()) if ok else None
        row[f"{name}_max"] = float(means[i].max()) if ok else None
        row[f"{name}_standard_error"] = float(found.mean_errors[name][i].mean()) if ok else None
    if rows.masks is not None:
        row["true_share"] = float(rows.masks[i].mean())
        row["iou"] = mask_iou(mask, rows.masks[i]) if ok else None
    return row


def _show(folder: Path, found: Any, rows: Any, chosen: str, settings: dict[str, Any]) -> None:
    """The table, the threshold, and where everything lies."""
    table = [_row(i, found, rows, chosen) for i in range(len(rows.ids))]
    text_table(TABLE_TITLE.format(chosen), table[:SHOWN], _columns(chosen, table))
    if len(table) > SHOWN:
        console.print(f"({len(table) - SHOWN:,} more rows in the table)")
    console.print(
        f"threshold: {found.thresholds[chosen]:.3g} ({settings['threshold_from']})", markup=False
    )
    if "quality" in settings:
        _show_quality(settings["quality"], chosen)
    for what, path in (("maps", "maps.npz"), ("masks", "masks"), ("table", "table.csv")):
        console.print(f"{what + ':':9}{folder / path}", markup=False, soft_wrap=True)
    console.print(f"figures: {folder / 'figures'}", markup=False, soft_wrap=True)
    console.print(f"report:  {folder / 'report.html'}", markup=False, soft_wrap=True)


def _quality(quality: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Every map against the known masks: rows, and the titles of their columns."""

    def interval(entry: dict[str, float]) -> str:
        return f"{entry['value']:.3f} [{entry['low']:.3f}, {entry['high']:.3f}]"

    rows = [
        {
            "map": name,
            "auroc": interval(by["counted"]["auroc"]),
            "iou": interval(by["counted"]["iou"]),
            "all": f"{by['all']['iou']['value']:.3f}",
        }
        for name, by in quality.items()
    ]
    return rows, {"map": "map", "auroc": "AUROC", "iou": "IoU", "all": "all"}


def _show_quality(quality: dict[str, Any], chosen: str) -> None:
    """Every map against the known masks, and what knows nothing."""
    text_table(QUALITY_TITLE, *_quality(quality))
    floor = quality[chosen]["counted"]["iou"]
    console.print(
        f"IoU of a mask of all pixels: {floor['all_ones']:.3f}; of as many at random: "
        f"{floor['random']:.3f}"
    )
