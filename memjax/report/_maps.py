"""Pictures of where an image is stored, and of what a sampler draws before and after a change."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from memjax._core.errors import require
from memjax.report._figures import _GRAY, _INK, _MUTED, _VERMILLION, _WIDTH, drawable

_GAP, _LEFT, _RIGHT, _HEAD, _FOOT = 0.1, 0.95, 0.1, 0.34, 0.72
_COLORS = "RdBu_r"
"""Brewer's red and blue, told apart by color-blind readers; white is zero."""
_TILE = 0.46
_ACROSS = 6
_MIN_RATIO = 0.4


class MapRow(NamedTuple):
    """One image and what is said of its pixels.

    Attributes:
        label: its name, any text.
        image: as 8-bit pixels, see ``thumbnail``; ``None`` for no picture.
        values: a signed number for every pixel; NaN is gray.
        mask: pixels called stored.
        truth: pixels that are; ``None`` where nobody knows.
    """

    label: str
    image: UInt8[np.ndarray, "_ _ _"] | None
    values: Float[np.ndarray, "h w"]
    mask: Bool[np.ndarray, "h w"]
    truth: Bool[np.ndarray, "h w"] | None = None


class SampleRow(NamedTuple):
    """Samples of one condition, before and after.

    Attributes:
        label: its name, any text.
        before: samples as 8-bit pixels.
        after: as many.
        marked: whether each of ``before``, then of ``after``, gets a frame.
    """

    label: str
    before: Sequence[UInt8[np.ndarray, "_ _ _"]]
    after: Sequence[UInt8[np.ndarray, "_ _ _"]]
    marked: tuple[Sequence[bool], Sequence[bool]]


def draw_maps(rows: Sequence[MapRow], unit: str) -> Any:
    """Image, map, mask and truth side by side, one line for each image, on one color scale.

    Args:
        rows: at least one.
        unit: what the maps are in, for the color bar.

    Returns:
        A matplotlib figure, for ``render``. The scale is symmetric about zero and reaches to the
        largest absolute value of all rows. Columns that no row has are left out.
    """
    titles = ["map", "mask"]
    if any(row.image is not None for row in rows):
        titles.insert(0, "image")
    if any(row.truth is not None for row in rows):
        titles.append("truth")
    finite = np.concatenate([row.values[np.isfinite(row.values)] for row in rows])
    limit = float(np.abs(finite).max(initial=0.0)) or 1.0
    panel = min(1.0, (_WIDTH - _LEFT - _RIGHT) / len(titles) - _GAP)
    ratio = max(row.values.shape[0] / row.values.shape[1] for row in rows)
    pitch = panel * max(_MIN_RATIO, min(ratio, 2.0)) + _GAP
    height = _HEAD + pitch * len(rows) + _FOOT
    figure = require("matplotlib.figure", "audit").Figure(figsize=(_WIDTH, height))
    colors = require("matplotlib", "audit").colormaps[_COLORS].with_extremes(bad=_GRAY)
    scale = None
    for line, row in enumerate(rows):
        top = height - _HEAD - pitch * line
        _name(figure, row.label, top - (pitch - _GAP) / 2, height)
        for column, title in enumerate(titles):
            left = _LEFT + column * (panel + _GAP)
            size = (panel / _WIDTH, (pitch - _GAP) / height)
            axes = figure.add_axes((left / _WIDTH, (top - pitch + _GAP) / height, *size))
            if line == 0:
                figure.text(
                    (left + panel / 2) / _WIDTH, (height - 0.1) / height, title, fontsize=9.5,
                    ha="center", va="top",
                )  # fmt: skip
            drawn = _panel(axes, row, title, limit, colors)
            scale = drawn if title == "map" else scale
    width = len(titles) * (panel + _GAP) - _GAP
    bar = figure.add_axes((_LEFT / _WIDTH, 0.5 / height, width / _WIDTH, 0.1 / height))
    figure.colorbar(scale, cax=bar, orientation="horizontal", ticks=[-limit, 0.0, limit])
    bar.set_xticks([-limit, 0.0, limit], [f"{-limit:.2g}", "0", f"{limit:.2g}"])
    bar.tick_params(length=2.0)
    for text, side in zip(bar.get_xticklabels(), ("left", "center", "right"), strict=True):
        text.set_horizontalalignment(side)
    bar.set_xlabel(drawable(unit, _WIDTH - 0.3, size=9.0), fontsize=9.0, labelpad=2.0,
                   x=(_WIDTH / 2 - _LEFT) / width)  # fmt: skip
    return figure


def draw_samples(rows: Sequence[SampleRow], meaning: str) -> Any:
    """Samples before (left) and after (right), one line for each condition.

    Args:
        rows: at least one, with at least one sample each; at most 6 a side are drawn.
        meaning: what a framed sample is.

    Returns:
        A matplotlib figure, for ``render``.
    """
    across = min(_ACROSS, max(len(row.before) for row in rows))
    tile = min(2 * _TILE, (_WIDTH - _LEFT - _RIGHT - 3 * _GAP) / (2 * across))
    height = _HEAD + (tile + 0.04) * len(rows) + 0.3
    figure = require("matplotlib.figure", "audit").Figure(figsize=(_WIDTH, height))
    framed = False
    for line, row in enumerate(rows):
        top = height - _HEAD - (tile + 0.04) * line
        _name(figure, row.label, top - tile / 2, height)
        for side, samples in enumerate((row.before, row.after)):
            start = _LEFT + side * (across * tile + 3 * _GAP)
            if line == 0:
                figure.text(
                    (start + across * tile / 2) / _WIDTH, (height - 0.1) / height,
                    ("before", "after")[side], fontsize=9.5, ha="center", va="top",
                )  # fmt: skip
            for k, pixels in enumerate(samples[:across]):
                place = (
                    (start + k * tile) / _WIDTH,
                    (top - tile) / height,
                    (tile - 0.04) / _WIDTH,
                    (tile - 0.04) / height,
                )
                axes = figure.add_axes(place)
                _picture(axes, pixels)
                framed |= (mark := row.marked[side][k])
                _frame(axes, _VERMILLION if mark else _GRAY, 1.8 if mark else 0.5)
    if framed:
        figure.text(
            _LEFT / _WIDTH, 0.1 / height, drawable(f"framed: {meaning}", 3.4, size=9.0),
            fontsize=9.0, color=_VERMILLION,
        )  # fmt: skip
    return figure


def _name(figure: Any, label: str, middle: float, height: float) -> None:
    figure.text(
        0.08 / _WIDTH, middle / height, drawable(label, _LEFT - 0.16, size=8.5), fontsize=8.5,
        va="center", color=_INK,
    )  # fmt: skip


def _panel(axes: Any, row: MapRow, title: str, limit: float, colors: Any) -> Any:
    """One picture of a row; what was drawn, for the color bar."""
    shape = row.values.shape
    drawn = None
    if title == "map":
        drawn = axes.imshow(
            row.values, cmap=colors, vmin=-limit, vmax=limit, interpolation="nearest"
        )
    elif title == "image":
        if row.image is None:
            axes.set_axis_off()
            return None
        _picture(axes, row.image)
    else:
        shown = row.mask if title == "mask" else row.truth
        if shown is None:
            axes.text(0.5, 0.5, "not known", ha="center", va="center", fontsize=8.5, color=_MUTED,
                      transform=axes.transAxes)  # fmt: skip
            shown = np.zeros(shape, bool)
        axes.imshow(shown, cmap="gray_r", vmin=0, vmax=1.25, interpolation="nearest")
    _frame(axes, _GRAY, 0.5)
    return drawn


def _picture(axes: Any, pixels: UInt8[np.ndarray, "_ _ _"]) -> None:
    axes.imshow(
        pixels if pixels.shape[2] == 3 else pixels[:, :, 0],
        cmap="gray",
        vmin=0,
        vmax=255,
        interpolation="nearest",
    )


def _frame(axes: Any, color: str, width: float) -> None:
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(visible=True, color=color, linewidth=width)
