"""Local dimension on a circle: stored by overfitting, stored by duplication, or not stored."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.reproductions._record import EXACT, OTHER, STORED, Reproduction, Statement, main
from memjax.calculus.linearization import linearize
from memjax.densities.empirical import Empirical
from memjax.diffusion.combine import at
from memjax.networks.mlp import ResidualMLP
from memjax.training.loop import train

KAPPA, NUM, FEW, COPIES, DUPLICATED = 2.0, 100, 12, 25, 2.0
"""The first set has 100 points of the density and one more, at angle 2, 25 times; the second 12."""
NOISE = 0.05
GROUPS = {
    "duplicated": ("many", "25 copies", "k"),
    "alone": ("many", "alone among 100", "#009E73"),
    "crowded": ("many", "crowded", OTHER),
    "few": ("few", "alone among 12", STORED),
}


def _at_angle(angle):
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)


@jax.jit
def _dimensions(score, points, sigmas):
    """FLIPD and effective dimension, [levels, points] each."""

    def one(x, sigma):
        linear = linearize(at(score, sigma), x)
        effective = x.size + sigma**2 * linear.trace()
        return effective + sigma**2 * jnp.sum(linear.value**2), effective

    return jax.vmap(jax.vmap(one, (0, None)), (None, 0))(points, sigmas)


def _nearest(angles, others):
    """Distance along the circle to the nearest other point."""
    gaps = np.abs(angles[:, None] - others[None])
    gaps = np.minimum(gaps, 2 * np.pi - gaps)
    return np.where(gaps == 0, np.inf, gaps).min(axis=1)


def compute(quick, seed):
    """Both dimensions at stored points and all along the circle, for two training sets."""
    rng = np.random.default_rng(seed)
    drawn = np.sort(rng.vonmises(0, KAPPA, NUM))
    many = np.append(drawn[_nearest(drawn, np.array([DUPLICATED])) > 0.25], DUPLICATED)
    few = np.sort(rng.vonmises(0, KAPPA, FEW))
    times = {"many": np.append(np.ones(len(many) - 1, int), COPIES), "few": np.ones(FEW, int)}
    stored = {"many": many, "few": few}
    # The truth: the density of ordinary points, and an atom at the duplicated one.
    smooth = _at_angle(rng.vonmises(0, KAPPA, 200 if quick else 20_000))
    share = COPIES / times["many"].sum()
    atom = np.append(np.full(len(smooth), (1 - share) / len(smooth)), share)
    truths = {
        "many": Empirical(
            np.concatenate([smooth, _at_angle(DUPLICATED)[None]]),
            atom.astype(np.float32),
            chunk_size=1024,
        ),
        "few": Empirical(smooth, chunk_size=1024),
    }
    sweep = np.linspace(-np.pi, np.pi, 31 if quick else 361)
    sigmas = jnp.asarray(np.geomspace(0.02, 0.5, 15), jnp.float32)
    at_noise = int(np.argmin(np.abs(np.asarray(sigmas) - NOISE)))
    found, curves = {}, {}
    for name, angles in stored.items():
        model = train(
            np.repeat(_at_angle(angles), times[name], axis=0),
            network=ResidualMLP(width=256, num_blocks=1 if quick else 2, embedding_width=64),
            steps=200 if quick else {"many": 12_000, "few": 6000}[name],
            log_sigma_mean=-1.8,
            seed=seed,
        )
        points = jnp.asarray(_at_angle(np.concatenate([angles, sweep])))
        scores = {"model": model, "memory": Empirical(_at_angle(angles)), "truth": truths[name]}
        for who, score in scores.items():
            flipd = np.asarray(_dimensions(score, points, sigmas)[0])
            curves[name, who] = flipd[:, : len(angles)]
            found.setdefault(name, {})[who] = {
                "stored": flipd[at_noise, : len(angles)],
                "sweep": flipd[at_noise, len(angles) :],
            }
    lone = {name: _nearest(angles, angles) > 4 * NOISE for name, angles in stored.items()}
    near = _nearest(many, many) < NOISE
    once = times["many"] == 1
    rows = {
        "duplicated": ~once,
        "alone": once & lone["many"],
        "crowded": once & near,
        "few": lone["few"],
    }
    profile = {
        group: {who: np.median(curves[GROUPS[group][0], who][:, own], axis=1) for who in scores}
        for group, own in rows.items()
        if own.any()
    }

    def median(group, who):
        return float(profile[group][who][at_noise]) if group in profile else float("nan")

    def compared(group):
        return f"model {median(group, 'model'):.2f}, true density {median(group, 'truth'):.2f}"

    statements = [
        Statement(
            "memorized by overfitting (OD-Mem): the model's local dimension at a stored point is "
            "below that of the data, 1",
            f"FLIPD at noise {NOISE}, median of {rows['few'].sum()} lone points of a set of {FEW}: "
            f"{compared('few')}",
            bool(median("few", "model") < 0.5 < median("few", "truth")),
        ),
        Statement(
            "the same at lone points of a set of 100",
            f"{rows['alone'].sum()} points farther than 0.2 from all others: {compared('alone')}",
            bool(median("alone", "model") < 0.5 < median("alone", "truth")),
            "100 points outline the circle, and the network joins them up (also with three blocks "
            "and three times the learning rate). The paper's longer training was not tried.",
        ),
        Statement(
            "memorized because the data are (DD-Mem): both dimensions are low at the duplicated "
            "point",
            compared("duplicated"),
            bool(max(median("duplicated", "model"), median("duplicated", "truth")) < 0.5),
        ),
        Statement(
            "not memorized: where the samples are dense the model has the dimension of the circle",
            f"{rows['crowded'].sum()} points with another within the noise: {compared('crowded')}",
            bool(abs(median("crowded", "model") - 1) < 0.35),
        ),
    ]
    numbers = {
        "stored": stored,
        "sweep": sweep,
        "found": found,
        "sigmas": np.asarray(sigmas),
        "profile": profile,
        "groups": rows,
    }
    return numbers, statements


def draw(figure, numbers):
    """FLIPD around the circle for both sets, and over noise."""
    many, few, over = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 1))
    sweep = np.array(numbers["sweep"])
    for axis, name, title in (
        (many, "many", "100 points, and one 25 times (angle 2)"),
        (few, "few", "12 points"),
    ):
        found = numbers["found"][name]
        for who, style, color, label in (
            ("memory", ":", "0.6", "perfect memory"),
            ("truth", "-", EXACT, "true density"),
            ("model", "-", OTHER, "model"),
        ):
            values = np.array(found[who]["sweep"], float)
            axis.plot(sweep, values, style, color=color, linewidth=1, label=label)
        stored = np.array(numbers["stored"][name])
        axis.plot(
            stored,
            found["model"]["stored"],
            "o",
            color=STORED,
            markersize=3.5,
            label="model, stored points",
        )
        axis.set_ylim(-0.3, 4)
        axis.set_xlabel("angle", fontsize=9)
        axis.set_title(f"FLIPD at noise {NOISE}: {title}", fontsize=9)
    many.legend(fontsize=7, loc="upper left")
    for group, curves in numbers["profile"].items():
        _, label, color = GROUPS[group]
        over.plot(numbers["sigmas"], curves["model"], color=color, label=label)
        over.plot(numbers["sigmas"], curves["truth"], "--", color=color, linewidth=0.9)
    over.set(xscale="log", ylim=(-0.3, 2.5), xticks=[0.02, 0.05, 0.1, 0.2, 0.5])
    over.set_xticks([], minor=True)
    over.set_xticklabels(["0.02", "0.05", "0.1", "0.2", "0.5"])
    over.axhline(1, color="0.85", linewidth=0.8)
    over.set_xlabel(r"noise $\sigma$", fontsize=9)
    over.set_title("FLIPD, median of stored points (dashed: truth)", fontsize=9)
    over.legend(fontsize=7, loc="upper left")


REPRODUCTION = Reproduction(
    "circle",
    "local dimension on a circle",
    "Ross et al. 2025, arXiv:2411.00113; FLIPD: Kamkari et al. 2024",
    f"{NUM} points of a von Mises density on the circle (kappa = 2), as in the paper, and one more "
    f"{COPIES} times, so that one world shows both kinds of memory; and a set of {FEW}. A residual "
    "MLP, 12,000 and 6,000 steps of 128 draws instead of 20,000 epochs of a plain one. FLIPD is "
    "exact, at the clean point.",
    compute,
    draw,
)

if __name__ == "__main__":
    sys.exit(main([REPRODUCTION]))
