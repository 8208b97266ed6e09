"""Networks of other libraries as callable pytrees: weights are leaves, the rest is static."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jaxtyping import Array, Float, PyTree

from memjax._core.errors import InputError

Scalar = float | int | Float[Array, ""]
"""A number known in advance, or an array that may be traced."""


class _Static(eqx.Module):
    """A callable whose arrays are leaves and whose other parts are hashed with the treedef."""

    arrays: PyTree
    rest: Any = eqx.field(static=True)

    def __call__(self, *args, **kwargs):
        return eqx.combine(self.arrays, self.rest)(*args, **kwargs)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def callable_pytree(function: Any, name: str = "function") -> Callable:
    """The same callable in a form that a jitted function can take as an argument.

    A pytree whose leaves are all arrays is returned as it is. In anything else (a plain function,
    an Equinox network with an activation function among its leaves) the arrays stay leaves, and
    the rest becomes static, so it must be hashable. Arrays that a plain function has closed over
    cannot be seen: they are constants of every program it is compiled into.

    Args:
        function: any callable.
        name: the argument's name in the error message.

    Returns:
        A callable with arrays as its only leaves.

    Raises:
        InputError: ``function`` is not callable.
    """
    if not callable(function):
        raise InputError(f"{name}: expected a callable, got {type(function).__name__}")
    if all(_is_array(leaf) for leaf in jax.tree.leaves(function)):
        return function
    return _Static(*eqx.partition(function, _is_array))


def _call_one(
    apply: Callable,
    x: Float[Array, "..."],
    t: Float[Array, ""],
    condition: PyTree,
    batched: bool,
) -> Float[Array, "..."]:
    """Call on one sample; a condition of ``None`` is not passed, a batch axis is put on and off."""
    args = (x, t) if condition is None else (x, t, condition)
    if not batched:
        return apply(*args)
    return apply(*jax.tree.map(lambda a: a[None], args))[0]


class LinenNetwork(eqx.Module):
    """A Flax Linen module and its variables as one network ``(x, t, condition) -> output``.

    Calls ``module.apply(variables, x, t, condition, **apply_kwargs)``, or without the condition
    where it is ``None``. The variables are the pytree's leaves; nothing is mutated, and no
    random stream is passed.

    Args:
        module: the Linen module (static; Linen modules hash by their fields).
        variables: what ``module.init`` returned, or trained variables of the same structure.
        batched: the module wants a leading batch axis on x, t and the condition. Static.
        **apply_kwargs: static keyword arguments of every call, such as ``train=False``.

    References:
        Heek et al. (2020), Flax: https://github.com/google/flax.
    """

    variables: PyTree
    module: Any = eqx.field(static=True)
    batched: bool = eqx.field(static=True)
    apply_kwargs: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def __init__(self, module: Any, variables: PyTree, *, batched: bool = False, **apply_kwargs):
        self.variables = variables
        self.module = module
        self.batched = batched
        self.apply_kwargs = tuple(sorted(apply_kwargs.items()))

    def __call__(
        self, x: Float[Array, "..."], t: Float[Array, ""], condition: PyTree = None
    ) -> Float[Array, "..."]:
        """The network's output for one sample."""

        def apply(*args):
            return self.module.apply(self.variables, *args, **dict(self.apply_kwargs))

        return _call_one(apply, x, t, condition, self.batched)


class NNXNetwork(eqx.Module):
    """A Flax NNX model as one network ``(x, t, condition) -> output``.

    The model is split once into its graph (static) and its state (leaves), and merged at each
    call: later changes to the model passed in are not seen, and changes a call makes to its state
    (random counters, running statistics) are dropped. Call ``model.eval()`` first where it
    matters.

    Args:
        model: the NNX module, called as ``model(x, t, condition, **call_kwargs)``, or without the
            condition where it is ``None``.
        batched: the model wants a leading batch axis on x, t and the condition. Static.
        **call_kwargs: static keyword arguments of every call.

    References:
        Heek et al. (2020), Flax: https://github.com/google/flax.
    """

    state: PyTree
    graph: Any = eqx.field(static=True)
    batched: bool = eqx.field(static=True)
    call_kwargs: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def __init__(self, model: Any, *, batched: bool = False, **call_kwargs):
        from flax import nnx  # half a second, paid by those who use NNX

        self.graph, state = nnx.split(model)
        self.state = jax.tree.map(lambda leaf: leaf, state)  # no longer the model's variables
        self.batched = batched
        self.call_kwargs = tuple(sorted(call_kwargs.items()))

    def __call__(
        self, x: Float[Array, "..."], t: Float[Array, ""], condition: PyTree = None
    ) -> Float[Array, "..."]:
        """The network's output for one sample."""
        from flax import nnx

        def apply(*args):
            return nnx.merge(self.graph, self.state, copy=True)(*args, **dict(self.call_kwargs))

        return _call_one(apply, x, t, condition, self.batched)
