"""Pictures of estimated multiplicities."""

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from memjax.report._figures import _BLUE, _GRAY, _GRID, _ORANGE, _VERMILLION, _figure

_TICKS = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)


def draw_counts(estimate: Float[np.ndarray, "n"], times: Int[np.ndarray, "n"] | None = None) -> Any:
    """Every estimate by its rank, on a logarithmic scale.

    Args:
        estimate: multiplicities, positive; NaN for none.
        times: the true ones, if they are known.

    Returns:
        A matplotlib figure, for ``render``.
    """
    figure = _figure(3.2)
    axes = figure.subplots()
    known = np.isfinite(estimate)
    rows = np.flatnonzero(known)[np.argsort(-estimate[known], kind="stable")]
    ranks = 1 + np.arange(len(rows))
    groups = {"images": (np.ones(len(rows), bool), _BLUE)}
    if times is not None:
        of = times[rows]
        groups = {
            "unseen": (of == 0, _GRAY),
            "once": (of == 1, _BLUE),
            "twice": (of == 2, _ORANGE),
            "more often": (of > 2, _VERMILLION),
        }
    for label, (member, color) in groups.items():
        if member.any():
            axes.plot(ranks[member], estimate[rows][member], ".", color=color, ms=4, label=label)
    low, high = float(np.min(estimate[rows])), float(np.max(estimate[rows]))
    shown = [tick for tick in _TICKS if low / 2 <= tick <= 2 * high]
    axes.set(xscale="log", yscale="log", xlabel="rank", ylabel="estimated times in training")
    axes.set_yticks(shown, [f"{tick:g}" for tick in shown])
    tens = [10**k for k in range(len(str(len(rows))))]
    axes.set_xticks(tens, [f"{ten:,}" for ten in tens])
    axes.minorticks_off()
    axes.set_ylim(min(0.8 * low, 0.7), max(1.25 * high, 1.5))
    axes.grid(color=_GRID, linewidth=0.8)
    if times is not None:
        axes.legend(title="truly", title_fontproperties={"size": 9.0}, markerscale=2)
    return figure
