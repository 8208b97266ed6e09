"""Models of PyTorch modules: the door, the transformations, what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

from memjax._core.errors import InputError  # noqa: E402
from memjax.calculus.linearization import linearize  # noqa: E402
from memjax.checkpoints.torch_bridge import from_torch, torch_network  # noqa: E402
from memjax.diffusion.combine import at  # noqa: E402
from memjax.diffusion.conformance import check_score  # noqa: E402
from memjax.diffusion.schedule import DiscreteVP, FlowMatching  # noqa: E402

pytestmark = pytest.mark.usefixtures("bridged")


def randomized(module, seed=0):
    """Weights of ordinary size, everywhere: fresh networks are zero in places."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        fan = p[0].numel() if p.ndim > 1 else 4
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) / fan**0.5
        p.data += float(p.ndim == 1)
    return module


def last(tensor):
    """One image, channels last, as NumPy has it."""
    return tensor.detach()[0].movedim(0, -1).numpy()


# The model ---------------------------------------------------------------------------------------


class Small(torch.nn.Module):
    """Linear layers with what matters at the door: dropout, a buffer, a tied table, a tuple."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(48, 40)
        self.dropout = torch.nn.Dropout(0.5)
        self.last = torch.nn.Linear(40, 48)
        self.register_buffer("scale", torch.full((40,), 0.7))

    def forward(self, x, t, condition=None):
        h = self.first(x.flatten(1)) + t[:, None] / 100
        if condition is not None:
            h = h + condition["a"] - condition["b"].to(h.dtype)[:, None]
        h = self.dropout(h).tanh_() * self.scale * torch.arange(40).div(40.0).cos()
        return self.last(h).reshape(x.shape), h


X, T = torch.zeros(1, 3, 4, 4), torch.zeros(1)
FACTS = {"schedule": DiscreteVP(), "prediction": "epsilon", "data_std": 0.5}
CONDITION = {"a": torch.zeros(1, 40), "b": torch.zeros(1, dtype=torch.int64)}
SOME = {"a": np.linspace(-1, 1, 40, dtype=np.float32), "b": np.int32(1)}


@pytest.fixture(scope="module")
def small():
    return randomized(Small())


@pytest.fixture(scope="module")
def model(small):
    """The module is in training mode, with dropout."""
    assert small.training
    return from_torch(small, (X, T), **FACTS)


def test_the_model_is_the_modules_in_evaluation(small, model):
    assert model.event_shape == (4, 4, 3)
    assert (model.sigma_min, model.sigma_max) == (DiscreteVP().sigma_min, DiscreteVP().sigma_max)
    assert small.training
    assert small.dropout.training  # left as it was
    x = np.random.default_rng(0).normal(size=(4, 4, 3)).astype(np.float32)
    schedule, sigma = DiscreteVP(), 0.8
    alpha, t = float(schedule.alpha_at(sigma)), float(schedule.time(sigma))
    with torch.no_grad():
        image = torch.tensor(np.moveaxis(alpha * x, -1, 0)[None])
        noise = last(small.eval()(image, torch.tensor([t]))[0])
    small.train()
    score = model(jnp.asarray(x), sigma)
    np.testing.assert_allclose(score, -noise / sigma, rtol=1e-5, atol=1e-5)


def test_every_transformation_agrees(model):
    """jit, vmap, scan, linearize and its transpose, second derivatives, against loops of jvps."""
    xs, vs = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 4, 3)), jnp.float32)

    @jax.jit
    def run(model, xs, vs):
        field = at(model, 0.5)

        def product(x, v):
            return jax.jvp(field, (x,), (v,))[1]

        looped = jnp.stack([product(x, v) for x, v in zip(xs, vs, strict=True)])
        lin = linearize(field, xs[0])
        linear = jnp.stack([lin.jvp(v) for v in vs])
        second = jax.jvp(lambda x: jax.vjp(field, x)[1](vs[1])[0], (xs[0],), (vs[0],))[1]
        reverse = jax.vjp(lambda x: product(x, vs[0]), xs[0])[1](vs[1])[0]
        return {
            "vmap": (jax.vmap(product)(xs, vs), looped),
            "scan": (jax.lax.map(lambda both: product(*both), (xs, vs)), looped),
            "linearize": (linear, jax.vmap(lambda v: product(xs[0], v))(vs)),
            "adjoint": (jnp.vdot(vs[1], linear[0]), jnp.vdot(lin.vjp(vs[1]), vs[0])),
            "second": (second, reverse),
        }

    for name, (found, expected) in run(model, xs, vs).items():
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(
        model(xs[0], 0.5), jax.jit(lambda f, x: f(x))(at(model, 0.5), xs[0]), rtol=1e-5
    )


def largest_constant(lowered):
    """Entries of the largest constant in a lowered program that is not one repeated value."""
    text = lowered.as_text()
    assert "elided" not in text
    shapes = re.findall(r'dense<["\[][^>]*>\s*:\s*tensor<((?:\d+x)+)\w+>', text)
    return max(
        (int(np.prod([int(n) for n in s.rstrip("x").split("x")])) for s in shapes), default=0
    )


def test_weights_are_arguments_under_their_own_names(small):
    network = torch_network(small, (X, T))
    named = {k: tuple(v.shape) for k, v in small.state_dict().items()}
    constants = {k: v.shape for k, v in network.weights.items() if k.startswith("constants.")}
    assert list(constants.values()) == [(40,)]  # the cosines
    assert {k: v.shape for k, v in network.weights.items()} == {**named, **constants}
    x, t = jnp.zeros((4, 4, 3)), jnp.float32(1.0)

    @jax.jit
    def run(network, x):
        return jax.vjp(lambda x: network(x, t), x)[1](x)[0]

    assert largest_constant(run.lower(network, x)) < 40
    assert largest_constant(jax.jit(lambda x: network(x, t)).lower(x)) >= 40 * 48


def test_weights_do_not_follow_the_module():
    module = randomized(Small())
    network = torch_network(module, (X, T))
    before = np.array(network.weights["last.bias"])
    with torch.no_grad():
        module.last.bias.add_(1.0)
    np.testing.assert_array_equal(network.weights["last.bias"], before)


def test_one_program_for_all_weights(small):
    """Converted twice, the graph is the same static value; other numbers in it are not."""
    graphs = [torch_network(small, (X, T)).graph for _ in range(2)]
    assert graphs[0] == graphs[1]
    assert hash(graphs[0]) == hash(graphs[1])

    class Scaled(torch.nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self, x, t):
            return x * self.scale

    one, whole, other = (torch_network(Scaled(s), (X, T)).graph for s in (1.0, 1, 1.5))
    assert len({one, whole, other}) == 3


def test_conditions_are_trees(small):
    model = from_torch(small, (X, T, CONDITION), null_condition=SOME, **FACTS)
    x = jnp.ones((4, 4, 3), jnp.float32)
    np.testing.assert_array_equal(model(x, 0.5), model(x, 0.5, SOME))
    assert np.abs(model(x, 0.5, {**SOME, "b": 3}) - model(x, 0.5)).max() > 0.01
    network = model.raw_score.network
    with torch.no_grad():
        args = (torch.ones(1, 3, 4, 4), torch.tensor([7.0]), jax.tree.map(torch.as_tensor, SOME))
        args[2].update(a=args[2]["a"][None], b=args[2]["b"].long()[None])
        expected = last(small.eval()(*args)[0])
    small.train()
    np.testing.assert_allclose(network(x, 7.0, SOME), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match="condition: expected"):
        network(x, 7.0, {"a": SOME["a"]})
    without_null = from_torch(small, (X, T, CONDITION), **FACTS)
    np.testing.assert_array_equal(without_null(x, 0.5, SOME), model(x, 0.5))


class Gaussian(torch.nn.Module):
    """The exact noise prediction for data N(0, 0.25), from a table of times."""

    def __init__(self):
        super().__init__()
        betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        self.register_buffer("kept", torch.cumprod(1 - betas, 0).float())

    def forward(self, x, t):
        kept = self.kept[t].reshape(-1, *[1] * (x.ndim - 1))
        return {"sample": (1 - kept).sqrt() * x / (0.25 * kept + 1 - kept), "t": t}


@pytest.mark.slow
def test_check_score_accepts_an_exact_network():
    """Times are whole numbers for this one: the network rounds."""
    args = (torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64))
    model = from_torch(Gaussian(), args, channels_first=False, **FACTS)
    xs = jax.random.normal(jax.random.key(0), (64, 8), jnp.float32) / 2
    assert check_score(model, xs).ok
    sigma = float(model.raw_score.schedule.sigma(400.0))
    np.testing.assert_allclose(model(xs[0], sigma), -xs[0] / (0.25 + sigma**2), rtol=1e-4)


def test_prediction_and_schedule_are_handed_on():
    model = from_torch(
        randomized(Small()),
        (X, T),
        schedule=FlowMatching(),
        prediction="flow",
        data_std=1.0,
        sigma_min=0.01,
        output=0,
        decode=lambda x: 2 * x,
    )
    assert (model.sigma_min, model.data_std) == (0.01, 1.0)
    assert model.raw_score.prediction == "flow"
    assert float(model.decode(jnp.float32(1.0))) == 2.0


# What is refused ---------------------------------------------------------------------------------


class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x, t):
        self.calls.add_(1)
        return x * self.calls


class Branching(torch.nn.Module):
    def forward(self, x, t):
        return x if x.sum() > 0 else -x


class Wide(torch.nn.Module):
    def forward(self, x, t):
        return torch.cat([x, x], 1)


@pytest.mark.parametrize(
    ("module", "args", "options", "message"),
    [
        (Small, (X, 3.0), {}, "example_args: expected tensors"),
        (Small, (X,), {}, "example_args: expected tensors"),
        (Small, (X[0], T), {}, "batch axis of 1"),
        (Small, (X.int(), T), {}, "floating point"),
        (Small, (X, torch.zeros(2)), {}, r"t of shape \(\) or \(1,\)"),
        (Small, (X, T, torch.zeros(40)), {}, "batch axis of 1 in every condition"),
        (Small, (X, T), {"argument_names": ("x",)}, "argument_names: expected 2"),
        (Counting, (X, T), {}, "changes .*calls"),
        (Branching, (X, T), {}, "torch.export cannot follow"),
        (Wide, (X, T), {}, "expected an output of the shape of x"),
        (lambda: lambda x, t: x, (X, T), {}, "module: expected a torch.nn.Module"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(module, args, options, message):
    with pytest.raises(InputError, match=message) as raised:
        from_torch(module(), args, **options, **FACTS)
    assert "\n" not in str(raised.value)


def test_a_second_half_of_channels_is_dropped_when_said_so():
    model = from_torch(Wide(), (X, T), learned_variance=True, **FACTS)
    x = jnp.ones((4, 4, 3), jnp.float32)
    np.testing.assert_allclose(model.raw_score.network(x, 0.0), x)


def test_shapes_are_fixed_at_conversion(model):
    with pytest.raises(InputError, match="expected shape"):
        model.raw_score.network(jnp.zeros((8, 8, 3)), 0.0)
