"""Does the installed stack compute right numbers? Checked by measurement, in a few seconds.

Compilers have bugs. A release of jaxlib (0.10.2, on CPU) returned Jacobians that were wrong in the
first digit from some batch size upwards, silently, while the same program at a smaller batch
was right. No number of an audit is worth quoting on such a stack, so every audit starts here.
"""

import functools
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_D, _WIDTH, _DEPTH = 64, 256, 2
"""The network: 64 inputs, width 256, two residual blocks."""
_CHUNK = 32
"""Tangents per turn of the looped products, as in a chunked trace."""
_HIGHEST = jax.lax.Precision.HIGHEST
_FLOAT32_BITS = 23
_FORMATS = {23: "float32", 10: "TF32", 7: "bfloat16"}
"""Stored mantissa bits of the formats that matrix units round their inputs to."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "diffrax", "equinox", "numpy")


class Check(NamedTuple):
    """One family of products at one batch size, against NumPy in float64.

    Attributes:
        name: what was computed, with dtype and number of rows.
        ok: ``error <= tolerance``.
        error: largest absolute deviation over the largest absolute reference value; infinite
            where a result is not finite.
        tolerance: 200 machine epsilons for a product, half an epsilon for one rounding.
    """

    name: str
    ok: bool
    error: float
    tolerance: float


class BackendReport(NamedTuple):
    """What ``check_backend`` found; ``str(report)`` is the text that ``memjax doctor`` prints.

    Attributes:
        ok: every check passed and the release has no known defect.
        checks: the checks in the order they ran.
        message: the verdict, one line.
        versions: package name to version.
        devices: the devices of the default backend; the checks run on the first.
        settings: the precision settings that bear on the numbers.
    """

    ok: bool
    checks: tuple[Check, ...]
    message: str
    versions: dict[str, str]
    devices: tuple[str, ...]
    settings: dict[str, str]

    def __str__(self) -> str:
        """Versions, devices, settings, every check, verdict."""
        rows = [
            "versions  "
            + ", ".join(f"{name} {version}" for name, version in self.versions.items()),
            "devices   " + ", ".join(self.devices),
            *(f"{name}: {value}" for name, value in self.settings.items()),
            "checks    largest relative error against NumPy float64 (tolerance)",
        ]
        width = max((len(check.name) for check in self.checks), default=0)
        for check in self.checks:
            verdict = "ok  " if check.ok else "FAIL"
            rows.append(
                f"  {verdict}  {check.name:<{width}}  {check.error:.1e} ({check.tolerance:.1e})"
            )
        return "\n".join([*rows, ("ok: " if self.ok else "FAIL: ") + self.message])


def check_backend(*, seed: int = 0) -> BackendReport:
    """Check products of small networks on this installation against NumPy in float64.

    A residual MLP (64 inputs, width 256) and a small convolution are evaluated batched, their
    Jacobians vmapped in forward and reverse mode, looped (``lax.map``, ``scan``) and taken in
    chunks from one linearization, and their transposes applied, at batch sizes on both sides of
    those where a compiler changes its mind (64 rows, 4,096 tangent rows, 32,768 reduced rows).
    All checks ask for matmul precision "highest", as memjax's networks do. What the *default*
    precision delivers (TF32 and bfloat16 keep 10 and 7 mantissa bits of 23) is measured apart
    and reported in ``settings`` and ``message``: it costs foreign networks digits, but is no
    defect.

    Runs in float32, and in float64 as well when ``jax_enable_x64`` is on. Changes no setting.

    Args:
        seed: draws the weights and inputs.

    Returns:
        A ``BackendReport``. It is not ``ok`` if any product is wrong, if "highest" precision is
        not delivered, or if the release is known to be defective on this platform even where the
        shapes tried here happen to come out right. Nothing is raised for wrong numbers.

    Cost: about 3 seconds on two CPU cores, most of it compilation; 0.3 seconds when repeated.
    """
    versions = _versions()
    device = jnp.zeros(()).devices().pop()
    x64 = jnp.zeros(()).dtype == np.float64
    dtypes = (np.float32, np.float64) if x64 else (np.float32,)
    checks = []
    for dtype in dtypes:
        tolerance = 200 * float(np.finfo(dtype).eps)
        for name, got, expected in _comparisons(np.random.default_rng(seed), dtype):
            error = _error(got, expected)
            label = f"{name}, {np.dtype(dtype).name}"
            checks.append(Check(label, error <= tolerance, error, tolerance))

    bits = {unit: _mantissa_bits(program) for unit, program in _UNITS.items()}
    for (kind, precision), kept in bits.items():
        if precision == "highest":
            error = 2.0 ** -(kept + 1)
            tolerance = 2.0 ** -(_FLOAT32_BITS + 1)
            label = f"{kind}, rounding at precision 'highest'"
            checks.append(Check(label, error <= tolerance, error, tolerance))

    defect = _known_defect(versions, device.platform)
    ok = defect is None and all(check.ok for check in checks)
    return BackendReport(
        ok=ok,
        checks=tuple(checks),
        message=_message(tuple(checks), bits, defect, versions, device.platform),
        versions=versions,
        devices=tuple(f"{d.platform}:{d.id} ({d.device_kind})" for d in jax.devices()),
        settings={
            "jax_enable_x64": str(x64),
            "jax_default_matmul_precision": str(
                getattr(jax.config, "jax_default_matmul_precision")  # noqa: B009 (pyright)
            ),
            "precision of a matmul by default": _format(bits["matmul", "default"]),
            "precision of a convolution by default": _format(bits["convolution", "default"]),
        },
    )


# The residual MLP, in JAX and in NumPy --------------------------------------------------------


def _draw_mlp(rng: np.random.Generator, dtype: type) -> list[np.ndarray]:
    """Weights in, (U, V) of each block, out; entries of the Jacobian are of order one."""
    sizes = [(_D, _WIDTH), *[(_WIDTH, _WIDTH)] * (2 * _DEPTH), (_WIDTH, _D)]
    return [(rng.standard_normal(size) / size[0] ** 0.5).astype(dtype) for size in sizes]


def _mlp(weights, x):
    """Value at x: [d] or [n, d]."""
    h = jnp.dot(x, weights[0], precision=_HIGHEST)
    for u, v in zip(weights[1:-1:2], weights[2:-1:2], strict=True):
        h = h + jnp.dot(jnp.tanh(jnp.dot(h, u, precision=_HIGHEST)), v, precision=_HIGHEST)
    return jnp.dot(h, weights[-1], precision=_HIGHEST)


def _numpy_mlp(weights: list[np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values [n, d] and Jacobians [n, out, in] in float64, by the chain rule."""
    weights = [w.astype(np.float64) for w in weights]
    h = x.astype(np.float64) @ weights[0]
    tangents = np.tile(weights[0], (len(x), 1))  # one row per sample and input
    for u, v in zip(weights[1:-1:2], weights[2:-1:2], strict=True):
        a = np.tanh(h @ u)
        h = h + a @ v
        tangents = tangents + (tangents @ u) * np.repeat(1 - a**2, _D, axis=0) @ v
    return h @ weights[-1], (tangents @ weights[-1]).reshape(-1, _D, _D).transpose(0, 2, 1)


_batched = jax.jit(_mlp)


@jax.jit
def _jacobian_forward(weights, x):
    return jax.vmap(jax.jacfwd(lambda row: _mlp(weights, row)))(x)


@jax.jit
def _jacobian_reverse(weights, x):
    return jax.vmap(jax.jacrev(lambda row: _mlp(weights, row)))(x)


@jax.jit
def _jacobian_looped(weights, x):
    return jax.lax.map(jax.jacfwd(lambda row: _mlp(weights, row)), x)


@jax.jit
def _jacobian_chunked(weights, x):
    """Columns in chunks from one linearization, looped inside and vmapped outside."""
    basis = jnp.eye(_D, dtype=x.dtype).reshape(-1, _CHUNK, _D)

    def one(row):
        _, tangent_map = jax.linearize(lambda r: _mlp(weights, r), row)
        return jax.lax.map(jax.vmap(tangent_map), basis).reshape(_D, _D).T

    return jax.vmap(one)(x)


@jax.jit
def _normal_products(weights, x, v):
    """(J^T J / d)^3 v, by a scan of products and transposed products, vmapped."""

    def one(row, v):
        _, tangent_map = jax.linearize(lambda r: _mlp(weights, r), row)
        transposed = jax.linear_transpose(tangent_map, row)

        def step(v, _):
            return transposed(tangent_map(v))[0] / _D, None

        return jax.lax.scan(step, v, length=3)[0]

    return jax.vmap(one)(x, v)


@jax.jit
def _row_norms(matrix, x):
    """|A x|^2 of many short rows: a product and a reduction that compilers like to fuse."""
    return jax.vmap(lambda row: jnp.sum(jnp.dot(matrix, row, precision=_HIGHEST) ** 2))(x)


# The convolution, in JAX and in NumPy ----------------------------------------------------------


def _conv(x, kernel, precision=_HIGHEST):
    """3 x 3, same size, channels last, of one image [h, w, c] or a batch."""
    batch = x if x.ndim == 4 else x[None]
    out = jax.lax.conv_general_dilated(
        batch,
        kernel,
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )
    return out if x.ndim == 4 else out[0]


def _convnet(kernels, x):
    return x + _conv(jnp.tanh(_conv(x, kernels[0])), kernels[1])


def _convnet_products(kernels, x, v):
    """Value, J v and J^T v at one image, stacked."""
    value, tangent = jax.jvp(lambda y: _convnet(kernels, y), (x,), (v,))
    _, pullback = jax.vjp(lambda y: _convnet(kernels, y), x)
    return jnp.stack([value, tangent, *pullback(v)])


@jax.jit
def _convnet_vmapped(kernels, x, v):
    return jax.vmap(lambda a, b: _convnet_products(kernels, a, b))(x, v)


@jax.jit
def _convnet_looped(kernels, x, v):
    return jax.lax.map(lambda pair: _convnet_products(kernels, *pair), (x, v))


def _numpy_conv(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    n, h, w, channels = x.shape
    shifts = [padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)]
    columns = np.concatenate(shifts, axis=-1).reshape(-1, 9 * channels)
    return (columns @ kernel.reshape(9 * channels, -1)).reshape(n, h, w, -1)


def _numpy_convnet(kernels: list[np.ndarray], x: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Value, J v and J^T v in float64: [n, 3, h, w, c]."""
    k1, k2 = (k.astype(np.float64) for k in kernels)
    # The transpose of a convolution is one with the flipped kernel, its channels swapped.
    k1t, k2t = (k[::-1, ::-1].transpose(0, 1, 3, 2) for k in (k1, k2))
    x, v = x.astype(np.float64), v.astype(np.float64)
    a = np.tanh(_numpy_conv(x, k1))
    value = x + _numpy_conv(a, k2)
    tangent = v + _numpy_conv((1 - a**2) * _numpy_conv(v, k1), k2)
    transposed = v + _numpy_conv((1 - a**2) * _numpy_conv(v, k2t), k1t)
    return np.stack([value, tangent, transposed], axis=1)


# Comparisons -----------------------------------------------------------------------------------


def _compute(program: Callable[..., jax.Array], *args) -> np.ndarray:
    """Run one program on the device: every number under test passes through here."""
    return np.asarray(program(*args))


def _comparisons(
    rng: np.random.Generator, dtype: type
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (name, result of the stack, reference) one after the other."""
    weights = _draw_mlp(rng, dtype)
    x = rng.standard_normal((96, _D)).astype(dtype)
    v = rng.standard_normal((64, _D)).astype(dtype)
    # Rows are independent, so the reference of a smaller batch is a slice of the largest.
    value, jacobian = _numpy_mlp(weights, x)
    normal = jacobian.transpose(0, 2, 1) @ jacobian / _D
    for n in (1, 64, 96):
        yield f"batched network, batch of {n}", _compute(_batched, weights, x[:n]), value[:n]
    for n in (16, 64, 96):
        got = _compute(_jacobian_forward, weights, x[:n])
        yield f"vmapped Jacobian, forward mode, {n} rows", got, jacobian[:n]
    for n in (64, 96):
        got = _compute(_jacobian_reverse, weights, x[:n])
        yield f"vmapped Jacobian, transposed, {n} rows", got, jacobian[:n]
    got = _compute(_jacobian_looped, weights, x[:64])
    yield "looped Jacobian, 64 rows", got, jacobian[:64]
    got = _compute(_jacobian_chunked, weights, x[:64])
    yield "vmapped and looped Jacobian, 64 rows", got, jacobian[:64]
    expected = v[:, :, None]
    for _ in range(3):
        expected = normal[:64] @ expected
    got = _compute(_normal_products, weights, x[:64], v)
    yield "scanned products and transposes, 64 rows", got, expected[:, :, 0]

    kernels = [
        (rng.standard_normal((3, 3, *channels)) / (9 * channels[0]) ** 0.5).astype(dtype)
        for channels in ((3, 16), (16, 3))
    ]
    images, tangents = (rng.standard_normal((64, 8, 8, 3)).astype(dtype) for _ in range(2))
    expected = _numpy_convnet(kernels, images, tangents)
    for n in (8, 64):
        got = _compute(_convnet_vmapped, kernels, images[:n], tangents[:n])
        yield f"vmapped convolution and transpose, {n} images", got, expected[:n]
    got = _compute(_convnet_looped, kernels, images[:8], tangents[:8])
    yield "looped convolution and transpose, 8 images", got, expected[:8]

    matrix = rng.standard_normal((3, 3)).astype(dtype)
    rows = rng.standard_normal((40_000, 3)).astype(dtype)
    expected = np.sum((rows.astype(np.float64) @ matrix.T.astype(np.float64)) ** 2, axis=1)
    for n in (4_096, 20_000, 40_000):
        got = _compute(_row_norms, matrix, rows[:n])
        yield f"products reduced row by row, {n} rows", got, expected[:n]


def _error(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest deviation relative to the largest reference value; infinite if not comparable."""
    if got.shape != expected.shape or not np.all(np.isfinite(got)):
        return float("inf")
    return float(np.max(np.abs(got - expected)) / np.max(np.abs(expected)))


def _unit_matmul(a, b, precision):
    return jnp.dot(a, b, precision=precision)


def _unit_convolution(a, b, precision):
    kernel = jnp.zeros((3, 3, *b.shape), b.dtype).at[1, 1].set(b)
    return _conv(a[None], kernel, precision)[0]


_UNITS = {
    (kind, name): jax.jit(functools.partial(product, precision=precision))
    for kind, product in (("matmul", _unit_matmul), ("convolution", _unit_convolution))
    for name, precision in (("default", None), ("highest", _HIGHEST))
}
"""Products of a matrix with a second one, as a matmul and as a 1 x 1 convolution in 3 x 3."""


def _mantissa_bits(program: Callable[..., jax.Array]) -> int:
    """How many mantissa bits of their inputs a float32 product keeps.

    1 + 2^-k times one is exact in any format of at least k bits and rounds to something else
    in a smaller one, so the answer does not depend on how errors add up.
    """
    bits = np.arange(256) % _FLOAT32_BITS + 1
    values = (1 + 2.0**-bits).astype(np.float32)
    out = _compute(program, np.diag(values), np.eye(256, dtype=np.float32))
    lost = bits[np.diag(out) != values]
    return int(lost.min()) - 1 if lost.size else _FLOAT32_BITS


# Words -----------------------------------------------------------------------------------------


def _versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers pass through."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _known_defect(versions: dict[str, str], platform_name: str) -> str | None:
    """Name a defect that this release is known to have on this platform."""
    # The YNNPACK fusion of this one release returns wrong rows of batched products at sizes that
    # depend on the processor (jax-ml/jax#39103); an empty list of fusions turns it off.
    flags = os.environ.get("XLA_FLAGS", "").split()
    if (
        versions["jaxlib"] == "0.10.2"
        and platform_name == "cpu"
        and "--xla_cpu_experimental_ynn_fusion_type=" not in flags
    ):
        return (
            "jaxlib 0.10.2 computes wrong numbers on CPU (its YNNPACK fusion, jax-ml/jax#39103); "
            "install another release: pip install 'jax!=0.10.2' 'jaxlib!=0.10.2'"
        )
    return None


def _format(bits: int) -> str:
    return f"{_FORMATS.get(bits, 'reduced')} ({bits} mantissa bits)"


def _message(
    checks: tuple[Check, ...],
    bits: dict[tuple[str, str], int],
    defect: str | None,
    versions: dict[str, str],
    platform_name: str,
) -> str:
    """The verdict in one line."""
    failed = [check for check in checks if not check.ok]
    worst = max(failed, key=lambda check: check.error / check.tolerance, default=None)
    measured = "" if worst is None else f"{worst.name}: relative error {worst.error:.2g}"
    if defect is not None:
        return f"{defect}; {measured or 'the sizes tried here come out right, others do not'}"
    highest = min(kept for (_, precision), kept in bits.items() if precision == "highest")
    if highest < _FLOAT32_BITS:
        return (
            f"precision 'highest' is not delivered on {platform_name}, products are rounded to "
            f"{_format(highest)}; {measured}"
        )
    if worst is not None:
        return (
            f"jaxlib {versions['jaxlib']} computes wrong numbers on {platform_name}; {measured} "
            f"({len(failed)} of {len(checks)} checks failed); trust no result of this installation"
        )
    largest = max(check.error for check in checks)
    verdict = f"{len(checks)} checks passed, largest relative error {largest:.1e}"
    default = min(kept for (_, precision), kept in bits.items() if precision == "default")
    if default < _FLOAT32_BITS:
        return (
            f"{verdict}; products at default precision are rounded to {_format(default)}: "
            "a network that does not ask for precision 'highest' loses digits here"
        )
    return verdict
