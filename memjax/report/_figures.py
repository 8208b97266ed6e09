"""The figures of a report, drawn from what the audit folder says.

Every figure is 4.6 inches wide: two stand side by side at 1,280 pixels, and one stays legible at
400. Nothing here touches pyplot. Text from outside is drawn as it stands (no mathematics, no
TeX), and characters that the font lacks are replaced.
"""

import bisect
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from memjax._core.errors import require
from memjax._core.text import one_line
from memjax.report._folder import Audit, Calibration
from memjax.report._record import Record

# Okabe and Ito's palette (2008), told apart by color-blind readers.
_BLUE, _ORANGE, _VERMILLION, _GREEN = "#0072b2", "#e69f00", "#d55e00", "#009e73"
_INK, _MUTED, _GRID, _GRAY = "#1c2126", "#59626c", "#e4e6e9", "#a9b0b8"
_WIDTH = 4.6
_STYLE: dict[str, Any] = {
    "figure.dpi": 240.0,
    "figure.facecolor": "white",
    "font.family": ["DejaVu Sans"],  # the font matplotlib brings: the same bytes everywhere
    "font.size": 10.0,
    "axes.labelsize": 10.0,
    "axes.edgecolor": _GRAY,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "legend.fontsize": 9.0,
    "legend.frameon": False,
    "text.color": _INK,
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": _MUTED,
    "xtick.labelsize": 9.5,
    "ytick.color": _MUTED,
    "ytick.labelsize": 9.5,
}
_DRAWN = 4000
"""Points of one color in a scatter; above this many every k-th rank is drawn."""
_DOTS = 20
"""Detectors times contrasts in the figure of metrics; the table on the page has all."""
_PAIRS = 24
"""Image pairs in the gallery figure."""


def drawable(text: str, inches: float, *, size: float = 10.0, weight: str = "normal") -> str:
    """Text that fits: one line, in characters the font has, cut off at a width.

    Args:
        text: any string.
        inches: room for it.
        size: of the font, in points.
        weight: of the font, ``"normal"`` or ``"bold"``.

    Returns:
        The text; ``?`` for a character the font lacks, an ellipsis where it was cut.
    """
    fonts = require("matplotlib.font_manager", "audit")
    properties = fonts.FontProperties(family="DejaVu Sans", weight=weight)
    font = fonts.get_font(fonts.findfont(properties))
    known = font.get_charmap()
    line = one_line(text, limit=200)
    line = "".join(character if ord(character) in known else "?" for character in line)
    font.set_size(size, _STYLE["figure.dpi"])

    def fits(part: str) -> bool:
        font.set_text(part)
        return font.get_width_height()[0] <= 64.0 * _STYLE["figure.dpi"] * inches

    if fits(line):
        return line
    kept = bisect.bisect_left(range(len(line)), True, key=lambda n: not fits(line[:n] + "\u2026"))
    return line[: max(0, kept - 1)].rstrip() + "\u2026"


def render(draw: Callable[..., Any], *arguments: Any) -> bytes:
    """Draw a figure in the report's style and return it as a PNG file.

    Args:
        draw: a function that returns a matplotlib figure, such as ``draw_maps``.
        *arguments: for ``draw``.

    Returns:
        The same bytes for the same arguments and versions; metadata names no date.
    """
    matplotlib = require("matplotlib", "audit")
    canvas = require("matplotlib.backends.backend_agg", "audit").FigureCanvasAgg
    # The reader's own matplotlibrc must not change a report; settings are put back afterwards.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = draw(*arguments)
        buffer = io.BytesIO()
        canvas(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _figure(height: float) -> Any:
    figure = require("matplotlib.figure", "audit").Figure(
        figsize=(_WIDTH, height), layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    return figure


def _truth_colors(audit: Audit) -> list[Any]:
    """Gray for images never trained on, then from light to dark with growing multiplicity."""
    shades = require("matplotlib", "audit").colormaps["plasma_r"]
    trained = sum(group.trained for group in audit.groups)
    ramp = iter(shades(np.linspace(0.18, 0.95, max(trained, 1))))
    return [next(ramp) if group.trained else _GRAY for group in audit.groups]


def _thin(member: Bool[np.ndarray, "n"], ranks: Float[np.ndarray, "n"]) -> Any:
    """Indices of the members in order of rank, evenly thinned to a number that can be drawn."""
    index = np.flatnonzero(member & np.isfinite(ranks))
    index = index[np.argsort(ranks[index], kind="stable")]
    if len(index) <= _DRAWN:
        return index
    # Evenly in the logarithm of the position, as the axis is: the first ranks are all there.
    places = np.geomspace(1.0, len(index), _DRAWN) - 1.0
    return index[np.unique(np.rint(places).astype(np.int64))]


def _score_scale(axes: Any, side: str, scores: Float[np.ndarray, "n"]) -> None:
    """Linear, unless a few scores lie so far out that the rest would be one line."""
    ticker = require("matplotlib.ticker", "audit")
    axis = getattr(axes, f"{side}axis")
    finite = scores[np.isfinite(scores)]
    low, high = np.quantile(finite, (0.05, 0.95)) if len(finite) else (0.0, 0.0)
    bulk = max(abs(low), abs(high))
    if 0.0 < 50.0 * (high - low) < np.ptp(finite) and np.abs(finite).max() > 50.0 * bulk:
        edge = 10.0 ** np.ceil(np.log10(bulk))  # linear up to here, logarithmic beyond
        getattr(axes, f"set_{side}scale")("symlog", linthresh=edge)
        axis.get_major_locator().set_params(numticks=6)
        ends = np.array([finite.min(), finite.max()])
        room = np.maximum(0.3 * edge, 0.6 * np.abs(ends))
        getattr(axes, f"set_{side}lim")(ends[0] - room[0], ends[1] + room[1])
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.6g}"))


def _score_label(audit: Audit) -> str:
    return f"{drawable(audit.primary.title, 2.2)}\n(larger = more memorized)"


def _kinds(audit: Audit) -> list[tuple[str, Any, Bool[np.ndarray, "n"]]]:
    """Label, color and members of each kind of ranked row, the most telling kind last."""
    ranked = audit.ranked
    if audit.groups:
        unknown = ~np.any([group.member for group in audit.groups], axis=0)
        kinds = [("not known", _GRAY, unknown)]
        kinds += [
            (drawable(group.label, 0.9, size=9.0), color, group.member)
            for group, color in zip(audit.groups, _truth_colors(audit), strict=True)
        ]
    else:
        flagged, calibrates = np.zeros_like(ranked), np.zeros_like(ranked)
        for calibration in audit.calibrations:
            flagged |= calibration.flagged
            calibrates |= calibration.calibrates
        kinds = [
            ("calibration", _GRAY, calibrates & ~flagged),
            ("not flagged" if audit.calibrations else "audited", _BLUE, ~calibrates & ~flagged),
            ("flagged", _VERMILLION, flagged),
        ]
    return [(label, color, member & ranked) for label, color, member in kinds
            if (member & ranked).any()]  # fmt: skip


def draw_ranking(audit: Audit) -> Any:
    """Scores of the primary detector by rank, and below them a strip for each kind of row."""
    ticker = require("matplotlib.ticker", "audit")
    kinds = _kinds(audit)
    strips = list(kinds)
    if audit.stored is not None and (audit.stored & audit.ranked).any():
        strips.append(("stored", _INK, audit.stored & audit.ranked))
    pitch = 0.2
    figure = _figure(3.1 + pitch * len(strips))
    curve, barcode = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": (2.2, pitch * len(strips))}
    )
    # Large groups first, so that a few rows are never hidden under many.
    for _, color, member in sorted(kinds, key=lambda kind: -int(kind[2].sum())):
        index = _thin(member, audit.ranks)
        curve.scatter(
            audit.ranks[index], audit.scores[index], s=18, color=[color], linewidths=0, zorder=2
        )
    for calibration, style in zip(audit.calibrations, ("--", ":"), strict=False):
        flagged = audit.scores[calibration.flagged & np.isfinite(audit.scores)]
        if len(flagged):
            curve.axhline(
                float(flagged.min()),
                color=_INK,
                linestyle=style,
                linewidth=1.2,
                label=f"lowest score flagged: {calibration.meaning}",
            )
    if curve.get_legend_handles_labels()[0]:
        curve.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)
    curve.grid(color=_GRID, linewidth=0.8)
    curve.tick_params(axis="x", which="both", length=0)
    _score_scale(curve, "y", audit.scores)
    curve.set_ylabel(_score_label(audit))
    for place, (_, color, member) in enumerate(strips):
        index = _thin(member, audit.ranks)
        barcode.vlines(audit.ranks[index], place - 0.38, place + 0.38, color=[color], linewidth=0.9)
    barcode.set_ylim(-0.6, len(strips) - 0.4)
    barcode.set_yticks(range(len(strips)), [label for label, _, _ in strips], fontsize=9.0)
    barcode.tick_params(axis="y", length=0, labelcolor=_INK)
    barcode.spines["left"].set_visible(False)
    barcode.set_xscale("log")
    barcode.xaxis.set_major_locator(ticker.LogLocator(numticks=8))
    barcode.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    barcode.xaxis.set_minor_formatter(ticker.NullFormatter())
    barcode.set_xlim(0.8, max(10.0, 1.25 * audit.ranked.sum()))
    barcode.set_xlabel("rank (1 = highest score; logarithmic)")
    return figure


def draw_distribution(audit: Audit) -> Any:
    """Scores by known truth, or else against the calibration images, or else alone."""
    groups = [g for g in audit.groups if np.isfinite(audit.scores[g.member]).any()]
    return _draw_groups(audit) if groups else _draw_histograms(audit)


def _short(count: int) -> str:
    return f"n={count:,}" if count < 10_000 else f"n={count / 1000:,.0f}k"


def _draw_groups(audit: Audit) -> Any:
    figure = _figure(3.5)
    axes = figure.add_subplot()
    labels = []
    for group, color in zip(audit.groups, _truth_colors(audit), strict=True):
        scores = audit.scores[_thin(group.member & np.isfinite(audit.scores), audit.ranks)]
        if not len(scores):
            continue
        place = len(labels)
        # The golden ratio spreads points evenly, and the same way every time.
        spread = (np.arange(len(scores)) * 0.6180339887498949) % 1.0 - 0.5
        axes.scatter(
            place + 0.56 * spread, scores, s=10, color=[color], alpha=0.6, linewidths=0, zorder=2
        )
        everything = audit.scores[group.member & np.isfinite(audit.scores)]
        if len(everything) >= 5:  # below that a box would be made up
            _box(axes, place, everything)
        labels.append((group.label, len(everything)))
    room = 3.6 / max(len(labels), 5)
    texts = [
        "\n".join(drawable(word, room, size=9.0) for word in [*label.split()[:2], _short(n)])
        for label, n in labels
    ]
    axes.set_xticks(range(len(labels)), texts, fontsize=9.0)
    axes.tick_params(axis="x", length=0, labelcolor=_INK)
    margin = max(0.6, 0.5 * (5 - len(labels)))
    axes.set_xlim(-margin, len(labels) - 1 + margin)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    _score_scale(axes, "y", audit.scores)
    axes.set_xlabel(audit.grouping)
    axes.set_ylabel(_score_label(audit))
    return figure


def _box(axes: Any, place: int, values: Float[np.ndarray, "_"]) -> None:
    """Median, quartiles, and whiskers to the last value within 1.5 box heights.

    Drawn by hand: matplotlib's own box plot looks through all settings, which imports pyplot.
    """
    stats = require("matplotlib.cbook", "audit").boxplot_stats(values)[0]
    low, high, half = stats["q1"], stats["q3"], 0.32
    line = {"color": _INK, "zorder": 3, "solid_capstyle": "butt"}
    for end, start in ((stats["whislo"], low), (stats["whishi"], high)):
        axes.plot([place, place], [start, end], linewidth=1.0, **line)
        axes.plot([place - half / 2, place + half / 2], [end, end], linewidth=1.0, **line)
    sides = [place - half, place + half, place + half, place - half, place - half]
    axes.plot(sides, [low, low, high, high, low], linewidth=1.0, **line)
    axes.plot([place - half, place + half], [stats["med"]] * 2, linewidth=2.0, **line)


def _draw_histograms(audit: Audit) -> Any:
    # Calibration images from elsewhere have no rows here: then the tested rows stand alone.
    panels: list[Calibration | None] = [*audit.calibrations] or [None]
    figure = _figure(0.6 + 2.3 * len(panels) if len(panels) > 1 else 3.5)
    scores = audit.scores[np.isfinite(audit.scores)]
    edges = np.histogram_bin_edges(scores, bins=40)
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, calibration in zip(grid, panels, strict=True):
        finite = np.isfinite(audit.scores)
        if calibration is None:
            parts = [("audited", _BLUE, finite)]
        else:
            parts = [
                ("calibration", _GRAY, calibration.calibrates & finite),
                ("tested", _BLUE, calibration.tested & finite),
            ]
        handles = []
        for label, color, member in parts:
            part = audit.scores[member]
            if len(part):
                _, _, shapes = axes.hist(
                    part,
                    edges,
                    weights=np.full(len(part), 100.0 / len(part)),
                    histtype="stepfilled",
                    alpha=0.55,
                    color=color,
                    edgecolor=color,
                    linewidth=1.4,
                    label=f"{label}, {_short(len(part))}",
                )
                handles.append(shapes[0])
        if calibration is not None and (calibration.flagged & finite).any():
            lowest = float(audit.scores[calibration.flagged & finite].min())
            handles.append(
                axes.axvline(
                    lowest,
                    color=_VERMILLION,
                    linestyle="--",
                    linewidth=1.4,
                    label="lowest score flagged",
                )
            )
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_ylabel("% of images")
        axes.legend(
            title=None if calibration is None else calibration.meaning,
            title_fontproperties={"size": 9.5, "weight": "bold"},
            alignment="left",
            handles=handles,
            loc="lower left",
            bbox_to_anchor=(0.0, 1.0),
            ncols=2,
            borderaxespad=0.2,
            columnspacing=1.2,
        )
    _score_scale(grid[-1], "x", scores)
    grid[-1].set_xlabel(_score_label(audit))
    return figure


def figure_rate(contrasts: list[Record]) -> float | None:
    """The false-positive rate shown in the figure: 1 % if it was resolved, else another that was.

    Args:
        contrasts: records of metrics.json.

    Returns:
        The rate; ``None`` if there is none at all.
    """
    entries = [entry for record in contrasts for entry in record.records("tpr_at_fpr")]
    rates = [entry.number("fpr") for entry in entries if entry.flag("resolvable") is not False]
    rates = [r for r in rates or [e.number("fpr") for e in entries] if np.isfinite(r)]
    return 0.01 if 0.01 in rates else min(rates, default=None)


def draw_metrics(audit: Audit) -> Any:
    """AUROC and true-positive rate with intervals: a dot per detector, a block per contrast."""
    records = audit.metrics.records("contrasts")
    rate = figure_rate(records)
    blocks: dict[tuple[str, str], dict[str, Record]] = {}
    for record in records:
        key = (record.text("positives", limit=60), record.text("negatives", limit=60))
        blocks.setdefault(key, {})[str(record.values.get("detector"))] = record
    shown = list(blocks.items())[: max(1, _DOTS // max(1, len(audit.detectors)))]
    low = min(_lowest(record) for _, block in shown for record in block.values())
    left_end, ticks = (0.4, [0.5, 0.75, 1.0]) if low >= 0.4 else (-0.06, [0.0, 0.5, 1.0])
    counts = [sum(d.name in block for d in audit.detectors) for _, block in shown]
    # Laid out by hand, in inches: titles stand over the detectors' names, and panels line up.
    left, gap, right, title_height, pitch, foot = 1.9, 0.16, 0.1, 0.36, 0.25, 0.55
    panel_width = (_WIDTH - left - gap - right) / 2.0
    height = 0.08 + sum(title_height + pitch * (n + 0.2) for n in counts) + foot
    figure = require("matplotlib.figure", "audit").Figure(figsize=(_WIDTH, height))
    top = height - 0.08
    for row, ((positives, negatives), block) in enumerate(shown):
        count = counts[row]
        title = drawable(f"{positives} vs {negatives}", _WIDTH - 0.24, size=9.5, weight="bold")
        figure.text(
            0.12 / _WIDTH, (top - 0.12) / height, title,
            fontsize=9.5, fontweight="bold", va="center",
        )  # fmt: skip
        bottom = top - title_height - pitch * (count + 0.2) + 0.1
        axes = [
            figure.add_axes(
                (
                    (left + column * (panel_width + gap)) / _WIDTH,
                    bottom / height,
                    panel_width / _WIDTH,
                    pitch * (count + 0.2) / height,
                )
            )
            for column in (0, 1)
        ]
        top = bottom - 0.1
        detectors = [d for d in audit.detectors if d.name in block]
        for place, detector in enumerate(detectors):
            record = block[detector.name]
            color, marker = (_VERMILLION, "D") if detector is audit.primary else (_BLUE, "o")
            _dot(axes[0], place, record.record("auroc"), color, marker)
            for entry in record.records("tpr_at_fpr"):
                if entry.number("fpr") == rate:
                    _dot(axes[1], place, entry, color, marker)
        for panel, limits, places, chance in (
            (axes[0], (left_end, 1.03 if low >= 0.4 else 1.06), ticks, 0.5),
            (axes[1], (-0.06, 1.06), [0.0, 0.5, 1.0], rate),
        ):
            panel.set_xlim(limits)
            panel.set_xticks(places, [])
            panel.set_ylim(count - 0.4, -0.6)
            panel.set_yticks([])
            panel.grid(axis="x", color=_GRID, linewidth=0.8)
            panel.tick_params(length=0)
            if chance is not None:
                panel.axvline(chance, color=_GRAY, linewidth=1.2, linestyle=":")
        axes[0].set_yticks(
            range(count),
            [drawable(d.title, left - 0.12, size=9.0) for d in detectors],
            fontsize=9.0,
        )
        axes[0].tick_params(axis="y", labelcolor=_INK)
        if row == len(shown) - 1:  # the last block carries the scale
            axes[0].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes[1].set_xticks([0.0, 0.5, 1.0], ["0", "0.5", "1"])
            axes[0].set_xlabel("AUROC")
            axes[1].set_xlabel("TPR" if rate is None else f"TPR at {100.0 * rate:g} % FPR")
    return figure


def _lowest(record: Record) -> float:
    auroc = record.record("auroc")
    ends = [auroc.number(key) for key in ("value", "low")]
    return min((end for end in ends if np.isfinite(end)), default=1.0)


def _dot(axes: Any, place: int, record: Record, color: str, marker: str) -> None:
    value, low, high = (record.number(key) for key in ("value", "low", "high"))
    if record.flag("resolvable") is False or not np.isfinite(value):
        axes.text(0.5, place, "not resolvable", ha="center", va="center", fontsize=8.5,
                  color=_MUTED, transform=axes.get_yaxis_transform())  # fmt: skip
        return
    if np.isfinite(low) and np.isfinite(high):
        axes.plot([low, high], [place, place], color=color, linewidth=2.0, solid_capstyle="butt")
    axes.plot([value], [place], marker=marker, markersize=6.0, color=color, linestyle="")


def draw_gallery(
    audit: Audit,
    images: list[UInt8[np.ndarray, "_ _ _"]],
    nearest: list[UInt8[np.ndarray, "_ _ _"] | None],
) -> Any:
    """The first ranks as pictures: audited image, and the generated sample nearest to it.

    Args:
        audit: says which of them are stored.
        images: thumbnails of the gallery's images.
        nearest: thumbnails of the samples; ``None`` where there is none.

    Returns:
        A matplotlib figure of at most 24 pairs.
    """
    count = max(1, min(_PAIRS, len(images)))
    across = 4
    down = -(-count // across)
    pair = any(sample is not None for sample in nearest)
    cell_width, cell_height = (2.36, 1.46) if pair else (1.36, 1.46)
    width, height = across * cell_width, down * cell_height
    figure = _figure(_WIDTH * height / width + 0.3)
    axes = figure.add_subplot()
    axes.set_xlim(0.0, width)
    axes.set_ylim(height, 0.0)
    axes.set_aspect("equal")
    axes.set_axis_off()
    for index in range(min(count, len(images))):
        left = index % across * cell_width + 0.13
        top = index // across * cell_height + 0.38
        for offset, pixels in ((0.0, images[index]), (1.02, nearest[index])):
            if pixels is None:
                continue
            rows, columns = pixels.shape[:2]
            high, wide = rows / max(rows, columns), columns / max(rows, columns)
            axes.imshow(
                pixels if pixels.shape[2] == 3 else pixels[:, :, 0],
                cmap="gray",
                vmin=0,
                vmax=255,
                interpolation="nearest",
                extent=(left + offset, left + offset + wide, top + high, top),
            )
        entry = audit.shown[index]
        rank = entry.get("rank")
        axes.text(
            left, top - 0.08, f"{rank}" + (" stored" if entry.get("stored") else ""),
            fontsize=9.0, va="bottom", fontweight="bold" if entry.get("stored") else "normal",
        )  # fmt: skip
    axes.set_xlim(0.0, width)
    axes.set_ylim(height, 0.0)
    figure.suptitle(
        "Rank, audited image, nearest generated sample" if pair else "Rank and audited image",
        x=0.02,
        ha="left",
        fontsize=10.0,
    )
    return figure
