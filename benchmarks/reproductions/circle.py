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

NUM, KAPPA, COPIES, DUPLICATED = 100, 2.0, 25, 2.0
"""Points drawn around angle 0; one more at angle 2 stands 25 times."""
NOISE = 0.05


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


def compute(quick, seed):
    """Both dimensions at stored points and all along the circle."""
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.vonmises(0, KAPPA, NUM))
    angles = angles[np.abs(angles - DUPLICATED) > 0.25]
    data = np.concatenate([_at_angle(angles), np.repeat(_at_angle(DUPLICATED)[None], COPIES, 0)])
    model = train(
        data,
        network=ResidualMLP(width=256, num_blocks=2, embedding_width=64),
        steps=200 if quick else 12000,
        log_sigma_mean=-1.8,
        seed=seed,
    )
    # The truth: the von Mises density of ordinary points, and an atom at the duplicated one.
    many = rng.vonmises(0, KAPPA, 20_000 if not quick else 1000)
    share = COPIES / len(data)
    truth = Empirical(
        np.concatenate([_at_angle(many), _at_angle(DUPLICATED)[None]]),
        np.append(np.full(len(many), (1 - share) / len(many)), share).astype(np.float32),
        chunk_size=1024,
    )
    sweep = np.linspace(-np.pi, np.pi, 361)
    sigmas = jnp.asarray(np.geomspace(0.02, 0.5, 15), jnp.float32)
    level = jnp.full(1, NOISE, jnp.float32)
    stored = np.append(angles, DUPLICATED)
    scores = {"learned": model, "stored": Empirical(data), "truth": truth}
    found, profile = {}, {}
    for name, score in scores.items():
        both = jnp.asarray(_at_angle(np.concatenate([stored, sweep])))
        flipd, effective = (np.asarray(v)[0] for v in _dimensions(score, both, level))
        found[name] = {
            "flipd": flipd[: len(stored)],
            "effective": effective[: len(stored)],
            "flipd_sweep": flipd[len(stored) :],
            "effective_sweep": effective[len(stored) :],
        }
    # The distance to the next stored point, in units of the noise, says which kind a point is.
    gaps = np.abs(stored[:, None] - angles[None])
    gaps = np.minimum(gaps, 2 * np.pi - gaps)
    gaps[np.arange(len(angles)), np.arange(len(angles))] = np.inf
    nearest = gaps.min(axis=1)
    once = np.arange(len(stored)) < len(angles)
    groups = {
        "duplicated": ~once,
        "alone": once & (nearest > 4 * NOISE),
        "crowded": once & (nearest < NOISE),
    }
    far = np.abs(sweep[:, None] - stored[None])
    far = np.minimum(far, 2 * np.pi - far).min(axis=1) > 4 * NOISE
    profile = {
        group: {
            name: np.median(
                np.asarray(_dimensions(score, jnp.asarray(_at_angle(stored[rows])), sigmas)[0]),
                axis=1,
            )
            for name, score in scores.items()
        }
        for group, rows in groups.items()
        if rows.any()
    }

    def middle(name, group, which="flipd"):
        rows = groups[group]
        return float(np.median(found[name][which][rows])) if rows.any() else float("nan")

    between = float(np.median(found["learned"]["flipd_sweep"][far])) if far.any() else float("nan")
    statements = [
        Statement(
            "memorized by overfitting (OD-Mem): the model's local dimension at a stored point is "
            "below that of the data, 1",
            f"FLIPD at noise {NOISE} at {groups['alone'].sum()} stored points that stand alone: "
            f"model {middle('learned', 'alone'):.2f}, true density {middle('truth', 'alone'):.2f} "
            f"(effective dimension {middle('learned', 'alone', 'effective'):.2f} and "
            f"{middle('truth', 'alone', 'effective'):.2f})",
            bool(middle("learned", "alone") < 0.5 < middle("truth", "alone")),
        ),
        Statement(
            "memorized because the data are (DD-Mem): both dimensions are low at the duplicated "
            "point",
            f"model {middle('learned', 'duplicated'):.2f}, true density "
            f"{middle('truth', 'duplicated'):.2f}",
            bool(max(middle("learned", "duplicated"), middle("truth", "duplicated")) < 0.5),
        ),
        Statement(
            "not memorized: where the samples are dense the model has the dimension of the circle",
            f"at {groups['crowded'].sum()} stored points with a neighbor within the noise: model "
            f"{middle('learned', 'crowded'):.2f}, true density {middle('truth', 'crowded'):.2f}; "
            f"on the circle far from every stored point the model says {between:.2f}",
            bool(abs(middle("learned", "crowded") - 1) < 0.35),
            "far from what it has stored, the circle is off the model's manifold: FLIPD then "
            "counts the squared score too, and exceeds the number of coordinates.",
        ),
    ]
    numbers = {
        "stored": stored,
        "sweep": sweep,
        "found": found,
        "sigmas": np.asarray(sigmas),
        "profile": profile,
        "groups": groups,
    }
    return numbers, statements


def draw(figure, numbers):
    """The circle; FLIPD around it; FLIPD over noise."""
    circle, around, over = figure.subplots(1, 3, width_ratios=(0.8, 1.5, 1))
    stored, sweep = np.array(numbers["stored"]), np.array(numbers["sweep"])
    learned = numbers["found"]["learned"]
    shades = circle.scatter(
        *_at_angle(stored).T,
        c=np.clip(learned["flipd"], 0, 2),
        cmap="coolwarm_r",
        s=14,
        vmin=0,
        vmax=2,
        zorder=2,
    )
    circle.plot(*_at_angle(sweep).T, color="0.8", linewidth=0.8, zorder=1)
    circle.annotate(
        "25 copies",
        _at_angle(stored[-1]),
        xytext=(0.15, 0.45),
        fontsize=8,
        arrowprops={"arrowstyle": "-", "color": "0.5"},
    )
    circle.set_aspect("equal")
    circle.set_title("stored points; color: FLIPD", fontsize=9)
    figure.colorbar(shades, ax=circle, shrink=0.6)
    around.plot(sweep, learned["flipd_sweep"], color=OTHER, linewidth=1, label="model, circle")
    around.plot(
        sweep,
        numbers["found"]["stored"]["flipd_sweep"],
        ":",
        color="0.5",
        linewidth=0.9,
        label="perfect memory",
    )
    around.plot(
        sweep,
        numbers["found"]["truth"]["flipd_sweep"],
        color=EXACT,
        linewidth=0.9,
        label="true density",
    )
    around.plot(
        stored, learned["flipd"], "o", color=STORED, markersize=3.5, label="model, stored points"
    )
    around.set(ylim=(-0.2, 6))
    around.set_xlabel("angle", fontsize=9)
    around.set_title(f"FLIPD at noise {NOISE}", fontsize=9)
    around.legend(fontsize=7)
    styles = {"learned": "-", "truth": "--"}
    colors = {"duplicated": "k", "alone": STORED, "crowded": OTHER}
    for group, curves in numbers["profile"].items():
        for name, style in styles.items():
            over.plot(
                numbers["sigmas"],
                curves[name],
                style,
                color=colors[group],
                label=f"{group}, {'model' if name == 'learned' else 'truth'}",
            )
    over.set(xscale="log", ylim=(-0.3, 2.5))
    over.axhline(1, color="0.85", linewidth=0.8)
    over.set_xlabel(r"noise $\sigma$", fontsize=9)
    over.set_title("FLIPD, median of stored points", fontsize=9)
    over.legend(fontsize=7)


REPRODUCTION = Reproduction(
    "circle",
    "local dimension on a circle",
    "Ross et al. 2025, arXiv:2411.00113; FLIPD: Kamkari et al. 2024",
    f"{NUM} points of a von Mises density on the circle (kappa = 2), as in the paper, and one more "
    f"{COPIES} times, so that one world shows both kinds of memory. A residual MLP, 12,000 steps "
    "instead of 20,000 epochs. Effective dimension and FLIPD are exact, at the stored points.",
    compute,
    draw,
)

if __name__ == "__main__":
    sys.exit(main([REPRODUCTION]))
