"""Traces: error against products on six spectra, every estimator, traceax's and matfree's.

Symmetric positive semi-definite matrices with known eigenvalues in a random basis, 400 x 400 (that
of rank 2 in the coordinates of two entries, so that it is of rank 2 to the last bit), float64,
fifty keys; error is |estimate - trace| / trace.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._precision import Method, draw, rounded, rows
from benchmarks.harness import Case, Table
from memjax._core.keys import derive_key
from memjax._core.status import Status
from memjax.linalg.trace import trace_hutchinson, trace_hutchpp, trace_xnystrace, trace_xtrace

BUDGETS = [12, 24, 48, 96, 192]
KEYS = 50
SPECTRA = {
    "flat": "flat: 1 to 3",
    "geometric": "geometric, ratio .7",
    "power-law": "power law, 1/i²",
    "rank-2": "rank 2: two entries, zero elsewhere",
    "identity": "identity",
    "retained-variance": "retained variance: 30 free of 400, the others 1e-3",
}


def _eigenvalues(name: str, n: int):
    i = np.arange(n, dtype=float)
    if name == "retained-variance":
        free = 30 * n // 400
        return np.where(i < free, 1 - 0.9 * i / free, 1e-3)
    return {
        "flat": 3 - 2 * i / (n - 1),
        "geometric": 0.7**i,
        "power-law": 1 / (i + 1) ** 2,
        "rank-2": np.where(i < 2, 2.0 - i, 0.0),
        "identity": np.ones(n),
    }[name]


def _methods(a) -> list[Method]:
    like = jnp.zeros(len(a))

    def matvec(v):
        return a @ v

    def ours(estimator):
        def estimate(key, products):
            out = estimator(matvec, like, key, products)
            return out.value, {"standard_error": out.standard_error, "status": out.status}

        return estimate

    def traceax(name):
        def estimate(key, products):
            import lineax
            from traceax import _estimators

            operator = lineax.MatrixLinearOperator(a, lineax.positive_semidefinite_tag)
            return getattr(_estimators, name)().estimate(key, operator, products)[0]

        return estimate

    def matfree(integrand, products_each):
        def estimate(key, products):
            from matfree import stochtrace

            sampler = stochtrace.sampler_sphere(like, num=products // products_each)
            made = getattr(stochtrace, integrand)()
            return stochtrace.estimator_leave_one_out(made, sampler)(matvec, key)

        return estimate

    return [
        Method("memjax Hutchinson", ours(trace_hutchinson)),
        Method("memjax Hutch++", ours(trace_hutchpp)),
        Method("memjax XTrace", ours(trace_xtrace)),
        Method("memjax XNysTrace", ours(trace_xnystrace)),
        Method("traceax Hutchinson", traceax("HutchinsonEstimator"), "traceax"),
        Method("traceax Hutch++", traceax("HutchPlusPlusEstimator"), "traceax"),
        Method("traceax XTrace", traceax("XTraceEstimator"), "traceax"),
        Method("traceax XNysTrace", traceax("XNysTraceEstimator"), "traceax"),
        Method("matfree XTrace", matfree("leave_one_out_xtrace", 2), "matfree"),
        Method("matfree XNysTrace", matfree("leave_one_out_xnystrace", 1), "matfree"),
    ]


def _make(name: str, quick: bool, seed: int) -> Table:
    n, num_keys = (80, 3) if quick else (400, KEYS)
    budgets = BUDGETS[:2] if quick else BUDGETS
    rng = np.random.default_rng(seed)
    values = _eigenvalues(name, n)
    basis, _ = np.linalg.qr(rng.standard_normal((n, n)))
    if name == "rank-2":
        basis = np.eye(n)
        basis[:2, :2] = np.array([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    a, trace = basis * values @ basis.T, float(np.sum(values))
    a = (a + a.T) / 2

    def relative_error(found):
        return np.abs(found - trace) / trace

    def summarize(extra):
        if "standard_error" not in extra:
            return {}
        out = {"flagged": int(np.sum(extra["status"] != Status.OK))}
        reported = np.median(extra["standard_error"]) / trace
        return out | ({"reported": rounded(reported)} if np.isfinite(reported) else {})

    def compute():
        with jax.enable_x64(True):
            keys = jax.random.split(derive_key(seed, "keys"), num_keys)
            found = rows(_methods(jnp.asarray(a)), budgets, keys, relative_error, summarize)
        return found, []

    return Table(compute, {"dimension": n, "keys": num_keys})


def cases() -> list[Case]:
    """One table a spectrum."""
    return [Case(f"traces/{name}", partial(_make, name)) for name in SPECTRA]


def figure(records):
    """One panel a spectrum."""
    order = {f"traces/{name}": i for i, name in enumerate(SPECTRA)}
    records = sorted(records, key=lambda record: order[record["case"]])
    return draw(records, SPECTRA, "relative error, median of keys")
