"""Every operator against closed forms, in 2 to 3,072 dimensions, in float32 and float64.

The field is the score of a mixture of three Gaussians at a point between them. Score, Hessian and
everything that follows from them are computed from the textbook formulas in NumPy, float64. Exact
operators show their relative error. Estimators show their error in units of the standard error
that they report, root mean square over ten keys: about 1 if the error bars are honest, less where
they are cautious. Spectral methods act on the retained-variance operator M = I + sigma^2 H;
eigenvalues show their distance from the nearest one of the matrix over the largest (whether none
nearer to the end was passed over is what ``Eigenpairs.extreme`` says).
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._precision import rounded
from benchmarks.harness import Case, Table
from memjax._core.keys import derive_key
from memjax.calculus import differential, flux, stencil
from memjax.calculus.linearization import linearize
from memjax.calculus.p_laplace import level_set_curvature, p_laplacian
from memjax.densities.mixture import GaussianMixture
from memjax.diffusion.combine import at
from memjax.linalg import diagonal, trace
from memjax.linalg.arnoldi import eigs
from memjax.linalg.choice import diagonal_auto
from memjax.linalg.exact import diagonal_exact, trace_exact
from memjax.linalg.lanczos import eigsh
from memjax.linalg.lattice import diagonal_lattice
from memjax.linalg.quadrature import spectral_density

DIMENSIONS = (2, 16, 64, 768, 3072)
DTYPES = ("float32", "float64")
EXPONENTS = (1, 1.5, 2, 3, math.inf)
SIGMA = 0.5
KEYS = 10
PRODUCTS = 16
PAIRS = 16


class World(NamedTuple):
    """A mixture and its closed forms at one point, in NumPy float64.

    Attributes:
        means, variances: of three components, per coordinate.
        x: the point.
        s: score.
        h: Hessian.
    """

    means: np.ndarray
    variances: np.ndarray
    x: np.ndarray
    s: np.ndarray
    h: np.ndarray

    @property
    def retained(self):
        """M = I + sigma^2 H."""
        return np.eye(len(self.x)) + SIGMA**2 * self.h


def _world(d: int, seed: int) -> World:
    rng = np.random.default_rng(seed)
    base = np.exp(rng.uniform(np.log(1e-2), 0.0, d))
    # Components close enough to share the posterior in any dimension.
    means = rng.standard_normal((3, d)) / d**0.5
    variances = base * (1 + 0.3 * rng.uniform(-1, 1, (3, d)) / d**0.5)
    x = 0.8 * rng.standard_normal(d) * np.sqrt(base + SIGMA**2)
    noisy = variances + SIGMA**2
    logits = -0.5 * np.sum((x - means) ** 2 / noisy + np.log(noisy), axis=1)
    weights = np.exp(logits - logits.max())
    weights /= weights.sum()
    scores = -(x - means) / noisy
    s = weights @ scores
    spread = scores - s
    h = -np.diag(weights @ (1 / noisy)) + (spread.T * weights) @ spread
    return World(means, variances, x, s, h)


def _p_laplacian(world: World, p, normalized: bool = False) -> float:
    square, along = world.s @ world.s, world.s @ world.h @ world.s
    ratio, total = along / square, np.trace(world.h)
    if p == math.inf:
        return float(ratio if normalized else along)
    inner = total + (p - 2) * ratio
    return float(inner / p if normalized else square ** (p / 2 - 1) * inner)


Run = Callable[[jax.Array], object]


def _exact_operators(world: World, density, score, x) -> dict[str, tuple[Run, object]]:
    """Functions of x, and what they should return, or a function that tells their error."""
    d, h, m = x.size, world.h, world.retained
    v = np.random.default_rng(1).standard_normal(d)
    direction = jnp.asarray(v, x.dtype)
    norm = np.linalg.norm(h)

    def products(kind):
        return lambda x: getattr(linearize(score, x), kind)(direction)

    def retained(x):
        lin = linearize(score, x)
        return lambda u: u + SIGMA**2 * lin.symmetric(u)

    def log_prob(x):
        return density.log_prob(x, SIGMA)

    out: dict[str, tuple[Run, object]] = {
        "linearize: value": (lambda x: linearize(score, x).value, world.s),
        "linearize: J v": (products("jvp"), h @ v),
        "linearize: Jᵀ v": (products("vjp"), h @ v),
        "divergence": (differential.divergence(score), np.trace(h)),
        "laplacian of log p": (differential.laplacian(log_prob), np.trace(h)),
        "hessian of log p": (differential.hessian(log_prob), h),
        # Zero, in units of |J|.
        "curl / |J|": (lambda x: differential.curl(score)(x) / norm, np.zeros((d, d))),
        "diagonal_exact of M": (lambda x: diagonal_exact(retained(x), x), np.diag(m)),
        "trace_exact of M": (lambda x: trace_exact(retained(x), x), np.trace(m)),
    }
    for p in EXPONENTS:
        out[f"p_laplacian, p = {p}"] = (p_laplacian(score, p), _p_laplacian(world, p))
        if p in (1, 3):
            name = f"p_laplacian, p = {p}, normalized"
            expected = _p_laplacian(world, p, normalized=True)
            out[name] = (p_laplacian(score, p, normalized=True), expected)
    curvature = _p_laplacian(world, 1) / (d - 1)
    out["level_set_curvature"] = (level_set_curvature(score), curvature)
    for order in (2, 4, 6):
        stencils = stencil.divergence_stencil(score, order=order)
        out[f"divergence_stencil, order {order}"] = (_value_of(stencils), np.trace(h))
    for p in (1, 3):
        stencils = stencil.p_laplacian_stencil(score, p, order=4)
        out[f"p_laplacian_stencil, p = {p}"] = (_value_of(stencils), _p_laplacian(world, p))
    k, key = min(3, d), jax.random.key(0)
    for which in ("largest", "smallest"):

        def extreme(x, which=which):
            return eigsh(retained(x), x, key, k, which=which).values

        out[f"eigsh of M, {which}"] = (extreme, partial(_nearest, np.linalg.eigvalsh(m)))

    def modulus(x):
        lin = linearize(score, x)
        return eigs(lin.jvp, x, key, k, num_products=200).values

    out["eigs of J, largest"] = (modulus, partial(_nearest, np.linalg.eigvalsh(h)))
    return out


def _value_of(estimate) -> Run:
    return lambda x: estimate(x).value


def _nearest(values, found) -> float:
    """Largest distance from the spectrum, relative to the largest eigenvalue."""
    distances = np.abs(np.asarray(found)[:, None] - values[None])
    return float(np.max(np.min(distances, axis=1)) / np.max(np.abs(values)))


def _estimators(world: World, score, x) -> dict[str, tuple[Callable, object]]:
    """Functions of x and a key that return value and standard error; what is estimated."""
    d, m = x.size, world.retained
    radius = 0.02 * SIGMA * d**0.5

    def on_retained(estimator):
        def estimate(x, key):
            lin = linearize(score, x)
            out = estimator(lambda u: u + SIGMA**2 * lin.symmetric(u), x, key)
            return out.value, out.standard_error

        return estimate

    def sized(estimator):
        return on_retained(lambda matvec, like, key: estimator(matvec, like, key, PRODUCTS))

    def quadrature(method, *arguments):
        def estimate(matvec, like, key):
            density = spectral_density(matvec, like, key, PRODUCTS, 32)
            return getattr(density, method)(*arguments)

        return on_retained(estimate)

    out: dict[str, tuple[Callable, object]] = {
        f"trace_{name} of M": (sized(getattr(trace, f"trace_{name}")), np.trace(m))
        for name in ("hutchinson", "hutchpp", "xtrace", "xnystrace")
    }
    chosen = {
        **{
            name: getattr(diagonal, f"diagonal_{name}")
            for name in ("hutchinson", "xdiag", "xnysdiag")
        },
        "lattice": diagonal_lattice,
        "auto": lambda *arguments: diagonal_auto(*arguments).estimate,
    }
    for name, estimator in chosen.items():
        out[f"diagonal_{name} of M"] = (sized(estimator), np.diag(m))
    values = np.linalg.eigvalsh(m)
    out["spectral_density of M: tr M²"] = (quadrature("trace", jnp.square), np.sum(values**2))
    # A threshold in the widest gap of the middle half: a step there is resolvable.
    middle = values[len(values) // 4 : max(len(values) - len(values) // 4, 2)]
    i = int(np.argmax(np.diff(middle)))
    tau = float((middle[i] + middle[i + 1]) / 2)
    above = quadrature("count_above", tau)
    out["spectral_density of M: count above"] = (above, np.sum(values > tau))
    forms = {
        # A frame of all directions has no variance to speak of, only the bias of the radius.
        "flux": partial(flux.p_laplacian_flux, radius=radius, directions="independent"),
        "ball": partial(flux.p_laplacian_ball, radius=radius),
        "stein": partial(flux.p_laplacian_stein, width=radius / d**0.5),
    }
    for name, form in forms.items():
        for p in (1, 2, 3):

            def estimate(x, key, form=form, p=p):
                found = form(score, p, num_pairs=PAIRS)(x, key)
                return found.value, found.standard_error

            out[f"p_laplacian_{name}, p = {p}"] = (estimate, _p_laplacian(world, p))
    return out


def _relative(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected)
    size = np.linalg.norm(expected)
    return float(np.linalg.norm(found - expected) / (size if size > 0 else 1.0))


def _in_standard_errors(found, expected, eps: float) -> float:
    """Root mean square error over root mean square standard error; rounding excused."""
    value, error = (np.asarray(a, np.float64) for a in found)
    size = np.linalg.norm(expected) / np.sqrt(np.size(expected))
    if np.any(np.isnan(value)) or np.any(np.isnan(error)):
        return math.nan
    floor = 100 * eps * size
    spread = np.sqrt(np.mean(np.square(error)))
    return float(np.sqrt(np.mean((value - expected) ** 2)) / max(spread, floor))


def _make(d: int, quick: bool, seed: int) -> Table:
    world = _world(d, seed)

    def compute():
        rows = []
        with jax.enable_x64(True):
            keys = jax.random.split(derive_key(seed, "keys"), 3 if quick else KEYS)
            for dtype in DTYPES[:1] if quick else DTYPES:
                arrays = (jnp.asarray(a, dtype) for a in (world.means, world.variances, world.x))
                means, variances, x = arrays
                density = GaussianMixture([1 / 3] * 3, means, variances)
                score = at(density.score, SIGMA)

                def add(kind, name, value, dtype=dtype):
                    status = "ok" if math.isfinite(value) else "failed"
                    row = {"method": name, "dtype": dtype, "kind": kind, "status": status}
                    rows.append(row | ({"value": rounded(value)} if status == "ok" else {}))

                for name, (run, expected) in _exact_operators(world, density, score, x).items():
                    found = jax.jit(run)(x)
                    error = expected(found) if callable(expected) else _relative(found, expected)
                    add("relative error", name, error)
                eps = float(jnp.finfo(dtype).eps)
                for name, (run, expected) in _estimators(world, score, x).items():
                    found = jax.jit(lambda x, keys, run=run: jax.lax.map(partial(run, x), keys))
                    value = _in_standard_errors(found(x, keys), expected, eps)
                    add("standard errors", name, value)
        return rows, []

    return Table(compute, {"dimension": d, "sigma": SIGMA, "products": PRODUCTS, "pairs": PAIRS})


def cases() -> list[Case]:
    """One table a dimension."""
    return [Case(f"operator_accuracy/d-{d}", partial(_make, d)) for d in DIMENSIONS]


def figure(records):
    """One table: operators down, dimensions and precisions across, colored by size."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    records = sorted(records, key=lambda record: record["parameters"]["dimension"])
    columns = [(r["parameters"]["dimension"], dtype) for dtype in DTYPES for r in records]
    cells = {
        (row["method"], r["parameters"]["dimension"], row["dtype"]): row
        for r in records
        for row in r["rows"]
    }
    kinds = ("relative error", "standard errors")
    names = {
        kind: list(dict.fromkeys(row["method"] for row in cells.values() if row["kind"] == kind))
        for kind in kinds
    }
    layout = ConstrainedLayoutEngine(rect=(0, 0.03, 1, 0.97))
    lines = sum(map(len, names.values()))
    out = Figure(figsize=(11, 2.2 + 0.21 * lines), layout=layout)
    axes = out.subplots(2, 1, height_ratios=[len(names[kind]) for kind in kinds])
    ranges = {"relative error": (-16, 0, "viridis_r"), "standard errors": (-2, 1, "cividis_r")}
    titles = {
        "relative error": "exact operators: relative error",
        "standard errors": "estimators: error in units of the reported standard error",
    }
    for axis, kind in zip(axes, kinds, strict=True):
        low, high, colors = ranges[kind]
        rows = [[cells.get((name, *column)) for column in columns] for name in names[kind]]
        values = np.array(
            [[np.nan if c is None else c.get("value", np.nan) for c in line] for line in rows]
        )
        with np.errstate(divide="ignore"):
            image = np.clip(np.log10(values), low, high)
        axis.imshow(image, aspect="auto", cmap=colors, vmin=low, vmax=high, alpha=0.75)
        for i, line in enumerate(rows):
            for j, cell in enumerate(line):
                if cell is not None:
                    form = ".1e" if kind == "relative error" else ".2f"
                    text = format(cell["value"], form) if "value" in cell else "nan"
                    axis.text(j, i, text, ha="center", va="center", fontsize=7)
        axis.set_yticks(range(len(names[kind])), names[kind], fontsize=7)
        labels = [f"{dtype}\nd = {d}" for d, dtype in columns]
        axis.set_xticks(range(len(columns)), labels, fontsize=7)
        axis.set_title(titles[kind], fontsize=9)
    return out
