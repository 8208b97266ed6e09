"""What each detector finds on the graded digits, and what it costs.

Quality is measured on test beds of three seeds other than the demonstration's: each redraws which
digits are repeated and held out, and trains anew. A case times one detector on a chunk of images
of the first of them; its check recomputes the statistic from the dense Jacobian of the score.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, Program
from memjax._core.keys import derive_key
from memjax.auditing.metrics import contrasts
from memjax.auditing.parts import Parts
from memjax.auditing.plan import DETECTORS, plan_detectors
from memjax.auditing.rows import evaluate_rows
from memjax.data.images import from_array
from memjax.detect.evaluate import evaluate_detectors
from memjax.evaluate.roc import auroc, tpr_at_fpr
from memjax.training.testbeds import graded_testbed

NUM_SEEDS = 3
CHUNK = 128
CONTRASTS = {
    "repeated 4 times or more": "4 times or more / once",
    "repeated 2 times": "2 times / once",
    "seen once": "once / never",
}


@cache
def _testbed(seed: int, quick: bool):
    steps, samples = (300, 64) if quick else (8000, 4096)
    return graded_testbed(seed, steps=steps, num_samples=samples)


def _quality(name: str, seeds: list[int], quick: bool) -> dict[str, dict[str, list[float]]]:
    """AUROC and TPR at 1 % FPR by contrast, one number a seed."""
    out: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        testbed = _testbed(seed, quick)
        (planned,) = plan_detectors([name], testbed.model)
        found = evaluate_rows(
            testbed.model,
            from_array(testbed.bed.images),
            (planned.detector,),
            seed=0,
            chunk_size=256,
            parts=Parts(None, {}),
            prefix="",
            progress=lambda stage, done, total: None,
        )
        for contrast in contrasts(np.asarray(testbed.bed.multiplicity)):
            if contrast.positives in CONTRASTS:
                rows = contrast.positive | contrast.negative
                scores, labels = found.value[rows, 0], contrast.positive[rows]
                numbers = out.setdefault(contrast.positives, {"auroc": [], "tpr_at_1_percent": []})
                numbers["auroc"].append(auroc(scores, labels).value)
                numbers["tpr_at_1_percent"].append(tpr_at_fpr(scores, labels, fpr=0.01).value)
    return out


def _run(detector, model, xs, key):
    return jax.vmap(lambda x: evaluate_detectors(model, x, (detector,), key=key)[0].value)(xs)


def _forward(model, xs, sigma):
    return jax.vmap(lambda x: model.score(x, sigma))(xs)


def _reference(detector, model, x, key) -> float:
    """The statistic from the score and its dense Jacobian, in NumPy float64."""
    sigma, d = detector.sigma, x.size

    def score(point):
        return np.asarray(model.score(point, sigma), np.float64).ravel()

    if detector.name == "denoising_loss":
        losses = []
        for j in range(detector.num_draws):
            n = jax.random.normal(derive_key(key, "draw", j), x.shape, x.dtype)
            residual = np.asarray(n, np.float64).ravel() + sigma * score(x + sigma * n)
            losses.append(np.mean(residual**2))
        return -float(np.mean(losses))
    s = score(x)
    if detector.name == "score_norm":
        return -sigma * float(np.linalg.norm(s)) / np.sqrt(d)
    jacobian = jax.jacrev(lambda p: model.score(p.reshape(x.shape), sigma).ravel())(x.ravel())
    trace = np.trace(np.asarray(jacobian, np.float64))
    extra = s @ s if detector.name == "flipd" else 0.0
    return -(1 + sigma**2 * float(trace + extra) / d)


def _make(name: str, quick: bool, seed: int) -> Program:
    seeds = [seed + 1 + i for i in range(1 if quick else NUM_SEEDS)]
    testbed = _testbed(seeds[0], quick)
    (planned,) = plan_detectors([name], testbed.model)
    detector, model = planned.detector, testbed.model
    xs = jnp.asarray(testbed.bed.images[:CHUNK])
    key = derive_key(seed, "detectors")

    def check(values) -> float:
        expected = [_reference(detector, model, x, key) for x in xs[:4]]
        return float(np.max(np.abs(np.asarray(values[:4]) / np.asarray(expected) - 1)))

    return Program(
        run=partial(_run, detector),
        arguments=(model, xs, key),
        check=check,
        tolerance=1e-3,
        forward=(_forward, (model, xs, jnp.asarray(detector.sigma, xs.dtype))),
        parameters={
            "title": detector.title,
            "sigma_over_data_std": planned.level,
            "images": CHUNK,
            "seeds": seeds,
            "quality": _quality(name, seeds, quick),
        },
    )


def cases() -> list[Case]:
    """One case per detector that an audit knows."""
    return [Case(f"detectors/{name}", partial(_make, name)) for name in DETECTORS]


def figure(records):
    """Quality on three questions against cost in forwards of the network."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(rect=(0, 0.05, 1, 0.95))
    out = Figure(figsize=(10, 4.2), layout=layout)
    axes = out.subplots(1, len(CONTRASTS), sharex=True)
    good = [record for record in records if record["status"] == "ok"]
    markers, colors = "osD^v", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
    for axis, (positives, title) in zip(axes, CONTRASTS.items(), strict=True):
        for record, marker, color in zip(good, markers, colors, strict=False):
            values = record["parameters"]["quality"][positives]["auroc"]
            axis.plot(
                [record["forwards"]] * len(values),
                values,
                marker,
                color=color,
                markersize=6,
                alpha=0.8,
                label=record["parameters"]["title"],
            )
        axis.set(xscale="log", title=title, xlabel="cost of an image, in forwards")
        axis.grid(color="0.9")
    axes[0].set_ylabel("AUROC (one mark a training seed)")
    out.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return out
