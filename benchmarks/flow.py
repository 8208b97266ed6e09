"""The flow: error of the log-determinant against network products, every rule and two peers.

A Gaussian in d = 100 (variances 1e-4 to 1 in a random basis) and one in d = 3072 whose data fill 32
directions (variances 1 to 300, and 5e-6 across, the rounding of 8-bit pixels), whose flows have a
closed form, and a mixture of five Gaussians in d = 8 (one of variance 1e-4), whose reference is
Dopri8 at tolerance 1e-12, itself compared with the change of variables log p_sigma0(x) - log
p_sigma1(x(sigma1)).
Between sigma 0.01 and 20, and between the levels of the published procedure, t = 0.001 to 1 of the
VP schedule, that is 0.0105 to 152. Float64. The error is that of log |det dx(sigma1)/dx(sigma0)|
over its ceiling d log(sigma1/sigma0); points are drawn from p_sigma0.

Products: evaluations of the score and products with its Jacobian, counted alike.

Peers: the published procedure (Hasegawa and Yasuda, 2025: ``volume_growth_edges``, 100 edges of
0.05 as published, or as many as dimensions), given the same points as our rules; in d = 3072 its
100 directions are a sample of all, and ``own_error`` is that against the exact growth of those; and
the likelihood of published score-SDE code (Song et al., 2021), SciPy's RK45 in the time of the VP
schedule, with one random probe kept along the trajectory as in that code, and with the exact
divergence. That code uses tolerances of 1e-5; others are shown beside it.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._precision import COLORS, MARKERS, panels, rounded
from benchmarks.harness import Case, Table, Target, installed
from memjax._core.keys import derive_key
from memjax.densities.density import Density
from memjax.densities.gaussian import Gaussian
from memjax.densities.mixture import GaussianMixture
from memjax.diffusion.edges import volume_growth_edges
from memjax.diffusion.flow import probability_flow
from memjax.diffusion.schedule import ContinuousVP
from memjax.diffusion.volume import volume_growth_frame
from memjax.linalg.probes import orthonormal

SCHEDULE = ContinuousVP()
WORLDS = {
    "gaussian-published": "Gaussian, d = 100, sigma from 0.0105 to 152",
    "low-rank-published": "Gaussian of rank 32, d = 3072, sigma from 0.0105 to 152",
    "mixture": "mixture of 5, d = 8, sigma from 0.01 to 20",
    "mixture-published": "mixture of 5, d = 8, sigma from 0.0105 to 152",
}
FIXED_STEPS = {"heun": (8, 16, 32, 40, 64, 128, 256), "rk4": (4, 8, 16, 32, 40, 64, 128)}
PROBED_STEPS = (4, 5, 6, 8, 12, 16)
PROBES = 8
LARGE = 1000
"""Dimensions above which few points and settings are affordable."""
LARGE_FIXED_STEPS = {"rk4": (4, 8, 40)}
LARGE_PROBED = (
    *(("hutchinson", n, PROBES) for n in PROBED_STEPS),
    *(("hutchinson", 4, 16), ("hutchpp", 4, 48), ("xnystrace", 4, 40)),
)
FRAME_STEPS = (4, 8, 16)
FEW = 2
"""Points for what is dear in a large dimension; growth of a linear flow is the same at all."""
TOLERANCES = {"tsit5": (1e-2, 1e-3, 1e-5, 1e-7, 1e-9), "dopri8": (1e-3, 1e-5, 1e-7, 1e-9, 1e-11)}
RK45_TOLERANCES = (1e-3, 1e-5, 1e-7)
EDGE_STEPS = (100, 300, 1000)
PUBLISHED_STEPS = 1000
PUBLISHED_EDGES = 100
EDGES = "published edges, Euler"


class World(NamedTuple):
    """What a table is computed on.

    Attributes:
        density: whose score is followed.
        sigmas: both levels.
        published: they are those of the published procedure.
        num_points: points.
    """

    density: Density
    sigmas: tuple[float, float]
    published: bool
    num_points: int

    @property
    def size(self) -> int:
        """Dimensions."""
        return self.density.event_shape[0]

    @property
    def ceiling(self) -> float:
        """Of the log-determinant, in nats."""
        return self.size * float(np.log(self.sigmas[1] / self.sigmas[0]))


class Run(NamedTuple):
    """One setting of a method: an error of every point, and what a point took."""

    method: str
    setting: dict[str, Any]
    log_volumes: np.ndarray
    evaluations: float
    products: float
    own: np.ndarray | None = None
    """Errors against the growth of the run's own directions, relative to their ceiling."""


def _world(name: str, quick: bool, seed: int) -> World:
    rng = np.random.default_rng(seed)
    published = name.endswith("published")
    ends = SCHEDULE.sigma(jnp.asarray([SCHEDULE.t_min, SCHEDULE.t_max]))
    sigmas = (float(ends[0]), float(ends[1])) if published else (0.01, 20.0)
    if name.startswith("gaussian"):
        size = 6 if quick else 100
        basis, _ = np.linalg.qr(rng.standard_normal((size, size)))
        covariance = basis * np.geomspace(1e-4, 1, size) @ basis.T
        density = Gaussian(jnp.zeros(size), jnp.asarray((covariance + covariance.T) / 2))
    elif name.startswith("low-rank"):
        size, rank = (1040, 4) if quick else (3072, 32)
        basis, _ = np.linalg.qr(rng.standard_normal((size, rank)))
        factor = jnp.asarray(basis * np.sqrt(np.geomspace(1, 300, rank)))
        density = Gaussian.low_rank(jnp.zeros(size), factor, 5e-6)
    else:
        means = jnp.asarray(rng.standard_normal((5, 8)))
        density = GaussianMixture(np.full(5, 0.2), means, np.geomspace(1e-4, 0.1, 5))
    num_points = 2 if quick else {"gaussian": 4, "low-rank": 16}.get(name.rsplit("-", 1)[0], 64)
    return World(density, sigmas, published, num_points)


def _ours(world: World, points: jax.Array, keys: jax.Array, quick: bool) -> Iterator[Run]:
    """Every rule, with the exact divergence; on many dimensions also with few probes."""
    large = world.size > LARGE
    few = slice(FEW if large else None)

    def run(name, setting, points=points, keys=keys, **options):
        # A profile of two levels: what an adaptive solver evaluates besides its steps.
        options = {"num_steps": 1, "divergence": "exact"} | options
        flow = probability_flow(world.density, *world.sigmas, max_steps=4096, **options)
        many = jax.jit(lambda points, keys: jax.lax.map(lambda at: flow(*at), (points, keys)))
        out = many(points, keys)
        evaluations = np.mean(out.cost.forward)
        total = np.mean(np.asarray(out.cost.total))
        return Run(f"memjax {name}", setting, np.asarray(out.log_volume), evaluations, total)

    for rule, every in (LARGE_FIXED_STEPS if large else FIXED_STEPS).items():
        for n in every[:2] if quick else every:
            setting = {"num_steps": n}
            yield run(rule, setting, points[few], keys[few], solver=rule, num_steps=n)
    if large:
        for method, n, products in LARGE_PROBED[-3:] if quick else LARGE_PROBED:
            name = {"hutchinson": "probes", "hutchpp": "Hutch++", "xnystrace": "XNysTrace"}[method]
            probed = {"divergence": method, "num_products": products}
            setting = {"num_steps": n}
            yield run(f"rk4, {products} {name}", setting, solver="rk4", num_steps=n, **probed)
        yield from _frames(world, points, keys, quick)
        return
    for rule, every in TOLERANCES.items():
        for tol in every[:2] if quick else every:
            yield run(rule, {"tol": tol}, solver=rule, tol=tol)
    if world.size > PROBES:
        for n in PROBED_STEPS:
            probed = {"divergence": "hutchinson", "num_products": PROBES}
            yield run(
                f"rk4, {PROBES} probes", {"num_steps": n}, solver="rk4", num_steps=n, **probed
            )


def _frames(world: World, points: jax.Array, keys: jax.Array, quick: bool) -> Iterator[Run]:
    """As many random directions as published, by tangents."""
    k = PUBLISHED_EDGES
    for n in FRAME_STEPS[:1] if quick else FRAME_STEPS:
        flow = probability_flow(world.density, *world.sigmas, solver="rk4", num_steps=n)
        growth = volume_growth_frame(flow, k)
        many = jax.jit(
            lambda points, keys, growth=growth: jax.lax.map(lambda at: growth(*at), (points, keys))
        )
        out = many(points[:FEW], keys[:FEW])
        frames = jax.vmap(lambda key: orthonormal(key, k, points[0]))(keys[:FEW])
        evaluations = float(np.mean(out.cost.forward))
        products = float(np.mean(np.asarray(out.cost.total)))
        setting = {"num_steps": n}
        yield _sampled(world, f"memjax frame of {k}, rk4", setting, out, frames, products)._replace(
            evaluations=evaluations
        )


def _sampled(
    world: World, method: str, setting: dict[str, Any], out: Any, frames: jax.Array, products: float
) -> Run:
    """The growth of some directions, both as that of all and as their own."""
    density, (sigma0, sigma1), k = world.density, world.sigmas, frames.shape[1]
    assert isinstance(density, Gaussian)

    def exact(frame):
        q, _ = jnp.linalg.qr(frame.T)
        moved = jax.vmap(lambda v: density.flow(v, sigma0, sigma1).point)(q.T)
        return jnp.sum(jnp.log(jnp.abs(jnp.diagonal(jnp.linalg.qr(moved.T)[1]))))

    log_volumes = np.asarray(out.log_volume)
    own = np.abs(log_volumes - np.asarray(jax.vmap(exact)(frames))) * world.size / k
    return Run(
        method, setting, log_volumes * world.size / k, products, products, own / world.ceiling
    )


def _edges(world: World, points: jax.Array, keys: jax.Array, quick: bool) -> Iterator[Run]:
    """The published procedure, from the same points, in our coordinates."""
    k = min(PUBLISHED_EDGES, world.size)
    if k < world.size:
        points, keys = points[:FEW], keys[:FEW]
    first, last = SCHEDULE.alpha(jnp.asarray([SCHEDULE.t_min, SCHEDULE.t_max]))
    for n in EDGE_STEPS[:2] if quick else EDGE_STEPS:
        growth = volume_growth_edges(
            world.density, schedule=SCHEDULE, k=k, num_steps=n, chunk_size=k + 1
        )
        many = jax.jit(
            lambda points, keys, growth=growth: jax.lax.map(lambda at: growth(*at), (points, keys))
        )
        out = many(first * points, keys)
        out = out._replace(log_volume=out.log_volume + k * jnp.log(first / last))
        products = (k + 1) * n
        if k < world.size:
            edges = jax.vmap(lambda key: jax.random.normal(key, (k, world.size), points.dtype))
            yield _sampled(world, EDGES, {"num_steps": n}, out, edges(keys), products)
            continue
        yield Run(EDGES, {"num_steps": n}, np.asarray(out.log_volume), products, products)


def _rk45(world: World, points: jax.Array, keys: jax.Array, quick: bool) -> Iterator[Run]:
    """dx/dt = -(beta/2) (x + s) and its divergence in x_t coordinates, by SciPy."""
    from scipy.integrate import solve_ivp

    size, slope = world.size, SCHEDULE.beta_max - SCHEDULE.beta_min
    integrals = np.log1p(np.square(world.sigmas))
    ends = (
        2 * integrals / (SCHEDULE.beta_min + np.sqrt(SCHEDULE.beta_min**2 + 2 * slope * integrals))
    )
    alphas = np.exp(-integrals / 2)

    @partial(jax.jit, static_argnames="exact")
    def rates(density, t, x, probe, exact):
        alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        beta = SCHEDULE.beta_min + t * slope

        def velocity(x):
            return -beta / 2 * (x + density.score(x / alpha, sigma) / alpha)

        if exact:
            return jnp.append(velocity(x), jnp.trace(jax.jacfwd(velocity)(x)))
        value, pull = jax.vjp(velocity, x)
        return jnp.append(value, jnp.vdot(pull(probe)[0], probe))

    probes = jax.vmap(lambda key: jax.random.rademacher(key, (size,), points.dtype))(keys)
    for exact in (False,) if size > LARGE else (True, False):
        each = 1 + (size if exact else 1)
        for tol in RK45_TOLERANCES[:1] if quick else RK45_TOLERANCES:
            values, evaluations = [], []
            for x, probe in zip(points, probes, strict=True):
                out = solve_ivp(
                    lambda t, y, probe=probe, exact=exact: np.asarray(
                        rates(world.density, t, y[:-1], probe, exact=exact)
                    ),
                    tuple(ends),
                    np.append(alphas[0] * np.asarray(x), 0.0),
                    rtol=tol,
                    atol=tol,
                )
                values.append(out.y[-1, -1] + size * np.log(alphas[0] / alphas[1]))
                evaluations.append(out.nfev)
            used = float(np.mean(evaluations))
            name = f"score-SDE RK45, {'exact divergence' if exact else 'one probe'}"
            yield Run(name, {"tol": tol}, np.asarray(values), used, each * used)


def _reference(world: World, points: jax.Array) -> tuple[np.ndarray, list[Target]]:
    """The log-determinant of every point; for a mixture compared with its densities."""
    density, (sigma0, sigma1) = world.density, world.sigmas
    if isinstance(density, Gaussian):
        return np.asarray(jax.vmap(lambda x: density.flow(x, sigma0, sigma1).log_det)(points)), []
    flow = probability_flow(
        density, sigma0, sigma1, divergence="exact", solver="dopri8", tol=1e-12, max_steps=4096
    )

    def both(x):
        out = flow(x)
        change = density.log_prob(x, sigma0) - density.log_prob(out.point, sigma1)
        return out.log_volume, change

    found, change = jax.jit(lambda points: jax.lax.map(both, points))(points)
    apart = float(jnp.max(jnp.abs(found - change))) / world.ceiling
    return np.asarray(found), [
        Target("reference against the change of variables, largest", rounded(apart), 1e-9)
    ]


def _targets(world: World, rows: list[dict[str, Any]]) -> list[Target]:
    def row(method, setting, value):
        (found,) = [r for r in rows if r["method"] == method and r.get(setting) == value]
        return found

    targets = []
    steps = row("memjax rk4", "num_steps", 40)
    targets += [
        Target("error of rk4, 40 steps, median", steps["error"], 1e-3),
        Target("error of rk4, 40 steps, largest", steps["largest"], 1e-3),
    ]
    if world.published:
        peer = row(EDGES, "num_steps", PUBLISHED_STEPS)
        # In a large dimension all of ours, and its own directions only of the published one's.
        ours, theirs = ("largest", "own_error") if "own_error" in peer else ("error", "error")
        as_good = [
            r["products"]
            for r in rows
            if r["method"].startswith("memjax") and r[ours] <= peer[theirs]
        ]
        # Where there are no more dimensions than probes, an evaluation costs both sides the same.
        bound = 1 / 300 if world.size > PROBES else 1.0
        targets.append(
            Target(
                "products that reach the published procedure's error, over its own",
                rounded(min(as_good, default=np.inf) / peer["products"]),
                rounded(bound),
            )
        )
    return targets


def _make(name: str, quick: bool, seed: int) -> Table:
    with jax.enable_x64(True):
        world = _world(name, quick, seed)

    def summary(run: Run, exact: np.ndarray) -> dict[str, Any]:
        errors = np.abs(run.log_volumes - exact[: len(run.log_volumes)]) / world.ceiling
        good = bool(np.all(np.isfinite(errors)))
        out = {"method": run.method, **run.setting, "status": "ok" if good else "failed"}
        out |= {"evaluations": rounded(run.evaluations), "products": rounded(run.products)}
        if good:
            out |= {"error": rounded(np.median(errors)), "largest": rounded(np.max(errors))}
        if run.own is not None and np.all(np.isfinite(run.own)):
            out |= {"own_error": rounded(np.median(run.own))}
        return out

    def compute():
        with jax.enable_x64(True):
            points = world.density.sample(
                derive_key(seed, "points"), world.num_points, world.sigmas[0]
            )
            keys = jax.random.split(derive_key(seed, "keys"), world.num_points)
            exact, targets = _reference(world, points)
            methods: list[Callable[..., Iterator[Run]]] = [_ours]
            if world.published:
                methods.append(_edges)
            if installed("scipy"):
                methods.append(_rk45)
            rows = [
                summary(run, exact)
                for method in methods
                for run in method(world, points, keys, quick)
            ]
        if not installed("scipy"):
            rows.append({"method": "score-SDE RK45", "status": "not installed"})
        return rows, targets if quick else targets + _targets(world, rows)

    parameters = {
        "d": world.size,
        "points": world.num_points,
        "sigmas": [rounded(sigma) for sigma in world.sigmas],
        "ceiling": rounded(world.ceiling),
    }
    return Table(compute, parameters)


def cases() -> list[Case]:
    """One table a density and pair of noise levels."""
    return [Case(f"flow/{name}", partial(_make, name)) for name in WORLDS]


def figure(records):
    """One panel a table: medians over points, and up to the largest."""
    order = {f"flow/{name}": i for i, name in enumerate(WORLDS)}
    records = sorted(records, key=lambda record: order[record["case"]])
    canvas, axes = panels(len(records), height=4.0)
    names = list(dict.fromkeys(row["method"] for record in records for row in record["rows"]))
    colors, markers = (*COLORS, "#999933", "#AA4499"), MARKERS + "ph"
    handles = {}
    for axis, record in zip(axes, records, strict=True):
        axis.set(xscale="log", yscale="log")
        for i, name in enumerate(names):
            own = [r for r in record["rows"] if r["method"] == name and "error" in r]
            ours = name.startswith("memjax")
            color = colors[i % len(colors)]
            errors = np.array([max(row["error"], 1e-16) for row in own])
            (handle,) = axis.plot(
                [row["products"] for row in own],
                errors,
                marker=markers[i % len(markers)],
                color=color,
                linestyle="-" if ours else "--",
                markersize=4.5 if ours else 7,
                markerfacecolor=color if ours else "none",
                linewidth=1.1,
            )
            for row in own:
                axis.plot(
                    [row["products"]] * 2,
                    [max(row["error"], 1e-16), max(row["largest"], 1e-16)],
                    color=color,
                    linewidth=0.7,
                    alpha=0.6,
                )
            directions = [row for row in own if "own_error" in row]
            axis.plot(
                [row["products"] for row in directions],
                [row["own_error"] for row in directions],
                "x",
                color=color,
                markersize=5,
            )
            if name not in handles:
                handles[name] = handle
        axis.axhline(1e-3, color="0.6", linewidth=0.8, linestyle=":")
        axis.set_title(WORLDS[record["case"].split("/")[-1]], fontsize=9)
        sampled = any("own_error" in row for row in record["rows"])
        note = "; x: for the directions followed" if sampled else ""
        axis.set_xlabel(f"network products a point{note}", fontsize=9)
        axis.grid(color="0.92")
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("error of log det / ceiling: median, thin line to largest", fontsize=9)
    canvas.legend(handles.values(), handles, loc="outside upper center", ncols=4, fontsize=8)
    return canvas
