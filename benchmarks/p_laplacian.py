"""p-Laplacians: every exponent for the price of one, and how many evaluations an estimate needs.

``exact`` and ``flux``: p = 1, 1.5, 2, 3 and infinity together, in turn with each of them alone, on
U-Nets; the program with the most operations is the dearest. ``error-p``: the estimators against
the exact value at a point of a Gaussian mixture in 16 dimensions, in float64; the spheres have a
radius of a twentieth, whose bias is the floor of the flux. A product of the Jacobian counts as an
evaluation there.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._precision import Method, draw, panels, rows
from benchmarks._unet import Network, field, forward, network, parameters
from benchmarks.harness import Baseline, Case, Program, Table
from memjax._core.keys import derive_key
from memjax.calculus.flux import p_laplacian_ball, p_laplacian_flux, p_laplacian_stein
from memjax.calculus.p_laplace import p_laplacian
from memjax.calculus.stencil import p_laplacian_stencil
from memjax.densities.mixture import GaussianMixture
from memjax.diffusion.combine import at
from memjax.linalg.probes import orthonormal
from memjax.linalg.trace import trace_hutchinson

EXPONENTS = (1, 1.5, 2, 3, math.inf)
TOGETHER_TARGET = 1.05
PAIRS = 4
DIMENSION = 16
SIGMA = 0.5
RADIUS = 0.05
EVALUATIONS = [8, 16, 32, 64, 256]
KEYS = 20
TITLES = {f"error-p-{p}": f"p = {p}" for p in (1, 2, 3)}


def _exact(p, module, weights, points):
    return jax.vmap(p_laplacian(field(module, weights), p))(points)


def _radius(points) -> float:
    return 0.1 * math.prod(points.shape[1:]) ** 0.5


def _flux(p, module, weights, points, keys):
    estimate = p_laplacian_flux(
        field(module, weights), p, radius=_radius(points), num_pairs=PAIRS, chunk_size=None
    )
    return jax.vmap(estimate)(points, keys).value


def _dense_values(net: Network):
    """From dense Jacobians, in NumPy float64, [point, exponent]."""
    out = []
    for x in net.points:
        f = field(net.module, net.weights)
        s = np.asarray(f(x), np.float64).ravel()
        jacobian = np.asarray(jax.jit(jax.jacfwd(f))(x), np.float64).reshape(s.size, s.size)
        trace, along, square = np.trace(jacobian), s @ jacobian @ s, s @ s
        out.append(
            [
                along
                if p == math.inf
                else square ** (p / 2 - 1) * (trace + (p - 2) * along / square)
                for p in EXPONENTS
            ]
        )
    return np.array(out)


def _flux_values(net: Network, keys):
    """From evaluations at the ends of the same directions, in NumPy float64."""
    d, r = net.points[0].size, _radius(net.points)
    out = []
    for x, key in zip(net.points, keys, strict=True):
        normals = orthonormal(key, PAIRS, x) / math.sqrt(d)
        ends = jnp.concatenate([x[None] + r * normals, x[None] - r * normals])
        values = np.asarray(forward(net.module, net.weights, ends), np.float64).reshape(-1, d)
        ahead, behind = values[:PAIRS], values[PAIRS:]
        n = np.asarray(normals, np.float64).reshape(-1, d)
        sizes = [np.linalg.norm(s, axis=1, keepdims=True) for s in (ahead, behind)]
        row = []
        for p in EXPONENTS:
            if p == math.inf:
                slopes = np.sum((ahead + behind) * n, axis=1)
                row.append(np.mean((sizes[0] ** 2 - sizes[1] ** 2)[:, 0] * slopes) * d / (8 * r))
            else:
                jump = ahead * sizes[0] ** (p - 2) - behind * sizes[1] ** (p - 2)
                row.append(np.mean(np.sum(jump * n, axis=1)) * d / (2 * r))
        out.append(row)
    return np.array(out)


def _cost(kind: str, quick: bool, seed: int) -> Program:
    # The exact trace of the large network is thousands of products: the small one tells as much.
    net = network(quick or kind == "exact", seed)
    keys = jax.random.split(derive_key(seed, "directions"), len(net.points))
    arguments = (net.weights, net.points) if kind == "exact" else (net.weights, net.points, keys)
    run = _exact if kind == "exact" else _flux
    expected = _dense_values(net) if kind == "exact" else _flux_values(net, keys)

    def check(column, out) -> float:
        found = np.asarray(out, np.float64)
        return float(np.max(np.abs(found - expected[:, column]) / np.abs(expected[:, column])))

    def operations(p) -> float:
        compiled = jax.jit(partial(run, p, net.module)).lower(*arguments).compile()
        return (compiled.cost_analysis() or {}).get("flops", 0.0)

    dearest = max(EXPONENTS, key=operations)
    baselines = {
        f"p = {p} alone": Baseline(
            partial(run, p, net.module),
            arguments,
            partial(check, i),
            target=TOGETHER_TARGET if p == dearest else None,
        )
        for i, p in enumerate(EXPONENTS)
    }
    return Program(
        partial(run, EXPONENTS, net.module),
        arguments,
        partial(check, slice(None)),
        2e-3,
        (partial(forward, net.module), arguments[:2]),
        parameters=parameters(net) | {"exponents": [str(p) for p in EXPONENTS], "pairs": PAIRS},
        baselines=baselines,
    )


def _error(p, quick: bool, seed: int) -> Table:
    rng = np.random.default_rng(seed)
    num_keys = 3 if quick else KEYS
    means, x = 0.3 * rng.standard_normal((4, DIMENSION)), 0.6 * rng.standard_normal(DIMENSION)
    bases, _ = np.linalg.qr(rng.standard_normal((4, DIMENSION, DIMENSION)))
    variances = np.exp(rng.uniform(np.log(0.01), 0, (4, 1, DIMENSION)))
    covariances = bases * variances @ bases.transpose(0, 2, 1)
    covariances = (covariances + covariances.transpose(0, 2, 1)) / 2

    def compute():
        with jax.enable_x64(True):
            density = GaussianMixture([0.25] * 4, jnp.asarray(means), jnp.asarray(covariances))
            score = at(density.score, SIGMA)
            exact = float(density.p_laplacian(jnp.asarray(x), SIGMA, p))
            keys = jax.random.split(derive_key(seed, "keys"), num_keys)
            found = rows(
                _methods(score, jnp.asarray(x), p),
                EVALUATIONS[:2] if quick else EVALUATIONS,
                keys,
                lambda values: np.abs(values / exact - 1),
            )
        return found, []

    settings = {"dimension": DIMENSION, "sigma": SIGMA, "radius": RADIUS, "keys": num_keys}
    return Table(compute, settings)


def _methods(score, x, p) -> list[Method]:
    def pairs(make, **options):
        return lambda key, count: make(score, p, num_pairs=count // 2, **options)(x, key).value

    def stencil(order):
        def estimate(key, count):
            made = p_laplacian_stencil(score, p, order=order, num_directions=count // order)
            return made(x, key).value

        return estimate

    def products(key, count):
        # One evaluation and two products along the score: the others go into the trace.
        return p_laplacian(
            score,
            p,
            trace=lambda matvec, like: trace_hutchinson(matvec, like, key, count - 3).value,
        )(x)

    independent = {"radius": RADIUS, "directions": "independent"}
    return [
        Method("memjax flux, orthonormal", pairs(p_laplacian_flux, radius=RADIUS)),
        Method("memjax flux, independent", pairs(p_laplacian_flux, **independent)),
        Method("memjax Stein", pairs(p_laplacian_stein, width=RADIUS / DIMENSION**0.5)),
        Method("memjax ball", pairs(p_laplacian_ball, radius=RADIUS)),
        Method("memjax stencil, order 2", stencil(2), most=2 * DIMENSION),
        Method("memjax stencil, order 4", stencil(4), most=4 * DIMENSION),
        Method("memjax products, random signs", products),
    ]


def cases() -> list[Case]:
    """Cost of all exponents together, error of the estimators for three of them."""
    return [
        *(Case(f"p_laplacian/{kind}", partial(_cost, kind)) for kind in ("exact", "flux")),
        *(Case(f"p_laplacian/error-p-{p}", partial(_error, p)) for p in (1, 2, 3)),
    ]


def figure(records):
    """Error of the estimators, a panel an exponent; below, the cost of all together."""
    costs = [record for record in records if "baselines" in record]
    tables = [record for record in records if "rows" in record]
    if not costs:
        return draw(tables, TITLES, "relative error, median of keys", unit="evaluations")
    figure, axes = panels(len(tables) + len(costs))
    if tables:
        draw(tables, TITLES, "relative error, median of keys", "evaluations", (figure, axes))
    for axis, record in zip(axes[len(tables) :], costs, strict=True):
        names = list(record["baselines"])
        times = [record["baselines"][name]["seconds"]["minimum"] for name in names]
        labels = ["all five", *(name.removesuffix(" alone") for name in names)]
        bars = 1e3 * np.array([record["seconds"]["minimum"], *times])
        axis.barh(labels, bars, color=["#0072B2", *["0.75"] * len(names)])
        axis.invert_yaxis()
        axis.set_title(f"{record['case'].split('/')[-1]}: all five and each alone", fontsize=9)
        axis.set_xlabel("milliseconds", fontsize=9)
        axis.tick_params(labelsize=8)
    return figure
