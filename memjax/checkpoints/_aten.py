"""PyTorch's elementwise operators, reductions and matrix products in JAX: one rule an operator.

A rule gets the operator's arguments in the order of its schema, defaults filled in, without those
that say where and how a tensor is stored. Tensors are arrays, dtypes are names. A rule's result
has the dtype of PyTorch's promotion, which is not JAX's: arrays without axes, and Python numbers,
count only where their kind (bool, integer, real, complex) is a higher one.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

_KINDS = (np.bool_, np.integer, np.floating, np.complexfloating)
_OF_NUMBERS = {bool: "bool", int: "int64", float: "float32", complex: "complex64"}


def storage_dtype(name: Any) -> np.dtype:
    """The dtype of this name as JAX holds it: without ``jax_enable_x64`` half of 64 bits."""
    return jax.dtypes.canonicalize_dtype(name)


def _kind(dtype: np.dtype) -> int:
    return next(rank for rank, kind in enumerate(_KINDS) if jnp.issubdtype(dtype, kind))


def common_dtype(*values: Any) -> np.dtype:
    """The dtype in which PyTorch combines these arrays and Python numbers."""
    levels = [[], [], []]  # arrays with axes, arrays without, numbers
    for value in values:
        if type(value) in _OF_NUMBERS:
            levels[2].append(storage_dtype(_OF_NUMBERS[type(value)]))
        else:
            levels[0 if value.ndim else 1].append(value.dtype)
    dtypes = [functools.reduce(jnp.promote_types, level) for level in levels if level]
    best = dtypes[0]
    for dtype in dtypes[1:]:
        if _kind(dtype) > _kind(best):
            best = jnp.promote_types(best, dtype)
    return np.dtype(best)


def together(*values: Any) -> list[Array]:
    """The values as arrays of their common dtype."""
    dtype = common_dtype(*values)
    return [jnp.asarray(value, dtype) for value in values]


def real(*values: Any) -> list[Array]:
    """The same, integers as float32."""
    dtype = common_dtype(*values)
    if _kind(dtype) < 2:
        dtype = np.dtype("float32")
    return [jnp.asarray(value, dtype) for value in values]


def _on_common(function: Callable) -> Callable:
    return lambda *values: function(*together(*values))


def _on_real(function: Callable) -> Callable:
    return lambda *values: function(*real(*values))


def _add(x, y, alpha=1):
    x, y = together(x, y)
    return x + (y if alpha == 1 else alpha * y)


def _subtract(x, y, alpha=1):
    return _add(x, y, -alpha)


def _divide(x, y, rounding=None):
    if rounding is None:
        return jnp.divide(*real(x, y))
    x, y = together(x, y)
    if rounding == "floor":
        return jnp.floor_divide(x, y)
    return jnp.trunc(x / y).astype(x.dtype)


def _power(x, y):
    base, exponent = together(x, y)
    if type(y) in (int, float) and y == int(y) and abs(y) <= 16:
        return jax.lax.integer_pow(base, int(y))  # its derivative is right at zero
    return jnp.power(base, exponent)


def _clamp(x, low, high):
    """As PyTorch's: the derivative at a bound is that of x."""
    dtype = common_dtype(*(value for value in (x, low, high) if value is not None))
    x = x.astype(dtype)
    if low is not None:
        x = jnp.where(x < low, jnp.asarray(low, dtype), x)
    if high is not None:
        x = jnp.where(x > high, jnp.asarray(high, dtype), x)
    return x


def _softplus(x, beta, threshold):
    return jnp.where(x * beta > threshold, x, jax.nn.softplus(x * beta) / beta)


def _elu(x, alpha, scale, input_scale):
    negative = alpha * jnp.expm1(jnp.where(x > 0, 0, x) * input_scale)
    return scale * jnp.where(x > 0, x, negative)


def _round(x, decimals=0):
    return x if _kind(x.dtype) < 2 else jnp.round(x, decimals)


def _cast(x, dtype=None):
    return x if dtype is None else x.astype(storage_dtype(dtype))


def axes(x: Array, dims: Any) -> tuple[int, ...]:
    """Axes as a tuple: one, several, or all for ``None`` and none."""
    if isinstance(dims, int):
        return (dims % x.ndim,) if x.ndim else ()
    return tuple(d % x.ndim for d in dims) if dims else tuple(range(x.ndim))


def _summed(function: Callable) -> Callable:
    """A sum or product, in whole numbers 64 bits wide."""

    def apply(x, dims=None, keepdims=False, dtype=None):
        if dtype is None:
            dtype = x.dtype if _kind(x.dtype) > 1 else "int64"
        return function(x.astype(storage_dtype(dtype)), axis=axes(x, dims), keepdims=keepdims)

    return apply


def _mean(x, dims=None, keepdims=False, dtype=None):
    x = _cast(x, dtype)
    return jnp.mean(x, axis=axes(x, dims), keepdims=keepdims)


def _variance(x, dims, correction, keepdims):
    """The correction is a number, or whether there is one."""
    ddof = 1 if correction is None else correction
    count = np.prod([x.shape[d] for d in axes(x, dims)])
    centered = x - jnp.mean(x, axis=axes(x, dims), keepdims=True)
    return jnp.sum(centered**2, axis=axes(x, dims), keepdims=keepdims) / (count - ddof)


def _reduced(function: Callable) -> Callable:
    return lambda x, dims=None, keepdims=False: function(x, axis=axes(x, dims), keepdims=keepdims)


def _extreme_with_index(largest: bool) -> Callable:
    def apply(x, dim, keepdims=False):
        index = (jnp.argmax if largest else jnp.argmin)(x, axis=dim, keepdims=True)
        value = jnp.take_along_axis(x, index, axis=dim)
        index = index.astype(storage_dtype("int64"))
        return (value, index) if keepdims else (value.squeeze(dim), index.squeeze(dim))

    return apply


def _index_of(function: Callable) -> Callable:
    def apply(x, dim=None, keepdims=False):
        return function(x, axis=dim, keepdims=keepdims).astype(storage_dtype("int64"))

    return apply


def _cumulated(x, dim, dtype):
    if dtype is None:
        dtype = x.dtype if _kind(x.dtype) > 1 else "int64"
    return jnp.cumsum(x.astype(storage_dtype(dtype)), axis=dim)


def _softmax(function: Callable) -> Callable:
    return lambda x, dim, dtype: function(_cast(x, dtype), axis=dim)


def _vector_norm(x, order=2, dims=None, keepdims=False, dtype=None):
    x = _cast(x, dtype)
    return jnp.linalg.vector_norm(x, ord=order, axis=axes(x, dims), keepdims=keepdims)


matmul = functools.partial(jnp.matmul, precision="highest")


def _einsum(equation, tensors, path=None):
    return jnp.einsum(equation, *tensors, precision="highest")


def _add_product(x, a, b, beta=1, alpha=1):
    product = matmul(a, b)
    x, product = (y if c == 1 else c * y for c, y in ((beta, x), (alpha, product)))
    return x + product


RULES: dict[str, Callable] = {
    # two arguments
    "add": _add,
    "sub": _subtract,
    "mul": _on_common(jnp.multiply),
    "div": _divide,
    "pow": _power,
    "remainder": _on_common(jnp.remainder),
    "fmod": _on_common(jnp.fmod),
    "maximum": _on_common(jnp.maximum),
    "minimum": _on_common(jnp.minimum),
    "atan2": _on_real(jnp.arctan2),
    "eq": _on_common(jnp.equal),
    "ne": _on_common(jnp.not_equal),
    "lt": _on_common(jnp.less),
    "le": _on_common(jnp.less_equal),
    "gt": _on_common(jnp.greater),
    "ge": _on_common(jnp.greater_equal),
    "logical_and": jnp.logical_and,
    "logical_or": jnp.logical_or,
    "logical_xor": jnp.logical_xor,
    "logical_not": jnp.logical_not,
    "bitwise_and": _on_common(jnp.bitwise_and),
    "bitwise_or": _on_common(jnp.bitwise_or),
    "bitwise_xor": _on_common(jnp.bitwise_xor),
    "bitwise_not": jnp.bitwise_not,
    "_to_copy": _cast,
    "where": lambda condition, x, y: jnp.where(condition, *together(x, y)),
    "clamp": _clamp,
    # one argument
    "abs": jnp.abs,
    "neg": jnp.negative,
    "sign": jnp.sign,
    "ceil": jnp.ceil,
    "floor": jnp.floor,
    "round": _round,
    "trunc": jnp.trunc,
    "isnan": jnp.isnan,
    "isinf": jnp.isinf,
    "acos": _on_real(jnp.arccos),
    "acosh": _on_real(jnp.arccosh),
    "asin": _on_real(jnp.arcsin),
    "asinh": _on_real(jnp.arcsinh),
    "atan": _on_real(jnp.arctan),
    "atanh": _on_real(jnp.arctanh),
    "cos": _on_real(jnp.cos),
    "cosh": _on_real(jnp.cosh),
    "erf": _on_real(jax.scipy.special.erf),
    "exp": _on_real(jnp.exp),
    "exp2": _on_real(jnp.exp2),
    "expm1": _on_real(jnp.expm1),
    "log": _on_real(jnp.log),
    "log10": _on_real(jnp.log10),
    "log1p": _on_real(jnp.log1p),
    "log2": _on_real(jnp.log2),
    "reciprocal": _on_real(jnp.reciprocal),
    "rsqrt": _on_real(jax.lax.rsqrt),
    "sigmoid": _on_real(jax.nn.sigmoid),
    "sin": _on_real(jnp.sin),
    "sinh": _on_real(jnp.sinh),
    "sqrt": _on_real(jnp.sqrt),
    "tan": _on_real(jnp.tan),
    "tanh": _on_real(jnp.tanh),
    "elu": _elu,
    "gelu": lambda x, approximate: jax.nn.gelu(x, approximate=approximate == "tanh"),
    "hardtanh": _clamp,
    "leaky_relu": lambda x, slope: jnp.where(x > 0, x, slope * x),
    "mish": lambda x: x * jnp.tanh(jax.nn.softplus(x)),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "softplus": _softplus,
    # along axes
    "sum": _summed(jnp.sum),
    "sum.default": lambda x, dtype: RULES["sum"](x, None, False, dtype),
    "prod.dim_int": _summed(jnp.prod),
    "prod.default": lambda x, dtype: RULES["prod.dim_int"](x, None, False, dtype),
    "mean": _mean,
    "mean.default": lambda x, dtype: _mean(x, dtype=dtype),
    "var.dim": _variance,
    "var.correction": _variance,
    "amax": _reduced(jnp.max),
    "amin": _reduced(jnp.min),
    "any": _reduced(jnp.any),
    "max.default": jnp.max,
    "max.dim": _extreme_with_index(True),
    "min.default": jnp.min,
    "min.dim": _extreme_with_index(False),
    "argmax": _index_of(jnp.argmax),
    "argmin": _index_of(jnp.argmin),
    "cumsum": _cumulated,
    "softmax.int": _softmax(jax.nn.softmax),
    "log_softmax.int": _softmax(jax.nn.log_softmax),
    "linalg_vector_norm": _vector_norm,
    # products
    "mm": matmul,
    "mv": matmul,
    "dot": matmul,
    "bmm": matmul,
    "matmul": matmul,
    "addmm": _add_product,
    "baddbmm": _add_product,
    "einsum": _einsum,
}
