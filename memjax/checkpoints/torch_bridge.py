"""The bridge for any PyTorch network: its exported graph, run by JAX."""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from memjax._core.errors import InputError, require
from memjax._core.text import one_line
from memjax.checkpoints import _aten, _aten_layers, _aten_shapes
from memjax.diffusion.adapters import Scalar
from memjax.diffusion.model import Model, from_callable, identity
from memjax.diffusion.schedule import Schedule

_RULES: dict[str, Callable] = {
    "getitem": operator.getitem,
    **_aten.RULES,
    **_aten_shapes.RULES,
    **_aten_layers.RULES,
}
# Where and how a tensor is stored, which is no concern of a rule.
_STORAGE = {"layout", "device", "pin_memory", "memory_format", "non_blocking", "generator"}
# Constants that are cheaper to make anew than to keep.
_REMADE = {"full", "expand"}


class _Value(NamedTuple):
    """An argument: the value at this place of the list of inputs, weights and earlier nodes."""

    index: int


class _Node(NamedTuple):
    """One operator. Shape and dtype are PyTorch's, where it returns one tensor."""

    rule: str
    args: tuple
    shape: tuple[int, ...] | None
    dtype: str | None


class _Graph:
    """A program without branches on inputs and weights, of plain Python values.

    Static, so it is compared and hashed whenever a compiled program is looked up: by its text, in
    which 1, 1.0 and True differ.
    """

    def __init__(self, weights: tuple[str, ...], nodes: tuple[_Node, ...], output: int):
        self.weights = weights
        self.nodes = nodes
        self.output = output
        self._text = repr((weights, nodes, output))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Graph) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __repr__(self) -> str:
        return f"<graph of {len(self.nodes)} operators>"

    def run(self, inputs: Sequence[Array], weights: dict[str, Array]) -> Array:
        values = [*inputs, *(weights[name] for name in self.weights)]
        # Promotion is done by the rules; broadcasting, by PyTorch's habit, unasked.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            for node in self.nodes:
                values.append(_evaluate(node, values))
        return values[self.output]


def _evaluate(node: _Node, values: list) -> Any:
    try:
        value = _RULES[node.rule](*_filled(node.args, values))
    except (TypeError, ValueError, NotImplementedError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"module: operator {node.rule} cannot be run here: {one_line(str(error), limit=200)}"
        ) from error
    if node.shape is not None:
        expected = (node.shape, _aten.storage_dtype(node.dtype))
        if (value.shape, value.dtype) != expected:
            raise InputError(
                f"module: operator {node.rule}: expected {expected[1]}{list(expected[0])} as from "
                f"PyTorch, got {value.dtype}{list(value.shape)}"
            )
    return value


def _filled(argument: Any, values: list) -> Any:
    if isinstance(argument, _Value):
        return values[argument.index]
    if isinstance(argument, tuple):
        return tuple(_filled(part, values) for part in argument)
    return argument


class _Signature(NamedTuple):
    """What a network takes, and how it differs from what the module takes."""

    event_shape: tuple[int, ...]
    time_shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    condition: Any
    condition_shapes: tuple[tuple[int, ...], ...]
    channels_first: bool
    learned_variance: bool


class TorchNetwork(eqx.Module):
    """The function of a PyTorch module as a network ``(x, t, condition) -> output`` of one sample.

    Computed in the dtypes of the module, whatever those of x and t; returned in the dtype of x.

    Attributes:
        weights: parameters, buffers and constants by their names in the module: the leaves.
        graph: the operators. Static.
        signature: shapes, dtypes and layout of the arguments. Static.
    """

    weights: dict[str, Array]
    graph: _Graph = eqx.field(static=True)
    signature: _Signature = eqx.field(static=True)

    def __call__(
        self, x: Float[Array, "..."], t: Scalar, condition: PyTree = None
    ) -> Float[Array, "..."]:
        """The module's output for one sample, channels last.

        Raises:
            InputError: x or the condition has other shapes than at conversion.
        """
        s = self.signature
        leaves, structure = jax.tree.flatten(condition)
        shapes = tuple(jnp.shape(leaf) for leaf in leaves)
        if x.shape != s.event_shape:
            raise InputError(f"x: expected shape {s.event_shape}, got {x.shape}")
        if (structure, shapes) != (s.condition, s.condition_shapes):
            raise InputError(
                f"condition: expected {s.condition} of shapes {s.condition_shapes}, "
                f"got {structure} of shapes {shapes}"
            )
        h = jnp.moveaxis(x, -1, 0) if s.channels_first else x
        t = jnp.asarray(t)
        if not jnp.issubdtype(s.dtypes[1], jnp.inexact):
            t = jnp.round(t)
        inputs = [h[None], t.reshape(s.time_shape), *(jnp.asarray(leaf)[None] for leaf in leaves)]
        inputs = [a.astype(_aten.storage_dtype(d)) for a, d in zip(inputs, s.dtypes, strict=True)]
        out = self.graph.run(inputs, self.weights)[0]
        out = jnp.moveaxis(out, 0, -1) if s.channels_first else out
        out = out[..., : x.shape[-1]] if s.learned_variance else out
        return out.astype(x.dtype)


def from_torch(
    module: Any,
    example_args: Sequence[Any],
    *,
    schedule: Schedule,
    prediction: str,
    data_std: float,
    argument_names: Sequence[str] | None = None,
    output: str | int | None = None,
    channels_first: bool = True,
    learned_variance: bool = False,
    null_condition: PyTree = None,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    encode: Callable = identity,
    decode: Callable = identity,
) -> Model:
    """Turn a PyTorch diffusion network into a model whose every derivative JAX can take.

    The module is run once by ``torch.export``, which writes down its operators; JAX then runs
    these, one rule an operator, with the weights as leaves of the model. PyTorch is needed for
    this conversion only.

    Choices that the module's Python code makes (branches on shapes, on arguments, on mode) are
    made once, as for ``example_args`` and in evaluation mode: dropout is off and batch statistics
    are the running ones. The module itself is left in the mode it was in. Operators on constants
    alone (tables of frequencies, masks) are computed by PyTorch, once, and kept.

    Args:
        module: the ``torch.nn.Module``, called as ``module(x, t, *condition)``. One whose call is
            more than a matter of ``argument_names`` and ``output`` goes into a small module of
            your own first.
        example_args: tensors ``(x, t, *condition)`` as the module takes them, with a batch axis
            of 1: x floating point, t of shape ``(1,)`` or ``()``. What follows may be trees of
            tensors (``None`` stands for itself). Only shapes and dtypes matter. The module
            should be in the dtype of x. With a t of whole numbers, times are rounded.
        schedule: the schedule the network was trained under.
        prediction: what it predicts, as for ``from_prediction``.
        data_std: standard deviation of the data in the network's space.
        argument_names: the module's names for the arguments in ``example_args``; by default they
            are passed by position.
        output: which part of the result is the prediction: a field, key or position. By default
            the tensor itself, or the field or key ``sample``, or the first of several.
        channels_first: x is [1, c, ...] for the module, and [..., c] here; if false, the axes are
            left as they are.
        learned_variance: the module predicts a variance too, in as many channels again; they are
            dropped.
        null_condition: what stands for "no condition", as for ``Model``: of the structure and
            shapes of the condition (the one argument after t, or the tuple of several), without
            the batch axis, its axes in the module's order.
        sigma_min: smallest noise level the score can be trusted at; by default the schedule's.
        sigma_max: largest.
        encode: image -> x, one sample. The identity in pixel space.
        decode: x -> image.

    Returns:
        The model, on samples of ``event_shape`` as in ``example_args``, channels last.

    Raises:
        MissingExtraError: PyTorch is not installed.
        InputError: ``torch.export`` cannot follow the module; it uses operators without a rule
            (all of them are named), keeps state between calls, or does not fit the other
            arguments.

    Accuracy: that of PyTorch, in the module's dtypes; convert ``module.double()`` under
    ``jax_enable_x64`` for double precision. Matrix products and convolutions are at full
    precision. Where PyTorch stops a gradient (``detach``), the derivative here is still that of
    the function. Cost: seconds, and a second copy of the weights. Call the model under ``jit``:
    each operator compiled on its own is slow.

    >>> model = mj.from_torch(  # doctest: +SKIP
    ...     UNet2DModel.from_pretrained(folder),
    ...     (torch.zeros(1, 3, 32, 32), torch.zeros(1)),
    ...     schedule=DiscreteVP(),
    ...     prediction="epsilon",
    ...     data_std=0.5,
    ... )
    >>> model.event_shape  # doctest: +SKIP
    (32, 32, 3)

    References:
        Paszke et al. (2019), PyTorch, arXiv:1912.01703.
    """
    network = torch_network(
        module,
        example_args,
        argument_names=argument_names,
        output=output,
        channels_first=channels_first,
        learned_variance=learned_variance,
    )
    s = network.signature
    condition = [
        jax.ShapeDtypeStruct(shape, _aten.storage_dtype(dtype))
        for shape, dtype in zip(s.condition_shapes, s.dtypes[2:], strict=True)
    ]
    return from_callable(
        network,
        schedule=schedule,
        prediction=prediction,
        event_shape=s.event_shape,
        data_std=data_std,
        null_condition=null_condition,
        example_condition=jax.tree.unflatten(s.condition, condition),
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        encode=encode,
        decode=decode,
    )


def torch_network(
    module: Any,
    example_args: Sequence[Any],
    *,
    argument_names: Sequence[str] | None = None,
    output: str | int | None = None,
    channels_first: bool = True,
    learned_variance: bool = False,
) -> TorchNetwork:
    """The network of ``from_torch`` alone, with the same arguments and errors."""
    torch = require("torch", "torch")
    if not isinstance(module, torch.nn.Module):
        raise InputError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    leaves, arguments = jax.tree.flatten(tuple(example_args))
    _check_examples(torch, leaves, example_args)
    if argument_names is not None and len(argument_names) != len(example_args):
        raise InputError(
            f"argument_names: expected {len(example_args)} as in example_args, "
            f"got {len(argument_names)}"
        )

    class Door(torch.nn.Module):
        """The module with one list of tensors going in and one tensor coming out."""

        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, *leaves):
            args = jax.tree.unflatten(arguments, leaves)
            named = {} if argument_names is None else dict(zip(argument_names, args, strict=True))
            result = self.module(**named) if named else self.module(*args)
            return _prediction(torch, result, output)

    graph, weights = _program(torch, _exported(torch, Door(), leaves))
    x, t, *rest = leaves
    condition = tuple(example_args)[2:]
    event_shape = tuple(x.shape[1:])
    signature = _Signature(
        event_shape=(*event_shape[1:], event_shape[0]) if channels_first else event_shape,
        time_shape=tuple(t.shape),
        dtypes=tuple(_name(leaf.dtype) for leaf in leaves),
        condition=jax.tree.structure(
            None if not condition else condition[0] if len(condition) == 1 else condition
        ),
        condition_shapes=tuple(tuple(leaf.shape[1:]) for leaf in rest),
        channels_first=channels_first,
        learned_variance=learned_variance,
    )
    return TorchNetwork(weights, graph, signature)


def _check_examples(torch: Any, leaves: list, example_args: Sequence[Any]):
    if len(example_args) < 2 or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
        kinds = ", ".join(type(leaf).__name__ for leaf in leaves)
        raise InputError(f"example_args: expected tensors (x, t, *condition), got {kinds}")
    x, t, *rest = leaves
    if not x.is_floating_point() or x.ndim < 2 or len(x) != 1:
        raise InputError(
            "example_args: expected x floating point with a batch axis of 1, "
            f"got {x.dtype}{list(x.shape)}"
        )
    if tuple(t.shape) not in ((), (1,)):
        raise InputError(f"example_args: expected t of shape () or (1,), got {tuple(t.shape)}")
    shapes = [list(leaf.shape) for leaf in rest if not leaf.ndim or len(leaf) != 1]
    if shapes:
        raise InputError(
            f"example_args: expected a batch axis of 1 in every condition, got {shapes[0]}"
        )


def _prediction(torch: Any, result: Any, output: str | int | None) -> Any:
    """The tensor that is the prediction, out of what a module returned."""
    if output is None and not isinstance(result, torch.Tensor):
        named = hasattr(result, "sample") or (isinstance(result, dict) and "sample" in result)
        output = "sample" if named else 0
    if isinstance(output, str):
        result = getattr(result, output) if hasattr(result, output) else result[output]
    elif output is not None:
        result = result[output]
    return result


def _exported(torch: Any, door: Any, leaves: list) -> Any:
    """The graph of the module in evaluation mode, without operators that act in place."""
    modes = {part: part.training for part in door.modules()}
    door.eval()
    try:
        # Without gradients: then the module's own ``no_grad`` blocks leave no trace.
        with torch.no_grad():
            exported = torch.export.export(door, tuple(leaves), strict=False)
            table = torch.export.default_decompositions()
            for target in [target for target in table if _rule(torch, target) is not None]:
                del table[target]
            return exported.run_decompositions(table)
    except Exception as error:
        text = one_line(str(error), limit=300)
        raise InputError(
            f"module: torch.export cannot follow it: {type(error).__name__}: {text}"
        ) from error
    finally:
        for part, mode in modes.items():
            part.training = mode


def _rule(torch: Any, target: Any) -> str | None:
    """The name of an operator's rule, if there is one."""
    if target is operator.getitem:
        return "getitem"
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name = target._schema.name.removeprefix("aten::")
    names = (f"{name}.{target._overloadname}", name)
    return next((name for name in names if name in _RULES), None)


def _program(torch: Any, exported: Any) -> tuple[_Graph, dict[str, Array]]:
    """The operators that the output depends on, and the arrays they start from."""
    signature = exported.graph_signature
    if signature.buffers_to_mutate:
        names = ", ".join(sorted(signature.buffers_to_mutate.values()))
        raise InputError(f"module: expected one without memory, got one that changes {names}")
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    nodes = list(exported.graph.nodes)
    kinds = {node: specs[node.name].kind.name for node in nodes if node.op == "placeholder"}
    results = zip(nodes[-1].args[0], signature.output_specs, strict=True)
    (output,) = (node for node, spec in results if spec.kind.name == "USER_OUTPUT")

    constants = _constants(torch, nodes, kinds)
    needed, folded, steps, arrays = {output}, set(), [], []
    for node in reversed(nodes):
        if node in needed and node in kinds:
            if kinds[node] != "USER_INPUT":
                arrays.append(node)
        elif node in needed and node in constants and _rule(torch, node.target) not in _REMADE:
            arrays.append(node)
            folded.add(node)
        elif node in needed:
            steps.append(node)
            needed.update(node.all_input_nodes)
        if node in folded:
            folded.update(node.all_input_nodes)
    unknown = {str(node.target) for node in steps if _rule(torch, node.target) is None}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise InputError(f"module: no rule for these operators of PyTorch: {names}")

    tensors = {**exported.state_dict, **exported.constants}
    values = {
        node: tensors[specs[node.name].target] for node in kinds if kinds[node] != "USER_INPUT"
    }
    for node in nodes:
        if node in folded and node not in kinds:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    names = {
        node: specs[node.name].target.removeprefix("module.")
        if node in kinds
        else f"constants.{node.name}"
        for node in reversed(arrays)
    }
    inputs = [node for node, kind in kinds.items() if kind == "USER_INPUT"]
    places = {node: _Value(i) for i, node in enumerate([*inputs, *names, *reversed(steps)])}
    program = tuple(_node(torch, node, places) for node in reversed(steps))
    graph = _Graph(tuple(names.values()), program, places[output].index)
    return graph, {name: _array(torch, values[node]) for node, name in names.items()}


def _constants(torch: Any, nodes: list, kinds: dict) -> set:
    """The nodes that depend on no input, no weight and no chance."""
    constants = {node for node, kind in kinds.items() if kind == "CONSTANT_TENSOR"}
    for node in nodes:
        if node.op == "call_function" and constants.issuperset(node.all_input_nodes):
            tags = getattr(node.target, "tags", ())
            constants |= set() if torch.Tag.nondeterministic_seeded in tags else {node}
    return constants


def _node(torch: Any, node: Any, places: dict) -> _Node:
    """One operator in plain Python values, its arguments in the order of its schema."""
    if node.target is operator.getitem:
        args = list(node.args)
    else:
        schema = node.target._schema.arguments
        given = {a.name: value for a, value in zip(schema, node.args, strict=False)} | node.kwargs
        args = [given.get(a.name, a.default_value) for a in schema if a.name not in _STORAGE]
    tensor = node.meta["val"]
    shape, dtype = None, None
    if isinstance(tensor, torch.Tensor):
        shape, dtype = tuple(int(n) for n in tensor.shape), _name(tensor.dtype)
    rule = _rule(torch, node.target)
    assert rule is not None
    return _Node(rule, tuple(_plain(torch, arg, places) for arg in args), shape, dtype)


def _plain(torch: Any, argument: Any, places: dict) -> Any:
    if isinstance(argument, torch.fx.Node):
        return places[argument]
    if isinstance(argument, list | tuple):
        return tuple(_plain(torch, part, places) for part in argument)
    if isinstance(argument, torch.dtype):
        return _name(argument)
    return argument


def _name(dtype: Any) -> str:
    """The name of a dtype of PyTorch, which is NumPy's."""
    return str(dtype).removeprefix("torch.")


def _array(torch: Any, tensor: Any) -> Array:
    """A copy of a tensor."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:  # which NumPy has not
        return jnp.array(tensor.float().numpy(), jnp.bfloat16)
    return jnp.array(tensor.numpy(), _aten.storage_dtype(_name(tensor.dtype)))
