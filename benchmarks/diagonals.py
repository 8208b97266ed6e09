"""Diagonals: error against products on six operators, every estimator and matfree's.

Two are local, as the Jacobian of a denoiser is on images: the retained variance of a smooth
Gaussian field (24 x 24 pixels, correlation 2.5 pixels) less that of the same field with a disc
pinned to a thousandth of its variance, at alpha^2 = .998 and .5 (alpha^2 + sigma^2 = 1). A third
has channels. The others have no geometry: a geometric spectrum, rank 10, and a power law.
Float64, twenty keys; error is |estimate - diagonal| / |diagonal|.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._precision import Method, draw, error_of, rounded, rows
from benchmarks.harness import Case, Table, Target
from memjax._core.keys import derive_key
from memjax._core.status import Status
from memjax.linalg.choice import DiagonalMethod, diagonal_auto
from memjax.linalg.diagonal import diagonal_hutchinson, diagonal_xdiag, diagonal_xnysdiag
from memjax.linalg.lattice import diagonal_lattice

BUDGETS = [8, 16, 32, 64, 128]
KEYS = 20
PINNED = 1e-3
WORLDS = {
    "field-998": "local field, alpha² = .998",
    "field-500": "local field, alpha² = .5",
    "channels": "16 x 16 pixels, 4 channels",
    "geometric": "geometric spectrum, ratio .6",
    "low-rank": "rank 10",
    "power-law": "eigenvalues 1/i, random basis",
}
TARGETS = {
    "field-998": [("lattice", 16, 0.12), ("lattice", 64, 0.04)],
    "field-500": [("lattice", 16, 0.18), ("lattice", 64, 0.03)],
    "low-rank": [("XDiag", 64, 1e-6), ("auto", 64, 1e-6)],
}


def _pixels(size: int):
    y, x = np.mgrid[:size, :size].astype(float)
    return np.stack([y.ravel(), x.ravel()], axis=1)


def _retained_difference(covariance, pinned, alpha2: float):
    """M - M_pinned with M = alpha^2 C (alpha^2 C + sigma^2 I)^-1; pinning scales rows, columns."""
    scale = np.where(pinned, PINNED**0.5, 1.0)
    noise = (1 - alpha2) * np.eye(len(covariance))

    def retained(c):
        return np.linalg.solve(alpha2 * c + noise, alpha2 * c)

    return retained(covariance) - retained(scale[:, None] * covariance * scale[None, :])


def _local(size: int, channels: int, alpha2: float):
    pixels = _pixels(size)
    squares = np.sum((pixels[:, None] - pixels[None]) ** 2, axis=-1)
    disc = np.sum((pixels - (size - 1) / 2) ** 2, axis=1) <= (7 * size / 24) ** 2
    covariance = np.exp(-squares / (2 * 2.5**2))
    if channels > 1:
        between = 0.4 * np.eye(channels) + 0.6
        covariance, disc = np.kron(covariance, between), np.repeat(disc, channels)
    a = _retained_difference(covariance, disc, alpha2)
    return (a + a.T) / 2


def _spectral(values, rng):
    basis, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    return basis * values @ basis.T


def _world(name: str, quick: bool, rng):
    """The matrix, the shape its vectors have, and whether it is positive semi-definite."""
    size = 8 if quick else 24
    if name.startswith("field"):
        return _local(size, 1, int(name[-3:]) / 1000), (size, size), False
    if name == "channels":
        size = 4 if quick else 16
        return _local(size, 4, 0.9), (size, size, 4), False
    index = np.arange(size**2)
    values = {
        "geometric": 0.6**index,
        "low-rank": np.where(index < 10, 1.0 - index / 20, 0.0),
        "power-law": 1 / (1.0 + index),
    }[name]
    return _spectral(values, rng), (size**2,), True


def _methods(a, shape, positive: bool) -> list[Method]:
    like = jnp.zeros(shape)

    def matvec(v):
        return (a @ v.reshape(-1)).reshape(shape)

    def ours(estimator, **options):
        def estimate(key, products):
            out = estimator(matvec, like, key, products, **options)
            return out.value, {"standard_error": out.standard_error, "status": out.status}

        return estimate

    def auto(key, products):
        out, method = diagonal_auto(matvec, like, key, products, positive=positive)
        extra = {"standard_error": out.standard_error, "status": out.status, "chosen": method}
        return out.value, extra

    def matfree(integrand, products_each):
        def estimate(key, products):
            from matfree import stochtrace

            sampler = stochtrace.sampler_signs(like, num=products // products_each)
            made = getattr(stochtrace, integrand)()
            return stochtrace.estimator_leave_one_out(made, sampler)(matvec, key)

        return estimate

    methods = [
        Method("memjax Hutchinson", ours(diagonal_hutchinson)),
        Method("memjax lattice", ours(diagonal_lattice)),
        Method("memjax XDiag", ours(diagonal_xdiag)),
        Method("memjax auto", auto),
        Method("matfree XDiag", matfree("leave_one_out_xdiag", 2), "matfree"),
    ]
    if positive:
        methods += [
            Method("memjax XNysDiag", ours(diagonal_xnysdiag)),
            Method("matfree XNysDiag", matfree("leave_one_out_xnysdiag", 1), "matfree"),
        ]
    return methods


def _make(name: str, quick: bool, seed: int) -> Table:
    a, shape, positive = _world(name, quick, np.random.default_rng(seed))
    exact, size = np.diag(a), np.linalg.norm(np.diag(a))
    budgets = BUDGETS[:2] if quick else BUDGETS
    num_keys = 3 if quick else KEYS

    def relative_error(values):
        return np.linalg.norm(values.reshape(len(values), -1) - exact[None], axis=1) / size

    def summarize(extra):
        """The error that was reported, in the same unit; warnings; what auto chose."""
        out = {}
        if "standard_error" in extra:
            reported = np.linalg.norm(extra["standard_error"].reshape(num_keys, -1), axis=1) / size
            if np.all(np.isfinite(reported)):
                out["reported"] = rounded(np.median(reported))
            out["flagged"] = int(np.sum(extra["status"] != Status.OK))
        if "chosen" in extra:
            labels = [DiagonalMethod(int(code)).label for code in extra["chosen"]]
            out["chosen"] = {label: labels.count(label) for label in sorted(set(labels))}
        return out

    def compute():
        with jax.enable_x64(True):
            keys = jax.random.split(derive_key(seed, "keys"), num_keys)
            found = rows(
                _methods(jnp.asarray(a), shape, positive), budgets, keys, relative_error, summarize
            )
        targets = [
            Target(f"error of {method}, {m} products", error_of(found, f"memjax {method}", m), e)
            for method, m, e in TARGETS.get(name, ())
            if m in budgets
        ]
        return found, targets

    return Table(compute, {"shape": list(shape), "keys": num_keys})


def cases() -> list[Case]:
    """One table an operator."""
    return [Case(f"diagonals/{name}", partial(_make, name)) for name in WORLDS]


def figure(records):
    """One panel an operator."""
    order = {f"diagonals/{name}": i for i, name in enumerate(WORLDS)}
    records = sorted(records, key=lambda record: order[record["case"]])
    return draw(records, WORLDS, "relative error, median of keys")
