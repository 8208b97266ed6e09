"""Random tiny models of diffusers and transformers, and their derivatives, all in PyTorch.

For tests where PyTorch is installed, and for ``make_golden.py``.
"""

import contextlib
import math
from unittest import mock

import numpy as np
import torch
from diffusers import FluxPipeline
from diffusers.models import embeddings
from diffusers.models.transformers import transformer_flux
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.t5 import modeling_t5

torch.set_num_threads(1)


def randomized(model, seed=0):
    """The model with every weight drawn, so that no norm or bias is at its initial value.

    The values have few digits, so that half precision holds them exactly.
    """
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for p in model.parameters():
            draw = rng.normal(size=p.shape)
            draw = p.numpy() + 0.3 * draw if p.ndim == 1 else draw / math.sqrt(p[0].numel())
            p.copy_(torch.tensor(draw.astype(np.float16).astype(np.float32)))
    return model.eval().requires_grad_(False)


def image(array):
    """[h, w, c] -> [1, c, h, w]."""
    return torch.tensor(np.asarray(array).transpose(2, 0, 1))[None]


def array(tensor):
    """[1, c, h, w] -> [h, w, c]."""
    return tensor[0].detach().numpy().transpose(1, 2, 0)


def products(network, x, v, u):
    """f(x), J v and J^T u of a network [1, c, h, w] -> [1, k, p, q], arrays channels last.

    Forward mode fails on these networks; J v is the derivative of w -> J^T w, and wants
    attention written out, for the fused one cannot be differentiated twice.
    """
    x = image(x).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        y = network(x)
        w = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, x, w, create_graph=True)
        (jv,) = torch.autograd.grad(pulled, w, image(v), retain_graph=True)
        (jtu,) = torch.autograd.grad(y, x, image(u))
    return array(y), array(jv), array(jtu)


@contextlib.contextmanager
def precise_means():
    """Root mean squares of T5 in double precision, which transformers forms in float32."""

    def normalize(self, h):
        return self.weight * h * torch.rsqrt((h * h).mean(-1, keepdim=True) + self.variance_epsilon)

    with mock.patch.object(modeling_t5.T5LayerNorm, "forward", normalize):
        yield


@contextlib.contextmanager
def precise_times():
    """Time features in double precision, with the frequencies that float32 knows.

    diffusers forms the angles t f_k in float32 whatever the dtype of the network, an error of
    1e-5 and more at t = 999 that a comparison in double precision would find nothing but.
    """

    def features(timesteps, width, flip_sin_to_cos=False, downscale_freq_shift=1, **_):
        half = width // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32)
        exponent = exponent / (half - downscale_freq_shift)
        angles = timesteps[:, None].double() * exponent.double().exp().float().double()
        parts = [angles.sin(), angles.cos()]
        out = torch.cat(parts[::-1] if flip_sin_to_cos else parts, dim=-1)
        return torch.nn.functional.pad(out, (0, width % 2))

    with mock.patch.object(embeddings, "get_timestep_embedding", features):
        yield


@contextlib.contextmanager
def precise_rotations():
    """Rotary embeddings in double precision, which diffusers rounds to single in any dtype."""

    def rotary(width, places, theta, **_):
        frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        angles = torch.outer(places.double(), frequencies).repeat_interleave(2, dim=1)
        return angles.cos(), angles.sin()

    def apply(x, cos_sin, **_):
        cos, sin = (a[None, :, None].to(x.dtype) for a in cos_sin)
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
        return x * cos + turned * sin

    with (
        mock.patch.object(transformer_flux, "get_1d_rotary_pos_embed", rotary),
        mock.patch.object(transformer_flux, "apply_rotary_emb", apply),
    ):
        yield


def flux(model, t, text, pooled, guidance=None):
    """A Flux transformer as a function of one latent alone, packed as its pipeline does."""

    def network(x):
        dtype = model.proj_out.weight.dtype
        _, c, h, w = x.shape
        tokens = FluxPipeline._pack_latents(x.to(dtype), 1, c, h, w)
        told = (None if a is None else torch.tensor(a)[None] for a in (text, pooled, guidance))
        text_, pooled_, guidance_ = (None if a is None else a.to(dtype) for a in told)
        out = model(
            hidden_states=tokens,
            timestep=torch.tensor([t], dtype=torch.float64) / 1000,
            encoder_hidden_states=text_,
            pooled_projections=pooled_,
            guidance=guidance_,
            txt_ids=torch.zeros(text_.shape[1], 3),
            img_ids=FluxPipeline._prepare_latent_image_ids(1, h // 2, w // 2, "cpu", dtype),
        ).sample
        return FluxPipeline._unpack_latents(out, h, w, 1)

    return network
