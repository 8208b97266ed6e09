"""What stops a model from copying, at what price: other noises, other prompts, other training sets.

``prompts``: the ten prompts of which one image fills 36 of 40 rows, so that they admit others, and
the twenty that only ever meant one image, without and with guidance. Every way of choosing initial
noises has a noise level and a threshold (a share of the objective's median over random noises of
the prompt): chosen on training seeds 1-3 as the setting that moves noises least among those with a
twentieth of the copies, or the fewest copies where none has; scored on 4-6, on which nothing was
chosen. Beside them the optimization of the prompt's embedding, and drawing until the training set
itself shows no copy. The cost is in network products for each noise accepted, without the sample
that it starts.

How Gaussian the accepted noises are: |n|^2 against chi-square (Kolmogorov-Smirnov, all together),
and the 64 coordinates of each noise against the normal law: the share of noises with p < 0.05,
which is 0.05 for random ones. Any selection must show at last, rejection by the training set too.

``data``: the graded digits, changed where detectors point, and as many rows at random.
"""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._beds import score_of
from benchmarks._precision import COLORS, panels, rounded
from benchmarks.harness import Case, Table, Target
from memjax._core.keys import derive_key
from memjax.data.bundled import digits
from memjax.data.testbeds import PromptBed
from memjax.diffusion.model import Model
from memjax.diffusion.sampling import sample
from memjax.evaluate.distances import find_copies, nearest_neighbors
from memjax.mitigate import (
    NoiseObjective,
    embed_conditions,
    fitted_model,
    judge_cost,
    judge_noises,
    mitigate_data,
    optimize_prompts,
    retrain,
    sail,
)
from memjax.training.testbeds import graded_testbed, prompts_testbed

TUNING, SCORING = (1, 2, 3), (4, 5, 6)
GUIDANCE = (1.0, 2.0)
NOISES, PILOT = 24, 16
"""Noises wanted for each prompt, and random ones whose median sets the scale of thresholds."""
CHUNK = 10
"""Prompts together."""
SHARES = (0.8, 0.7, 0.6, 0.5, 0.4)
SIGMAS = (None, 2.0)
"""The first step of the sampler, and a level at which it decides between images."""
EVALUATIONS = 35
"""Of a sample: Heun's rule with 18 steps."""
FOLD, MARGIN = 10, 20
"""Fewer copies: what is aimed at, and what a setting is chosen for."""
EMBEDDING_TARGETS = (0.8, 0.6, 0.4, 0.2)
"""Of the gap, as a share of the median before."""


class Way(NamedTuple):
    """A way of choosing initial noises.

    Attributes:
        title: for readers.
        objective: its name.
        options: of ``sail``.
        sigmas: noise levels to choose from.
        regularization: of the objective.
    """

    title: str
    objective: str
    options: tuple[tuple[str, Any], ...]
    sigmas: tuple[float | None, ...] = SIGMAS
    regularization: float = 0.0


_ADAM = (("optimizer", "adam"), ("num_steps", 20))
WAYS = (
    Way("paper, Adam", "paper", _ADAM),
    Way("released code's, Adam", "released", (*_ADAM, ("keep_norm", False)), (None,), 0.05),
    Way("released code's, Polyak", "released", (), (None,)),
    Way("exact, Adam", "exact", _ADAM),
    Way("gap, Polyak", "gap", ()),
    Way("pull, Adam", "pull", _ADAM),
    Way("pull, Polyak", "pull", ()),
    Way("pull, selection", "pull", (("num_steps", 0), ("max_candidates", 600))),
)
OURS = "pull, Polyak"


class World(NamedTuple):
    """One training seed of the prompts bed."""

    model: Model
    bed: PromptBed
    kind: np.ndarray


@cache
def world(seed: int, quick: bool) -> World:
    """The bed with its model, whose facts are equal for all seeds: one program serves them all."""
    found = prompts_testbed(seed, **({"steps": 150, "num_samples": 70} if quick else {}))
    model = found.model
    facts = {name: getattr(model, name) for name in ("sigma_min", "sigma_max")}
    same = Model(
        score_of(model),
        model.event_shape,
        data_std=0.75,
        null_condition=model.null_condition,
        **facts,
    )
    return World(same, found.bed, np.array(found.bed.kind))


def draw(model: Model, noises, conditions, guidance: float) -> np.ndarray:
    """Samples from noises [c, n], NaN where the noise is."""
    flat = jnp.asarray(noises).reshape(-1, *model.event_shape)
    each = jnp.repeat(jnp.asarray(conditions), noises.shape[1], axis=0)
    return np.asarray(
        sample(model, len(flat), noises=flat, conditions=each, guidance=guidance, chunk_size=240)
    )


def normality(noises: np.ndarray) -> dict[str, float]:
    """P-value of |n|^2 against chi-square; share of noises rejected by their coordinates."""
    from scipy import stats

    flat = noises.reshape(len(noises), -1).astype(np.float64)
    if not len(flat):
        return {"norm p": float("nan"), "rejected": float("nan")}
    norms = stats.kstest((flat**2).sum(1), stats.chi2(flat.shape[1]).cdf).pvalue
    each = stats.kstest(flat, "norm", axis=1).pvalue
    return {"norm p": rounded(norms), "rejected": rounded(np.mean(each < 0.05))}


@cache
def _classifier():
    from sklearn.linear_model import LogisticRegression

    bank = digits()
    return LogisticRegression(max_iter=2000).fit(bank.images.reshape(len(bank), -1), bank.labels)


def quality(here: World, samples: np.ndarray, prompts: np.ndarray) -> dict[str, Any]:
    """Copies, and how much like digits, and like the prompt's, the samples are.

    ``own`` is whether the nearest training image is one of the prompt's. ``neighbor`` is the
    distance of samples that are no copies to the nearest image of the bank other than the prompt's
    first (which it must not be), over that of held-out digits.
    """
    bank = digits().images
    found = find_copies(samples, here.bed.images)
    first = here.bed.images[40 * prompts]
    free = ~found.is_copy & np.isfinite(found.d1)
    near = nearest_neighbors(samples, bank, k=2)
    own = np.linalg.norm((bank[near.index[:, 0]] - first).reshape(len(first), -1), axis=1) == 0
    distance = np.where(own, near.distance[:, 1], near.distance[:, 0])
    used = np.unique(here.bed.source)
    held = np.setdiff1d(np.arange(len(bank)), used)
    unit = np.median(nearest_neighbors(bank[held], bank[used]).distance)
    out = {"copies": found.is_copy, "neighbor": np.where(free, distance / unit, np.nan)}
    out["own"] = np.where(free, here.bed.prompt[found.nearest] == prompts, np.nan)
    digit = here.bed.digit_class[prompts]
    finite = np.nan_to_num(samples.reshape(len(samples), -1))
    out["right digit"] = np.where(digit >= 0, _classifier().predict(finite) == digit, np.nan)
    return out


class Trial(NamedTuple):
    """What a setting did on one kind of prompt, some seeds together: one entry a noise."""

    accepted: np.ndarray
    copies: np.ndarray
    neighbor: np.ndarray
    own: np.ndarray
    right: np.ndarray
    moved: np.ndarray
    noises: np.ndarray
    products: float

    def row(self) -> dict[str, Any]:
        """As JSON holds it: of accepted noises, but for their share."""
        ok = self.accepted
        found = {"accepted": rounded(ok.mean()), "products": rounded(self.products)}
        if not ok.any():
            return found | {"status": "not found", "copies": None}

        def mean(values: np.ndarray) -> float | None:
            known = values[ok & np.isfinite(values)]
            return rounded(np.mean(known)) if len(known) else None

        neighbor = self.neighbor[ok & np.isfinite(self.neighbor)]
        return found | {
            "status": "ok",
            "copies": rounded(self.copies[ok].mean()),
            "neighbor": rounded(np.median(neighbor)) if len(neighbor) else None,
            "own": mean(self.own),
            "right digit": mean(self.right),
            "moved": mean(self.moved),
            **normality(self.noises[ok]),
        }


def _joined(trials: list[Trial]) -> Trial:
    parts = [np.concatenate(part) for part in list(zip(*trials, strict=True))[:-1]]
    accepted = [t.accepted.sum() for t in trials]
    products = sum(t.products * a for t, a in zip(trials, accepted, strict=True))
    return Trial(*parts, float(products / max(1, sum(accepted))))


def _trial(here: World, prompts, noises, accepted, moved, products, guidance, model=None) -> Trial:
    conditions = prompts if model is None else model[1]
    samples = draw(here.model if model is None else model[0], noises, conditions, guidance)
    each = np.repeat(prompts, noises.shape[1])
    found = quality(here, samples, each)
    flat = np.asarray(accepted).ravel()
    return Trial(
        flat,
        found["copies"],
        found["neighbor"],
        found["own"],
        found["right digit"],
        np.asarray(moved).ravel(),
        np.asarray(noises).reshape(len(flat), -1),
        float(products) / max(1, int(flat.sum())),
    )


def _prompts(here: World, kind: str) -> np.ndarray:
    return np.flatnonzero(here.kind == kind).astype(np.int32)


def random_noises(seed: int, what: str, count: int, n: int) -> jax.Array:
    """Normal noises [count, n, 8, 8, 1]."""
    return jax.random.normal(derive_key(seed, what), (count, n, 8, 8, 1), jnp.float32)


def sailed(
    seed: int, quick: bool, kind: str, way: Way, guidance: float, sigma: float | None, share: float
) -> Trial:
    """A way to choose noises, on one seed."""
    here = world(seed, quick)
    prompts = _prompts(here, kind)
    objective = NoiseObjective(
        way.objective,
        sigma=sigma,
        regularization=way.regularization,
        guidance=1.0 if sigma is None else guidance,  # not read there: one program for both
    )
    count = len(prompts)
    pilot = random_noises(seed, "pilot", count, PILOT)
    scale = np.median(judge_noises(here.model, pilot, prompts, objective, chunk_size=CHUNK), axis=1)
    options = {"max_candidates": 4 * NOISES, **dict(way.options)}
    threshold = share * scale.astype(np.float32)
    if way.regularization:  # the share is of the objective alone
        threshold = share * (scale - way.regularization * 8) + way.regularization * 8
    found = sail(
        here.model,
        NOISES,
        key=seed,
        conditions=prompts,
        threshold=threshold.astype(np.float32),
        objective=objective,
        chunk_size=CHUNK,
        **options,
    )
    judging = judge_cost(here.model, PILOT, objective).total
    products = np.asarray(found.cost.total).sum() + count * judging
    return _trial(here, prompts, found.noises, found.accepted, found.moved, products, guidance)


def as_sampled(seed: int, quick: bool, kind: str, guidance: float) -> Trial:
    """Random noises."""
    here = world(seed, quick)
    prompts = _prompts(here, kind)
    noises = random_noises(seed, "as sampled", len(prompts), 4 * NOISES)
    yes = np.ones(noises.shape[:2], bool)
    return _trial(here, prompts, noises, yes, np.zeros(yes.shape), 0, guidance)


def rejected(seed: int, quick: bool, kind: str, guidance: float) -> Trial:
    """Random noises whose samples the training set does not call copies: an owner's own way."""
    here = world(seed, quick)
    prompts = _prompts(here, kind)
    noises = random_noises(seed, "rejection", len(prompts), 60 if quick else 600)
    yes = np.ones(noises.shape[:2], bool)
    found = _trial(here, prompts, noises, yes, np.zeros(yes.shape), 0, guidance)
    evaluations = EVALUATIONS * (1 if guidance == 1 else 2) * found.copies.size
    accepted = ~found.copies
    products = evaluations / max(1, int(accepted.sum()))
    return found._replace(accepted=accepted, products=products)


def reworded(seed: int, quick: bool, kind: str, guidance: float, share: float) -> Trial:
    """The prompt's embedding optimized; its products shared among the noises wanted."""
    here = world(seed, quick)
    prompts = _prompts(here, kind)
    model, vectors = embed_conditions(here.model, jnp.asarray(prompts))
    noises = random_noises(seed, "as sampled", len(prompts), NOISES)
    given = {"key": seed, "conditions": vectors, "num_steps": 60, "chunk_size": CHUNK}
    start = optimize_prompts(model, target=1e9, **given)
    target = share * float(np.median(start.before))
    found = optimize_prompts(model, target=target, **given)
    ok = np.repeat(np.asarray(found.status) == 0, NOISES).reshape(noises.shape[:2])
    products = np.asarray(found.cost.total).sum()
    other = (model, found.conditions)
    return _trial(here, prompts, noises, ok, np.zeros(ok.shape), products, guidance, other)


def choose(rows: list[dict[str, Any]], before: float) -> int:
    """The setting that moves noises least among those that reach the margin, else fewest copies."""
    found = [r["copies"] is not None and r["accepted"] >= 0.9 for r in rows]
    good = [ok and r["copies"] * MARGIN <= before for ok, r in zip(found, rows, strict=True)]
    if any(good):
        return min((i for i, ok in enumerate(good) if ok), key=lambda i: rows[i]["moved"])
    usable = [i for i, ok in enumerate(found) if ok] or range(len(rows))
    return min(usable, key=lambda i: (rows[i]["copies"] is None, rows[i]["copies"]))


def _make_prompts(quick: bool, seed: int) -> Table:
    tuning, scoring = ([seed + n for n in s[: 1 if quick else None]] for s in (TUNING, SCORING))
    ways = [w for w in WAYS if w.title == OURS] if quick else WAYS
    shares = SHARES[1:3] if quick else SHARES

    def over(seeds, run, *settings):
        return _joined([run(one, quick, *settings) for one in seeds])

    def compute():
        rows, targets = [], []

        def record(method, kind, guidance, trial, **more):
            row = {"method": method, "kind": kind, "guidance": guidance, **more, **trial.row()}
            rows.append(row)
            return row

        for guidance in GUIDANCE:
            before = {}
            for kind in ("mitigation", "memorized", "general"):
                for method, run in (("as sampled", as_sampled), ("rejection", rejected)):
                    if method == "rejection" and kind == "general":
                        continue
                    row = record(method, kind, guidance, over(scoring, run, kind, guidance))
                    before.setdefault(kind, row["copies"])
            start = over(tuning, as_sampled, "mitigation", guidance).row()["copies"]
            for way in ways:
                settings = [(sigma, share) for sigma in way.sigmas for share in shares]
                tried = [
                    over(tuning, sailed, "mitigation", way, guidance, *one).row()
                    for one in settings
                ]
                chosen = settings[choose(tried, start)]
                curve = [
                    {"sigma": s, "share": f, "copies": r["copies"], "accepted": r["accepted"]}
                    | {"products": r["products"], "rejected": r.get("rejected")}
                    for (s, f), r in zip(settings, tried, strict=True)
                ]
                more = {"sigma": chosen[0], "share": chosen[1]}
                trial = over(scoring, sailed, "mitigation", way, guidance, *chosen)
                row = record(way.title, "mitigation", guidance, trial, **more, tuning=curve)
                if way.title != OURS:
                    continue
                what = f"guidance {guidance:g}: copies left of those as sampled, {way.title}"
                left = (row["copies"] or 0) / before["mitigation"] if before["mitigation"] else 0
                if row["copies"] is None:
                    left = 1.0
                targets.append(Target(what, rounded(left), 1 / FOLD))
                random = next(r for r in rows if r["method"] == "as sampled")
                what = f"guidance {guidance:g}: noises not normal at 0.05, {way.title}"
                targets.append(Target(what, row.get("rejected", 1.0), random["rejected"] + 0.05))
                trial = over(scoring, sailed, "general", way, guidance, *chosen)
                record(way.title, "general", guidance, trial, **more)
                for share in shares:
                    trial = over(scoring, sailed, "memorized", way, guidance, chosen[0], share)
                    record(way.title, "memorized", guidance, trial, sigma=chosen[0], share=share)
            for share in EMBEDDING_TARGETS[: 1 if quick else None]:
                for kind in ("mitigation", "memorized", "general"):
                    trial = over(scoring, reworded, kind, guidance, share)
                    record("prompt embedding", kind, guidance, trial, share=share)
        return rows, targets

    parameters = {"d": 64, "tuning_seeds": tuning, "scoring_seeds": scoring, "noises": NOISES}
    return Table(compute, parameters, dtype="float32")


RANKINGS = ("p = 1 flux", "oracle", "score norm")
"""What ranks the graded digits."""


def _ranking(name: str, found) -> np.ndarray:
    from memjax.detect.evaluate import evaluate_detectors
    from memjax.detect.p_laplace import PLaplaceFlux
    from memjax.detect.score_norm import ScoreNorm

    if name == "oracle":
        return found.bed.multiplicity.astype(np.float64)
    detector = PLaplaceFlux(0.1, radius=0.5) if name == "p = 1 flux" else ScoreNorm(0.1)
    key = derive_key(0, "detectors")

    @jax.jit
    def values(score, images):
        def one(x):
            return evaluate_detectors(score, x, (detector,), key=key)[0].value

        return jax.lax.map(one, images, batch_size=128)

    return np.asarray(values(found.model, jnp.asarray(found.bed.images)), np.float64)


def _make_data(quick: bool, seed: int) -> Table:
    seeds = [seed + n for n in SCORING[: 1 if quick else 2]]
    steps, samples = (150, 64) if quick else (8000, 4096)
    actions = ("drop", "deduplicate", "augment")

    def compute():
        rows, targets = [], []
        gathered: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for one in seeds:
            found = graded_testbed(one, steps=steps, num_samples=samples)
            bed = found.bed
            heldout = bed.images[bed.multiplicity == 0]
            fit = retrain(heldout, num_samples=samples, seed=one, steps=steps)
            before = fitted_model(found.model, heldout, num_samples=samples, seed=one)
            for name in RANKINGS[: 1 if quick else None]:
                ranking = _ranking(name, found)
                for action in actions if name == RANKINGS[0] else ("deduplicate",):
                    result = mitigate_data(
                        bed.images,
                        bed.multiplicity,
                        ranking,
                        fit,
                        num_images=80,
                        action=action,
                        num_random=int(name == RANKINGS[0]),
                        seed=one,
                        before=before,
                    )
                    sets = {"before": result.before, "after": result.after}
                    if result.random:
                        sets["random"] = result.random[0]
                    for which, outcome in sets.items():
                        row = {"seed": one, "which": which, **outcome._asdict()}
                        gathered.setdefault((name, action), []).append(row)
        for (name, action), these in gathered.items():
            row = {"method": name, "action": action, "status": "ok"}
            for which in ("before", "after", "random"):
                mine = [r for r in these if r["which"] == which]
                if mine:
                    row[which] = {
                        key: rounded(np.mean([r[key] for r in mine]))
                        for key in ("rows", "changed", "copies", "copied", "heldout_loss")
                    }
            rows.append(row)
            if (name, action) == (RANKINGS[0], "deduplicate"):
                share = row["after"]["copies"] / max(row["random"]["copies"], 1e-9)
                what = "copies left by de-duplicating what the flux ranks highest, of random"
                targets.append(Target(what, rounded(share), 1 / 3))
                worse = row["after"]["heldout_loss"] / row["before"]["heldout_loss"]
                targets.append(Target("held-out loss after, of before", rounded(worse), 1.0))
        return rows, targets

    return Table(compute, {"d": 64, "seeds": seeds, "images": 80}, dtype="float32")


def cases() -> list[Case]:
    """Two tables."""
    return [Case("mitigation/prompts", _make_prompts), Case("mitigation/data", _make_data)]


def _label(row) -> str:
    if row["method"] == "prompt embedding":
        return f"prompt embedding, gap to {row['share']:g}"
    return row["method"]


def figure(records):
    """Copies left by every way at either guidance, with its cost; and trainings compared."""
    by_case = {record["case"]: record for record in records}
    canvas, axes = panels(3, height=4.4)
    prompts = by_case["mitigation/prompts"]["rows"]
    for axis, guidance in zip(axes, GUIDANCE, strict=False):
        here = [r for r in prompts if r["guidance"] == guidance and r["kind"] == "mitigation"]
        here = [r for r in here if r["copies"] is not None]
        random = next(r for r in here if r["method"] == "as sampled")
        for i, row in enumerate(here):
            color = COLORS[0] if row["method"] == OURS else "0.35"
            normal = row["rejected"] <= random["rejected"] + 0.05 and row["norm p"] >= 0.01
            fill = color if normal else "white"
            axis.plot(row["copies"], i, "o", color=color, markerfacecolor=fill, markersize=5)
            cost = f"{row['products']:,.0f}" if row["products"] >= 10 else f"{row['products']:.1f}"
            if row["accepted"] < 0.995:
                cost += f", {row['accepted']:.0%} found"
            axis.text(1.06, i, cost, fontsize=6.5, va="center", color=color)
        axis.set_yticks(range(len(here)), [_label(row) for row in here], fontsize=6.5)
        axis.text(1.06, -0.9, "products a noise", fontsize=6.5, color="0.35")
        axis.set_ylim(len(here) - 0.5, -1.4)
        axis.axvline(random["copies"] / FOLD, color="0.6", linewidth=0.8, linestyle=":")
        axis.set_xlim(-0.03, 1.62)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1])
        axis.set_xlabel("share of copies; open: noises not Gaussian", fontsize=8)
        axis.set_title(f"mixed prompts, guidance {guidance:g}", fontsize=9)
    rows = by_case.get("mitigation/data", {"rows": []})["rows"]
    for i, row in enumerate(rows):
        for which, color in (("before", "0.6"), ("random", COLORS[1]), ("after", COLORS[0])):
            if which in row:
                label = {"label": which} if not i else {}
                axes[2].plot(row[which]["copies"], i, "o", color=color, markersize=5, **label)
    axes[2].set_yticks(range(len(rows)), [f"{r['action']}, {r['method']}" for r in rows])
    axes[2].tick_params(axis="y", labelsize=6.5)
    axes[2].invert_yaxis()
    axes[2].set_xlabel("share of copies", fontsize=8)
    axes[2].set_title("graded digits, trained again", fontsize=9)
    if rows:
        axes[2].legend(fontsize=7, frameon=False)
    else:
        axes[2].set_axis_off()
    for axis in axes:
        axis.grid(color="0.92")
        axis.tick_params(axis="x", labelsize=7)
    return canvas
