"""The convolution of the networks, its products, and what they cost inside a loop.

Against XLA's own (``jax.lax.conv_general_dilated`` and the derivatives JAX asks of it) and against
shifted slices with matrix products. ``-loop`` runs four products one after the other in one
``scan``, as training and eigen-solvers do; times are per product.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, Program
from memjax._core.keys import derive_key
from memjax.networks.convolution import conv

LOOP = 4
SIZES = {
    "16px-32ch": ((64, 16, 16, 32), 32, 1),
    "32px-32ch-stride2": ((16, 32, 32, 32), 64, 2),
    "32px-rgb": ((16, 32, 32, 3), 64, 1),
}
PRODUCTS = ("forward", "input-gradient", "kernel-gradient")


def _ours(x, kernel, stride):
    return conv(x, kernel, stride=stride)


def _xla(x, kernel, stride):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest",
    )


def _windows(x, stride):
    """Slices of the zero-padded images that the nine taps of a "SAME" kernel meet."""
    low = 1 if stride == 1 else 0
    padded = np.pad if isinstance(x, np.ndarray) else jnp.pad
    padded = padded(x, ((0, 0), (low, 1), (low, 1), (0, 0)))
    height, width = (size // stride for size in x.shape[1:3])
    return {
        (i, j): padded[:, i : i + stride * height : stride, j : j + stride * width : stride]
        for i in range(3)
        for j in range(3)
    }


def _slices(x, kernel, stride):
    return sum(
        jnp.matmul(window, kernel[tap], precision="highest")
        for tap, window in _windows(x, stride).items()
    )


METHODS = {"memjax": _ours, "xla": _xla, "slices": _slices}


def _product(method, product, stride, x, kernel, dy):
    f = partial(METHODS[method], stride=stride)
    if product == "forward":
        return f(x, kernel)
    if product == "input-gradient":
        return jax.vjp(lambda x: f(x, kernel), x)[1](dy)[0]
    return jax.vjp(lambda kernel: f(x, kernel), kernel)[1](dy)[0]


def _loop(method, product, stride, x, kernel, dy):
    """Four products, each with arguments that depend on the one before; the last one."""

    def step(shift, _):
        out = _product(method, product, stride, x + shift, kernel + shift, dy + shift)
        return 1e-20 * out.reshape(-1)[0], out

    return jax.lax.scan(step, jnp.float32(0), length=LOOP)[1][-1]


def _reference(product, stride, x, kernel, dy):
    """The sums over taps in NumPy float64."""
    x, kernel, dy = (np.asarray(a, np.float64) for a in (x, kernel, dy))
    windows = _windows(x, stride)
    if product == "forward":
        return sum(window @ kernel[tap] for tap, window in windows.items())
    if product == "kernel-gradient":
        out = np.empty_like(kernel)
        for tap, window in windows.items():
            out[tap] = np.einsum("nhwc,nhwk->ck", window, dy, optimize=True)
        return out
    # The windows are views of one padded array: what is added to them is the gradient of it.
    gradient = _windows(np.zeros_like(x), stride)
    for tap, window in gradient.items():
        window += dy @ kernel[tap].T
    low = 1 if stride == 1 else 0
    return gradient[0, 0].base[:, low:-1, low:-1]


def _make(method: str, product: str, loop: bool, size: str, quick: bool, seed: int) -> Program:
    shape, features, stride = SIZES[size]
    shape = (2, *shape[1:]) if quick else shape
    x = jax.random.normal(derive_key(seed, "x"), shape, jnp.float32)
    kernel = 0.1 * jax.random.normal(
        derive_key(seed, "kernel"), (3, 3, shape[-1], features), jnp.float32
    )
    out = (shape[0], shape[1] // stride, shape[2] // stride, features)
    arguments = x, kernel, jax.random.normal(derive_key(seed, "dy"), out, jnp.float32)

    def check(found):
        expected = _reference(product, stride, *arguments)
        return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))

    return Program(
        partial(_loop if loop else _product, method, product, stride),
        arguments,
        check,
        1e-4,
        (partial(_product, "xla", "forward", stride), arguments),
        LOOP if loop else 1,
        {"method": method, "product": product, "x": list(shape), "kernel": list(kernel.shape)},
    )


def cases() -> list[Case]:
    """Every method, product and size, called alone and in a loop."""
    return [
        Case(
            f"convolution/{size}/{product}{'-loop' if loop else ''}/{method}",
            partial(_make, method, product, loop, size),
        )
        for size in SIZES
        for product in PRODUCTS
        for loop in (False, True)
        for method in METHODS
    ]
