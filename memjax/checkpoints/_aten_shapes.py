"""PyTorch's operators that move, select and make entries, in JAX: one rule an operator."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from memjax.checkpoints._aten import storage_dtype, together


def _expand(x, size, implicit=False):
    """-1 keeps an axis; new axes come in front."""
    old = (1,) * (len(size) - x.ndim) + x.shape
    return jnp.broadcast_to(x, [b if a == -1 else a for a, b in zip(size, old, strict=True)])


def _squeeze(x, dims=None):
    if dims is None:
        return x.squeeze()
    dims = [dims] if isinstance(dims, int) else dims
    return x.squeeze(tuple(d % x.ndim for d in dims if x.shape[d] == 1)) if x.ndim else x


def _slices(x: Array, dim: int, *bounds: int | None) -> tuple[slice, ...]:
    return (slice(None),) * (dim % x.ndim) + (slice(*bounds),)


def _slice(x, dim, start, end, step):
    return x[_slices(x, dim, start, end, step)]


def _split(x, sizes, dim):
    """Into pieces of these sizes, or of this size."""
    if isinstance(sizes, int):
        sizes = [sizes] * (x.shape[dim] // sizes) + [x.shape[dim] % sizes]
    ends = [end for end in np.cumsum(sizes[:-1]) if end < x.shape[dim]]
    return tuple(jnp.split(x, ends, axis=dim))


def _roll(x, shifts, dims):
    if not dims:
        return jnp.roll(x, shifts[0])
    return jnp.roll(x, shifts, axis=tuple(dims))


def _pad(mode: str) -> Callable:
    """PyTorch lists the padding from the last axis on: low, high, low, high ..."""

    def apply(x: Array, padding: Sequence[int], value: Any = 0) -> Array:
        pairs = list(zip(padding[::2], padding[1::2], strict=True))[::-1]
        pairs = [(0, 0)] * (x.ndim - len(pairs)) + pairs
        for axis, (low, high) in enumerate(pairs):  # a negative padding cuts off
            x = x[_slices(x, axis, max(-low, 0), x.shape[axis] - max(-high, 0))]
        pairs = [(max(low, 0), max(high, 0)) for low, high in pairs]
        if mode == "constant":
            return jnp.pad(x, pairs, constant_values=jnp.asarray(value, x.dtype))
        return jnp.pad(x, pairs, mode=mode)

    return apply


def _index(x, indices):
    return x[tuple(slice(None) if i is None else i for i in indices)]


def _index_put(x, indices, values, accumulate):
    mask = indices[0]
    if len(indices) == 1 and mask.dtype == bool and not values.ndim:
        mask = mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
        return jnp.where(mask, x + values if accumulate else values, x)
    at = x.at[tuple(slice(None) if i is None else i for i in indices)]
    return at.add(values) if accumulate else at.set(values)


def _select(x, dim, index):
    return jnp.take(x, index % x.shape[dim], axis=dim)


def _one(x: Array, dim: int, index: int) -> tuple:
    return (slice(None),) * (dim % x.ndim) + (index % x.shape[dim],)


def _along(x: Array, dim: int, index: Array) -> tuple[Array, ...]:
    """Indices of x that follow ``index`` along one axis and count along the others."""
    grid = jnp.indices(index.shape, sparse=True)
    return tuple(index if axis == dim % x.ndim else i for axis, i in enumerate(grid))


def _gather(x, dim, index, sparse=False):
    return x[_along(x, dim, index)]


def _scatter(x, dim, index, values):
    if hasattr(values, "ndim") and values.ndim:
        values = values[tuple(slice(n) for n in index.shape)]
    return x.at[_along(x, dim, index)].set(values)


def _scatter_add(x, dim, index, values):
    return x.at[_along(x, dim, index)].add(values[tuple(slice(n) for n in index.shape)])


def _full(size, value, dtype=None):
    if dtype is None:
        dtype = {bool: "bool", int: "int64"}.get(type(value), "float32")
    return jnp.full(size, value, storage_dtype(dtype))


def _full_like(x, value, dtype=None):
    return jnp.full(x.shape, value, x.dtype if dtype is None else storage_dtype(dtype))


def _same(x, *_):
    return x


RULES: dict[str, Callable] = {
    "view": jnp.reshape,
    "_unsafe_view": jnp.reshape,
    "permute": jnp.transpose,
    "transpose": jnp.swapaxes,
    "t": jnp.transpose,
    "expand": _expand,
    "unsqueeze": lambda x, dim: jnp.expand_dims(x, dim),
    "squeeze": _squeeze,
    "alias": _same,
    "clone": _same,
    "detach": _same,
    "copy": lambda x, source: jnp.broadcast_to(source, x.shape).astype(x.dtype),
    "cat": lambda tensors, dim=0: jnp.concatenate(together(*tensors), axis=dim),
    "stack": lambda tensors, dim=0: jnp.stack(together(*tensors), axis=dim),
    "split": _split,
    "split_with_sizes": _split,
    "select": _select,
    "slice": _slice,
    "select_scatter": lambda x, part, dim, index: x.at[_one(x, dim, index)].set(part),
    "slice_scatter": lambda x, part, *where: x.at[_slices(x, *where)].set(part),
    "diagonal": lambda x, offset, dim1, dim2: jnp.diagonal(x, offset, dim1, dim2),
    "flip": jnp.flip,
    "roll": _roll,
    "repeat": jnp.tile,
    "tril": jnp.tril,
    "triu": jnp.triu,
    "constant_pad_nd": _pad("constant"),
    **{f"reflection_pad{n}d": _pad("reflect") for n in (1, 2, 3)},
    **{f"replication_pad{n}d": _pad("edge") for n in (1, 2, 3)},
    "index": _index,
    "_unsafe_index": _index,
    "index_put": _index_put,
    "index_select": lambda x, dim, index: jnp.take(x, index, axis=dim),
    "gather": _gather,
    "scatter": _scatter,
    "scatter_add": _scatter_add,
    "full": _full,
    "full_like": _full_like,
    "fill": lambda x, value: _full_like(x, value),
    "view_as_complex": lambda x: x[..., 0] + 1j * x[..., 1],
    "view_as_real": lambda x: jnp.stack([x.real, x.imag], axis=-1),
}
