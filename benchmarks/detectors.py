"""Which detector finds memorized images, at what cost, how surely: all of them on one bench.

A table is a test bed: digits of which some were repeated, at the end of training and at an earlier
checkpoint; prompts that store an image or half of one; exact worlds in 8, 64 and 768 dimensions.
Its rows are detectors with a budget (pairs, draws, probes, ...). Noise level and radius are chosen
on five training seeds and scored on five others, on which nothing was chosen, no threshold either.
``_quality`` says what the intervals cover. What compares images with each other compares those of
an audit that asks the question: the training set, or, for membership, all images. What all
detectors cost together, ``together`` times.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks._beds import (
    Bed,
    empirical,
    excesses,
    forwards,
    graded,
    mixture,
    prompts,
    values,
)
from benchmarks._detectors_figure import figure as figure
from benchmarks._quality import Quality, merit, pooled, quality, record, short, transferred
from benchmarks.harness import Case, Table, Target
from memjax._core.errors import InputError
from memjax.auditing.plan import DETECTORS, SAMPLE_DETECTORS, evaluated
from memjax.detect.combined import Difference
from memjax.detect.difficulty import OverDifficulty
from memjax.detect.neighbors import Blurred
from memjax.detect.p_laplace import PLaplaceFlux
from memjax.detect.plan import cost, plan_evaluations, requirements

TUNING, SCORING = (1, 2, 3, 4, 5), (6, 7, 8, 9, 10)
SIGMAS = (0.035, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3)
"""In the units of the digits, whose standard deviation is 0.755."""
WORLD_SIGMAS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
FLOW_SIGMAS = (0.05, 0.1)
FIRST_STEP = 20.0
"""Noise at which sampling starts: pure noise there is what one has before any image."""
RADII = (0.25, 0.5, 1.0)
SAMPLES = (256, 4096)
KINDS = [{"num_draws": 1}, {}, {"kind": "clean", "num_draws": 1}, {"kind": "noised"}]
"""Pure noise, one and several, the image, noised images: of what compares conditions."""
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "anisotropy": [{"num_draws": 1}, {}],
    "denoised_norm": [{}, {"num_pairs": 4}],
    "denoising_loss": [{"num_draws": 2}, {}],
    "effective_dimension": [{"num_probes": 16}, {}],
    "extreme_eigenvalue": [{"which": "largest"}, {"which": "smallest"}],
    "flipd": [{"num_probes": 16}, {}],
    "flux_and_loss": [{"num_pairs": 1}, {}, {"num_pairs": 32}],
    "flux_dimension": [{"num_pairs": 1}, {}],
    "gap_sharpness": KINDS,
    "p_laplace": [{"p": p} for p in (1, 1.5, 2, 3, math.inf)],
    "p_laplace_flux": [
        *({"num_pairs": pairs} for pairs in (1, 4, 16)),
        *({"p": p} for p in (1.5, 2, 3)),
    ],
    "score_gap": KINDS,
    "sphere_loss": [{"num_pairs": 1}, {}],
}
"""Settings of a detector, by its name, that are not chosen; the defaults where there is none."""
GAP_VARIANTS = {"p_laplace_flux": [{"field": "gap"}], "p_laplace": [{"field": "gap"}]}
"""More of them where there are conditions."""
ABSOLUTE = ("anisotropy",)
"""Detectors with a second noise level of their own, which has a unit."""


class Setting(NamedTuple):
    """A test bed, and where detectors look.

    Attributes:
        bed: ``bed(seed, quick)``.
        sigmas: noise levels.
        flow_sigmas: those from which flows start.
        chunk: rows evaluated together.
        products: most products a detector may make.
        own: questions for which noise level and radius are chosen on their own; for the others
            they are those of the first question.
    """

    bed: Callable[[int, bool], Bed]
    sigmas: tuple[float, ...] = SIGMAS
    flow_sigmas: tuple[float, ...] = FLOW_SIGMAS
    chunk: int = 300
    products: int = 1000
    own: tuple[str, ...] = ("membership", "memorized", "template", "mitigation")


SETTINGS = {
    "graded": Setting(partial(graded, 8000)),
    "graded-3000": Setting(partial(graded, 3000), flow_sigmas=()),
    "prompts": Setting(prompts, (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 20.0), (0.1, 1.0), 70),
    "mixture-8": Setting(partial(mixture, 8), WORLD_SIGMAS, chunk=400),
    "mixture-64": Setting(partial(mixture, 64), WORLD_SIGMAS, chunk=100),
    "mixture-768": Setting(partial(mixture, 768), (0.05, 0.2, 0.5), (), 10, 200),
    "empirical-8": Setting(partial(empirical, 8), WORLD_SIGMAS, (), 100),
    "empirical-64": Setting(partial(empirical, 64), WORLD_SIGMAS, (), 50),
    "empirical-768": Setting(partial(empirical, 768), (0.2, 0.5, 1.0), (), 10, 200),
}
TITLES = {
    "graded": "graded digits",
    "graded-3000": "graded digits, 3,000 steps",
    "prompts": "prompts",
    **{f"mixture-{d}": f"stored points in a mixture, d = {d}" for d in (8, 64, 768)},
    **{f"empirical-{d}": f"repeated points of a training set, d = {d}" for d in (8, 64, 768)},
}


class Candidate(NamedTuple):
    """A detector somewhere.

    Attributes:
        detector: at noise level ``sigma / unit``.
        unit: noise level that counts as 1 in the detector, see ``_beds.Rescaled``.
        sigma: noise level.
        radius: of its sphere.
    """

    detector: Any
    unit: float
    sigma: float
    radius: float | None

    @property
    def where(self) -> tuple[float, float | None]:
        """What is chosen."""
        return self.sigma, self.radius


class Method(NamedTuple):
    """A detector with a budget, at every noise level and radius.

    Attributes:
        name: the detector's name, and what differs from its defaults.
        title: for readers.
        candidates: what is chosen from.
    """

    name: str
    title: str
    candidates: tuple[Candidate, ...]


def methods(kinds: Sequence[type], setting: Setting, bed: Bed) -> list[Method]:
    """Every detector that a test bed has what it needs for, with every budget."""
    out = []

    def add(make: Callable[..., Any], tuned: bool, name: str = "", absolute: bool = False) -> None:
        found = []
        for sigma in setting.sigmas:
            unit = 1.0 if absolute else sigma
            for radius in RADII if tuned else (None,):
                detector = make(sigma / unit, **({"radius": radius} if tuned else {}))
                if _fits(evaluated(detector), sigma, setting, bed):
                    found.append(Candidate(detector, unit, sigma, radius))
        if found:
            first = found[0].detector
            out.append(Method(name or first.name, first.title, tuple(found)))
        start = tuple(c for c in found if c.sigma == FIRST_STEP)
        if start and _image_free(evaluated(start[0].detector), bed.images[0].size):
            name = name or start[0].detector.name
            out.append(Method(f"{name} at {FIRST_STEP}", start[0].detector.title, start))

    for kind in kinds:
        tuned = "radius" in [field.name for field in dataclasses.fields(kind)]
        variants = VARIANTS.get(kind.name, [{}])
        if bed.conditions is not None:
            variants = variants + GAP_VARIANTS.get(kind.name, [])
        for options in variants:
            said = ", ".join(f"{field}={value}" for field, value in options.items())
            name = f"{kind.name}({said})" if said else kind.name
            add(partial(kind, **options), tuned, name, kind.name in ABSOLUTE)
    for weight in (0.5, 1) if bed.baseline is not None else ():

        def over(sigma: float, radius: float, weight: float = weight) -> Difference:
            return Difference(PLaplaceFlux(sigma, radius=radius), weight=weight)

        add(over, True)
    for num_pairs in (1, 16) if bed.conditions is None else ():

        def excess(sigma: float, radius: float, num_pairs: int = num_pairs) -> OverDifficulty:
            return OverDifficulty(PLaplaceFlux(sigma, radius=radius, num_pairs=num_pairs))

        add(excess, True, f"p_laplace_flux_over_difficulty(num_pairs={num_pairs})")
    for num_pairs in (8, 16) if bed.images.ndim == 4 and bed.conditions is None else ():

        def near(sigma: float, radius: float, num_pairs: int = num_pairs) -> Difference:
            flux = PLaplaceFlux(sigma, radius=radius, num_pairs=num_pairs)
            return Difference(flux, Blurred(), 0.5)

        add(near, True, f"p_laplace_flux_over_0.5_blurred(num_pairs={num_pairs})")
    return out


def _image_free(detector: Any, d: int) -> bool:
    points = [need.point for need in detector.needs(d)]
    return all(getattr(point, "start", point).kind == "pure" for point in points)


def _fits(detector: Any, sigma: float, setting: Setting, bed: Bed) -> bool:
    d = bed.images[0].size
    try:
        needed = requirements((detector,), d)
    except InputError:  # a setting that images of this size do not admit
        return False
    flows = bool(plan_evaluations((detector,), d).trajectories)
    return (
        (bed.conditions is not None or not needed.conditions)
        and (bed.baseline is not None or not needed.baseline)
        and (not flows or sigma in setting.flow_sigmas)
        and int(cost((detector,), d).total) <= setting.products
    )


def table(
    kinds: Sequence[type], setting: Setting, tuning, scoring, *, quick: bool = False, timed: int = 0
) -> list[dict[str, Any]]:
    """One row for each method, chosen on some seeds and scored on others.

    Args:
        kinds: detectors.
        setting: where.
        tuning: seeds that choose.
        scoring: seeds that score.
        quick: passed to the test bed.
        timed: how often each chosen detector is timed, alone.
    """
    beds = {seed: setting.bed(seed, quick) for seed in (*tuning, *scoring)}
    first = beds[scoring[0]]
    chosen, compared = methods(kinds, setting, first), excesses(beds)
    found = _evaluate([c for method in chosen for c in method.candidates], beds, setting.chunk)
    out = []
    for method in chosen:
        detector = method.candidates[0].detector
        price = cost((evaluated(detector),), first.images[0].size)
        candidates = {c.where: found[c] for c in method.candidates}
        many = partial(compared, detector) if isinstance(detector, OverDifficulty) else _single
        row = _row(candidates, setting.own, beds, tuning, scoring, many)
        if timed:
            at = next(iter(row["questions"].values()))
            (best,) = (c for c in method.candidates if c.where == (at["sigma"], at["radius"]))
            row["forwards"] = round(forwards(first, evaluated(best.detector), best.unit, timed), 2)
        named = {"method": method.name, "title": method.title, "products": int(price.total)}
        out.append(named | {"cost": {k: int(v) for k, v in price._asdict().items()}} | row)
    for name in first.known:
        candidates = {
            (sigma, None): {seed: bed.known[name](sigma) for seed, bed in beds.items()}
            for sigma in setting.sigmas
        }
        row = _row(candidates, setting.own, beds, tuning, scoring)
        out.append({"method": name, "title": name, **row})
    return out


def _evaluate(
    candidates: list[Candidate], beds: dict[int, Bed], chunk: int
) -> dict[Candidate, dict[int, np.ndarray]]:
    """Values of every candidate by seed, all of one noise level together."""
    # Detectors that stand at every level are one program, the others (flows) another.
    levels = {c.unit for c in candidates}
    count = Counter(c.detector for c in candidates)
    out: dict[Candidate, dict[int, np.ndarray]] = {c: {} for c in candidates}
    groups: dict[tuple, list[Candidate]] = {}
    for c in out:
        groups.setdefault((c.unit, count[c.detector] >= len(levels)), []).append(c)
    for (unit, _), group in groups.items():
        for seed, bed in beds.items():
            found = values(bed, [evaluated(c.detector) for c in group], unit, chunk)
            for c, column in zip(group, found, strict=True):
                out[c][seed] = column
    return out


def samples(kinds: Sequence[type], setting: Setting, scoring, quick: bool) -> list[dict[str, Any]]:
    """The same for detectors that see nothing but samples: there is nothing to choose."""
    beds = {seed: setting.bed(seed, quick) for seed in scoring}
    for bed in beds.values():
        if bed.trained_on is None:
            return []
        # Which images were extracted is read off the same samples: no question to them.
    beds = {
        seed: bed._replace(questions={q: m for q, m in bed.questions.items() if q != "extracted"})
        for seed, bed in beds.items()
    }
    out = []
    for kind in kinds:
        for num in SAMPLES[:1] if quick else SAMPLES:
            found = {
                seed: kind()
                .compare(bed.images, bed.samples[:num], bed.images[bed.trained_on])
                .value
                for seed, bed in beds.items()
            }
            row = _row({(None, None): found}, setting.own, beds, (), scoring)
            named = {"method": f"{kind.name}({num} samples)", "title": kind.title, "samples": num}
            out.append(named | row)
    return out


def _single(seed: int, column: np.ndarray, question: str) -> np.ndarray:
    """Values of one image at a time are the same whatever is asked."""
    return column


def _row(
    candidates: dict[tuple[float | None, float | None], dict[int, np.ndarray]],
    own: tuple[str, ...],
    beds: dict[int, Bed],
    tuning: tuple[int, ...],
    scoring: tuple[int, ...],
    compared: Callable[[int, np.ndarray, str], np.ndarray] = _single,
) -> dict[str, Any]:
    """What the best candidate (by noise level and radius; values by seed) is worth."""

    def answers(at, seeds, name) -> list[np.ndarray]:
        return [compared(seed, candidates[at][seed], name) for seed in seeds]

    def qualities(at, seeds, name) -> list[Quality]:
        found = answers(at, seeds, name)
        return [quality(v, beds[s].questions[name]) for v, s in zip(found, seeds, strict=True)]

    failed = max(int(np.sum(~np.isfinite(v))) for v in candidates.values() for v in v.values())
    row: dict[str, Any] = {"status": "ok", "questions": {}}
    row |= {"largest_number_of_failed_rows": failed} if failed else {}
    shared = [q for q in beds[scoring[0]].questions if all(q in b.questions for b in beds.values())]
    merits: dict[str, dict] = {}
    for name in shared:
        deciding = name if name in own else shared[0]
        if deciding not in merits:
            merits[deciding] = {at: merit(qualities(at, tuning, deciding)) for at in candidates}
        at = max(merits[deciding], key=merits[deciding].__getitem__)
        row["questions"][name] = {
            "sigma": at[0],
            "radius": at[1],
            "merit": short(merits[deciding][at]),
            **record(qualities(at, scoring, name)),
        }
        if tuning:
            row["questions"][name]["transferred"] = transferred(
                answers(at, tuning, name),
                [beds[s].questions[name] for s in tuning],
                answers(at, scoring, name),
                [beds[s].questions[name] for s in scoring],
            )
    if tuning and shared:
        first = shared[0]
        row["levels"] = _levels(merits[first], lambda at: qualities(at, scoring, first))
    return row


def _levels(
    merits: dict[tuple[float | None, float | None], float],
    qualities: Callable[[tuple[float | None, float | None]], list[Quality]],
) -> dict[str, list[float | None]]:
    """AUROC and rate at 1 % for the first question, by noise level, at the radius chosen there."""
    out = {}
    for sigma in dict.fromkeys(at[0] for at in merits):
        found = qualities(max((at for at in merits if at[0] == sigma), key=merits.__getitem__))
        out[str(sigma)] = [short(pooled(metric, found)[0]) for metric in ("auroc", "tpr")]
    return out


def _targets(name: str, rows: list[dict[str, Any]]) -> list[Target]:
    """What the project has set itself, below 1; the detector is chosen as its noise level is."""

    def lower_ends(
        question: str, most: int, bounds: dict[str, float], by: str, compared: bool = False
    ) -> list[Target]:
        cheap = [row for row in rows if row.get("products", math.inf) <= most]
        fit = [row for row in cheap if row["method"].endswith("_baseline") == compared]
        if not fit:
            return []
        best = max(fit, key=lambda row: row["questions"][by]["merit"] or -math.inf)
        return [
            Target(
                f"{metric} of {question} within {most} products, lower end, below 1: "
                f"{best['method']}",
                round(1 - (best["questions"][question][metric]["low"] or 0), 4),
                round(1 - bound, 4),
            )
            for metric, bound in bounds.items()
        ]

    def values_of(question: str, bound: float, fit: list[dict[str, Any]], what: str) -> Target:
        best = max(fit, key=lambda row: row["questions"][question]["merit"] or -math.inf)
        value = best["questions"][question]["auroc"]["value"] or 0
        what = f"auroc of {question} prompts {what}, below 1: {best['method']}"
        return Target(what, round(1 - value, 4), round(1 - bound, 4))

    if name == "graded":
        return [
            *lower_ends("x4", 2, {"auroc": 0.99, "tpr": 0.95}, "x2"),
            *lower_ends("x2", 64, {"auroc": 0.975, "tpr": 0.7}, "x2"),
            *lower_ends("membership", 64, {"auroc": 0.99, "tpr": 0.85}, "membership"),
            *lower_ends("membership", 64, {"auroc": 0.99, "tpr": 0.85}, "membership", True),
            *lower_ends("x2", 100, {"auroc": 0.99, "tpr": 0.88}, "x2"),
        ]
    if name == "graded-3000":
        return lower_ends("x4", 100, {"auroc": 0.997, "tpr": 0.92}, "x2")
    if name == "prompts":
        pure = [row for row in rows if _first_step(row)]
        return [
            values_of("memorized", 0.995, pure, "from pure noise, one linearization"),
            values_of("template", 0.99, rows, "at the best noise level"),
        ]
    return []


def _first_step(row: dict[str, Any]) -> bool:
    """Whether a row looks at nothing but the noise that sampling starts from, once."""
    once = row.get("cost", {}).get("forward", 0) <= 2
    return once and row["method"].endswith(f"at {FIRST_STEP}")


def _table(name: str, quick: bool, seed: int) -> Table:
    setting = SETTINGS[name]
    tuning, scoring = (TUNING[:1], SCORING[:2]) if quick else (TUNING, SCORING)
    if quick:
        setting = setting._replace(sigmas=setting.sigmas[2:3], flow_sigmas=())

    def compute():
        kinds = tuple(DETECTORS.values())
        timed = (1 if quick else 5) if name == "graded" else 0
        rows = table(kinds, setting, tuning, scoring, quick=quick, timed=timed)
        rows += samples(tuple(SAMPLE_DETECTORS.values()), setting, scoring, quick)
        return rows, [] if quick else _targets(name, rows)

    parameters = {
        "title": TITLES[name],
        "tuning_seeds": tuning,
        "scoring_seeds": scoring,
        "sigmas": setting.sigmas,
        "radii": RADII,
    }
    return Table(compute, parameters, "float32")


def cases() -> list[Case]:
    """A table for each test bed."""
    return [Case(f"detectors/{name}", partial(_table, name)) for name in SETTINGS]
