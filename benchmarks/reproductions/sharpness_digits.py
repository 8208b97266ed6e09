"""One digit 9 repeated a hundred times against three thousand digits 3: the whole spectrum."""

import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.reproductions._record import EXACT, OTHER, STORED, Reproduction, Statement, main
from benchmarks.reproductions._trajectories import trajectories
from memjax._core.keys import derive_key
from memjax.calculus.linearization import linearize
from memjax.data.bundled import digits
from memjax.diffusion.combine import at, guided
from memjax.diffusion.model import Model
from memjax.evaluate.distances import nearest_neighbors
from memjax.networks.mlp import ResidualMLP
from memjax.training.loop import train

THREE, NINE, ANY = 0, 1, 2
"""Conditions; the last is the unconditional branch, trained on other rows."""
PER_CLASS, COPIES, DROPOUT, GUIDANCE, LAST = 3000, 100, 0.2, 5.0, 0.02


def _varied(images, count, rng):
    """``count`` slightly rotated, scaled and shifted versions, in turn of each image."""
    from scipy.ndimage import affine_transform

    out = np.empty((count, *images.shape[1:]), np.float32)
    center = (np.array(images.shape[1:3]) - 1) / 2
    for i in range(count):
        angle, scale = rng.uniform(-0.2, 0.2), rng.uniform(0.92, 1.08)
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        offset = center - turn @ center + rng.uniform(-0.6, 0.6, 2)
        image = images[i % len(images), ..., 0]
        out[i, ..., 0] = affine_transform(image, turn, offset, order=1, mode="nearest")
    return out


def _training_set(seed):
    """Rows and conditions such that every fifth row drawn is the unconditional branch's."""
    bank = digits()
    rng = np.random.default_rng(seed)
    threes, nines = (bank.images[bank.labels == label] for label in (3, 9))
    stored = nines[int(rng.integers(len(nines)))]
    general, other = _varied(threes, PER_CLASS, rng), _varied(nines, PER_CLASS, rng)
    conditional = np.concatenate([general, np.repeat(stored[None], COPIES, axis=0)])
    labels = np.repeat([THREE, NINE], [PER_CLASS, COPIES])
    repeats = round(2 * PER_CLASS * (1 - DROPOUT) / DROPOUT / len(conditional))
    images = np.concatenate([*[conditional] * repeats, general, other])
    conditions = np.concatenate([*[labels] * repeats, np.full(2 * PER_CLASS, ANY)])
    return images, conditions.astype(np.int32), general, stored


@jax.jit
def _spectra(score, points, sigmas, conditions):
    """Eigenvalues of the symmetric part, and what the checks need, [levels, samples, ...]."""

    def one(x, sigma, condition):
        linear = linearize(at(score, sigma, condition), x)
        jacobian, s = linear.jacobian(), linear.value.reshape(-1)
        values = jnp.linalg.eigvalsh((jacobian + jacobian.T) / 2)
        along = jnp.matmul(jacobian, s, precision="highest")
        skew = jnp.linalg.norm((jacobian - jacobian.T) / 2) / jnp.linalg.norm(jacobian)
        return values, jnp.sum(s**2), jnp.sum(along**2), skew

    level = jax.vmap(one, (0, None, 0))
    return jax.lax.map(lambda pair: level(*pair, conditions), (points, sigmas))


def compute(quick, seed):
    """Spectra at the first and last step under guidance; the two checks without it."""
    images, conditions, general, stored = _training_set(seed)
    trained = train(
        images,
        network=ResidualMLP(num_conditions=3, num_blocks=1 if quick else 3),
        conditions=conditions,
        steps=100 if quick else 6000,
        condition_dropout=0.0,
        log_sigma_mean=-2.0,
        log_sigma_std=1.5,
        second_order_weight=0.5,
        seed=seed,
    )
    model = Model(
        trained.raw_score,
        trained.event_shape,
        sigma_min=trained.sigma_min,
        sigma_max=trained.sigma_max,
        data_std=trained.data_std,
        null_condition=jnp.int32(ANY),
    )
    num = 20 if quick else 200
    groups = {"stored": slice(None, num), "general": slice(num, 2 * num)}
    settings = {"last": LAST, "steps": 50 if quick else 500, "kept": 11}
    given = jnp.asarray(np.repeat([NINE, THREE], [num, 2 * num]), jnp.int32)
    sigmas, guided_path = trajectories(
        model,
        3 * num,
        derive_key(seed, "guided"),
        conditions=given,
        score=guided(model, GUIDANCE),
        **settings,
    )
    # As in the paper: of the general class the half that is farthest from what was trained on.
    apart = nearest_neighbors(np.asarray(guided_path[-1, num:]), general).distance[:, 0]
    rows = np.concatenate([np.arange(num), num + np.argsort(-apart)[:num]])
    guided_path = guided_path[:, rows]
    ends = {name: np.asarray(guided_path[-1, group]) for name, group in groups.items()}
    # Without guidance samples are distributed as the density of which H is the Hessian.
    sigmas, path = trajectories(
        model, 2 * num, derive_key(seed, "unguided"), conditions=given[: 2 * num], **settings
    )
    found = _spectra(
        model,
        jnp.concatenate([guided_path[jnp.array([0, -1])], path]),
        jnp.concatenate([sigmas[jnp.array([0, -1])], sigmas]),
        given[: 2 * num],
    )
    values, norms, alongs, skew = (np.asarray(part, np.float64) for part in found)
    levels = np.asarray(sigmas, np.float64)
    extremes = {name: values[:2, group] for name, group in groups.items()}
    checks = {
        name: {
            "squared_norm": norms[2:, group].mean(axis=1),
            "minus_trace": -values[2:, group].sum(axis=2).mean(axis=1),
            "squared_product": alongs[2:, group].mean(axis=1),
            "minus_trace_cubed": -(values[2:, group] ** 3).sum(axis=2).mean(axis=1),
        }
        for name, group in groups.items()
    }
    copied = np.linalg.norm((ends["stored"] - stored).reshape(num, -1), axis=1)
    nearest = nearest_neighbors(ends["general"], general).distance[:, 0]
    spectra = {
        name: {
            "first": levels[0] ** 2 * extremes[name][0],
            "last": levels[-1] ** 2 * extremes[name][1],
        }
        for name in groups
    }
    positive = {n: float((spectra[n]["last"] >= 0).sum(axis=1).mean()) for n in spectra}
    close = {n: float((spectra[n]["last"] < -0.5).sum(axis=1).mean()) for n in spectra}
    below = {n: float((spectra[n]["last"] < -1).mean()) for n in spectra}
    first = np.concatenate([spectra[n]["first"].ravel() for n in spectra])
    ratios = {
        name: {
            "norm": own["squared_norm"] / own["minus_trace"],
            "product": own["squared_product"] / own["minus_trace_cubed"],
        }
        for name, own in checks.items()
    }

    def span(values):
        return f"{np.min(values):.2f} to {np.max(values):.2f}"

    norms = np.stack([ratios[n]["norm"] for n in ratios])
    products = np.stack([ratios[n]["product"] for n in ratios])
    statements = [
        Statement(
            "at the first step all eigenvalues are near -1 in the paper's coordinates (sigma^2 H "
            "is the same in all), -1.15 to -0.9",
            f"sigma^2 lambda between {first.min():.3f} and {first.max():.3f} at noise "
            f"{levels[0]:.1f}",
            bool(first.min() > -1.15 and first.max() < -0.9),
        ),
        Statement(
            "at the last step the stored digit's are far more negative and fewer are non-negative "
            "(about -7e3 at worst, floor about -1e4; a positive tail for general digits only)",
            f"at noise {LAST} (floor -{1 / LAST**2:.0f}): lowest "
            f"{extremes['stored'][1].min():.0f} stored, "
            f"{extremes['general'][1].min():.0f} general; non-negative of 64: "
            f"{positive['stored']:.1f} stored, {positive['general']:.1f} general; below "
            f"half the floor: {close['stored']:.1f} and {close['general']:.1f}",
            bool(close["stored"] > close["general"] and positive["stored"] < positive["general"]),
            "the lowest eigenvalues are alike: every 8 x 8 digit has pixels that are always blank, "
            "pinned for general digits too. What tells them apart is how many directions are.",
        ),
        Statement(
            "|s|^2 = -tr H on average along the trajectory",
            f"ratio of the means {span(norms[:, levels > 0.1])} at noise above 0.1, "
            f"{span(norms[:, -1])} at the last step",
            bool(np.all(np.abs(norms - 1) < 0.25)),
            "an identity (Hyvarinen) of every density under its own samples: what is missing to 1 "
            "is the error of the score, largest at the smallest noise.",
        ),
        Statement(
            "|H s|^2 = -tr H^3 on average along the trajectory",
            f"ratio of the means {span(products)}",
            bool(np.all(np.abs(products - 1) < 0.3)),
            "holds for Gaussian densities only.",
        ),
    ]
    numbers = {
        "sigmas": levels,
        "histograms": {step: _histograms(spectra, step) for step in ("first", "last")},
        "checks": checks,
        "asymmetry": {name: skew[:2, group].mean(axis=1) for name, group in groups.items()},
        "share_below_floor": below,
        "distance_to_stored": copied,
        "distance_of_general_to_training": nearest,
        "stored": stored[..., 0],
        "samples": {name: end[:4, ..., 0] for name, end in ends.items()},
    }
    return numbers, statements


def _histograms(spectra, step):
    """Densities of sigma^2 lambda of both classes, over common bins."""
    values = {name: own[step].ravel() for name, own in spectra.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), 60)
    densities = {n: np.histogram(v, edges, density=True)[0] for n, v in values.items()}
    return {"edges": edges, **densities}


def draw(figure, numbers):
    """Digits; spectra at the first and last step; the two checks."""
    left, first, last, checks = figure.subplots(1, 4, width_ratios=(0.7, 1, 1, 1.1))
    samples = numbers["samples"]
    blank = np.full((1, 17), np.nan)
    rows = [
        np.concatenate(
            [np.pad(np.array(numbers["stored"]), ((0, 0), (0, 9)), constant_values=np.nan)]
        )
    ]
    for name in ("stored", "general"):
        pictures = [np.array(image) for image in samples[name]]
        gap = np.full((8, 1), np.nan)
        for i in (0, 2):
            rows += [blank, np.concatenate([pictures[i], gap, pictures[i + 1]], axis=1)]
    left.imshow(np.concatenate(rows), cmap="gray", vmin=-1, vmax=1)
    left.set_axis_off()
    left.set_title("the stored 9; samples\nunder '9'; under '3'", fontsize=8)
    for axis, step in ((first, "first"), (last, "last")):
        found = numbers["histograms"][step]
        for name, color in (("general", OTHER), ("stored", STORED)):
            axis.stairs(found[name], found["edges"], color=color, alpha=0.6, fill=True, label=name)
        axis.set_yscale("log")
        axis.axvline(-1, color="0.6", linewidth=0.8)
        axis.set_xlabel(r"$\sigma^2 \lambda$", fontsize=9)
        sigma = numbers["sigmas"][0 if step == "first" else -1]
        axis.set_title(rf"{step} step, $\sigma$ = {sigma:.3g}", fontsize=9)
    first.legend(fontsize=7)
    for name, color in (("general", OTHER), ("stored", STORED)):
        own = {key: np.array(value, float) for key, value in numbers["checks"][name].items()}
        checks.plot(
            numbers["sigmas"],
            own["squared_norm"] / own["minus_trace"],
            "-",
            color=color,
            label=rf"$|s|^2 / (-\mathrm{{tr}} H)$, {name}",
        )
        checks.plot(
            numbers["sigmas"],
            own["squared_product"] / own["minus_trace_cubed"],
            "--",
            color=color,
            label=rf"$|Hs|^2 / (-\mathrm{{tr}} H^3)$, {name}",
        )
    checks.axhline(1, color=EXACT, linewidth=0.8)
    checks.set(xscale="log", ylim=(0, 2))
    checks.invert_xaxis()
    checks.legend(fontsize=7, loc="lower left")
    checks.set_xlabel(r"noise $\sigma$", fontsize=9)
    checks.set_title("ratios of means over samples", fontsize=9)


REPRODUCTION = Reproduction(
    "sharpness_digits",
    "one 9 repeated 100 times against 3,000 digits 3",
    "Jeon, Kim, No 2025, arXiv:2412.04140",
    "8 x 8 digits instead of MNIST: 183 threes and 180 nines, rotated, scaled and shifted a little "
    "to 3,000 each. As in the paper: an unconditional branch of 3,000 + 3,000 (drop-out 0.2), "
    "L_DSM + 0.5 L_DSM^(2) with one random sign vector, guidance 5, DDIM with 500 steps, the half "
    "of the threes farthest from the training set; 200 samples instead of 500, a residual MLP. The "
    "two checks are made on samples without guidance, whose density H belongs to.",
    compute,
    draw,
)

if __name__ == "__main__":
    sys.exit(main([REPRODUCTION]))
