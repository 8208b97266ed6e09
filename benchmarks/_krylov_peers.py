"""Products that eigen-solvers need to reach a residual: ours, a plain reference, peers.

Every solver takes a problem and returns a ``Run`` for every start. Single-vector solvers that do
not look further may miss copies of multiple eigenvalues: runs record whether they did.
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
        values: all eigenvalues, ascending.
        starts: first vectors, [starts, n].
    """

    apply: Callable
    n: int
    k: int
    tol: float
    values: np.ndarray
    starts: np.ndarray

    @property
    def norm(self) -> float:
        """|A|."""
        return float(np.max(np.abs(self.values)))

    def run(self, products: int, values, columns) -> "Run":
        """What a solver found, recomputed."""
        values, columns = np.asarray(values), np.asarray(columns, np.float64)
        rest = np.asarray(self.apply(columns)) - columns * values[None]
        sizes = np.linalg.norm(rest, axis=0) / np.linalg.norm(columns, axis=0)
        off = np.abs(np.sort(values) - self.values[-self.k :])
        complete = bool(np.all(off <= 2 * self.tol * self.norm))
        return Run(int(products), float(np.max(sizes) / self.norm), complete)


class Run(NamedTuple):
    """One start.

    Attributes:
        products: with A.
        residual: largest of |A y - theta y| / (|A| |y|).
        complete: whether the values are the k largest, each as often as it occurs.
    """

    products: int
    residual: float
    complete: bool


def unrestarted(problem: Problem) -> list[Run]:
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
                    out.append(problem.run(j + 1, theta[-problem.k :], y))
                    break
            basis[:, j + 1] = w / beta
    return out


def memjax(problem: Problem, basis_size: int) -> list[Run]:
    """Ours, every start in one program, until the search says that no pair is missing."""
    return _ours(problem, problem.starts, basis_size, 20 * problem.n)


def memjax_told(problem: Problem, lengths: list[int]) -> list[Run]:
    """Ours with as many products as another method needed from the same start: the residual."""
    runs: dict[int, Run] = {}
    for length in sorted(set(lengths)):
        rows = [i for i, other in enumerate(lengths) if other == length]
        found = _ours(problem, problem.starts[rows], min(problem.n, length), length)
        runs.update(zip(rows, found, strict=True))
    return [runs[i] for i in range(len(lengths))]


def _ours(problem: Problem, starts: np.ndarray, basis_size: int, budget: int) -> list[Run]:
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
                max_products=budget,
                start=start,
            )
            return out.num_products, out.values, out.vectors

        return jax.lax.map(one, starts)

    found = zip(*map(np.asarray, run(jnp.asarray(starts))), strict=True)
    return [problem.run(m, values, y.T) for m, values, y in found]


def scipy(problem: Problem, basis_size: int | None) -> list[Run]:
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
            run = problem.run(count, values, y)
            if run.residual <= problem.tol:
                out.append(run)
                break
        else:
            out.append(Run(count, float("nan"), False))
    return out


def lobpcg(problem: Problem) -> list[Run]:
    """JAX's LOBPCG on A - lowest I, which its test of convergence needs to be positive.

    Counted as an implementation that keeps A X and A P would need them: k for the start, k for
    the first directions, k an iteration. This one makes 4 k an iteration.
    """
    from jax.experimental.sparse.linalg import lobpcg_standard

    lowest = float(problem.values[0])

    def shifted(columns):
        return problem.apply(columns) - lowest * columns

    # It stops at |r| < 10 n tol (theta + |A v|): the tolerance that means ours for the largest.
    top = float(problem.values[-1]) - lowest
    tol = problem.tol * problem.norm / (20 * problem.n * top)
    out = []
    for i in range(len(problem.starts)):
        rng = np.random.default_rng(i)
        x = jnp.asarray(rng.standard_normal((problem.n, problem.k)))
        values, y, iterations = lobpcg_standard(shifted, x, m=2000, tol=tol)
        products = (int(iterations) + 2) * problem.k
        out.append(problem.run(products, np.asarray(values) + lowest, y))
    return out


def matfree(problem: Problem, length: int) -> list[Run]:
    """A fixed number of steps, which the caller has to know."""
    from matfree import decomp, eig

    run = jax.jit(lambda start: eig.eigh_partial(decomp.tridiag_sym(length))(problem.apply, start))
    out = []
    for start in problem.starts:
        values, rows = (np.asarray(a) for a in run(jnp.asarray(start)))
        order = np.argsort(values)[-problem.k :]
        out.append(problem.run(length, values[order], rows[order].T))
    return out
