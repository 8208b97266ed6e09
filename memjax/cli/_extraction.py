"""Files, page and tables of ``memjax extract``."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from memjax.cli._choices import npz_file, text_rows, text_table, write_table, writing
from memjax.cli.app import console

PAGES = 6
SHOWN = 10
"""Rows in the terminal's table."""
TABLE_TITLE = "Candidates, found without the training images"
METHODS = {
    "fixed-points": "fixed points of the denoiser",
    "side": "SIDE: guided towards clusters of samples",
    "both": "fixed points from guided samples",
}
COPIES_TITLE = "Samples that copy a training image (95 % intervals)"
BANDS_TITLE = "Training images matched, by distance: % of samples (95 % intervals)"


class Result(NamedTuple):
    """What is written and shown.

    Attributes:
        given: model and images.
        found: by the extraction.
        judged: against the training images; ``None`` without any.
        settings: as written down.
    """

    given: dict[str, Any]
    found: Any
    judged: Any
    settings: dict[str, Any]


def _candidate_rows(result: Result) -> list[dict[str, Any]]:
    """What the table says of every candidate."""
    from memjax._core.status import Status

    facts, judged = result.found.candidates.facts, result.judged
    rows = []
    for k in range(len(result.found.candidates.points)):
        row: dict[str, Any] = {"rank": k + 1}
        for name, values in facts.items():
            value = values[k].item()
            row[name] = Status(value).label if name == "status" else value
        if judged is not None:
            reference, at = result.given["reference"], int(judged.nearest[k])
            row |= {
                "nearest": result.given["ids"][reference.rows[at]] if at >= 0 else None,
                "d1": float(judged.d1[k]),
                "ratio": float(judged.d1[k] / judged.d2[k]),
                "distance": float(judged.distance[k]),
                "copy": bool(judged.is_copy[k]),
                "times": int(reference.times[at]) if at >= 0 else None,
            }
        rows.append(row)
    return rows


def _score_rows(result: Result) -> list[dict[str, Any]]:
    """Every set of samples in every band."""
    rows = []
    for of, matches in zip(result.found.sets, result.judged.sets, strict=True):
        for band in matches.bands:
            row: dict[str, Any] = {"samples": of.name, "weight": of.weight, "fixed": of.fixed}
            row |= {"band_low": band.band[0], "band_high": band.band[1]}
            for name, value in (
                ("ams", band.ams),
                ("ums", band.ums),
                ("ums_best", band.ums_best),
                ("copied", matches.copied),
                ("distinct", matches.distinct),
                ("heldout", matches.heldout),
            ):
                ends = (None,) * 3 if value is None else map(float, value)
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
            row |= {"number": len(of.samples), "products": of.products}
            row |= {"gradients": of.gradients, "failed": band.failed}
            rows.append(row)
    return rows


def write(folder: Path, result: Result) -> None:
    """All files of the results, each whole."""
    import numpy as np

    from memjax._core.files import write_atomically

    found, judged, reference = result.found, result.judged, result.given["reference"]
    text = json.dumps(result.settings, indent=1, sort_keys=True) + "\n"
    arrays: dict[str, Any] = {"settings": np.array(text), "images": found.candidates.images}
    if found.candidates.points.shape != found.candidates.images.shape:
        arrays["latents"] = found.candidates.points
    arrays |= found.candidates.facts
    samples: dict[str, Any] = {"settings": np.array(text)}
    for k, of in enumerate(found.sets):
        name = of.name.replace(",", "").replace(" ", "_")
        samples[name] = of.samples
        if of.label is not None:
            samples[f"{name}.cluster"] = of.label
        if judged is not None:
            copies = judged.sets[k].copies
            samples |= {f"{name}.copy": copies.is_copy, f"{name}.nearest": _rows(reference, copies)}
    if judged is not None:
        arrays |= {"copy": judged.is_copy, "nearest": _rows(reference, judged)}
        arrays |= {name: getattr(judged, name) for name in ("d1", "d2", "distance")}
    table = _candidate_rows(result)
    figures = folder / "figures"
    with writing(folder, figures.name):
        for path in figures.iterdir():  # of an earlier call
            if re.fullmatch(r"(candidates-\d{2}|scores|curves)\.png", path.name):
                path.unlink()
        charts, pages = _charts(result), _pages(result, table)
        for name, chart in charts.items():
            write_atomically(figures / f"{name}.png", chart.png)
        for number, page in enumerate(pages, start=1):
            write_atomically(figures / f"candidates-{number:02d}.png", page)
        write_atomically(folder / "candidates.npz", npz_file(arrays))
        write_atomically(folder / "samples.npz", npz_file(samples))
        write_table(folder / "table.csv", table, _columns_of(result, table))
        (folder / "scores.csv").unlink(missing_ok=True)
        if judged is not None:
            write_table(folder / "scores.csv", _score_rows(result))
        write_atomically(folder / "settings.json", text.encode())
        page = _page(result, table, pages, list(charts.values()))
        write_atomically(folder / "report.html", page)


def _rows(reference: Any, found: Any) -> Any:
    """Rows of the data, for numbers of images of the reference; -1 for none."""
    import numpy as np

    return np.where(found.nearest >= 0, reference.rows[found.nearest], -1)


def _columns_of(result: Result, table: list[dict[str, Any]]) -> list[str]:
    """Columns of the table, even if it has no row."""
    return list(table[0]) if table else ["rank", *result.found.candidates.facts]


def _pages(result: Result, table: list[dict[str, Any]]) -> list[bytes]:
    """Candidates as pictures, beside the training images nearest to them."""
    from memjax.report._extraction import PER_PAGE, CandidatePicture, draw_candidates
    from memjax.report._figures import render
    from memjax.report._images import thumbnail

    judged, reference = result.judged, result.given["reference"]
    tiles = []
    per_page = PER_PAGE[judged is not None]
    for k, row in enumerate(table[: PAGES * per_page]):
        nearest, marked = None, False
        if judged is not None and judged.nearest[k] >= 0:
            nearest = thumbnail(reference.images[judged.nearest[k]])
            marked = bool(judged.is_copy[k])
        label = f"#{row['rank']} \u00d7{row['hits']}"
        image = thumbnail(result.found.candidates.images[k])
        tiles.append(CandidatePicture(label, image, nearest, marked))
    meaning = "a copy of the training image on its right"
    return [
        render(draw_candidates, tiles[start : start + per_page], meaning)
        for start in range(0, len(tiles), per_page)
    ]


def _charts(result: Result) -> dict[str, Any]:
    """Figures of what samples give away."""
    import numpy as np

    from memjax.report._extraction import Curve, ScorePanel, draw_curves, draw_scores
    from memjax.report._figures import render
    from memjax.report._pictures import Chart

    if result.judged is None:
        return {}
    pairs = list(zip(result.found.sets, result.judged.sets, strict=True))
    guided = _guided(result)

    def panel(title: str, chosen: list[Any]) -> Any:
        scores: dict[str, dict[str, Any]] = {"AMS": {}, "UMS": {}}
        for k, (low, high) in enumerate(result.settings["bands"]):
            for name in scores:
                values = [getattr(matches.bands[k], name.lower()) for _, matches in chosen]
                scores[name][f"{low:g} to {high:g}"] = 100.0 * np.array(values)
        ticks = [f"{of.weight:g}" if guided else of.name for of, _ in chosen]
        return ScorePanel(title, ticks, scores, guided)

    if guided:
        parts = {"guided": False, "fixed points": True}
        chosen = {t: [pair for pair in pairs if pair[0].fixed == f] for t, f in parts.items()}
        panels = [panel(title, some) for title, some in chosen.items() if some]
    else:
        panels = [panel("", pairs)]
    curves = [
        Curve(
            of.name,
            *(getattr(matches.curve, part) for part in ("size", "value", "low", "high")),
            dashed=of.fixed,
        )
        for of, matches in pairs
    ]
    label = "weight of the guidance" if guided else ""
    return {
        "scores": Chart(
            render(draw_scores, panels, label),
            "What samples give away",
            "AMS: samples whose nearest training image lies in the band of distance. UMS: training "
            "images in the band of some sample, per sample drawn. Intervals at 95 %.",
        ),
        "curves": Chart(
            render(draw_curves, curves),
            "How many different images",
            "Expected number of training images copied (d1/d2 < 1/3) by so many samples, with "
            "95 % intervals.",
        ),
    }


def _page(
    result: Result, table: list[dict[str, Any]], pictures: list[bytes], charts: list[Any]
) -> bytes:
    """The report: settings, pictures, and the tables."""
    from memjax.report._pictures import PageTable, picture_page

    settings, plan = result.settings, result.found.plan
    facts = {
        "model": settings["model"],
        "training images": settings["data"] or "not given",
        "method": METHODS[plan["method"]],
        "samples" if plan["method"] == "fixed-points" else "samples of every weight": (
            f"{plan['samples']:,}"
        ),
        "standard deviation of the data": f"{settings['data_std']:.3g}",
    }
    if "sigma" in settings:
        facts["noise level of the fixed points"] = f"{settings['sigma']:.3g}"
        facts["came to rest"] = f"{settings['converged']:,} of {settings['starts']:,}"
    if "side" in plan:
        facts |= _side_facts(plan["side"], settings)
    facts["seed"] = plan["seed"]
    tables = [PageTable(TABLE_TITLE, *text_rows(table, _shown_columns(result)))]
    if result.judged is not None:
        tables = [
            PageTable(COPIES_TITLE, *text_rows(*_copies(result))),
            PageTable(BANDS_TITLE, *text_rows(*_bands(result))),
            *tables,
        ]
    lede = "Candidates for stored images, found without any training image, the likeliest first: "
    lede += "rank, and how many samples came to each."
    if result.judged is not None:
        lede += " On its right, the training image nearest to it."
    return picture_page(
        "extract",
        f"What does {settings['model']} give back of its training set?",
        lede,
        facts,
        pictures,
        "Candidates",
        tables,
        charts,
    )


def _side_facts(side: dict[str, Any], settings: dict[str, Any]) -> dict[str, str]:
    """What the page says of clusters and classifier."""
    kept, dropped = len(settings["cluster_size"]), len(settings["cluster_dropped_size"])
    window = side["window"]
    classifier = "exact posterior of the pool"
    if "classifier" in settings:
        sigmas, spread = (settings["classifier"][name] for name in ("sigmas", "accuracy"))
        classifier = f"accuracy {spread[0]:.1%} at sigma {sigmas[0]:.2g}, "
        classifier += f"{spread[-1]:.1%} at {sigmas[-1]:.2g}"
    return {
        "clusters": f"{kept} of {kept + dropped}, from {side['pool']:,} samples "
        f"({settings['pool_products']:,} network products)",
        "mean cosine to the center": f"{settings['cluster_cohesion'][-1]:.2f} to "
        f"{settings['cluster_cohesion'][0]:.2f}",
        "classifier": classifier,
        "guided": "at all noise levels"
        if window is None
        else f"from {window[0]:g} to {window[1]:g} standard deviations of the data",
        "push": ("in units of the score" if side["normalize"] else "weight times gradient")
        + ("" if side["limit"] is None else f", at most {side['limit']:g} times the score"),
    }


def _shown_columns(result: Result) -> dict[str, str]:
    """Columns of the table that are shown, with their titles."""
    columns = {"rank": "rank", "hits": "hits"}
    if result.found.plan["method"] == "side":
        columns |= {"weight": "weight", "cluster": "cluster", "contrast": "contrast"}
    else:
        columns |= {"radius": "radius", "residual": "residual"}
    if result.judged is not None:
        columns |= {"copy": "copy", "ratio": "d1/d2", "nearest": "nearest", "times": "times"}
    return columns


def _interval(value: Any, scale: float = 100.0, digits: int = 1) -> str:
    """A number and its interval."""
    if value is None:
        return ""
    ends = [f"{scale * end:.{digits}f}" for end in value]
    return f"{ends[0]} [{ends[1]}, {ends[2]}]"


def _copies(result: Result) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Copies among every set of samples: rows, and the titles of their columns."""
    rows = [
        {
            "samples": _short(of),
            "copied": _interval(matches.copied),
            "distinct": _interval(matches.distinct, 1.0, 0),
            "heldout": _interval(matches.heldout),
            "products": of.products // len(of.samples),
        }
        for of, matches in zip(result.found.sets, result.judged.sets, strict=True)
    ]
    titles = {"samples": _kind(result), "copied": "% copies", "distinct": "images"}
    if result.given["heldout"] is not None:
        titles["heldout"] = "% held out"
    return rows, titles | {"products": "products"}


def _guided(result: Result) -> bool:
    return any(of.weight is not None for of in result.found.sets)


def _kind(result: Result) -> str:
    """What sets of samples differ in."""
    return "weight" if _guided(result) else "samples"


def _short(of: Any) -> str:
    """A set of samples, under that title."""
    return of.name.removeprefix("weight ")


def _bands(result: Result, most: int | None = None) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """AMS and UMS of every set of samples in the nearest bands: rows, and their titles."""
    rows = [
        {
            "samples": _short(of),
            "band": f"{band.band[0]:g} to {band.band[1]:g}",
            "ams": _interval(band.ams),
            "ums": _interval(band.ums),
            "best": _interval(band.ums_best),
        }
        for of, matches in zip(result.found.sets, result.judged.sets, strict=True)
        for band in matches.bands[:most]
    ]
    titles = {"samples": _kind(result), "band": "distance", "ams": "AMS", "ums": "UMS"}
    return rows, titles | {"best": "nearest only"}


def show(folder: Path, result: Result) -> None:
    """The tables, sums, and where everything lies."""
    table, settings, plan = _candidate_rows(result), result.settings, result.found.plan
    rest = ""
    if "starts" in settings:
        rest = f"; {settings['converged']:,} of {settings['starts']:,} samples came to rest"
    text_table(TABLE_TITLE, table[:SHOWN], _shown_columns(result))
    if len(table) > SHOWN:
        console.print(f"({len(table) - SHOWN:,} more candidates in the table)")
    console.print(f"candidates: {len(table):,}{rest}")
    if result.judged is not None:
        text_table(COPIES_TITLE, *_copies(result))
        text_table(BANDS_TITLE, *_bands(result, 1))
        _show_truth(result)
    if "side" in plan:
        steps = plan["side"]["steps"] if "classifier" in settings else 0
        console.print(
            f"beside these: {settings['pool_products']:,} network products for the pool, and "
            f"{steps:,} steps of the classifier",
            soft_wrap=True,
        )
    for what, path in (
        ("candidates", "candidates.npz"),
        ("samples", "samples.npz"),
        ("table", "table.csv"),
        ("figures", "figures"),
        ("report", "report.html"),
    ):
        console.print(f"{what + ':':12}{folder / path}", markup=False, soft_wrap=True)


def _show_truth(result: Result) -> None:
    """How many candidates are training images, and how many of these were reached."""
    import numpy as np

    judged, times = result.judged, result.given["reference"].times
    n, copies = len(judged.is_copy), int(judged.is_copy.sum())
    console.print(f"training images (d1/d2 < 1/3): {copies:,} of {n:,} candidates")
    reached = np.zeros(len(times), bool)
    reached[judged.nearest[judged.is_copy]] = True
    kinds = {"several times": times > 1, "once": times == 1}
    for words, of in kinds.items():
        if of.any():
            console.print(
                f"reached: {int(reached[of].sum()):,} of {int(of.sum()):,} images that stand in "
                f"the data {words}"
            )
