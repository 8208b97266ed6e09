"""Changes of low rank to a network that stays as it is, and conditions that are learned."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path, tree_map_with_path
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Shaped

from memjax._core.errors import InputError
from memjax._core.keys import derive_key


class LowRank(NamedTuple):
    """What is added to an array, as a product: ``left @ right`` in the array's shape.

    Attributes:
        left: one row per row of the array as a matrix.
        right: one column per column of it.
    """

    left: Float[Array, "m r"]
    right: Float[Array, "r n"]


KernelLayout = Literal["HWIO", "OIHW"]
"""Axes of leaves with four axes called ``weight``: in memjax's own networks, or in PyTorch's."""

Changes = dict[str, LowRank | Array]
"""By a leaf's path (``jax.tree_util.keystr``): what is added to it, or stands in its place."""


def low_rank_adapters(
    network: PyTree,
    rank: int,
    *,
    key: int | PRNGKeyArray,
    kernel_layout: KernelLayout = "HWIO",
) -> dict[str, LowRank]:
    """Low-rank changes, zero at first, for the matrices and kernels of a network.

        W + s A B,    A [m, r],  B [r, n],   r = min(rank, m, n)

    The leaves called ``...kernel`` (Flax) and ``...weight`` (PyTorch, Equinox) are adapted, where
    they are floating point and have two or four axes. A kernel is taken as the matrix
    [height width in, out], whose change of rank r is a convolution to r channels followed by a
    dense layer for each pixel. The factor on the side of the inputs is normal with variance
    1/(number of inputs), the other one zero, so that at first the network is what it was.

    Args:
        network: pytree of weights or of their shapes, such as a callable network.
        rank: at least 1.
        key: a seed or a typed key.
        kernel_layout: axes of leaves with four axes called ``weight``: ``"HWIO"`` in memjax's own
            networks, ``"OIHW"`` in PyTorch and Equinox. Those called ``kernel`` are ``"HWIO"``.

    Returns:
        A ``LowRank`` in float32 by the path of every leaf adapted, for ``merge_adapters``.

    Raises:
        InputError: the rank is not positive, or there is no such leaf.

    Cost: r (m + n) numbers in place of m n; tables of embeddings, kernels with three axes,
    biases and normalizations stay as they are.

    >>> import jax.numpy as jnp
    >>> network = {"dense": {"kernel": jnp.ones((3, 8)), "bias": jnp.zeros(8)}}
    >>> adapters = low_rank_adapters(network, 2, key=0)
    >>> {name: [factor.shape for factor in change] for name, change in adapters.items()}
    {"['dense']['kernel']": [(3, 2), (2, 8)]}

    References:
        Hu et al. (2022), LoRA, arXiv:2106.09685, section 4.1 (which draws A with another
        constant variance); Yeh et al. (2024), arXiv:2309.14859, section 3.1 (kernels).
    """
    if rank < 1:
        raise InputError(f"rank: expected at least 1, got {rank}")
    adapters = {}
    for path, leaf in tree_flatten_with_path(network)[0]:
        name = keystr(path)
        matrix = _matrix(name, leaf, kernel_layout)
        if matrix is None:
            continue
        rows, columns, inputs_first = matrix
        r = min(rank, rows, columns)
        inputs = rows if inputs_first else columns
        shape = (rows, r) if inputs_first else (r, columns)
        draw = jax.random.normal(derive_key(key, name), shape, jnp.float32) / inputs**0.5
        if inputs_first:
            adapters[name] = LowRank(draw, jnp.zeros((r, columns), jnp.float32))
        else:
            adapters[name] = LowRank(jnp.zeros((rows, r), jnp.float32), draw)
    if not adapters:
        raise InputError(
            "network: expected matrices or kernels among the leaves called kernel or weight, "
            "found none"
        )
    return adapters


def _matrix(
    name: str, leaf: Array | jax.ShapeDtypeStruct, layout: str
) -> tuple[int, int, bool] | None:
    """Rows and columns of a leaf as a matrix, and whether its rows belong to the inputs."""
    name = name.rstrip("']")
    flax = name.endswith("kernel")
    if not (flax or name.endswith("weight")) or leaf.ndim not in (2, 4):
        return None
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return None
    inputs_first = flax or (leaf.ndim == 4 and layout == "HWIO")
    rows = leaf.size // leaf.shape[-1] if inputs_first else leaf.shape[0]
    return rows, leaf.size // rows, inputs_first


def merge_adapters(
    network: PyTree, changes: Mapping[str, LowRank | Array], scale: float | int = 1.0
) -> PyTree:
    """The network with its changes in it: a plain network again, of the same structure.

        W + scale A B    for a ``LowRank``,    the array itself for an array

    Args:
        network: pytree of weights.
        changes: by the path of a leaf, see ``low_rank_adapters``.
        scale: of the products.

    Returns:
        A network like ``network``. A changed leaf is in float32 at least: half precision would
        swallow small changes. Differentiable in the changes.

    Raises:
        InputError: a change of no leaf.

    Cost: 2 m n r operations a leaf, once for a batch that shares the network.

    >>> import jax.numpy as jnp
    >>> change = LowRank(jnp.array([[1.0], [2.0]]), jnp.array([[3.0, 4.0]]))
    >>> merge_adapters({"weight": jnp.ones((2, 2))}, {"['weight']": change}, 0.5)["weight"].tolist()
    [[2.5, 3.0], [4.0, 5.0]]
    """
    unused = set(changes)

    def merged(path, leaf):
        name = keystr(path)
        if name not in changes:
            return leaf
        unused.remove(name)
        change = changes[name]
        if not isinstance(change, LowRank):
            return change
        product = jnp.matmul(change.left, change.right, precision="highest")
        dtype = max(leaf.dtype, product.dtype, key=lambda dtype: dtype.itemsize)
        return leaf.astype(dtype) + scale * product.reshape(leaf.shape).astype(dtype)

    out = tree_map_with_path(merged, network)
    if unused:
        raise InputError(f"changes: expected paths of the network's leaves, got {min(unused)}")
    return out


class LearnedConditions(eqx.Module):
    """A network whose conditions are learned: label i stands for row i of a table of them.

    Called as ``network(x, t, label)``, with a label in 0..n or ``None`` for the last row, which
    stands for no condition. The table is a leaf like the weights.

    Attributes:
        network: callable pytree ``(x, t, condition) -> output`` on one sample.
        table: a condition whose arrays have a leading axis of n + 1.

    References:
        Gal et al. (2023), Textual Inversion, arXiv:2208.01618 (one condition that is learned).
    """

    network: Callable
    table: PyTree

    @staticmethod
    def all_equal(network: Callable, condition: PyTree, num_labels: int) -> "LearnedConditions":
        """The network with one condition under every label, and for none."""

        def repeated(leaf):
            return jnp.tile(jnp.asarray(leaf)[None], (num_labels + 1,) + (1,) * jnp.ndim(leaf))

        return LearnedConditions(network, jax.tree.map(repeated, condition))

    def __call__(
        self,
        x: Float[Array, "..."],
        t: Shaped[Array, ""] | float | int,
        condition: Int[Array, ""] | None = None,
    ) -> Float[Array, "..."]:
        """The network's output under a label; NaN for one that is not in the table."""
        label = jnp.int32(-1) if condition is None else condition
        rows = jax.tree.map(lambda leaf: jnp.take(leaf, label, axis=0, mode="fill"), self.table)
        return self.network(x, t, rows)
