"""Work-precision tables: the error of an estimator, ours or a peer's, against its products."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.harness import installed

FLOOR = 1e-17
"""Where an error of zero is drawn."""
MARKERS = "osD^vPX<>*"
COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#332288"),
    *("#882255", "#117733"),
)


class Method(NamedTuple):
    """An estimator in a work-precision table.

    Attributes:
        name: "memjax ..." or the peer's name first.
        estimate: ``estimate(key, products)``, traceable in the key: the value, or
            ``(value, extra)`` with a dictionary of numbers, such as ``flagged``.
        package: the peer to be imported; ``None`` for ours.
        most: products beyond which it has nothing to gain; ``None`` without a limit.
    """

    name: str
    estimate: Callable[[jax.Array, int], Any]
    package: str | None = None
    most: int | None = None


def rounded(x: float) -> float:
    """Three digits: what a record needs."""
    return float(f"{x:.3g}")


def rows(
    methods: list[Method],
    budgets: list[int],
    keys: jax.Array,
    relative_error: Callable[[np.ndarray], np.ndarray],
    summarize: Callable[[dict[str, np.ndarray]], dict[str, Any]] = lambda extra: {},
) -> list[dict[str, Any]]:
    """One row for every method and budget: median error over the keys, and its 10-90 % range.

    Args:
        methods: what to compare.
        budgets: products that each may use.
        keys: one an experiment; the same for all.
        relative_error: of stacked values, one number each.
        summarize: further columns from the stacked extras.
    """
    out = []
    for method in methods:
        if method.package is not None and not installed(method.package):
            out.append({"method": method.name, "status": "not installed"})
            continue
        for products in (b for b in budgets if method.most is None or b <= method.most):
            row: dict[str, Any] = {"method": method.name, "products": products}
            out.append(row)
            try:
                run = jax.jit(
                    lambda keys, method=method, products=products: jax.lax.map(
                        lambda key: method.estimate(key, products), keys
                    )
                )
                found = jax.block_until_ready(run(keys))
            except Exception as error:  # a peer that cannot is a result
                if method.package is None:
                    raise
                row |= {"status": "failed", "message": type(error).__name__}
                continue
            values, extra = found if isinstance(found, tuple) else (found, {})
            errors = relative_error(np.asarray(values, np.float64))
            good = errors[np.isfinite(errors)]
            row |= {"status": "ok" if len(good) == len(errors) else "failed"}
            if len(good) < len(errors):
                row["failures"] = f"{len(errors) - len(good)} of {len(errors)}"
            if len(good):
                low, median, high = np.quantile(good, (0.1, 0.5, 0.9))
                row |= {"error": rounded(median), "low": rounded(low), "high": rounded(high)}
            row |= summarize({name: np.asarray(x) for name, x in extra.items()})
    return out


def error_of(rows_: list[dict[str, Any]], method: str, products: int) -> float:
    """The median error in a row; NaN where the method failed."""
    (row,) = [r for r in rows_ if r["method"] == method and r.get("products") == products]
    return row["error"] if row["status"] == "ok" else float("nan")


def panels(count: int, height: float = 3.2):
    """A figure with a grid of axes, room for a legend above and the caption below."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(count, 3)
    lines = -(-count // columns)
    layout = ConstrainedLayoutEngine(rect=(0, 0.03 / lines + 0.02, 1, 0.98 - 0.03 / lines))
    figure = Figure(figsize=(4.2 * columns, height * lines + 1.0), layout=layout)
    axes = list(np.atleast_1d(figure.subplots(lines, columns)).flat)
    for axis in axes[count:]:
        axis.set_axis_off()
    return figure, axes[:count]


def draw(
    records: list[dict[str, Any]],
    titles: dict[str, str],
    quantity: str,
    unit: str = "products",
    canvas=None,
):
    """One panel a record, one line a method; crosses at the top where it failed.

    Args:
        records: of tables made by ``rows``.
        titles: of the panels, by the last part of the case's name.
        quantity: label of the vertical axes.
        unit: label of the horizontal axes.
        canvas: figure and axes, of which the first are drawn on.
    """
    figure, axes = canvas or panels(len(records))
    axes = axes[: len(records)]
    names = list(dict.fromkeys(row["method"] for record in records for row in record["rows"]))
    styles = {name: (MARKERS[i % 10], COLORS[i % 10]) for i, name in enumerate(names)}
    handles: dict[str, Any] = {}
    for axis, record in zip(axes, records, strict=True):
        axis.set(xscale="log", yscale="log")
        present = [row for row in record["rows"] if row["status"] != "not installed"]
        budgets = sorted({row["products"] for row in present})
        failures = 0
        for name in names:
            marker, color = styles[name]
            own = [row for row in present if row["method"] == name and "error" in row]
            ours = name.startswith("memjax")
            (handle,) = axis.plot(
                [row["products"] for row in own],
                [max(row["error"], FLOOR) for row in own],
                marker=marker,
                color=color,
                linestyle="-" if ours else "--",
                markersize=4.5 if ours else 7,
                markerfacecolor=color if ours else "none",
                linewidth=1.1,
            )
            handles.setdefault(name, handle)
            failed = [
                row["products"]
                for row in present
                if row["method"] == name and row["status"] == "failed"
            ]
            if failed:
                height, transform = 0.96 - 0.06 * failures, axis.get_xaxis_transform()
                axis.plot(failed, [height] * len(failed), "x", color=color, transform=transform)
                failures += 1
        if failures:  # keep the band of the crosses free
            low, high = axis.get_ylim()
            axis.set_ylim(low, high * (high / low) ** (0.08 * (failures + 1)))
        axis.set_title(titles[record["case"].split("/")[-1]], fontsize=9)
        axis.set_xticks(budgets, [str(b) for b in budgets])
        axis.minorticks_off()
        axis.grid(color="0.92")
        axis.tick_params(labelsize=8)
    for axis in axes[::3]:
        axis.set_ylabel(quantity, fontsize=9)
    for axis in axes[-3:]:
        axis.set_xlabel(unit, fontsize=9)
    missing = {row["method"] for r in records for row in r["rows"] if "products" not in row}
    labels = [name + (" (not installed)" if name in missing else "") for name in handles]
    figure.legend(handles.values(), labels, loc="outside upper center", ncols=4, fontsize=8)
    return figure
