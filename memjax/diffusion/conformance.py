"""What is wrong with this score function? Answered from samples and the function alone.

The denoising identity decides. With x = x0 + sigma n, x0 from the data and n ~ N(0, I), the true
score s is the conditional mean of -n/sigma given x, so for every function f

    E <f(x), -n/sigma> = E <f(x), s(x)>                                                        (1)

and E |f - s|^2 = E |f|^2 + 2 E <f, n/sigma> + const (Vincent 2011, equations 9 to 11): among all
functions the score alone minimizes the denoising loss. Neither side needs the score to be known.
A function that is a wrong convention of a good score (its negative, the predicted noise, the
denoiser, a missing power of sigma ...) is told apart because undoing exactly that convention, at
every noise level, brings the loss down to what the best combination a f(x) + b x attains, and
leaving it as it is does not. Pairs +n, -n cancel the part of (1) whose variance grows as sigma
falls: what remains is the Stein form, E <f, -n/sigma> = E div f (Hyvarinen 2005, equation 4).
"""

import inspect
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from memjax._core.chunked import chunked_map
from memjax._core.errors import InputError
from memjax._core.keys import derive_key
from memjax.calculus.linearization import linearize
from memjax.diffusion._conventions import Arguments, Law, known_arguments, known_laws
from memjax.diffusion.adapters import callable_pytree
from memjax.diffusion.combine import Score, at

_NUM_LEVELS = 6
_MIN_SAMPLES = 16
_CHUNK = 64
_NUM_POINTS = 8
"""Points at which derivatives, NaNs, conditions and batches are looked at, per noise level."""
_SAME = 1e-2
"""Two evaluations that differ by less, relative to the largest entry, are the same number."""
_LEAST_GAIN = 0.25
"""A level where less than this share of the noise can be predicted weighs in proportion."""
_WRONG = 0.1
"""Mean shortfall of the denoising loss from which a score is wrong: a constant factor of 1.32, or
an error of 56 % of the score's own size in a random direction."""
_ASYMMETRIC = 0.3
"""|J - J^T| / 2|J| that is reported; a learned score has about 0.1, a random matrix 0.7."""
_WRONG_DERIVATIVE = 0.3


class Finding(NamedTuple):
    """One thing that is wrong.

    Attributes:
        code: one of ``CODES``.
        message: what is wrong and how to mend it, one line.
        evidence: the numbers it rests on.
    """

    code: str
    message: str
    evidence: dict[str, float]


CODES = {
    "raises": "cannot be called as score(x, sigma, condition) on one sample",
    "shape": "returns another shape than x, or wants a batch",
    "dtype": "returns another dtype than x",
    "impure": "gives different answers for the same input",
    "not_traceable": "cannot be traced by jax.jit or jax.vmap",
    "batch_coupled": "an answer depends on the other rows of the batch",
    "nonfinite": "NaN or infinity at a valid input, in the value or the derivative",
    "not_differentiable": "has no derivative, or JAX's derivative is not the function's",
    "ignores_x": "does not depend on x",
    "ignores_sigma": "does not depend on sigma",
    "ignores_condition": "does not depend on the condition",
    "sign": "the negative of the score",
    "noise": "the predicted noise, not the score",
    "denoiser": "the denoised sample, not the score",
    "velocity": "a velocity prediction, not the score",
    "sigma_power": "the score with a power of sigma too many or too few",
    "alpha": "the score with respect to alpha x instead of x",
    "constant": "the score times a constant",
    "coordinates": "expects alpha x (variance-preserving or flow coordinates) instead of x",
    "sigma_units": "expects sigma in another unit",
    "asymmetric": "the Jacobian is far from symmetric, so this is no gradient",
    "not_the_score": "denoises these samples badly, for a reason not recognized",
}
"""Every finding's code, and what it means."""


class ScoreMeasurements(NamedTuple):
    """What was measured, per noise level; NaN where a check could not run.

    Attributes:
        sigma: the noise levels.
        scale: the factor c for which c f(x) fits -n/sigma best; 1 for a true score.
        denoising_loss: E |n + sigma f|^2 / d: 0 at best, 1 for f = 0.
        attainable_loss: that of the best combination a f(x) + b x.
        asymmetry: |J - J^T| / 2|J| (Frobenius): 0 for a gradient, about 0.1 for a learned score.
        derivative_error: |J v - (f(x + h v) - f(x - h v)) / 2h| over |J v| + the other's norm,
            median; NaN where finite differences do not settle either.
    """

    sigma: tuple[float, ...]
    scale: tuple[float, ...] = ()
    denoising_loss: tuple[float, ...] = ()
    attainable_loss: tuple[float, ...] = ()
    asymmetry: tuple[float, ...] = ()
    derivative_error: tuple[float, ...] = ()


class ScoreReport(NamedTuple):
    """What ``check_score`` found; ``print(report)`` says it in words.

    Attributes:
        ok: nothing was found.
        findings: what is wrong, the most fundamental first. A function that cannot be evaluated
            is not checked further: mend what is named and check again.
        measurements: the numbers, also where nothing is wrong.
    """

    ok: bool
    findings: tuple[Finding, ...]
    measurements: ScoreMeasurements

    @property
    def codes(self) -> tuple[str, ...]:
        """The findings' codes."""
        return tuple(finding.code for finding in self.findings)

    def __str__(self) -> str:
        """Findings with their evidence, then the table of measurements."""
        rows = []
        for code, message, evidence in self.findings:
            numbers = ", ".join(f"{name} {value:.3g}" for name, value in evidence.items())
            rows.append(f"{code}: {message}" + (f" ({numbers})" if numbers else ""))
        columns = {k: v for k, v in self.measurements._asdict().items() if v}
        if len(columns) > 1:
            rows.append("  ".join(f"{name:>16}" for name in columns))
            for values in zip(*columns.values(), strict=True):
                rows.append("  ".join(f"{value:16.4g}" for value in values))
        return "\n".join(
            [*rows, "ok: nothing wrong was found" if self.ok else "not a usable score"]
        )


def check_score(
    score: Score,
    x: Float[Array, "n ..."] | Float[np.ndarray, "n ..."],
    *,
    sigma_range: tuple[float, float] | None = None,
    conditions: PyTree = None,
    key: int | PRNGKeyArray = 0,
) -> ScoreReport:
    """Find out what is wrong with a score function, from samples of its data alone.

    A score is a callable ``(x, sigma, condition=None) -> s`` on one unbatched sample with
    s = grad_x log p_sigma(x | condition), x = x0 + sigma n. Checked in this order: that it can
    be called; shape and dtype; that the same input gives the same answer, jitted and vmapped
    too; finite values and derivatives at clean, noised and zero inputs; that x, sigma and the
    condition matter; sign, scale, prediction type, coordinates and units, by the denoising
    identity ``E <f, -n/sigma> = E <f, s>``; derivatives against finite differences; symmetry of
    the Jacobian. Nothing but samples is needed: the true score stays unknown.

    Args:
        score: the score, or a ``Model``.
        x: clean samples of the data the score belongs to (for a trained network: training
            samples), floating point, n >= 16, in the coordinates and dtype the score is used in.
        sigma_range: smallest and largest sigma at which the score must be right. By default a
            ``Model``'s own, else 0.01 and 100 times the standard deviation of x. The identity is
            tested at six levels between 0.1 and 10 standard deviations within it, finiteness at
            both ends too.
        conditions: pytree of arrays with leading axis n, the condition of each sample; ``None``
            for an unconditional score.
        key: seed or typed key for the noise.

    Returns:
        A ``ScoreReport``: ``ok``, ``findings`` (code, sentence, evidence), ``measurements``.

    Raises:
        InputError: x is not floating point, has fewer than 16 rows, is constant or not finite,
            or ``sigma_range`` or ``conditions`` does not fit. What the score itself raises is
            caught and becomes a finding.

    Accuracy: statistical. An imperfect network is no finding: only a loss further from what is
    attainable than a constant factor of 1.3 would cause, by four standard errors. A score of
    other data than x (an overfitted network on held-out samples) may be reported as
    ``not_the_score``. A convention that makes no difference on the levels tested (a missing
    1/sigma where all sigma are near 1) cannot be seen. Cost: about 2,000 forward evaluations
    (16,000 in few dimensions), ten times that for a score that is wrong, and five programs to
    compile.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.random.normal(jax.random.key(0), (64, 8))
    >>> check_score(lambda x, sigma, condition=None: -x / (1 + sigma**2), x).ok
    True
    >>> check_score(lambda x, sigma, condition=None: sigma * x / (1 + sigma**2), x).codes
    ('noise',)

    References:
        Vincent (2011), doi:10.1162/NECO_a_00142, equations 9 to 11. Hyvarinen (2005), JMLR 6,
        equation 4 (the Stein form).
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(f"x: expected a floating-point array, got dtype {x.dtype}")
    n = x.shape[0] if x.ndim else 0
    if n < _MIN_SAMPLES:
        raise InputError(f"x: expected at least {_MIN_SAMPLES} samples (rows), got {n}")
    std = float(jnp.std(x.astype(jnp.float32)))
    if not 0 < std < float("inf"):
        raise InputError(f"x: expected finite samples that differ, got standard deviation {std}")
    if any(jnp.ndim(leaf) == 0 or leaf.shape[0] != n for leaf in jax.tree.leaves(conditions)):
        raise InputError(f"conditions: expected arrays with leading axis {n}, one row per sample")
    smallest, largest = _range(score, sigma_range, std)
    low = min(max(smallest, 0.1 * std), largest)
    high = max(min(largest, 10 * std), smallest)
    levels = np.geomspace(*((low, high) if low < high else (smallest, largest)), _NUM_LEVELS)

    order = jax.random.permutation(derive_key(key, "rows"), n)
    conditions = jax.tree.map(lambda leaf: jnp.asarray(leaf)[order], conditions)
    subject = _Subject(callable_pytree(score, "score"), x[order], conditions, levels, key)
    measured = ScoreMeasurements(tuple(levels.tolist()))

    findings = _call(score, subject) or _trace(score, subject)
    if not findings:
        findings = [*_finite(subject, smallest, largest), *_depends(subject)]
        blind = {"ignores_x", "ignores_sigma"} & {finding.code for finding in findings}
        if not blind:
            derivative, measured = _derivatives(subject, measured)
            identity, measured = _identity(subject, measured)
            if "asymmetric" in [finding.code for finding in derivative]:
                # The part that is no gradient looks like a misfit of the rest.
                identity = [f for f in identity if f.code not in ("constant", "not_the_score")]
            if {"coordinates", "sigma_units"} & {finding.code for finding in identity}:
                # Inputs that the function was not made for.
                findings = [finding for finding in findings if finding.code != "nonfinite"]
            findings += [*derivative, *identity]
    return ScoreReport(not findings, tuple(findings), measured)


class _Subject(NamedTuple):
    """The score under examination and what it is examined with."""

    score: Score
    x: Float[Array, "n ..."]
    conditions: PyTree
    levels: np.ndarray
    key: int | PRNGKeyArray

    def condition(self, i: Any) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[i], self.conditions)

    def noised(self, num: int, purpose: str) -> tuple[Array, Array, PyTree]:
        """``num`` points at every level: x [levels * num, ...], sigma, conditions."""
        rows = jnp.arange(_NUM_LEVELS * num) % len(self.x)
        sigma = jnp.repeat(jnp.asarray(self.levels, self.x.dtype), num)
        shape = (len(rows), *self.x.shape[1:])
        noise = jax.random.normal(derive_key(self.key, purpose), shape, self.x.dtype)
        return self.x[rows] + _along(sigma, noise) * noise, sigma, self.condition(rows)


def _along(scalars: Array, rows: Array) -> Array:
    return scalars.reshape(-1, *[1] * (rows.ndim - 1))


def _range(score: Any, sigma_range: tuple[float, float] | None, std: float) -> tuple[float, float]:
    if sigma_range is None:
        default = (0.01 * std, 100 * std)
        sigma_range = (
            getattr(score, "sigma_min", default[0]),
            getattr(score, "sigma_max", default[1]),
        )
    smallest, largest = (float(sigma) for sigma in sigma_range)
    if not 0 < smallest < largest < float("inf"):
        raise InputError(
            f"sigma_range: expected 0 < smallest < largest < infinity, got {sigma_range}"
        )
    return smallest, largest


# Can it be called? -----------------------------------------------------------------------------


def _one_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}"[:200]


def _call(score: Score, subject: _Subject) -> list[Finding]:
    """Call once, eagerly, on one noised sample."""
    xs, sigmas, conditions = subject.noised(1, "call")
    i = _NUM_LEVELS // 2
    x, sigma, condition = xs[i], float(sigmas[i]), jax.tree.map(lambda leaf: leaf[i], conditions)
    try:
        out = score(x, sigma, condition)
    except Exception as error:
        return [_explain_call(score, x, sigma, condition, error)]
    if not hasattr(out, "shape") or not hasattr(out, "dtype"):
        kind = type(out).__name__
        return [Finding("shape", f"return one array like x, {list(x.shape)}, not a {kind}", {})]
    if out.shape != x.shape:
        message = f"return the shape of x, {list(x.shape)}, not {list(out.shape)}"
        return [Finding("shape", message, {})]
    if out.dtype != x.dtype:
        message = (
            f"return x's dtype, {x.dtype}, not {out.dtype}: convert weights or input and output"
        )
        return [Finding("dtype", message, {})]
    again = score(x, sigma, condition)
    if (difference := _difference(out, again)) > 1e-5:
        message = (
            "the same input gives different answers: switch dropout and other noise off, and keep "
            "no state between calls"
        )
        return [Finding("impure", message, {"relative difference": difference})]
    return []


def _explain_call(score, x, sigma, condition, error: Exception) -> Finding:
    """Say why a call on one sample failed, by trying what would have worked."""
    if isinstance(error, NameError) and "axis name" in str(error):
        message = (
            "statistics are taken over a batch axis: use the stored ones (evaluation mode), so "
            "that a sample's score is its own"
        )
        return Finding("batch_coupled", message, {})
    try:
        inspect.signature(score).bind(x, sigma, condition)
    except TypeError as signature_error:
        message = f"define it as score(x, sigma, condition=None): {signature_error}"
        return Finding("raises", message, {})
    except ValueError:
        pass  # a callable without a signature
    attempts = {
        "raises": (x, jnp.asarray(sigma, x.dtype), condition),
        "shape": (x[None], jnp.full(1, sigma, x.dtype), jax.tree.map(lambda c: c[None], condition)),
    }
    advice = {
        "raises": "accept a Python float for sigma: sigma = jnp.asarray(sigma, x.dtype)",
        "shape": "take one sample, not a batch: wrap it with x[None], sigma[None] and out[0]",
    }
    for code, call in attempts.items():
        try:
            score(*call)
        except Exception:
            continue
        return Finding(code, f"{advice[code]} (raised {_one_line(error)})", {})
    return Finding("raises", f"score(x, sigma, condition) raised {_one_line(error)}", {})


def _difference(a: Any, b: Any) -> float:
    """Largest deviation relative to the largest finite entry; NaNs in the same place agree."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if not np.array_equal(np.isfinite(a), np.isfinite(b)):
        return float("inf")
    finite = np.isfinite(a)
    largest = np.max(np.abs(a[finite]), initial=0.0)
    return float(np.max(np.abs(a - b)[finite], initial=0.0) / largest) if largest > 0 else 0.0


# Can it be traced, alone and in a batch? -------------------------------------------------------


@eqx.filter_jit
def _value(score, x, sigma, condition):
    return at(score, sigma, condition)(x)


@eqx.filter_jit
def _values(score, x, sigma, conditions):
    def one(row):
        x, sigma, condition = row
        return score(x, sigma, condition)

    return jax.vmap(one)((x, sigma, conditions))


def _trace(score: Score, subject: _Subject) -> list[Finding]:
    """Jit and vmap, and compare with the eager answer and with other companions in the batch."""
    xs, sigmas, conditions = subject.noised(2, "trace")
    i = _NUM_LEVELS
    condition = jax.tree.map(lambda leaf: leaf[i], conditions)
    eager = score(xs[i], float(sigmas[i]), condition)
    try:
        jitted = _value(subject.score, xs[i], sigmas[i], condition)
        batch = _values(subject.score, xs, sigmas, conditions)
        others = _values(
            subject.score,
            (2 * xs[::-1]).at[i].set(xs[i]),
            sigmas[::-1].at[i].set(sigmas[i]),
            jax.tree.map(lambda leaf: leaf[::-1].at[i].set(leaf[i]), conditions),
        )
    except Exception as error:
        return [_explain_trace(error)]
    if (difference := _difference(batch[i], others[i])) > _SAME:
        message = (
            "a row's score changes with the rest of the batch: batch normalization must use stored "
            "statistics, and nothing may be reduced over the batch"
        )
        return [Finding("batch_coupled", message, {"relative difference": difference})]
    worst = max(_difference(eager, jitted), _difference(eager, batch[i]))
    if worst > _SAME:
        message = (
            "jax.jit or jax.vmap gives other numbers than a plain call: the function keeps state, "
            "draws numbers of its own, or treats sigma differently as an array and as a float"
        )
        return [Finding("impure", message, {"relative difference": worst})]
    after = score(xs[i], float(sigmas[i]), condition)
    if (difference := _difference(eager, after)) > 1e-5:
        message = "tracing changed the function: keep no state between calls"
        return [Finding("impure", message, {"relative difference": difference})]
    return []


def _explain_trace(error: Exception) -> Finding:
    if isinstance(error, NameError) and "axis name" in str(error):
        message = "statistics are taken over a batch axis: use the stored ones (evaluation mode)"
        return Finding("batch_coupled", message, {})
    if isinstance(error, jax.errors.TracerArrayConversionError):
        advice = "replace NumPy functions by those of jax.numpy"
    elif isinstance(error, jax.errors.ConcretizationTypeError):
        advice = (
            "replace Python's if, while, float() and bool() on x or sigma by jnp.where or jax.lax"
        )
    elif isinstance(error, jax.errors.UnexpectedTracerError):
        return Finding("impure", "a traced value was stored between calls: keep no state", {})
    else:
        advice = "it must work under jax.jit and jax.vmap, with sigma a 0-d array"
    return Finding("not_traceable", f"{advice} (raised {_one_line(error)})", {})


# Is it finite? ----------------------------------------------------------------------------------


class _Probe(NamedTuple):
    """First-order facts along one direction v of signs, one row a point; JAX's or NumPy's."""

    jvp: Any
    vjp: Any
    slope: Any
    """(f(x + h v) - f(x - h v)) / 2h at h = 0.005 sigma."""
    slope_twice: Any
    """The same at 2h: where the two differ, neither is the derivative."""


@eqx.filter_jit
def _evaluate(score, x, sigma, conditions):
    return chunked_map(lambda row: score(*row), (x, sigma, conditions), chunk_size=_CHUNK)


@eqx.filter_jit
def _probe(score, x, sigma, conditions, v):
    def one(row):
        x, sigma, condition, v = row
        field = at(score, sigma, condition)
        lin = linearize(field, x)

        def slope(h):
            return (field(x + h * v) - field(x - h * v)) / (2 * h)

        h = 0.005 * sigma
        return _Probe(lin.jvp(v), lin.vjp(v), slope(h), slope(2 * h))

    return chunked_map(one, (x, sigma, conditions, v), chunk_size=_CHUNK)


def _signs(subject: _Subject, like: Array) -> Array:
    return jax.random.rademacher(derive_key(subject.key, "signs"), like.shape, like.dtype)


def _finite(subject: _Subject, smallest: float, largest: float) -> list[Finding]:
    """Values and derivatives at clean, noised and zero inputs, at all levels and both ends."""
    num = 2
    clean = subject.x[:num]
    noise = jax.random.normal(derive_key(subject.key, "finite"), clean.shape, clean.dtype)
    sigmas = np.unique([smallest, *subject.levels, largest])
    grid = [
        (place, sigma, points)
        for sigma in jnp.asarray(sigmas, clean.dtype)
        for place, points in (
            ("clean samples", clean),
            ("noised samples", clean + sigma * noise),
            ("x = 0", jnp.zeros_like(clean)),
        )
    ]
    xs = jnp.concatenate([points for _, _, points in grid])
    sigma = jnp.repeat(jnp.stack([sigma for _, sigma, _ in grid]), num)
    conditions = subject.condition(jnp.arange(len(xs)) % num)
    results = {"value": _evaluate(subject.score, xs, sigma, conditions)}
    try:
        probe = _probe(subject.score, xs, sigma, conditions, _signs(subject, xs))
        results["derivative"] = probe.jvp + probe.vjp
    except Exception:
        pass  # no derivative at all is reported by _derivatives
    for kind, out in results.items():
        bad: dict[str, list[float]] = {}
        for (place, sigma, _), rows in zip(
            grid, np.asarray(out).reshape(len(grid), -1), strict=True
        ):
            if not np.all(np.isfinite(rows)):
                bad.setdefault(place, []).append(float(sigma))
        if bad:
            where = "; ".join(
                f"{place}, sigma {min(at_sigma):.3g} to {max(at_sigma):.3g}"
                for place, at_sigma in bad.items()
            )
            message = (
                f"the {kind} is not finite at {where}: guard divisions, square roots and "
                "logarithms (a jnp.where around the result does not mend its derivative), and use "
                "softmax or logsumexp for exponentials"
            )
            evidence = {"places": float(sum(map(len, bad.values()))), "of": float(len(grid))}
            return [Finding("nonfinite", message, evidence)]
    return []


# Does it look at its arguments? ----------------------------------------------------------------


def _depends(subject: _Subject) -> list[Finding]:
    """Does the answer change with x, with sigma, with the condition?"""
    findings = []
    xs, sigmas, conditions = subject.noised(_NUM_POINTS, "depends")
    values = np.asarray(_evaluate(subject.score, xs, sigmas, conditions))

    def unchanged(x, sigma, conditions):
        others = np.asarray(_evaluate(subject.score, x, sigma, conditions))
        return bool(np.array_equal(values, others, equal_nan=True))

    # Reversing the rows reverses the levels; x is replaced by other points of the same level.
    if unchanged(jnp.roll(xs, 1, axis=0), sigmas, conditions):
        message = "the answer is the same for every x: check how x reaches the network"
        findings.append(Finding("ignores_x", message, {}))
    elif unchanged(xs, sigmas[::-1], conditions):
        message = "the answer is the same at every sigma: pass sigma on to the network"
        findings.append(Finding("ignores_sigma", message, {}))
    # Conditions of other samples, at three distances lest neighbours share theirs.
    rows = np.arange(len(xs)) % len(subject.x)
    shifted = [subject.condition((rows + shift) % len(subject.x)) for shift in (1, 3, 7)]
    pairs = [
        pair
        for others in shifted
        for pair in zip(jax.tree.leaves(conditions), jax.tree.leaves(others), strict=True)
    ]
    if any(not np.array_equal(*pair) for pair in pairs) and all(
        unchanged(xs, sigmas, others) for others in shifted
    ):
        message = "the answer is the same for every condition: pass the condition on"
        findings.append(Finding("ignores_condition", message, {}))
    return findings


# Derivatives and symmetry ----------------------------------------------------------------------


def _derivatives(
    subject: _Subject, measured: ScoreMeasurements
) -> tuple[list[Finding], ScoreMeasurements]:
    """JAX's derivative against finite differences, and J against its transpose."""
    xs, sigmas, conditions = subject.noised(_NUM_POINTS, "derivatives")
    try:
        probe = _probe(subject.score, xs, sigmas, conditions, _signs(subject, xs))
    except Exception as error:
        message = (
            "forward and transposed derivatives are needed: replace host callbacks, while loops "
            f"and the like by differentiable operations (raised {_one_line(error)})"
        )
        return [Finding("not_differentiable", message, {})], measured
    shape = (_NUM_LEVELS, _NUM_POINTS, -1)
    probe = _Probe(*(np.asarray(part, np.float64).reshape(shape) for part in probe))

    def norm(a):
        return np.linalg.norm(a, axis=-1)

    with np.errstate(invalid="ignore", divide="ignore"):
        settled = norm(probe.slope - probe.slope_twice) <= 0.05 * norm(probe.slope)
        error = norm(probe.jvp - probe.slope) / (norm(probe.jvp) + norm(probe.slope))
        error = np.where(settled & np.isfinite(error), error, np.nan)
        few = np.sum(np.isfinite(error), axis=1) < _NUM_POINTS / 2
        error = np.array(
            [np.nan if skip else np.nanmedian(e) for skip, e in zip(few, error, strict=True)]
        )
        skew = np.nansum(norm(probe.jvp - probe.vjp) ** 2, axis=1)
        asymmetry = np.sqrt(skew / np.nansum(norm(probe.jvp) ** 2, axis=1)) / 2
    measured = measured._replace(
        asymmetry=tuple(asymmetry.tolist()), derivative_error=tuple(error.tolist())
    )
    findings = []
    worst = float(np.nanmax(error, initial=0.0))
    if worst > _WRONG_DERIVATIVE:
        message = (
            "JAX's derivative is not the slope of the values: look for stop_gradient, rounding, or "
            "a custom derivative"
        )
        findings.append(Finding("not_differentiable", message, {"relative error": worst}))
    elif np.sum(asymmetry > _ASYMMETRIC) >= _NUM_LEVELS / 2:
        message = (
            "the Jacobian is far from symmetric, so this is no gradient of a log-density: look for "
            "permuted or transposed outputs (channels first against last), or an untrained network"
        )
        evidence = {"median |J - J^T|/2|J|": float(np.median(asymmetry))}
        findings.append(Finding("asymmetric", message, evidence))
    return findings, measured


# The denoising identity ------------------------------------------------------------------------


class _Moments(NamedTuple):
    """Inner products averaged over a pair x0 +- sigma n; one row per level, one column per pair."""

    ff: np.ndarray
    fx: np.ndarray
    xx: np.ndarray
    fn: np.ndarray
    """<f, -n>, the noise with its sign in the pair."""
    xn: np.ndarray


@eqx.filter_jit
def _moments(score, x, conditions, key, sigma, factor, level, *, num):
    """Moments of f = score(factor x, level) and x: [levels * num, 5], one pair a row."""

    def one(row):
        i, sigma, factor, level = row
        # The noise of a pair is drawn where it is used: nothing as large as all pairs is held.
        n = jax.random.normal(jax.random.fold_in(key, i), x.shape[1:], x.dtype)
        sample = i % num % len(x)
        condition = jax.tree.map(lambda leaf: leaf[sample], conditions)

        def side(n):
            noised = x[sample] + sigma * n
            f = score(factor * noised, level, condition)
            products = ((f, f), (f, noised), (noised, noised), (f, -n), (noised, -n))
            return jnp.stack([jnp.sum(a * b) for a, b in products])

        return (side(n) + side(-n)) / 2

    rows = (jnp.arange(len(sigma) * num), *(jnp.repeat(a, num) for a in (sigma, factor, level)))
    return chunked_map(one, rows, chunk_size=_CHUNK)


class _Fit(NamedTuple):
    """How well a convention explains the noise."""

    arguments: Arguments
    law: Law
    shortfall: np.ndarray
    """Per level: loss above the attainable one, over the attainable gain."""
    loss: np.ndarray
    """Per level and pair, over the attainable gain: for paired comparisons."""
    penalty: float


def _measure(subject: _Subject, convention: Arguments) -> _Moments:
    """Moments [levels, pairs]; pair j belongs to sample j modulo n. NaN where any is not finite."""
    num = int(np.clip(8192 // int(np.prod(subject.x.shape[1:])), 128, 1024))
    per_level = (
        jnp.asarray(a, subject.x.dtype)
        for a in (subject.levels, convention.factor, convention.level)
    )
    key = derive_key(subject.key, "identity")
    out = _moments(subject.score, subject.x, subject.conditions, key, *per_level, num=num)
    out = np.array(out, np.float64).reshape(_NUM_LEVELS, num, -1)
    out[~np.isfinite(out).all(axis=-1)] = np.nan
    return _Moments(*np.moveaxis(out, -1, 0))


def _loss(m: _Moments, sigma: np.ndarray, d: int, c: Any, b: Any) -> np.ndarray:
    """(|n + sigma (c f + b x)|^2 - |n|^2) / d, per level and pair."""
    sigma, c, b = (np.broadcast_to(a, sigma.shape)[:, None] for a in (sigma, c, b))
    square = c**2 * m.ff + 2 * c * b * m.fx + b**2 * m.xx
    return (sigma**2 * square - 2 * sigma * (c * m.fn + b * m.xn)) / d


def _best(m: _Moments, sigma: np.ndarray, d: int) -> np.ndarray:
    """The lowest mean loss of any c f + b x, per level; -1 is perfect, 0 that of no score."""
    ff, fx, xx, fn, xn = (np.nanmean(part, axis=1) for part in m)
    best = []
    for i in range(len(sigma)):
        scale = 1 / np.sqrt(np.maximum([ff[i], xx[i]], 1e-300))
        gram = np.array([[ff[i], fx[i]], [fx[i], xx[i]]]) * np.outer(scale, scale)
        target = np.array([fn[i], xn[i]]) * scale
        # f and x may be parallel (a Gaussian): the pseudo-inverse takes the shortest solution.
        best.append(-target @ np.linalg.pinv(gram, rcond=1e-5, hermitian=True) @ target / d)
    return np.array(best)


def _fits(subject: _Subject, convention: Arguments) -> tuple[list[_Fit], _Moments, np.ndarray]:
    """Every law under one convention of the arguments."""
    sigma, d = subject.levels, int(np.prod(subject.x.shape[1:]))
    m = _measure(subject, convention)
    if np.isnan(m.ff).all(axis=1).any():
        return [], m, np.full(len(sigma), np.nan)
    best = _best(m, sigma, d)
    weight = 1 / np.maximum(-best, _LEAST_GAIN)
    candidates = known_laws(sigma)
    if convention.code == "coordinates":
        candidates[0] = candidates[0]._replace(c=convention.factor)
    elif convention.code == "sigma_units":
        # With b x in the law, any f that is small at the wrong sigma would look right.
        candidates = [law for law in candidates if law.code in ("", "noise")]
    else:
        ff, fn = np.nanmean(m.ff, axis=1), np.nanmean(m.fn, axis=1)
        total = np.sum(weight * sigma**2 * ff)
        constant = np.sum(weight * sigma * fn) / total if total > 0 else 1.0
        candidates.append(Law("constant", _constant_message(constant, d), constant + 0 * sigma))
    fits = []
    for law in candidates:
        loss = weight[:, None] * _loss(m, sigma, d, law.c, law.b)
        shortfall = np.nanmean(loss, axis=1) - weight * best
        penalty = 0.1 * (bool(convention.code) + (law.code == "constant"))
        fits.append(_Fit(convention, law, np.clip(shortfall, 0, 3), loss, penalty))
    return fits, m, best


def _constant_message(constant: float, d: int) -> str:
    hint = ""
    if np.isfinite(constant) and constant > 0 and d > 3 and abs(np.log(constant / d)) < 0.3:
        hint = ", the number of coordinates: differentiate a sum over them, not a mean"
    return f"off by a constant factor: multiply by {constant:.3g}{hint}"


def _identity(
    subject: _Subject, measured: ScoreMeasurements
) -> tuple[list[Finding], ScoreMeasurements]:
    """Recognize the convention that the function is in, if it is not ours."""
    sigma, d = subject.levels, int(np.prod(subject.x.shape[1:]))
    as_is, *others = known_arguments(sigma)
    fits, m, best = _fits(subject, as_is)
    if not fits:
        return [], measured
    given = fits[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.nanmean(m.fn, axis=1) / (sigma * np.nanmean(m.ff, axis=1))
    measured = measured._replace(
        scale=tuple(scale.tolist()),
        denoising_loss=tuple((1 + np.nanmean(_loss(m, sigma, d, 1.0, 0.0), axis=1)).tolist()),
        attainable_loss=tuple((1 + best).tolist()),
    )
    if given.shortfall.mean() <= _WRONG:
        return [], measured
    for other in others:
        fits += _fits(subject, other)[0]
    fit = min(fits, key=lambda fit: fit.shortfall.sum() + fit.penalty)
    evidence = {
        "mean shortfall of the denoising loss": float(given.shortfall.mean()),
        "after mending": float(fit.shortfall.mean()),
    }
    if fit.shortfall.sum() <= given.shortfall.sum() / 4 and _better(subject, fit, given):
        conventions = [part for part in (fit.arguments, fit.law) if part.code]
        return [Finding(part.code, part.message, evidence) for part in conventions], measured
    if given.shortfall.mean() > 5 * _WRONG and np.sum(given.shortfall > _WRONG) > _NUM_LEVELS / 2:
        message = (
            "this does not denoise these samples, and no known convention explains it: check that "
            "x are samples of the data it was trained on, in its range and layout, and the weights"
        )
        return [Finding("not_the_score", message, evidence)], measured
    return [], measured


def _better(subject: _Subject, fit: _Fit, given: _Fit) -> bool:
    """Is the paired improvement above four standard errors? Pairs of one sample are one draw."""
    difference = np.nansum(given.loss - fit.loss, axis=0)
    rows = np.arange(len(difference)) % len(subject.x)
    per_sample = np.bincount(rows, difference) / np.bincount(rows)
    error = np.std(per_sample, ddof=1) / np.sqrt(len(per_sample))
    return bool(per_sample.mean() > 4 * error)
