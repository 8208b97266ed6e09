"""The figure of the bench of detectors: quality against network products, question by question."""

from typing import Any

import numpy as np

from benchmarks._precision import COLORS, MARKERS, panels

DODGE = 1.03
"""Factor by which families are moved aside in the figure: many cost the same."""
FAMILIES = {
    "p = 1 flux": ("p_laplace_flux(num_pairs", "published_p_laplace_flux", "flux_dimension"),
    "flux, p > 1": ("p_laplace_flux(p=",),
    "sphere loss": ("sphere_loss",),
    "flux and loss": ("flux_and_loss",),
    "flux over difficulty": ("p_laplace_flux_over_difficulty",),
    "flux over blurred": ("p_laplace_flux_over_0.5_blurred",),
    "difference to a checkpoint": ("p_laplace_flux_over",),
    "denoising loss": ("denoising_loss",),
    "score norm": ("score_norm",),
    "FLIPD": ("flipd",),
    "effective dimension": ("effective_dimension",),
    "p-Laplacian at the point": ("p_laplace(",),
    "spectrum": ("sharpness", "negative_share", "floor_share", "extreme_eigenvalue"),
    "volume growth": ("volume_growth",),
    "gap between conditions": (
        *("score_gap", "gap_sharpness", "anisotropy", "denoised_norm"),
        *("p_laplace_flux(field=gap", "p_laplace(field=gap"),
    ),
}
"""What is drawn alike, by how a method's name begins; the longest beginning counts."""
REFERENCES = {"samples": "samples alone, best", "log odds": "Bayes"}
PANELS = [
    ("graded", "x2", "auroc", "twice against once: AUROC"),
    ("graded", "x2", "tpr", "twice against once: found at 1 % false"),
    ("graded", "membership", "tpr", "once against unseen: found at 1 % false"),
    ("graded-3000", "x4", "tpr", "four times, 3,000 steps: found at 1 % false"),
    ("prompts", "template", "auroc", "template against general prompts: AUROC"),
    ("mixture-8", "0.3", "auroc", "stored in a mixture, d = 8, noise 0.3: AUROC"),
]


def _family(method: str) -> str | None:
    fits = [
        (len(begin), family)
        for family, begins in FAMILIES.items()
        for begin in begins
        if method.startswith(begin)
    ]
    return max(fits)[1] if fits else None


def _bounds(row: dict[str, Any], question: str, metric: str) -> list[float | None]:
    """Value, low, high of a row's answer; a noise level for a question: the first's, there."""
    if question in row.get("levels", {}):
        value = row["levels"][question][("auroc", "tpr").index(metric)]
        return [value] * 3
    answer = row["questions"].get(question, {}).get(metric, {})
    return [answer.get(k) for k in ("value", "low", "high")]


def figure(records):
    """Quality against network products, with intervals, and what samples or theory say."""
    tables = {r["case"].split("/")[1]: r["rows"] for r in records if "rows" in r}
    shown = [p for p in PANELS if p[0] in tables]
    canvas, axes = panels(len(shown), height=3.4)
    names = [*FAMILIES, "other"]
    handles = {}
    for axis, (name, question, metric, title) in zip(axes, shown, strict=True):
        for i, family in enumerate(names):
            own = [
                (row["products"], *_bounds(row, question, metric))
                for row in tables[name]
                if "products" in row
                and (_family(row["method"]) or "other") == family
                and _bounds(row, question, metric)[0] is not None
            ]
            if not own:
                continue
            products, value, low, high = np.array(sorted(own)).T
            products = products * DODGE ** (i - len(names) / 2)
            handles[family] = axis.errorbar(
                products,
                value,
                (np.maximum(value - low, 0), np.maximum(high - value, 0)),
                fmt=MARKERS[i % len(MARKERS)],
                color=COLORS[i % len(COLORS)],
                markerfacecolor=COLORS[i % len(COLORS)] if i < len(COLORS) else "none",
                markersize=5,
                elinewidth=0.7,
                alpha=0.85,
            )
        for kind, linestyle in (("samples", ":"), ("log odds", "--")):
            alone = [
                _bounds(row, question, metric)[0]
                for row in tables[name]
                if kind in row or row["method"] == kind
            ]
            if any(alone):
                handles[REFERENCES[kind]] = axis.axhline(
                    max(a for a in alone if a is not None),
                    color="0.5",
                    linestyle=linestyle,
                    linewidth=1,
                )
        axis.set(xscale="log", xlabel="network products an image")
        axis.set_title(title, fontsize=9)
        axis.grid(color="0.92")
        axis.tick_params(labelsize=8)
    canvas.legend(handles.values(), handles, loc="outside upper center", ncols=5, fontsize=8)
    return canvas
