"""Pictures of an extraction: candidates beside training images, and how much samples give away."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from memjax._core.errors import require
from memjax.report._figures import (
    _BLUE,
    _GRAY,
    _GREEN,
    _GRID,
    _INK,
    _MUTED,
    _ORANGE,
    _VERMILLION,
    _WIDTH,
    _figure,
    drawable,
)
from memjax.report._maps import _frame, _picture

_EDGE, _GAP, _LINE = 0.08, 0.05, 0.2
_ACROSS = {True: 4, False: 6}
PER_PAGE = {True: 40, False: 48}
"""Candidates on a page, with training images and without."""
_BAND_COLORS = (_VERMILLION, _ORANGE, _BLUE, _GREEN, _MUTED)
_PAIR = (_MUTED, _VERMILLION)


class CandidatePicture(NamedTuple):
    """A candidate, and the training image nearest to it.

    Attributes:
        label: above it, any text.
        image: as 8-bit pixels, see ``thumbnail``.
        nearest: likewise; ``None`` where no training image is known.
        marked: whether it gets a frame.
    """

    label: str
    image: UInt8[np.ndarray, "_ _ _"]
    nearest: UInt8[np.ndarray, "_ _ _"] | None = None
    marked: bool = False


class ScorePanel(NamedTuple):
    """What k sets of samples give away.

    Attributes:
        title: what they have in common; empty for nothing.
        ticks: what tells them apart, k texts.
        scores: by name of a score, and then of a band: value and interval of each, in percent.
        joined: whether a line joins them.
    """

    title: str
    ticks: Sequence[str]
    scores: Mapping[str, Mapping[str, Float[np.ndarray, "k 3"]]]
    joined: bool = True


class Curve(NamedTuple):
    """Distinct images against the number of samples.

    Attributes:
        label: of the samples.
        size: numbers of samples.
        value: expected distinct images.
        low: of their interval.
        high: likewise.
        dashed: curves that are and curves that are not get the same colors, in their order.
    """

    label: str
    size: Int[np.ndarray, "m"]
    value: Float[np.ndarray, "m"]
    low: Float[np.ndarray, "m"]
    high: Float[np.ndarray, "m"]
    dashed: bool = False


def draw_candidates(candidates: Sequence[CandidatePicture], meaning: str) -> Any:
    """Candidates in order, each with the training image nearest to it on its right.

    Args:
        candidates: at least one.
        meaning: what a framed candidate is.

    Returns:
        A matplotlib figure, for ``render``.
    """
    pairs = any(each.nearest is not None for each in candidates)
    across = _ACROSS[pairs]
    cell = (_WIDTH - 2 * _EDGE + _GAP) / across
    tile = ((cell - 2 * _GAP) / 2 if pairs else cell) - _GAP
    ratio = max(each.image.shape[0] / each.image.shape[1] for each in candidates)
    pitch = _LINE + tile * min(max(ratio, 0.4), 2.0) + _GAP
    foot = 0.3 if any(each.marked for each in candidates) else 0.06
    height = -(-len(candidates) // across) * pitch + foot
    figure = require("matplotlib.figure", "audit").Figure(figsize=(_WIDTH, height))
    for k, each in enumerate(candidates):
        left, top = _EDGE + k % across * cell, height - k // across * pitch
        figure.text(
            left / _WIDTH, (top - 0.16) / height, drawable(each.label, cell - 0.03, size=8.0),
            fontsize=8.0, color=_VERMILLION if each.marked else _INK,
        )  # fmt: skip
        size = (tile / _WIDTH, (pitch - _LINE - _GAP) / height)
        bottom = (top - pitch + _GAP) / height
        axes = figure.add_axes((left / _WIDTH, bottom, *size))
        _picture(axes, each.image)
        _frame(axes, _VERMILLION if each.marked else _GRAY, 1.8 if each.marked else 0.5)
        if each.nearest is not None:
            axes = figure.add_axes(((left + tile + _GAP) / _WIDTH, bottom, *size))
            _picture(axes, each.nearest)
            _frame(axes, _GRAY, 0.5)
    if any(each.marked for each in candidates):
        figure.text(
            _EDGE / _WIDTH, 0.1 / height, drawable(f"framed: {meaning}", _WIDTH - 0.2, size=9.0),
            fontsize=9.0, color=_VERMILLION,
        )  # fmt: skip
    return figure


def draw_scores(panels: Sequence[ScorePanel], xlabel: str) -> Any:
    """Scores of every band with their intervals, a row for each panel, a column for each score.

    Args:
        panels: at least one; all have the same scores and bands.
        xlabel: what the ticks are.

    Returns:
        A matplotlib figure, for ``render``.
    """
    names = list(panels[0].scores)
    figure = _figure(0.7 + 2.0 * len(panels))
    grid = figure.subplots(len(panels), len(names), squeeze=False)
    for row, panel in zip(grid, panels, strict=True):
        for axes, name in zip(row, names, strict=True):
            bands = panel.scores[name]
            places = np.arange(len(panel.ticks))
            for k, (band, scores) in enumerate(bands.items()):
                value, low, high = scores.T
                axes.errorbar(
                    places + 0.12 * (k - (len(bands) - 1) / 2),
                    value,
                    yerr=np.maximum([value - low, high - value], 0.0),
                    color=_BAND_COLORS[k % len(_BAND_COLORS)],
                    linestyle="-" if panel.joined else "",
                    linewidth=1.0,
                    elinewidth=1.4,
                    marker="o",
                    markersize=3.6,
                    label=band,
                )
            room = (_WIDTH - 0.9) / len(names) / len(places)
            texts = [drawable(tick, room, size=9.0) for tick in panel.ticks]
            axes.set_xticks(places, texts, fontsize=9.0)
            axes.set_xlim(-0.5, len(places) - 0.5)
            axes.set_ylim(bottom=0.0)
            axes.grid(axis="y", color=_GRID, linewidth=0.8)
            title = f"{name}, {panel.title}" if panel.title else name
            axes.set_title(title, fontsize=9.5, loc="left")
            axes.tick_params(axis="x", length=0)
    grid[0][0].set_ylabel("% of samples")
    for axes in grid[-1]:
        axes.set_xlabel(xlabel)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=3, title="distance",
                  title_fontsize=9.0, alignment="left")  # fmt: skip
    return figure


def draw_curves(curves: Sequence[Curve]) -> Any:
    """Distinct training images against the number of samples, with 95 % intervals.

    Args:
        curves: at least one.

    Returns:
        A matplotlib figure, for ``render``.
    """
    many = len(curves) > 2
    figure = _figure(3.0 + 0.2 * (len(curves) + 1) // 2)
    axes = figure.add_subplot()
    shades = require("matplotlib", "audit").colormaps["viridis"]
    for dashed in (False, True):
        family = [curve for curve in curves if curve.dashed == dashed]
        for k, curve in enumerate(family):
            color = shades(0.92 * k / max(1, len(family) - 1)) if many else _PAIR[dashed]
            axes.fill_between(
                curve.size, curve.low, curve.high, color=color, alpha=0.15, linewidth=0
            )
            axes.plot(
                curve.size, curve.value, color=color, linewidth=1.6,
                linestyle="--" if dashed and many else "-",
                label=drawable(curve.label, 1.6, size=9.0),
            )  # fmt: skip
    ticker = require("matplotlib.ticker", "audit")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylim(bottom=0.0)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_xlabel("samples (logarithmic)")
    axes.set_ylabel("distinct training images")
    figure.legend(loc="outside lower left", ncols=2)
    return figure
