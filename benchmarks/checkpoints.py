"""Published architectures: products in loops, and against PyTorch, on a network of 36 M weights.

``loop``: a product of the linearized network inside ``lax.scan`` against the same product called
from Python. ``torch``: forward, one jvp, one vjp, and twenty Lanczos products on the symmetric
part, linearization included, against diffusers' own network in PyTorch by each way that works.
``bridge``: the network brought over by ``memjax.from_torch`` against ours.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _diffusers, _torch
from benchmarks._ritz import both_ends, hessenberg, relative_error
from benchmarks.harness import Baseline, Case, Program, require
from memjax.calculus.linearization import linearize
from memjax.linalg.lanczos import eigsh

BATCH = 2
PRODUCTS = 20
PAIRS = 6
LOOP_TARGET = 1.3
TORCH_TARGET = 0.5
TOLERANCE = 1e-3


def _forward(network, points):
    return jax.vmap(lambda x: network(x, _diffusers.TIME))(points)


def _linearize(network, points):
    return linearize(partial(_forward, network), points)


def _product(kind, network, points, v):
    lin = _linearize(network, points)
    return getattr(lin, kind)(v)


def _scanned(kind, lin, v):
    # The length of v matters little, but twenty products of one network may overflow.
    def step(v, _):
        w = getattr(lin, kind)(v)
        return w / jnp.linalg.norm(w), None

    return jax.lax.scan(step, v, length=PRODUCTS)[0]


def _lanczos(network, points, starts):
    """Ritz values at both ends of every image's symmetrized Jacobian, after the whole budget."""

    def one(x, start):
        lin = linearize(lambda x: network(x, _diffusers.TIME), x)
        pairs = eigsh(
            lin.symmetric,
            x,
            jax.random.key(0),
            PAIRS,
            which="both",
            tol=0.0,
            max_products=PRODUCTS,
            basis_size=PRODUCTS,
            start=start,
        )
        return pairs.values

    return jax.vmap(one)(points, starts)


class _Setting:
    def __init__(self, quick: bool, seed: int):
        require("torch", "diffusers")
        self.pair = _diffusers.pair(quick, seed, BATCH)
        self.arguments = (self.pair.network, self.pair.points)
        self.lin = jax.jit(_linearize)(*self.arguments)
        self.products = {
            kind: jax.jit(lambda lin, v, kind=kind: getattr(lin, kind)(v))
            for kind in ("jvp", "vjp", "symmetric")
        }
        self.images = _torch.to_torch(self.pair.points)
        self.starts = _torch.to_torch(self.pair.directions)

    def program(self, run, arguments, expected, units=1, **baselines) -> Program:
        weights = jax.tree.leaves(self.pair.network)
        return Program(
            run,
            arguments,
            lambda out: relative_error(out, expected),
            TOLERANCE,
            (_forward, self.arguments),
            units,
            {
                "network_parameters": sum(w.size for w in weights),
                "batch": BATCH,
                "event_shape": list(self.pair.points.shape[1:]),
                "products": units,
            },
            baselines=baselines,
        )


def _last(t) -> np.ndarray:
    """A PyTorch tensor, channels last."""
    return t.detach().permute(0, 2, 3, 1).numpy()


def _loop(kind: str, quick: bool, seed: int) -> Program:
    setting = _Setting(quick, seed)
    v, product = setting.pair.directions, setting.products[kind]

    @jax.jit
    def unit(w):
        return w / jnp.linalg.norm(w)

    def outside(lin, v):
        for _ in range(PRODUCTS):
            v = unit(product(lin, v))
        return v

    transposed = {"jvp": "vjp", "vjp": "jvp"}[kind]
    u = np.asarray(v)[::-1]
    across = np.vdot(u, product(setting.lin, v))
    back = np.vdot(setting.products[transposed](setting.lin, jnp.asarray(u)), v)
    if not abs(across - back) < TOLERANCE * np.linalg.norm(product(setting.lin, v)):
        raise ValueError(f"<u, J v> and <J^T u, v> differ: {across:.6g} and {back:.6g}")
    expected = np.asarray(outside(setting.lin, v))
    baseline = Baseline(
        outside,
        (setting.lin, v),
        lambda out: relative_error(out, expected),
        target=LOOP_TARGET,
        jit=False,
    )
    return setting.program(
        partial(_scanned, kind),
        (setting.lin, v),
        expected,
        PRODUCTS,
        **{f"{PRODUCTS} calls": baseline},
    )


def _ways(setting: _Setting) -> dict:
    """The ways to products in PyTorch, each a function that evaluates and prepares them."""
    module, x = setting.pair.module, setting.images
    copied = _diffusers.patched(module)
    return {
        "PyTorch, backward of backward": lambda: _diffusers.Twice(module, x),
        "PyTorch, patched for forward mode": lambda: _diffusers.Forward(copied, x),
    }


def _torch_forward(quick: bool, seed: int) -> Program:
    setting = _Setting(quick, seed)
    module, x = setting.pair.module, setting.images

    def evaluate():
        import torch

        with torch.no_grad():
            return _last(module(x, _diffusers.TIME).sample)

    expected = evaluate()
    baseline = Baseline(evaluate, (), lambda out: relative_error(out, expected), jit=False)
    return setting.program(_forward, setting.arguments, expected, PyTorch=baseline)


def _torch_product(kind: str, quick: bool, seed: int) -> Program:
    """One product at a point where nothing has been evaluated."""
    setting = _Setting(quick, seed)
    expected = np.asarray(setting.products[kind](setting.lin, setting.pair.directions))
    baselines = {
        name: Baseline(
            lambda way=way: _last(getattr(way(), kind)(setting.starts)),
            (),
            lambda out: relative_error(out, expected),
            jit=False,
        )
        for name, way in _ways(setting).items()
    }
    arguments = (*setting.arguments, setting.pair.directions)
    return setting.program(partial(_product, kind), arguments, expected, **baselines)


def _torch_lanczos(quick: bool, seed: int) -> Program:
    setting = _Setting(quick, seed)
    product = partial(setting.products["symmetric"], setting.lin)
    projected = hessenberg(product, setting.pair.directions, PRODUCTS)
    expected = both_ends(np.linalg.eigvalsh((projected + projected.mT) / 2), PAIRS)

    def run(way):
        products = way()

        def symmetric(v):
            return (products.jvp(v) + products.vjp(v)) / 2

        return both_ends(_torch.ritz_values(symmetric, setting.starts, PRODUCTS), PAIRS)

    baselines = {
        name: Baseline(
            partial(run, way),
            (),
            lambda out: relative_error(out, expected),
            target=TORCH_TARGET,
            jit=False,
        )
        for name, way in _ways(setting).items()
    }
    arguments = (*setting.arguments, setting.pair.directions)
    return setting.program(_lanczos, arguments, expected, PRODUCTS, **baselines)


def _bridge(quick: bool, seed: int) -> Program:
    """Twenty products in a loop of the network as ``torch.export`` writes it down."""
    import torch

    from memjax.checkpoints.torch_bridge import torch_network

    setting = _Setting(quick, seed)
    kind, v = "jvp", setting.pair.directions
    example = (setting.images[:1], torch.tensor([_diffusers.TIME]))
    converted = torch_network(setting.pair.module, example)
    lin = jax.jit(_linearize)(converted, setting.pair.points)
    expected = np.asarray(jax.jit(partial(_scanned, kind))(setting.lin, v))
    native = Baseline(
        partial(_scanned, kind), (setting.lin, v), lambda out: relative_error(out, expected)
    )
    run = partial(_scanned, kind)
    return setting.program(run, (lin, v), expected, PRODUCTS, **{"UNet2DModel of memjax": native})


def cases() -> list[Case]:
    """Products in loops, products and Lanczos against PyTorch, the bridge."""
    return [
        *(Case(f"checkpoints/loop/{kind}", partial(_loop, kind)) for kind in ("jvp", "vjp")),
        Case("checkpoints/torch/forward", _torch_forward),
        *(
            Case(f"checkpoints/torch/{kind}", partial(_torch_product, kind))
            for kind in ("jvp", "vjp")
        ),
        Case("checkpoints/torch/lanczos", _torch_lanczos),
        Case("checkpoints/bridge/jvp-loop", _bridge),
    ]


def figure(records):
    """Times of ours and of what it is compared with, the ratio beside each."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    records = [record for record in records if record["status"] == "ok"]
    counts = [1 + len(record["baselines"]) for record in records]
    layout = ConstrainedLayoutEngine(rect=(0, 0.04, 1, 0.96))  # room for the caption
    drawn = Figure(figsize=(9, 1.2 + 0.34 * sum(counts) + 0.5 * len(counts)), layout=layout)
    axes = drawn.subplots(len(records), 1, squeeze=False, height_ratios=counts)[:, 0]
    for axis, record in zip(axes, records, strict=True):
        entries = {"memjax": record} | record["baselines"]
        if "bridge" in record["case"]:
            entries = {"memjax.from_torch": record} | record["baselines"]
        times = [1e3 * entry["seconds"]["minimum"] for entry in entries.values()]
        colors = ["#0072B2"] + ["0.75"] * (len(entries) - 1)
        axis.barh(range(len(times)), times, color=colors)
        for i, (entry, time) in enumerate(zip(entries.values(), times, strict=True)):
            ratio = f", memjax / this = {entry['ratio']:.2f}" if "ratio" in entry else ""
            axis.text(time, i, f"  {time:.0f} ms{ratio}", va="center", fontsize=8)
        axis.set_yticks(range(len(times)), list(entries), fontsize=8)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.45 * max(times))
        axis.tick_params(axis="x", labelsize=8)
        what = record["case"].split("/", 1)[1].replace("/", ", ")
        per = "a product of twenty" if record["seconds"]["products_per_run"] > 1 else "once"
        axis.set_title(f"{what} ({per})", fontsize=9, loc="left")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[-1].set_xlabel("milliseconds, minimum of repeats", fontsize=9)
    return drawn
