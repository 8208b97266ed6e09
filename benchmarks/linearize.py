"""What a product with the Jacobian costs, in forwards of the network.

A linearization is made once and applied many times; the alternative is a fresh ``jax.jvp`` or
``jax.vjp`` for every product. The loops take twenty products one after the other inside one
program, as an eigen-solver does; times are per product.

A batch is linearized as one field, ``linearize(vmap(f), xs)``. ``vmapped-`` cases use
``vmap(linearize)`` instead and hand the batch of linearizations to another jitted function, which
copies the weights once per sample: the table shows what that costs.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import Case, Program
from memjax._core.keys import derive_key
from memjax.calculus.linearization import linearize
from memjax.networks.mlp import ResidualMLP
from memjax.networks.unet import UNet

PRODUCTS = 20
NETWORKS = {"mlp": (ResidualMLP(), (64,)), "unet": (UNet(channels=(16, 32)), (16, 16, 3))}
METHODS = (
    *("forward", "linearize", "jvp", "vjp", "fresh-jvp", "fresh-vjp", "jvp-loop", "vjp-loop"),
    *("vmapped-linearize", "vmapped-jvp"),
)
CHUNKS = (1, 16, 64, None)


def _setup(name: str, quick: bool, seed: int):
    """Network with random weights in every layer, samples, directions."""
    module, shape = NETWORKS[name]
    batch = 4 if quick else (64 if name == "mlp" else 8)
    x, v = jax.random.normal(derive_key(seed, "points"), (2, batch, *shape))
    weights = module.init(derive_key(seed, "weights"), x[0], jnp.zeros(()))
    # Last layers start at zero: make every one count.
    leaves, structure = jax.tree.flatten(weights)
    noise = [
        0.05 * jax.random.normal(derive_key(seed, "leaf", i), w.shape) for i, w in enumerate(leaves)
    ]
    weights = jax.tree.map(jnp.add, weights, jax.tree.unflatten(structure, noise))
    return module, weights, x, v


def _field(module, weights):
    return lambda x: module.apply(weights, x, jnp.zeros(()))


def _forward(module, weights, x):
    return jax.vmap(_field(module, weights))(x)


def _linearize(module, weights, x):
    return linearize(lambda x: _forward(module, weights, x), x)


def _linearize_vmapped(module, weights, x):
    return jax.vmap(lambda x: linearize(_field(module, weights), x))(x)


def _apply(kind, lin, v):
    return getattr(lin, kind)(v)


def _apply_vmapped(kind, lins, v):
    return jax.vmap(partial(_apply, kind))(lins, v)


def _loop(kind, lin, v):
    """Twenty products, each depending on the one before; the last one."""

    def step(v, _):
        out = _apply(kind, lin, v)
        size = jnp.sqrt(1 + jnp.sum(out**2, axis=range(1, out.ndim), keepdims=True))
        return v + out / size, out

    return jax.lax.scan(step, v, length=PRODUCTS)[1][-1]


def _fresh(kind, module, weights, x, v):
    def one(x, v):
        f = _field(module, weights)
        return jax.jvp(f, (x,), (v,))[1] if kind == "jvp" else jax.vjp(f, x)[1](v)[0]

    return jax.vmap(one)(x, v)


def _relative(got, expected) -> float:
    return float(jnp.max(jnp.abs(got - expected)) / jnp.max(jnp.abs(expected)))


def _dense_products(kind, length, module, weights, x, v):
    """The last of ``length`` products, with dense Jacobians in NumPy float64."""
    outs = []
    for point, start in zip(x, np.asarray(v, np.float64), strict=True):
        jacobian = jax.jit(jax.jacrev(_field(module, weights)))(point)
        a = np.asarray(jacobian, np.float64).reshape(start.size, start.size)
        a = a if kind == "jvp" else a.T
        w, out = start.reshape(-1), a @ start.reshape(-1)
        for _ in range(length - 1):
            w = w + out / np.sqrt(1 + np.sum(out**2))
            out = a @ w
        outs.append(out.reshape(start.shape))
    return np.stack(outs)


def _product_case(name: str, method: str, quick: bool, seed: int) -> Program:
    module, weights, x, v = _setup(name, quick, seed)
    forward = partial(_forward, module), (weights, x)
    parameters = {"network": name, "batch": len(x), "event_shape": list(x.shape[1:])}
    values = {
        "forward": _forward,
        "linearize": _linearize,
        "vmapped-linearize": _linearize_vmapped,
    }
    if method in values:
        alone = jnp.stack([module.apply(weights, row, jnp.zeros(())) for row in x[:2]])

        def check_value(out):
            return _relative((out if method == "forward" else out.value)[:2], alone)

        run = partial(values[method], module)
        return Program(run, (weights, x), check_value, 1e-4, forward, parameters=parameters)
    kind = "jvp" if "jvp" in method else "vjp"
    length = PRODUCTS if method.endswith("-loop") else 1
    if method.startswith("fresh-"):
        run, arguments = partial(_fresh, kind, module), (weights, x, v)
    else:
        make = _linearize_vmapped if method.startswith("vmapped-") else _linearize
        apply = {"vmapped-jvp": _apply_vmapped}.get(method, _apply if length == 1 else _loop)
        run, arguments = partial(apply, kind), (jax.jit(partial(make, module))(weights, x), v)

    def check(out):
        # The dense Jacobians of two samples are enough to tell a wrong product.
        dense = _dense_products(kind, length, module, weights, x[:2], v[:2])
        return _relative(out[:2], dense)

    return Program(run, arguments, check, 1e-3, forward, length, parameters)


def _trace_case(name: str, chunk_size: int | None, quick: bool, seed: int) -> Program:
    module, weights, x, _ = _setup(name, quick, seed)

    def run(weights, x):
        return jax.vmap(
            lambda x: linearize(_field(module, weights), x).trace(chunk_size=chunk_size)
        )(x)

    def check(out):
        dense = [jax.jacrev(_field(module, weights))(row).reshape(row.size, -1) for row in x[:2]]
        return _relative(out[:2], jnp.stack([jnp.trace(a) for a in dense]))

    return Program(
        run,
        (weights, x),
        check,
        1e-3,
        (partial(_forward, module), (weights, x)),
        parameters={
            "network": name,
            "batch": len(x),
            "event_shape": list(x.shape[1:]),
            "chunk_size": chunk_size,
        },
    )


def cases() -> list[Case]:
    """Every method on every network; traces of the MLP at several chunk sizes."""
    return [
        *(
            Case(f"linearize/{name}/{method}", partial(_product_case, name, method))
            for name in NETWORKS
            for method in METHODS
        ),
        *(
            Case(f"linearize/mlp/trace-chunk-{chunk or 'all'}", partial(_trace_case, "mlp", chunk))
            for chunk in CHUNKS
        ),
    ]
