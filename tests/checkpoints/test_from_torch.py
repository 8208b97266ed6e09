"""Networks of PyTorch through the bridge: values and derivatives are PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
F = torch.nn.functional

from memjax.checkpoints.torch_bridge import torch_network  # noqa: E402

pytestmark = pytest.mark.usefixtures("bridged")


# The networks ------------------------------------------------------------------------------------

UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
DIT = {
    "sample_size": 4,
    "patch_size": 2,
    "in_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
}


def unet2d(diffusers):
    module = diffusers.UNet2DModel(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **UNET,
    )
    return module, (torch.zeros(1, 3, 8, 8), torch.zeros(1)), {}


def unet2d_condition(diffusers):
    module = diffusers.UNet2DConditionModel(
        cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **UNET,
    )
    return module, (torch.zeros(1, 4, 8, 8), torch.zeros(1), torch.zeros(1, 5, 12)), {}


def ncsnpp(diffusers):
    """As of score SDE: Fourier features of the noise level, FIR resampling, skipped images."""
    module = diffusers.UNet2DModel(
        time_embedding_type="fourier",
        down_block_types=("SkipDownBlock2D", "SkipDownBlock2D"),
        up_block_types=("SkipUpBlock2D", "SkipUpBlock2D"),
        mid_block_scale_factor=2**0.5,
        downsample_type="resnet",
        **{**UNET, "attention_head_dim": None, "add_attention": False},
    )
    return module, (torch.zeros(1, 3, 8, 8), torch.zeros(1)), {}


def dit(diffusers):
    module = diffusers.DiTTransformer2DModel(
        out_channels=8, num_layers=2, num_embeds_ada_norm=10, **DIT
    )
    args = (torch.zeros(1, 4, 4, 4), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    return module, args, {"learned_variance": True}


def pixart(diffusers):
    module = diffusers.PixArtTransformer2DModel(
        out_channels=8, num_layers=1, cross_attention_dim=16, caption_channels=12, **DIT
    )
    text = {"hidden": torch.zeros(1, 5, 12), "mask": torch.ones(1, 5)}

    class Call(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x, t, text):
            return self.module(
                x,
                encoder_hidden_states=text["hidden"],
                encoder_attention_mask=text["mask"],
                timestep=t,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            )

    return Call(), (torch.zeros(1, 4, 4, 4), torch.zeros(1), text), {"learned_variance": True}


def sd3(diffusers):
    module = diffusers.SD3Transformer2DModel(
        num_layers=2,
        out_channels=4,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
        **DIT,
    )
    names = ("hidden_states", "timestep", "encoder_hidden_states", "pooled_projections")
    args = (torch.zeros(1, 4, 4, 4), torch.zeros(1), torch.zeros(1, 5, 12), torch.zeros(1, 10))
    return module, args, {"argument_names": names}


def flux(diffusers):
    module = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=8,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 2, 2),
        guidance_embeds=True,
    )

    class Call(torch.nn.Module):
        """Pixels in pairs of rows as tokens, with their positions."""

        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, x, t, text, pooled):
            _, c, h, w = x.shape
            tokens = x.reshape(1, c, h // 2, 2, w).permute(0, 2, 4, 1, 3).flatten(1, 2).flatten(2)
            rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w), indexing="ij")
            places = torch.stack([0 * rows, rows, columns], -1).reshape(-1, 3)
            out = self.module(
                tokens,
                encoder_hidden_states=text,
                pooled_projections=pooled,
                timestep=t,
                img_ids=places,
                txt_ids=torch.zeros(text.shape[1], 3),
                guidance=torch.tensor([3.5]),
            ).sample
            return out.reshape(1, h // 2, w, c, 2).permute(0, 3, 1, 4, 2).reshape(x.shape)

    args = (torch.zeros(1, 4, 4, 4), torch.zeros(1), torch.zeros(1, 5, 12), torch.zeros(1, 10))
    return Call(), args, {}


class Block(torch.nn.Module):
    """A residual block with the noise level's embedding, dropout, and attention."""

    def __init__(self, width_in, width, attention=False):
        super().__init__()
        self.norm = torch.nn.GroupNorm(2, width_in)
        self.conv = torch.nn.Conv2d(width_in, width, 3, padding=1)
        self.modulate = torch.nn.Linear(16, 2 * width)
        self.out = torch.nn.Conv2d(width, width, 3, padding=1)
        self.skip = torch.nn.Conv2d(width_in, width, 1)
        self.dropout = torch.nn.Dropout(0.3)
        self.qkv = torch.nn.Conv2d(width, 3 * width, 1) if attention else None

    def forward(self, x, e):
        h = self.conv(F.silu(self.norm(x)))
        scale, shift = self.modulate(e)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, F.layer_norm(h, h.shape[1:]), scale + 1))
        h = (self.skip(x) + self.out(self.dropout(h))) * 0.5**0.5
        if self.qkv is not None:
            q, k, v = self.qkv(h).flatten(2).chunk(3, 1)
            weights = torch.einsum("ncq,nck->nqk", q, k / k.shape[1] ** 0.5).softmax(dim=2)
            h = h + torch.einsum("nqk,nck->ncq", weights, v).reshape(h.shape)
        return h


class EDMStyle(torch.nn.Module):
    """A denoiser D(x, sigma, class labels) with the preconditioning of EDM around a U-Net."""

    def __init__(self, data_std=0.5, classes=3):
        super().__init__()
        self.data_std = data_std
        self.register_buffer("frequencies", torch.randn(8) * 2)
        self.embed = torch.nn.Linear(16, 16)
        self.label = torch.nn.Linear(classes, 16, bias=False)
        self.first = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.down = Block(8, 8)
        self.pool = torch.nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.middle = Block(8, 12, attention=True)
        self.up = torch.nn.ConvTranspose2d(12, 8, 4, stride=2, padding=1)
        self.last = Block(16, 8)
        self.end = torch.nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, sigma, labels):
        sigma = sigma.reshape(-1, 1, 1, 1)
        total = sigma**2 + self.data_std**2
        angles = (sigma.log() / 4).flatten().outer(2 * np.pi * self.frequencies)
        e = F.silu(self.embed(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.label(labels))
        h = self.down(self.first(x / total.sqrt()), e)
        u = self.up(self.middle(self.pool(h), e))
        raw = self.end(F.silu(self.last(torch.cat([h, u], dim=1), e)))
        return self.data_std**2 / total * x + sigma * self.data_std / total.sqrt() * raw


def edm(_=None):
    return EDMStyle(), (torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1, 3)), {}


NETWORKS = [unet2d, unet2d_condition, ncsnpp, dit, pixart, sd3, flux, edm]


def randomized(module, seed=0):
    """Weights of ordinary size, everywhere: fresh networks are zero in places."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        fan = p[0].numel() if p.ndim > 1 else 4
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) / fan**0.5
        p.data += float(p.ndim == 1)
    return module


def built(make):
    diffusers = pytest.importorskip("diffusers") if make is not edm else None
    torch.manual_seed(0)
    module, args, options = make(diffusers)
    return randomized(module), args, options


def drawn(args, seed=1):
    """The same arguments with entries: noise, a time, classes, and masks as they are."""
    generator = torch.Generator().manual_seed(seed)

    def entries(a):
        if not a.is_floating_point() or a.ndim == 1:
            return a + torch.tensor([7.3] if a.is_floating_point() else [2]).to(a.dtype)
        return a if a.any() else torch.randn(a.shape, generator=generator, dtype=a.dtype)

    return jax.tree.map(entries, args)


def here(args):
    """The arguments of a module as those of the network."""
    x, t, *condition = jax.tree.map(lambda a: jnp.asarray(a[0].numpy()), tuple(args))
    condition = None if not condition else condition[0] if len(condition) == 1 else tuple(condition)
    return jnp.moveaxis(x, 0, -1), t, condition


def last(tensor):
    """One image, channels last, as NumPy has it."""
    return tensor.detach()[0].movedim(0, -1).numpy()


def reference(module, args, options, v, u):
    """Value, J v and J^T u in PyTorch: J v is the derivative of J^T u along u."""
    x, *rest = args
    names = options.get("argument_names")

    def f(x):
        named = dict(zip(names, (x, *rest), strict=True)) if names else {}
        out = module(**named) if named else module(x, *rest)
        out = out if isinstance(out, torch.Tensor) else out.sample
        return out[:, : x.shape[1]]

    leaf, dual = x.clone().requires_grad_(), u.clone().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value = f(leaf)
        (pulled,) = torch.autograd.grad(value, leaf, dual, create_graph=True)
        (pushed,) = torch.autograd.grad(pulled, dual, v)
    return last(value), last(pushed), last(pulled)


def value_and_products(network, x, t, condition, v, u):
    value, pushed = jax.jvp(lambda x: network(x, t, condition), (x,), (v,))
    return value, pushed, jax.vjp(lambda x: network(x, t, condition), x)[1](u)[0]


def error(a, b):
    """Largest difference, relative to the largest entry (or to one, if that is larger)."""
    return np.abs(a - b).max() / max(1, np.abs(b).max())


@pytest.mark.slow
@pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)
def test_value_and_products_are_pytorchs(make, fast_compile):
    module, args, options = built(make)
    network = torch_network(module, args, **options)
    args = drawn(args)
    v, u = torch.randn(2, *args[0].shape, generator=torch.Generator().manual_seed(2))
    expected = reference(module.eval(), args, options, v, u)
    run = jax.jit(value_and_products, compiler_options=fast_compile)
    value, pushed, pulled = run(network, *here(args), last(v), last(u))
    assert np.abs(expected[1]).max() > 0.1  # there is something to compare
    assert error(value, expected[0]) < 1e-5
    assert error(pushed, expected[1]) < 1e-4
    assert error(pulled, expected[2]) < 1e-4
    left, right = np.vdot(last(u), pushed), np.vdot(pulled, last(v))
    assert abs(left - right) < 1e-5 * np.linalg.norm(pushed) * np.linalg.norm(u)


@pytest.mark.slow
def test_double_precision_is_double(x64, fast_compile):
    module, args, options = built(edm)
    args = drawn(jax.tree.map(torch.Tensor.double, args))
    module = module.double()
    v, u = torch.randn(2, *args[0].shape, generator=torch.Generator().manual_seed(2)).double()
    expected = reference(module.eval(), args, options, v, u)
    run = jax.jit(value_and_products, compiler_options=fast_compile)
    found = run(torch_network(module, args), *here(args), last(v), last(u))
    assert all(a.dtype == np.float64 for a in found)
    assert max(error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-12
