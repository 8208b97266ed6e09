"""Every rule for an operator of PyTorch, against PyTorch: value, product and transposed product."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

from memjax._core.errors import InputError  # noqa: E402
from memjax.checkpoints._aten import common_dtype  # noqa: E402
from memjax.checkpoints.torch_bridge import _RULES, torch_network  # noqa: E402

pytestmark = pytest.mark.usefixtures("bridged")

SHAPE = (1, 4, 6, 6)


def _weights(*shape):
    count = int(np.prod(shape))
    return torch.sin(torch.arange(1.0, count + 1, dtype=torch.float64) * 1.7).reshape(shape)


def _set(x, where, value):
    x = x.clone()
    x[where] = value
    return x


def _inside(x):
    """Between 0.1 and 0.9."""
    return 0.1 + 0.8 * torch.sigmoid(x)


INDEX = torch.tensor([[2, 0], [1, 3]])
MASK = torch.tensor([[True, False, True], [True, True, True]])

# In each: functions of x [1, 4, 6, 6].
CASES = {
    "two arguments": [
        lambda x: torch.add(x, x[:, :1], alpha=2),
        lambda x: 3 - x,
        lambda x: torch.sub(x, 1.5, alpha=0.5),
        lambda x: x * x[0, 0, 0, 0],
        lambda x: x / 3,
        lambda x: (
            torch.div(x, 0.3, rounding_mode="floor") + torch.div(x, 0.3, rounding_mode="trunc")
        ),
        lambda x: (torch.arange(5) - 2) // 2 + x[..., :5],
        lambda x: torch.div(torch.arange(5), 2) + x[..., :5],
        lambda x: torch.div(torch.arange(5) - 2, 2, rounding_mode="trunc") + x[..., :5],
        lambda x: x**3 + x**2 + 2.0**x + _inside(x) ** 1.5 + _inside(x) ** x + _inside(x) ** -0.5,
        lambda x: torch.remainder(x, 0.7) + torch.fmod(x, 0.7),
        lambda x: torch.maximum(x, x.flip(3)) - torch.minimum(x, x.flip(2)),
        lambda x: torch.atan2(x, 1 + x**2),
        lambda x: torch.where(x > 0, x, 2.0) + torch.where(x <= x.flip(2), x, -x),
        lambda x: torch.where((x >= 0) & ~(x < 1) | (x != 0) ^ (x == 1), x, 0 * x),
        lambda x: torch.where(
            torch.logical_or(x > 1, torch.logical_xor(x > 0, torch.logical_and(x, x < 0.5))), x, 1
        ),
        lambda x: torch.where(torch.logical_not(x), x, 2 * x),
        lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0.1) + torch.clamp(x, max=x.flip(3)),
    ],
    "one argument": [
        *(
            lambda x, f=f: f(x)
            for f in (
                torch.abs,
                torch.neg,
                torch.sign,
                torch.ceil,
                torch.floor,
                torch.round,
                torch.trunc,
                torch.atan,
                torch.asinh,
                torch.cos,
                torch.cosh,
                torch.erf,
                torch.exp,
                torch.exp2,
                torch.expm1,
                torch.sigmoid,
                torch.sin,
                torch.sinh,
                torch.tan,
                torch.tanh,
                F.silu,
                F.relu,
                F.gelu,
                F.mish,
                F.elu,
                F.selu,
                F.celu,
                F.softplus,
                F.leaky_relu,
                F.hardtanh,
                F.relu6,
                F.hardswish,
                F.logsigmoid,
                F.tanhshrink,
                F.softsign,
                torch.square,
            )
        ),
        *(
            lambda x, f=f: f(_inside(x))
            for f in (
                torch.acos,
                torch.asin,
                torch.atanh,
                torch.log,
                torch.log10,
                torch.log1p,
                torch.log2,
                torch.reciprocal,
                torch.rsqrt,
                torch.sqrt,
                torch.logit,
            )
        ),
        lambda x: torch.acosh(2 + x**2),
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x: torch.nan_to_num(x, nan=0.0),
        lambda x: torch.exp(torch.arange(4)) * x[..., :4],
        lambda x: torch.where(torch.isinf(x / 0) & ~torch.isnan(x), x, 1),
    ],
    "along axes": [
        lambda x: x.sum(),
        lambda x: x.sum((1, -1)) + x.sum(2, keepdim=True)[..., 0, :1],
        lambda x: (x > 0).sum(1) * x[:, 0],
        lambda x: x.mean() + x.mean((2, 3), keepdim=True) + (x > 0).to(torch.int64).sum(),
        lambda x: x.var(1) + x.var((2, 3), unbiased=False).sum() + x.std(1, correction=0),
        lambda x: x.prod(1) + x[..., :2, :2].prod(),
        lambda x: x.amax((1, 2)) - x.amin(3)[..., :1] + x.max() - x.min(),
        lambda x: x.max(1).values + x.min(1, keepdim=True).values[0],
        lambda x: (
            x.max(1).indices
            + x.min(2, keepdim=True).indices[:, 0]
            + x.argmax(1)
            - x.argmin(1)
            + 0 * x[:, 0]
        ),
        lambda x: x.cumsum(2) + (x > 0).any(1, keepdim=True) + (x > 2).all(),
        lambda x: torch.cumsum(torch.ones_like(x[0, 0], dtype=torch.int32), 0) * x,
        lambda x: x.softmax(1) + x.log_softmax(-1) + torch.logsumexp(x, 1, keepdim=True),
        lambda x: torch.linalg.vector_norm(x, dim=1) + x.norm(),
    ],
    "products": [
        lambda x: x[0, 0] @ x[0, 1] + torch.mm(x[0, 0], x[0, 1].t()),
        lambda x: torch.bmm(x[0], x[0].transpose(1, 2)) + x[0] @ x[0, 0],
        lambda x: torch.mv(x[0, 0], x[0, 1, 0]) + torch.dot(x[0, 0, 0], x[0, 1, 0]),
        lambda x: torch.addmm(x[0, 2], x[0, 0], x[0, 1], beta=0.5, alpha=2.0),
        lambda x: torch.baddbmm(x[0], x[0], x[0], alpha=0.1),
        lambda x: torch.einsum("nchw, ndhw -> ncd", x, x),
        lambda x: (
            torch.outer(x[0, 0, 0], x[0, 0, 1]) + torch.tensordot(x[0], x[0], dims=([0, 1], [0, 1]))
        ),
        lambda x: F.linear(x, _weights(3, 6), _weights(3)) + F.linear(x, _weights(3, 6)),
    ],
    "shapes": [
        lambda x: x.reshape(2, -1).view(2, 8, 9).flatten(1).unflatten(1, (9, 8)),
        lambda x: x.permute(0, 2, 3, 1).contiguous().transpose(1, -1).expand(3, -1, -1, -1),
        lambda x: (
            x[:, 0].unsqueeze(-1).squeeze(0).squeeze()
            + torch.where(x.detach() > 0, x, 1)[0, 0]
            + x[:, :1].squeeze((0, 1))
        ),
        lambda x: torch.cat([x, x.new_ones(1, 1, 6, 6), x.float()], 1),
        lambda x: torch.stack([x, -x], -1),
        lambda x: torch.cat(
            [a * i for i, a in enumerate(x.chunk(3, 2), 1)] + list(x.split([1, 5], 2))[::-1], 2
        ),
        lambda x: sum(a * i for i, a in enumerate(x.unbind(1))) + x.split(3, 2)[1].mean(),
        lambda x: x[:, -2, ..., ::2] * x[0, 1, :, 1:4] + x.select(1, -1)[..., 3:],
        lambda x: _set(_set(x, (0, 1), 2.0), (..., slice(1, 5, 2)), x[..., :2]),
        lambda x: _set(x, (slice(None), INDEX), 1.5) + _set(x, x > 0, -1.0),
        lambda x: torch.diagonal(x, 1, 2, 3) + torch.diag_embed(x[0, 0]).sum(),
        lambda x: x.flip((2, 3)) + x.roll((1, -2), (2, 3)) + x.roll(3),
        lambda x: x.repeat(1, 2, 1, 1).tile(2).sum(3) + x.repeat_interleave(2, 1).mean(3),
        lambda x: x.tril() + x.triu(-1),
        lambda x: F.pad(x, (1, 2, 0, -1), value=0.5) + F.pad(x[..., :5, :], (1, 2)),
        lambda x: F.pad(x, (1, 2, 2, 0), mode="reflect") + F.pad(x, (1, 2, 2, 0), mode="replicate"),
        lambda x: F.pad(x[0], (1, 2), mode="reflect") + F.pad(x[0], (1, 2), mode="replicate"),
        lambda x: (
            F.pad(x, (1, 1, 1, 1, 1, 0), mode="reflect")
            + F.pad(x, (1, 1, 1, 1, 1, 0), mode="replicate")
        ),
        lambda x: F.pad(x, (1, 2, 2, 0), mode="circular"),
        lambda x: x[:, INDEX] + x[:, :, 0:6].sum(),
        lambda x: x[:, :, INDEX, INDEX] + x[:, INDEX, 2, INDEX].sum(),
        lambda x: x.index_select(1, INDEX[0]) + x[0, 0, 0, 0],
        lambda x: x.gather(1, INDEX[None, :, :, None].expand(1, 2, 2, 3)),
        lambda x: x.scatter(1, INDEX[None, :, :, None], 0.5),
        lambda x: x.scatter(1, INDEX[None, :, :, None], x[:, :2, :2, :1]),
        lambda x: x.scatter_add(1, INDEX[None, :, :, None], x[:, :2, :2, :1]),
        lambda x: (
            torch.full_like(x, 2.0)
            + torch.zeros_like(x)
            + x.new_full((6, 6), 3)
            + torch.full((2, 1, 1, 1), 1.0)
        ),
        lambda x: torch.zeros(4, 6, dtype=x.dtype).copy_(x[0, 0, 0]),
        lambda x: x.to(torch.float32).to(torch.int32).to(x.dtype) + x.type_as(x),
        lambda x: torch.view_as_real(
            torch.view_as_complex(x.reshape(4, 6, 3, 2).contiguous()) * (1 + 2j)
        ),
        lambda x: F.pixel_shuffle(x, 2) + F.pixel_unshuffle(x, 2).mean(),
        lambda x: F.unfold(x, 2, stride=2),
    ],
    "layers": [
        lambda x: F.conv2d(x, _weights(3, 4, 3, 3), _weights(3), padding=1),
        lambda x: (
            F.conv2d(x, _weights(3, 4, 3, 3), stride=2, padding=1)
            + F.conv2d(x, _weights(3, 4, 2, 2), stride=2)
        ),
        lambda x: F.conv2d(
            x, _weights(8, 2, 3, 1), groups=2, dilation=(2, 1), padding=(0, 1), stride=(1, 2)
        ),
        lambda x: F.conv1d(x[0], _weights(3, 6, 3), _weights(3), padding="same"),
        lambda x: F.conv1d(x[0], _weights(6, 1, 3), stride=2, groups=6),
        lambda x: F.conv3d(x[None], _weights(2, 1, 2, 3, 3), padding=(0, 1, 1)),
        lambda x: F.conv_transpose2d(
            x, _weights(4, 3, 3, 3), _weights(3), stride=2, padding=1, output_padding=1
        ),
        lambda x: F.conv_transpose2d(
            x, _weights(4, 3, 2, 3), groups=2, dilation=(1, 2), stride=(3, 1)
        ),
        lambda x: F.conv_transpose1d(x[0], _weights(6, 2, 4), stride=2, padding=1),
        lambda x: (
            F.group_norm(x, 2, _weights(4), _weights(4), 1e-3)
            + F.group_norm(x[..., 0], 4)[..., None]
        ),
        lambda x: torch.ops.aten.native_group_norm(x, _weights(4), None, 1, 4, 36, 2, 1e-5)[0],
        lambda x: F.layer_norm(x, (6, 6), _weights(6, 6), _weights(6, 6)) + F.layer_norm(x, (6,)),
        lambda x: torch.ops.aten.native_layer_norm(x, (6,), _weights(6), None, 1e-5)[0],
        lambda x: F.rms_norm(x, (6,), _weights(6), 1e-6) + F.rms_norm(x, (6, 6)),
        lambda x: F.batch_norm(x, _weights(4), _weights(4) ** 2, _weights(4), _weights(4)),
        lambda x: F.instance_norm(x, weight=_weights(4), bias=_weights(4)),
        lambda x: F.embedding((x[0, 0] > 0).long(), x[0, 1, :2]),
        lambda x: F.scaled_dot_product_attention(x, x[:, :, :2], x[:, :, 1:3] ** 2),
        lambda x: F.scaled_dot_product_attention(x, 2 * x, x, is_causal=True, scale=0.3),
        lambda x: F.scaled_dot_product_attention(
            x[:, :, :2], x[:, :, :3], x[:, :, :3], attn_mask=MASK
        ),
        lambda x: F.scaled_dot_product_attention(
            x, x[:, :2], x[:, :2] + 1, attn_mask=x[0, 0], enable_gqa=True
        ),
        lambda x: F.multi_head_attention_forward(
            x[0],
            x[0],
            x[0],
            6,
            2,
            _weights(18, 6),
            None,
            None,
            None,
            False,
            0.0,
            _weights(6, 6),
            None,
            training=False,
        )[0],
        lambda x: (
            F.avg_pool2d(x, 2)
            + F.avg_pool2d(x, 2, stride=2, ceil_mode=False, divisor_override=3)
            + F.avg_pool2d(x, 3, stride=2, padding=1)
            + F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
        ),
        lambda x: F.avg_pool1d(x[0], 2) + F.avg_pool3d(x, (2, 1, 2)).mean(),
        lambda x: (
            F.adaptive_avg_pool2d(x, 1)
            + F.adaptive_avg_pool2d(x, (6, 3))
            + F.adaptive_avg_pool1d(x[0], 3)
            + F.adaptive_avg_pool2d(x, (6, 4))[..., :3]
        ),
        lambda x: F.max_pool2d(x, 2) + F.max_pool2d(x, 3, stride=2, padding=1),
        lambda x: (
            F.interpolate(x, scale_factor=2) + F.interpolate(x, size=(12, 12), mode="nearest-exact")
        ),
        lambda x: F.interpolate(x, size=(4, 9)) + F.interpolate(x, scale_factor=1.5)[..., :4, :],
        lambda x: (
            F.interpolate(x, size=(4, 9), mode="nearest-exact")
            + F.interpolate(x[0], scale_factor=1.5)[:, None, :4]
        ),
        lambda x: (
            F.interpolate(x, size=(4, 9), mode="bilinear")
            + F.interpolate(x, size=(4, 9), mode="bilinear", align_corners=True)
        ),
        lambda x: (
            F.interpolate(x, scale_factor=1.7, mode="bilinear")
            + F.interpolate(x[0], 10, mode="linear")[None].mean()
        ),
        lambda x: (
            F.interpolate(x[None], (3, 6, 12), mode="trilinear")
            + F.interpolate(x[None], (2, 3, 1)).mean()
        ),
        lambda x: (
            F.interpolate(x[0], 12, mode="nearest-exact").mean()
            + F.interpolate(x[None], (2, 3, 1), mode="nearest-exact")
        ),
        lambda x: F.interpolate(x, size=(4, 9), mode="bicubic"),
    ],
}


class Group(torch.nn.Module):
    """Functions side by side, their results in one row."""

    def __init__(self, functions):
        super().__init__()
        self.functions = functions

    def forward(self, x, t):
        return torch.cat([f(x).to(x.dtype).flatten() for f in self.functions])[None] + 0 * t


@pytest.fixture(scope="module")
def converted():
    """The groups in double precision as networks."""
    torch.set_num_threads(1)
    x, t = torch.zeros(SHAPE, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    with jax.enable_x64(True):
        return {
            name: torch_network(Group(functions), (x, t), channels_first=False)
            for name, functions in CASES.items()
        }


@pytest.mark.parametrize("name", CASES)
def test_operators_are_pytorchs(x64, converted, name, fast_compile):
    rng = np.random.default_rng(0)
    x, v = rng.normal(size=(2, *SHAPE))
    leaf = torch.tensor(x, requires_grad=True)
    parts = [f(leaf).to(leaf.dtype).flatten() for f in CASES[name]]
    u = rng.normal(size=sum(len(part) for part in parts))
    (pulled,) = torch.autograd.grad(torch.cat(parts), leaf, torch.tensor(u))

    @partial(jax.jit, compiler_options=fast_compile)
    def run(network, x, v, u):
        def f(x):
            return network(x, jnp.float64(0.0))

        value, pull = jax.vjp(f, x)
        return value, jax.jvp(f, (x,), (v,))[1], pull(u)[0]

    value, pushed, pulled_here = run(converted[name], x[0], v[0], u)
    ends = np.cumsum([len(part) for part in parts])
    for i, (here, there) in enumerate(zip(np.split(value, ends[:-1]), parts, strict=True)):
        np.testing.assert_allclose(
            here, there.detach(), rtol=1e-10, atol=1e-10, err_msg=f"case {i}"
        )
    np.testing.assert_allclose(pulled_here, pulled.numpy()[0], rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(np.vdot(u, pushed), np.vdot(pulled_here, v), rtol=1e-8)


def test_every_rule_is_tried(converted):
    tried = {node.rule for network in converted.values() for node in network.graph.nodes}
    assert set(_RULES) - tried == set()


DTYPES = ["bool", "uint8", "int32", "bfloat16", "float16", "float32"]


def test_promotion_is_pytorchs():
    """Arrays with axes, arrays without, and numbers, in every combination of two."""

    def operands(torch_side):
        for name in DTYPES:
            for shape in ((2,), ()):
                if torch_side:
                    yield torch.ones(shape, dtype=getattr(torch, name))
                else:
                    yield jnp.ones(shape, name)
        yield from (True, 2, 2.0)

    with jax.numpy_dtype_promotion("standard"):
        pairs = itertools.product(operands(False), repeat=2)
        theirs = itertools.product(operands(True), repeat=2)
        for ours, expected in zip(pairs, theirs, strict=True):
            name = str(torch.result_type(*expected)).removeprefix("torch.")
            expected = jax.dtypes.canonicalize_dtype(name)
            assert common_dtype(*ours) == expected, (ours, expected)


class Unknown(torch.nn.Module):
    def forward(self, x, t):
        x = torch.linalg.inv(x) + torch.special.bessel_j0(x) + torch.special.i0e(x)
        return torch.nn.functional.dropout(x, 0.5, training=True)


def test_operators_without_a_rule_are_all_named_at_once():
    with pytest.raises(InputError) as raised:
        torch_network(Unknown(), (torch.zeros(1, 1, 3, 3), torch.zeros(1)))
    message = str(raised.value)
    assert "\n" not in message
    for name in ("linalg_inv_ex", "bessel_j0", "i0e", "dropout"):
        assert name in message, message
