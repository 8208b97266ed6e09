"""Products that eigen-solvers need to reach a residual: ours, a plain reference, peers.

Every function takes a symmetric operator as a function of NumPy or JAX columns and returns, for
every start, the products it took and the residual that it really reached, relative to |A|.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from memjax.linalg.lanczos import eigsh


class Problem(NamedTuple):
    """The k largest eigenvalues of a symmetric operator.

    Attributes:
        apply: A on one vector or on columns, NumPy or JAX.
        n: dimension.
        k: pairs wanted.
        tol: residual wanted, relative to ``norm``.
        norm: |A|.
        lowest: an eigenvalue that no other is below.
        starts: first vectors, [starts, n].
    """

    apply: Callable
    n: int
    k: int
    tol: float
    norm: float
    lowest: float
    starts: np.ndarray

    def residual(self, values, columns) -> float:
        """Largest of |A y - theta y| / (|A| |y|), recomputed."""
        columns = np.asarray(columns, np.float64)
        rest = np.asarray(self.apply(columns)) - columns * np.asarray(values)[None]
        sizes = np.linalg.norm(rest, axis=0) / np.linalg.norm(columns, axis=0)
        return float(np.max(sizes) / self.norm)


def unrestarted(problem: Problem) -> list[tuple[int, float]]:
    """Lanczos in NumPy: the whole basis kept, orthogonalized twice, looked at after every step."""
    out = []
    for start in problem.starts:
        basis = np.zeros((problem.n, problem.n + 1))
        basis[:, 0] = start / np.linalg.norm(start)
        t = np.zeros((problem.n + 1, problem.n + 1))
        for j in range(problem.n):
            w = np.asarray(problem.apply(basis[:, j]))
            for _ in range(2):
                along = basis[:, : j + 1].T @ w
                w = w - basis[:, : j + 1] @ along
                t[: j + 1, j] += along
            t[j, : j + 1] = t[: j + 1, j]
            beta = np.linalg.norm(w)
            if j + 1 >= problem.k:
                theta, z = np.linalg.eigh(t[: j + 1, : j + 1])
                bound = beta * np.abs(z[-1, -problem.k :])
                if np.all(bound <= problem.tol * problem.norm):
                    y = basis[:, : j + 1] @ z[:, -problem.k :]
                    out.append((j + 1, problem.residual(theta[-problem.k :], y)))
                    break
            basis[:, j + 1] = w / beta
    return out


def memjax(problem: Problem, basis_size: int) -> list[tuple[int, float]]:
    """Ours, every start in one program."""

    @jax.jit
    def run(starts):
        def one(start):
            out = eigsh(
                problem.apply,
                start,
                jax.random.key(0),
                problem.k,
                tol=problem.tol,
                basis_size=basis_size,
                max_products=20 * problem.n,
                start=start,
            )
            return out.num_products, out.values, out.vectors

        return jax.lax.map(one, starts)

    found = zip(*map(np.asarray, run(jnp.asarray(problem.starts))), strict=True)
    return [(int(m), problem.residual(values, y.T)) for m, values, y in found]


def scipy(problem: Problem, basis_size: int | None) -> list[tuple[int, float]]:
    """ARPACK, the tolerance as loose as reaches the residual; products counted."""
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator
    from scipy.sparse.linalg import eigsh as arpack

    out = []
    for start in problem.starts:
        for tol in problem.tol * 10.0 ** -np.arange(0, 7, 0.5):
            count = 0

            def product(v):
                nonlocal count
                count += 1
                return problem.apply(v)

            operator = LinearOperator((problem.n,) * 2, matvec=product, dtype=np.float64)
            try:
                values, y = arpack(
                    operator, problem.k, which="LA", ncv=basis_size, tol=tol, v0=start
                )
            except ArpackNoConvergence:
                continue
            residual = problem.residual(values, y)
            if residual <= problem.tol:
                out.append((count, residual))
                break
        else:
            out.append((count, float("nan")))
    return out


def lobpcg(problem: Problem) -> list[tuple[int, float]]:
    """JAX's LOBPCG on A - lowest I, which its test of convergence needs to be positive.

    Counted with k products an iteration, what an implementation that keeps A X and A P needs; this
    one makes 4 k.
    """
    from jax.experimental.sparse.linalg import lobpcg_standard

    def shifted(columns):
        return problem.apply(columns) - problem.lowest * columns

    # It stops at |r| < 10 n tol (theta + |A v|): the tolerance that means ours for the largest.
    top = problem.norm if problem.lowest >= 0 else problem.norm - problem.lowest
    tol = problem.tol * problem.norm / (20 * problem.n * top)
    out = []
    for i in range(len(problem.starts)):
        rng = np.random.default_rng(i)
        x = jnp.asarray(rng.standard_normal((problem.n, problem.k)))
        values, y, iterations = lobpcg_standard(shifted, x, m=2000, tol=tol)
        residual = problem.residual(np.asarray(values) + problem.lowest, y)
        out.append((int(iterations) * problem.k, residual))
    return out


def matfree(problem: Problem, length: int) -> list[tuple[int, float]]:
    """A fixed number of steps, which the caller has to know."""
    from matfree import decomp, eig

    run = jax.jit(lambda start: eig.eigh_partial(decomp.tridiag_sym(length))(problem.apply, start))
    out = []
    for start in problem.starts:
        values, rows = (np.asarray(a) for a in run(jnp.asarray(start)))
        order = np.argsort(values)[-problem.k :]
        out.append((length, problem.residual(values[order], rows[order].T)))
    return out
