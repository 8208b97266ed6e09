"""How often each digit stands in a training set, told by training the model further.

The graded digits, on the five training seeds that nothing was chosen on (settings are those of
seeds 1 to 5). Every row of the table is what is given, at what price: the training set, each image
once (with the default of 42 passes in one run, with 24, and with a round before four runs); all
digits, unseen ones among them; a random half of the training set; the training set, for a model
trained for 3,000 steps only. Beside quality the medians of the estimates by true multiplicity, and
the products of an image, those of the continued training among them, also over those of the
training itself.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks._beds import EARLIER, GROUP_SIZES, QUICK_STEPS
from benchmarks._quality import Question, quality, record, short
from benchmarks.harness import Case, Table, Target
from memjax.detect.multiplicity import (
    BATCH_SIZE,
    PASSES,
    MultiplicityEstimate,
    estimate_multiplicity,
)
from memjax.training.testbeds import graded_testbed

SCORING = (6, 7, 8, 9, 10)
STEPS, BATCH = 8000, 128
FEW_PASSES = 24


class Setting(NamedTuple):
    """What an estimate is made from.

    Attributes:
        given: ``"trained"``, ``"all"`` or ``"half"`` of the rows.
        passes: of each run over the given rows.
        rounds: before the last.
        runs: of the last round.
        steps: of the model's training.
    """

    given: str = "trained"
    passes: int = PASSES
    rounds: int = 0
    runs: int = 1
    steps: int = STEPS


SETTINGS = {
    "graded": {
        "training set": Setting(),
        f"training set, {FEW_PASSES} passes": Setting(passes=FEW_PASSES),
        "training set, a round and 4 runs": Setting(rounds=1, runs=4),
        "half of the training set": Setting("half"),
    },
    "graded-unseen": {"training set and unseen images": Setting("all")},
    "graded-3000": {"training set": Setting(steps=EARLIER)},
}


def _estimate(setting: Setting, seed: int, quick: bool) -> tuple[MultiplicityEstimate, np.ndarray]:
    """Estimates on one seed, and the true multiplicities of the rows given."""
    steps, samples = (QUICK_STEPS[setting.steps], 64) if quick else (setting.steps, 4096)
    found = graded_testbed(seed, GROUP_SIZES, steps=steps, num_samples=samples)
    multiplicity = found.bed.multiplicity
    rows = np.flatnonzero((multiplicity > 0) | (setting.given == "all"))
    if setting.given == "half":
        rows = np.random.default_rng(seed).permutation(rows)[: len(rows) // 2]
    passes = 2 if quick else setting.passes
    estimate = estimate_multiplicity(
        found.model,
        found.bed.images[rows],
        steps=round(passes * len(rows) / BATCH_SIZE),
        rounds=setting.rounds,
        runs=setting.runs,
        seed=seed,
    )
    return estimate, multiplicity[rows]


def _row(name: str, setting: Setting, seeds: tuple[int, ...], quick: bool) -> dict[str, Any]:
    found = [_estimate(setting, seed, quick) for seed in seeds]
    questions = {f"x{m}": (m, 1) for m in (2, 4, 8)}
    if setting.given == "all":
        questions["membership"] = (1, 0)
    answers = {
        question: [quality(e.value, Question(m == yes, m == no)) for e, m in found]
        for question, (yes, no) in questions.items()
    }
    medians = {
        str(k): [short(np.median(e.multiplicity[m == k])) for e, m in found]
        for k in np.unique(found[0][1]).tolist()
    }
    cost = found[0][0].cost
    trained = 2 * setting.steps * BATCH / len(found[0][1])  # forward and backward, an image
    return {
        "method": name,
        "status": "ok",
        "products": int(cost.total),
        "cost": {k: int(v) for k, v in cost._asdict().items()},
        "products_over_those_of_the_training": short(float(cost.total / trained)),
        "questions": {question: record(found) for question, found in answers.items()},
        "median_estimates": medians,
    }


_ASKED = {
    "graded": [
        (0, "x2", "value", {"auroc": 0.99, "tpr": 0.88}, 100),
        (1, "x2", "low", {"auroc": 0.975, "tpr": 0.70}, 64),
    ],
    "graded-unseen": [(0, "membership", "low", {"auroc": 0.99, "tpr": 0.85}, 100)],
    "graded-3000": [(0, "x4", "value", {"auroc": 0.997, "tpr": 0.92}, 100)],
}
"""Row, question, value or lower end of the interval, what it should reach, with which products."""


def _targets(name: str, rows: list[dict[str, Any]]) -> list[Target]:
    """What is asked of detectors on this bed, below 1, and at what price."""
    out = []
    for row, question, end, bounds, products in _ASKED[name]:
        for metric, bound in bounds.items():
            found = rows[row]["questions"][question][metric][end] or 0
            what = f"{metric} of {question}, {end if end == 'value' else 'lower end'}, below 1"
            out.append(Target(what, round(1 - found, 4), round(1 - bound, 4)))
        out.append(Target(f"products of {question}", rows[row]["products"], products))
    return out


def _make(name: str, quick: bool, seed: int) -> Table:
    seeds = SCORING[:2] if quick else SCORING

    def compute():
        rows = [_row(title, setting, seeds, quick) for title, setting in SETTINGS[name].items()]
        return rows, [] if quick else _targets(name, rows)

    return Table(compute, {"scoring_seeds": seeds, "group_sizes": list(GROUP_SIZES)}, "float32")


def cases() -> list[Case]:
    """A table for each thing that may be given."""
    return [Case(f"multiplicity/{name}", partial(_make, name)) for name in SETTINGS]


def figure(records):
    """Estimates against the truth, and the rate at 1 % of every question."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import NullLocator

    rows = [
        (result["case"].removeprefix("multiplicity/"), row)
        for result in records
        for row in result["rows"]
    ]
    names = {"graded-3000": ", model of 3,000 steps"}
    out = Figure(figsize=(10, 4.2), layout=ConstrainedLayoutEngine(rect=(0, 0.05, 1, 0.95)))
    left, right = out.subplots(1, 2)
    colors = ("#4477aa", "#66ccee", "#332288", "#ccbb44", "#228833", "#aa3377")
    for i, (case, row) in enumerate(rows):
        title = row["method"] + names.get(case, "")
        truth = sorted(int(k) for k in row["median_estimates"] if int(k))
        middle = np.array([row["median_estimates"][str(k)] for k in truth], float)
        left.plot(truth, np.median(middle, axis=1), "o-", color=colors[i], label=title, ms=4)
        for question, found in row["questions"].items():
            place = ["x2", "x4", "x8", "membership"].index(question) + (i - 2.5) * 0.12
            rate = found["tpr"]
            right.plot([place] * 2, [rate["low"], rate["high"]], color=colors[i], lw=1)
            right.plot(place, rate["value"], "o", color=colors[i], ms=4)
    ticks = [1, 2, 4, 8, 16, 32]
    left.plot(ticks, ticks, color="0.7", lw=1, zorder=0)
    left.set(xscale="log", yscale="log", xlabel="times in the training set", ylabel="estimated")
    for axis in (left.xaxis, left.yaxis):
        axis.set_ticks(ticks, [str(tick) for tick in ticks])
        axis.set_minor_locator(NullLocator())
    left.legend(frameon=False, fontsize=8)
    right.set_xticks(range(4), ["twice", "4 times", "8 times", "once,\nagainst unseen"])
    right.set(ylabel="found at 1 % false positives", title="against images seen once")
    for axes in (left, right):
        axes.grid(color="0.92")
    return out
