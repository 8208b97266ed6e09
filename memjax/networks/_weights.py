"""The door of published checkpoints: options read strictly, every named array used exactly.

A network of `diffusers` or `transformers` is two files: `config.json`, read against a table of
what we know of its class, and named arrays. Which arrays a network needs, and their shapes,
follows from the options; a network asks for them by name while it is traced. So a missing,
misshapen or superfluous array is found by tracing once, without allocating anything.
"""

import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from memjax._core.errors import InputError
from memjax._core.text import one_line

Leaf = Array | jax.ShapeDtypeStruct
"""A weight, or its shape and dtype alone."""

Table = TypeVar("Table", bound=tuple)

WAY_OUT = "memjax.from_torch takes any PyTorch module"


class Weights:
    """The arrays under a prefix, asked for by name and shape, in one dtype.

    ``weights / "down_blocks" / 0`` views those whose names begin with ``down_blocks.0.``, and
    ``weights("bias", 8)`` is the array ``<prefix>bias`` of shape [8].

    Args:
        arrays: by full name.
        dtype: of every array handed out.
        prefix: of the names in this view, with its final dot.
        used: collects the full names asked for.
    """

    def __init__(
        self,
        arrays: Mapping[str, Any],
        dtype: DTypeLike,
        prefix: str = "",
        used: set[str] | None = None,
    ):
        self._arrays, self._dtype, self._prefix = arrays, dtype, prefix
        self.used = set() if used is None else used

    def __truediv__(self, part: str | int) -> "Weights":
        return Weights(self._arrays, self._dtype, f"{self._prefix}{part}.", self.used)

    def __call__(self, name: str, *shape: int) -> Array:
        """The array of this name, which must have this shape and be floating point."""
        name = self._prefix + name
        if name not in self._arrays:
            raise InputError(f"weights: expected an array {name!r} of shape {list(shape)}, no such")
        array = self._arrays[name]
        if array.shape != shape:
            raise InputError(
                f"weights: expected {name!r} of shape {list(shape)}, got {list(array.shape)}"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise InputError(f"weights: expected {name!r} in floating point, got {array.dtype}")
        self.used.add(name)
        return array.astype(self._dtype)


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def current_names(weights: Mapping[str, Leaf]) -> dict[str, Leaf]:
    """The same arrays, attention layers under the names that diffusers gives them today."""

    def current(name):
        path = name.split(".")
        if "attentions" in path:
            path[-2:-1] = [_OLD_ATTENTION.get(part, part) for part in path[-2:-1]]
        return ".".join(path)

    return {current(name): leaf for name, leaf in weights.items()}


def check_all_used(model: str, weights: Mapping[str, Leaf], run: Callable[[Weights], Any]) -> None:
    """Trace a network on the shapes of its weights: each array it needs is there, and no other.

    Args:
        model: name of the class, for the message.
        weights: arrays or their shapes; nothing is computed.
        run: calls the network with the weights it is given, on inputs in float32.

    Raises:
        InputError: an array is missing, has another shape, is not floating point (quantized), or
            is used nowhere.
    """
    used: set[str] = set()
    jax.eval_shape(lambda arrays: run(Weights(arrays, jnp.float32, used=used)), dict(weights))
    unused = sorted(set(weights) - used)
    if unused:
        first = one_line(unused[0], limit=120)
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise InputError(
            f"weights: expected only what {model} with these options has, "
            f"got also {first!r}{more}; {WAY_OUT}"
        )


def read_options(table: type[Table], config: Mapping[str, Any], model: str) -> Table:
    """The options of a network from its configuration, where every one is known and supported.

    Args:
        table: a NamedTuple; its defaults are those of the class for options that old
            configurations lack, and its annotations say which values are supported: ``int`` a
            positive whole number, ``float`` any number, ``tuple`` a list, ``Literal`` these.
        config: names and values as in ``config.json``. Names that begin with an underscore, and
            unknown ones that are null, are left out.
        model: name of the class, for the message.

    Returns:
        The table filled, lists as tuples.

    Raises:
        InputError: an option is unknown, or its value not supported.
    """
    hints = get_type_hints(table)
    values = {}
    for name, value in config.items():
        if name in hints:
            values[name] = _frozen(value)
            if not _fits(values[name], hints[name]):
                raise InputError(
                    f"{name}: expected {_describe(hints[name])} for {model}, "
                    f"got {_shown(value)}; {WAY_OUT}"
                )
        elif not name.startswith("_") and value is not None:
            raise InputError(
                f"{one_line(name, limit=80)}: expected no such option for {model}, "
                f"got {_shown(value)}; {WAY_OUT}"
            )
    return table(**values)


def _shown(value: Any) -> str:
    return one_line(repr(value), limit=80)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is one of those that an annotation stands for."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is Literal:
        return any(
            value == arg and isinstance(value, bool) == isinstance(arg, bool) for arg in args
        )
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, args[0]) for item in value)
    if isinstance(value, bool) or hint in (bool, str, types.NoneType):
        return type(value) is hint
    if hint is int:
        return isinstance(value, int) and value > 0
    return isinstance(value, int | float)


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is Literal:
        return " or ".join(repr(arg) for arg in args)
    if origin is tuple:
        return f"a list of ({_describe(args[0])})"
    names = {int: "a positive whole number", float: "a number", bool: "True or False", str: "text"}
    return names.get(hint, "None")
