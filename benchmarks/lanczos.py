"""Eigen-solvers: what they cost beyond their products, and how many products they need.

``cost``: twenty products of a fixed-budget run, linearization included, on the U-Net, against
twenty bare applications of the same linear map in a loop. ``torch``: the same runs against the
published method in PyTorch, same network, same weights, same start. ``products``: products
until the six largest eigenpairs have a residual of 1e-6 |A|, median of twenty starts, in float64.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _krylov_peers, _torch
from benchmarks._krylov_peers import Problem
from benchmarks._precision import COLORS, panels, rounded
from benchmarks._ritz import both_ends, hessenberg, largest_modulus, relative_error
from benchmarks._unet import Network, field, forward, network, parameters
from benchmarks.harness import Baseline, Case, Program, Table, Target, installed, require
from memjax.calculus.linearization import linearize
from memjax.linalg.arnoldi import eigs
from memjax.linalg.lanczos import eigsh

PRODUCTS = 20
PAIRS = 6
BARE_TARGET = 1.08
TORCH_TARGET = 1 / 3
RESIDUAL = 1e-6
STARTS = 20
SMALL_BASIS = 32
SAME = f"basis {SMALL_BASIS}"
TICKS = [factor * 10**power for power in range(5) for factor in (1, 2, 5)]
REFERENCE = "unrestarted reference"
MEMJAX_TOLD = "memjax, to the residual"
MEMJAX_FITS = "memjax, basis fits"
MEMJAX_SMALL = f"memjax, {SAME}"
SPECTRA = {
    "score": "score near a stored image",
    "learned-score": "the same, learned: a bulk, 20 outliers",
    "geometric": "geometric, ratio .9",
    "low-rank": "rank 10",
    "path": "Laplacian of a path of 200",
    "ring": "Laplacian of a ring of 100: all double",
}


def _eigsh(kind, module, weights, points, starts):
    """Extreme Ritz values, both ends, of every point's Jacobian after the whole budget."""

    def one(x, start):
        lin = linearize(field(module, weights), x)
        return eigsh(
            getattr(lin, kind),
            x,
            jax.random.key(0),
            PAIRS,
            which="both",
            tol=0.0,
            max_products=PRODUCTS,
            basis_size=PRODUCTS,
            start=start,
        )

    pairs = jax.vmap(one)(points, starts)
    return pairs.values, pairs.num_products


def _eigs(module, weights, points, starts):
    """The Ritz values of largest modulus after the whole budget."""

    def one(x, start):
        lin = linearize(field(module, weights), x)
        return eigs(
            lin.jvp, x, jax.random.key(0), PAIRS, tol=0.0, num_products=PRODUCTS, start=start
        )

    pairs = jax.vmap(one)(points, starts)
    return pairs.values, pairs.num_products


def _linearize(module, weights, points):
    return linearize(partial(forward, module, weights), points)


def _bare(kind, lin, v):
    """The products and nothing else."""
    return jax.lax.scan(lambda v, _: (getattr(lin, kind)(v), None), v, length=PRODUCTS)[0]


class _Setting:
    """The network, its products, and what the solvers should find."""

    def __init__(self, kind: str, quick: bool, seed: int):
        self.kind = kind
        self.net: Network = network(quick, seed)
        self.arguments = (self.net.weights, self.net.points, self.net.directions)
        self.lin = jax.jit(partial(_linearize, self.net.module))(*self.arguments[:2])
        self.product = jax.jit(lambda lin, v: getattr(lin, kind)(v))
        self.hessenberg = hessenberg(partial(self.product, self.lin), self.net.directions, PRODUCTS)

    @property
    def ritz(self):
        # Of a matrix that is not symmetric, the solver and this take the upper triangle.
        return np.linalg.eigvalsh(self.hessenberg, UPLO="U")

    def check_symmetric(self, out) -> float:
        values, num_products = out
        if np.any(np.asarray(num_products) != PRODUCTS):
            return np.inf
        return relative_error(values, both_ends(self.ritz, PAIRS))

    def check_arnoldi(self, out) -> float:
        values, num_products = out
        if np.any(np.asarray(num_products) != PRODUCTS):
            return np.inf
        return relative_error(np.abs(values), largest_modulus(self.hessenberg, PAIRS))

    def program(self, run, check, **baselines) -> Program:
        return Program(
            partial(run, self.net.module),
            self.arguments,
            check,
            1e-3,
            (partial(forward, self.net.module), self.arguments[:2]),
            PRODUCTS,
            {**parameters(self.net), "products": PRODUCTS, "operator": self.kind},
            baselines=baselines,
        )


def _against_bare(run_and_check, kind: str, quick: bool, seed: int) -> Program:
    setting = _Setting(kind, quick, seed)

    def check(out) -> float:
        v = setting.net.directions
        for _ in range(PRODUCTS):
            v = setting.product(setting.lin, v)
        return relative_error(out, np.asarray(v))

    bare = Baseline(
        partial(_bare, kind), (setting.lin, setting.net.directions), check, 1, BARE_TARGET
    )
    run, check_name = run_and_check
    checked = getattr(setting, check_name)
    return setting.program(run, checked, **{f"{PRODUCTS} bare products": bare})


def _against_torch(method: str, quick: bool, seed: int) -> Program:
    require("torch")
    kind = "jvp" if method == "arnoldi" else "symmetric"
    setting = _Setting(kind, quick, seed)
    net = setting.net
    function, images = _torch.unet(net.module, net.weights, net.points)
    parity = relative_error(
        _torch.evaluate(function, images), np.asarray(forward(net.module, *net[1:3]))
    )
    if not parity < 1e-4:
        raise ValueError(f"the networks differ by {parity:.1e}")
    arguments = (function, images, _torch.to_torch(net.directions), PRODUCTS)

    def check(values) -> float:
        if method == "arnoldi":
            found = -np.sort(-np.abs(values), axis=1)[:, :PAIRS]
            return relative_error(found, largest_modulus(setting.hessenberg, PAIRS))
        return relative_error(both_ends(values, PAIRS), both_ends(setting.ritz, PAIRS))

    rivals = {"PyTorch": getattr(_torch, method)}
    if method == "lanczos":
        rivals = {
            "PyTorch, one forward for every vjp": _torch.lanczos,
            "PyTorch, a forward for each vjp": partial(_torch.lanczos, fresh=True),
        }
    baselines = {
        name: Baseline(run, arguments, check, target=TORCH_TARGET, jit=False)
        for name, run in rivals.items()
    }
    if method == "arnoldi":
        return setting.program(_eigs, setting.check_arnoldi, **baselines)
    return setting.program(partial(_eigsh, kind), setting.check_symmetric, **baselines)


def _semicircle(count: int):
    """Quantiles of the semicircle on [-1, 1]."""
    x = np.linspace(-1, 1, 20001)
    mass = np.cumsum(np.sqrt(1 - x**2))
    return np.interp((np.arange(count) + 0.5) / count, mass / mass[-1], x)


def _eigenvalues(name: str, n: int):
    """The spectrum of a test operator."""
    i = np.arange(n, dtype=float)
    if name == "score":
        # -1/(sigma^2 + c): sixty directions with variance c from 1 to 1e-4, the others pinned.
        free = 6 * n // 100
        variance = np.where(i < free, 10.0 ** (-4 * i / free), 0.0)
        return -1 / (0.1**2 + variance)
    if name == "learned-score":
        # The pinned directions of a learned score spread around -1/sigma^2.
        free = 2 * n // 100
        bulk = -100 + 10 * _semicircle(n - free)
        return np.concatenate([-1 / (0.1**2 + 10.0 ** (-2 * np.arange(free) / free)), bulk])
    return {"geometric": 0.9**i, "low-rank": np.where(i < 10, 1.0 - i / 20, 0.0)}[name]


def _problem(name: str, quick: bool, seed: int) -> Problem:
    n = 60 if quick else {"ring": 100, "path": 200}.get(name, 1000)
    starts = np.random.default_rng(seed).standard_normal((3 if quick else STARTS, n))
    if name in ("ring", "path"):
        angle = 2 * np.pi * np.arange(n) / n if name == "ring" else np.pi * np.arange(n) / n

        def laplacian(v):
            xp = np if isinstance(v, np.ndarray) else jnp
            wrap = "wrap" if name == "ring" else "edge"
            padded = xp.pad(v, ((1, 1), *(((0, 0),) * (v.ndim - 1))), mode=wrap)
            return 2 * v - padded[2:] - padded[:-2]

        return Problem(laplacian, n, PAIRS, RESIDUAL, np.sort(2 - 2 * np.cos(angle)), starts)
    values = _eigenvalues(name, n)

    def apply(v):
        scale = values.astype(v.dtype)
        return (scale if v.ndim == 1 else scale[:, None]) * v

    return Problem(apply, n, PAIRS, RESIDUAL, np.sort(values), starts)


def _row(method: str, runs: list[_krylov_peers.Run], problem: Problem) -> dict:
    """Median products; not ok if half of the starts or more are not."""
    counts = np.array([run.products for run in runs])
    # A solver may stop at its own estimate of |A|, a little below it.
    missed = sum(not run.residual <= 1.1 * problem.tol for run in runs)
    incomplete = sum(not run.complete for run in runs)
    low, median, high = np.quantile(counts, (0.1, 0.5, 0.9))
    status = "failed" if 2 * missed >= len(runs) else "ok"
    return {
        "method": method,
        "status": "incomplete" if status == "ok" and 2 * incomplete >= len(runs) else status,
        "products": float(median),
        "low": float(low),
        "high": float(high),
        "residual_missed": missed,
        "incomplete": incomplete,
        "residual": rounded(float(np.median([run.residual for run in runs]))),
    }


def _products(name: str, quick: bool, seed: int) -> Table:
    problem = _problem(name, quick, seed)

    def compute():
        with jax.enable_x64(True):
            reference = _krylov_peers.unrestarted(problem)
            lengths = [run.products for run in reference]
            counts = sorted(lengths)
            fits = min(problem.n, max(counts[-1] + 10, SMALL_BASIS))
            rows = [
                _row(REFERENCE, reference, problem),
                _row(MEMJAX_TOLD, _krylov_peers.memjax_told(problem, lengths), problem),
                _row(MEMJAX_FITS, _krylov_peers.memjax(problem, fits), problem),
                _row(MEMJAX_SMALL, _krylov_peers.memjax(problem, SMALL_BASIS), problem),
            ]
            for size, label in ((None, "default basis"), (SMALL_BASIS, SAME), (fits, "basis fits")):
                method = f"scipy eigsh, {label}"
                rows.append(_row(method, _krylov_peers.scipy(problem, size), problem))
            rows.append(_row("jax LOBPCG", _krylov_peers.lobpcg(problem), problem))
            if installed("matfree"):
                median = counts[len(counts) // 2]
                found = _krylov_peers.matfree(problem, median)
                rows.append(_row("matfree, told the length", found, problem))
            else:
                rows.append({"method": "matfree, told the length", "status": "not installed"})
        return rows, _targets(rows)

    sizes = {"dimension": problem.n, "pairs": PAIRS, "residual": RESIDUAL}
    return Table(compute, sizes | {"starts": len(problem.starts), "small_basis": SMALL_BASIS})


def _targets(rows) -> list[Target]:
    """Against whatever finds all six, copies included.

    With the products of unrestarted Lanczos ours must have the residuals too; what it spends after
    them, to establish that no pair is missing, is counted in the rows that run to their end.
    """
    products = {row["method"]: row["products"] for row in rows if row["status"] == "ok"}
    # matfree runs as long as it is told, here as long as the reference needed.
    peers = [count for name, count in products.items() if name.startswith(("scipy", "jax"))]
    pairs = [
        ("unrestarted Lanczos, to the residual", MEMJAX_TOLD, products.get(REFERENCE), 1.02),
        ("unrestarted Lanczos, to the end", MEMJAX_FITS, products.get(REFERENCE), 1.02),
        ("the best peer, basis fits", MEMJAX_FITS, min(peers, default=None), 1.0),
        ("scipy, same basis", MEMJAX_SMALL, products.get(f"scipy eigsh, {SAME}"), 1.0),
    ]
    return [
        Target(f"products over those of {what}", products.get(ours, np.nan) / other, bound)
        for what, ours, other, bound in pairs
        if other is not None
    ]


def cases() -> list[Case]:
    """Cost against bare products and against PyTorch; products to a residual."""
    symmetric = "check_symmetric"
    return [
        *(
            Case(
                f"lanczos/cost/{name}",
                partial(_against_bare, (partial(_eigsh, kind), symmetric), kind),
            )
            for name, kind in (("lanczos-jvp", "jvp"), ("lanczos-symmetric", "symmetric"))
        ),
        Case("lanczos/cost/arnoldi-jvp", partial(_against_bare, (_eigs, "check_arnoldi"), "jvp")),
        *(
            Case(f"lanczos/torch/{method}", partial(_against_torch, method))
            for method in ("arnoldi", "lanczos")
        ),
        *(Case(f"lanczos/products/{name}", partial(_products, name)) for name in SPECTRA),
    ]


def figure(records):
    """Cost and its parts above, products to a residual below."""
    costs = [record for record in records if record.get("baselines")]
    order = {f"lanczos/products/{name}": i for i, name in enumerate(SPECTRA)}
    tables = [record for record in records if "rows" in record]
    tables = sorted(tables, key=lambda record: order[record["case"]])
    figure, axes = panels(2 + len(tables))
    for axis, title in zip(axes, ("cost", "torch"), strict=False):
        labels, times, colors = [], [], []
        for record in costs:
            _, group, name = record["case"].split("/")
            if group != title:
                continue
            entries = {f"{name}: memjax": record} | record["baselines"]
            for label, entry in entries.items():
                seconds = entry["seconds"]
                total = seconds["minimum"] * seconds["products_per_run"]
                ratio = f" ({entry['ratio']:.2f})" if "ratio" in entry else ""
                labels.append(f"{label}{ratio}")
                times.append(total)
                colors.append("#0072B2" if entry is record else "0.75")
        places = np.arange(len(labels))
        axis.barh(places, times, color=colors)
        axis.set_yticks(places, labels, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel("seconds for 20 products, 8 images", fontsize=9)
        what = "bare products" if title == "cost" else "PyTorch"
        axis.set_title(f"against {what} (ratio of memjax to it)", fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
    for axis, record in zip(axes[2:], tables, strict=True):
        names = [row["method"] for row in record["rows"]]
        for i, row in enumerate(record["rows"]):
            if "products" not in row:
                axis.text(1, i, "not installed", fontsize=7, va="center")
                continue
            color = COLORS[0] if row["method"].startswith("memjax") else "0.3"
            marker = "o" if row["status"] == "ok" else "x"
            axis.plot([row["low"], row["high"]], [i, i], color=color, linewidth=1)
            axis.plot(row["products"], i, marker, color=color, markersize=5)
            note = {"ok": "", "failed": " failed", "incomplete": " misses copies"}[row["status"]]
            text = f"  {row['products']:.0f}{note}"
            axis.text(row["high"], i, text, fontsize=7, va="center")
        axis.set_yticks(range(len(names)), names, fontsize=7)
        axis.invert_yaxis()
        axis.set_xscale("log")
        low, high = axis.get_xlim()
        low, high = low / 1.2, high * 3  # room for the numbers
        ticks = [tick for tick in TICKS if low <= tick <= high]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set_xlim(low, high)
        axis.set_title(SPECTRA[record["case"].split("/")[-1]], fontsize=9)
        axis.set_xlabel("products, median of starts", fontsize=9)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", color="0.92")
    return figure
