"""Eigen-solvers: what they cost beyond their products, and how many products they need.

``cost``: twenty products of a fixed-budget run, linearization included, on the U-Net, against
twenty bare applications of the same linear map in a loop. ``torch``: the same runs against the
published method in PyTorch, same network, same weights, same start.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _torch
from benchmarks._unet import Network, field, forward, network, parameters
from benchmarks.harness import Baseline, Case, Program, require
from memjax.calculus.linearization import linearize
from memjax.linalg.arnoldi import eigs
from memjax.linalg.lanczos import eigsh

PRODUCTS = 20
PAIRS = 6
BARE_TARGET = 1.08
TORCH_TARGET = 1 / 3


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


def _hessenberg(product, starts):
    """V A V^T of every point in float64: Gram-Schmidt twice, products one by one."""
    batch = len(starts)
    basis = np.zeros((batch, PRODUCTS + 1, starts[0].size))
    basis[:, 0] = np.asarray(starts, np.float64).reshape(batch, -1)
    out = np.zeros((batch, PRODUCTS + 1, PRODUCTS))
    for j in range(PRODUCTS):
        v = jnp.asarray(basis[:, j], starts.dtype).reshape(starts.shape)
        w = np.asarray(product(v), np.float64).reshape(batch, -1)
        for _ in range(2):
            along = np.einsum("bmd,bd->bm", basis[:, : j + 1], w)
            w -= np.einsum("bm,bmd->bd", along, basis[:, : j + 1])
            out[:, : j + 1, j] += along
        out[:, j + 1, j] = np.linalg.norm(w, axis=1)
        basis[:, j + 1] = w / out[:, j + 1, j, None]
    return out[:, :PRODUCTS]


def _largest_modulus(hessenberg):
    """Moduli, because conjugates may come in either order."""
    return -np.sort(-np.abs(np.linalg.eigvals(hessenberg)), axis=1)[:, :PAIRS]


def _both_ends(ritz):
    """Half of the values from either end of an ascending list."""
    return np.concatenate([ritz[:, : PAIRS // 2], ritz[:, -PAIRS // 2 :]], axis=1)


def _error(found, expected) -> float:
    return float(np.max(np.abs(np.asarray(found) - expected)) / np.max(np.abs(expected)))


class _Setting:
    """The network, its products, and what the solvers should find."""

    def __init__(self, kind: str, quick: bool, seed: int):
        self.kind = kind
        self.net: Network = network(quick, seed)
        self.arguments = (self.net.weights, self.net.points, self.net.directions)
        self.lin = jax.jit(partial(_linearize, self.net.module))(*self.arguments[:2])
        self.product = jax.jit(lambda lin, v: getattr(lin, kind)(v))
        self.hessenberg = _hessenberg(partial(self.product, self.lin), self.net.directions)

    @property
    def ritz(self):
        # Of a matrix that is not symmetric, the solver and this take the upper triangle.
        return np.linalg.eigvalsh(self.hessenberg, UPLO="U")

    def check_symmetric(self, out) -> float:
        values, num_products = out
        if np.any(np.asarray(num_products) != PRODUCTS):
            return np.inf
        return _error(values, _both_ends(self.ritz))

    def check_arnoldi(self, out) -> float:
        values, num_products = out
        if np.any(np.asarray(num_products) != PRODUCTS):
            return np.inf
        return _error(np.abs(values), _largest_modulus(self.hessenberg))

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
        return _error(out, np.asarray(v))

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
    parity = _error(_torch.evaluate(function, images), np.asarray(forward(net.module, *net[1:3])))
    if not parity < 1e-4:
        raise ValueError(f"the networks differ by {parity:.1e}")
    arguments = (function, images, _torch.to_torch(net.directions), PRODUCTS)

    def check(values) -> float:
        if method == "arnoldi":
            found = -np.sort(-np.abs(values), axis=1)[:, :PAIRS]
            return _error(found, _largest_modulus(setting.hessenberg))
        return _error(_both_ends(values), _both_ends(setting.ritz))

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


def cases() -> list[Case]:
    """Cost against bare products and against PyTorch."""
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
    ]
