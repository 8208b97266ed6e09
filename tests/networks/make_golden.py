"""Write the golden files: tiny models as their libraries save them, and what they compute.

    python tests/networks/make_golden.py

wants torch, diffusers and transformers. Each folder gets ``config.json``, ``model.safetensors``
(random weights in half precision, which holds them exactly), and ``reference.npz``: inputs, and
in double precision outputs and products, by PyTorch. The time features in these, the rotary
embeddings and the means of T5 are formed in double precision as well. ``full_sizes.json.xz`` has
options, names and shapes of published models of full size.
"""

import json
import lzma
from pathlib import Path

import numpy as np
import torch
import torch_models
from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel, UNet2DModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

GOLDEN = Path(__file__).with_name("golden")

UNET = {
    "block_out_channels": (4, 8),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 2,
    "layers_per_block": 1,
}
UNETS = {
    "unet2d-ddpm": {
        "downsample_padding": 0,
        "freq_shift": 1,
        "flip_sin_to_cos": False,
        "attention_head_dim": None,
        "norm_eps": 1e-6,
    },
    "unet2d-classes": {
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
        "num_class_embeds": 3,
        "out_channels": 6,
        "act_fn": "mish",
    },
}
TEXT_UNETS = {
    "unet2d-condition-1": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 6,
        "attention_head_dim": 2,
    },
    "unet2d-condition-xl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 6,
        "use_linear_projection": True,
        "attention_head_dim": (2, 4),
        "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 29,
    },
}
FLUX = {
    "in_channels": 8,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 6,
    "num_attention_heads": 2,
    "joint_attention_dim": 6,
    "pooled_projection_dim": 5,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 2, 2),
}
CIFAR = {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
FULL_SIZES = {
    "ddpm-cifar10-32": (UNet2DModel, CIFAR),
    "ddpm-celebahq-256": (
        UNet2DModel,
        CIFAR
        | {
            "sample_size": 256,
            "block_out_channels": [128, 128, 256, 256, 512, 512],
            "down_block_types": ["DownBlock2D"] * 4 + ["AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D"] + ["UpBlock2D"] * 4,
        },
    ),
    "stable-diffusion-1.5": (UNet2DConditionModel, {"cross_attention_dim": 768}),
    "stable-diffusion-2.1": (
        UNet2DConditionModel,
        {
            "cross_attention_dim": 1024,
            "attention_head_dim": [5, 10, 20, 20],
            "use_linear_projection": True,
            "upcast_attention": True,
        },
    ),
    "stable-diffusion-xl": (
        UNet2DConditionModel,
        {
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
            "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "flux-dev": (FluxTransformer2DModel, {"guidance_embeds": True}),
    "flux-schnell": (FluxTransformer2DModel, {}),
    "stable-diffusion-vae": (
        AutoencoderKL,
        {
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 2,
        },
    ),
}
ENCODER = CLIPTextConfig(
    vocab_size=20,
    hidden_size=8,
    intermediate_size=16,
    projection_dim=6,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=9,
    bos_token_id=18,
    eos_token_id=19,
)
T5_ENCODER = T5Config(
    vocab_size=20,
    d_model=8,
    d_kv=6,
    d_ff=16,
    num_layers=2,
    num_heads=2,
    relative_attention_num_buckets=12,
    relative_attention_max_distance=20,
    feed_forward_proj="gated-gelu",
)


def save(name, model, config, **arrays):
    """One folder; the weights are kept before the model computes in double precision."""
    folder = GOLDEN / name
    folder.mkdir(parents=True, exist_ok=True)
    halves = {key: a.half().contiguous() for key, a in model.state_dict().items()}
    save_file(halves, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    np.savez_compressed(folder / "reference.npz", **arrays)


def draw(*shape):
    """Normal values that single precision holds exactly."""
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def unets():
    for name, options in UNETS.items():
        model = torch_models.randomized(UNet2DModel(**UNET | options))
        x, v, u = draw(3, 8, 8, 3).astype(np.float64)
        label = 2 if "num_class_embeds" in options else None
        labels = None if label is None else torch.tensor([label])

        def network(x, model=model, labels=labels):
            return model.double()(x, torch.tensor(621.5), labels).sample[:, :3]

        y, jv, jtu = torch_models.products(network, x, v, u)
        given = {} if label is None else {"label": np.int32(label)}
        save(
            name,
            model.float(),
            {"_class_name": "UNet2DModel", **UNET, **options},
            **given,
            t=np.float32(621.5),
            **{"x": x, "v": v, "u": u, "y": y, "jv": jv, "jtu": jtu},
        )


def text_unets():
    for name, options in TEXT_UNETS.items():
        model = torch_models.randomized(UNet2DConditionModel(**UNET | options))
        x, v, u = draw(3, 8, 8, 4).astype(np.float64)
        given = {"hidden_states": draw(5, 6)}
        if "addition_embed_type" in options:
            sizes = np.array([512, 640, 0, 3, 1024, 768], np.float32)
            given |= {"pooled": draw(5), "time_ids": sizes}
        text, *added = (torch.tensor(a)[None].double() for a in given.values())
        extra = dict(zip(("text_embeds", "time_ids"), added, strict=bool(added)))

        def network(x, model=model, text=text, extra=extra):
            out = model.double()(x, torch.tensor(621.5), text, added_cond_kwargs=extra)
            return out.sample

        y, jv, jtu = torch_models.products(network, x, v, u)
        save(
            name,
            model.float(),
            {"_class_name": "UNet2DConditionModel", **UNET, **options},
            **given,
            t=np.float32(621.5),
            **{"x": x, "v": v, "u": u, "y": y, "jv": jv, "jtu": jtu},
        )


def flux():
    model = torch_models.randomized(FluxTransformer2DModel(**FLUX))
    x, v, u = draw(3, 4, 6, 2).astype(np.float64)
    given = {"hidden_states": draw(5, 6), "pooled": draw(5), "guidance": np.float32(2.5)}
    network = torch_models.flux(model.double(), 621.5, *given.values())
    y, jv, jtu = torch_models.products(network, x, v, u)
    save(
        "flux",
        model.float(),
        {"_class_name": "FluxTransformer2DModel", **FLUX},
        **given,
        t=np.float32(621.5),
        **{"x": x, "v": v, "u": u, "y": y, "jv": jv, "jtu": jtu},
    )


def autoencoder():
    options = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 2,
        "latent_channels": 4,
    }
    model = torch_models.randomized(AutoencoderKL(**options))
    x, z = draw(8, 8, 3).astype(np.float64), draw(4, 4, 4)[:3, :2].astype(np.float64)
    latent = model.double().encode(torch_models.image(x)).latent_dist
    decoded = torch_models.array(model.decode(torch_models.image(z)).sample)
    mean, logvar = torch_models.array(latent.mean), torch_models.array(latent.logvar)
    config = {"_class_name": "AutoencoderKL", **options}
    save("vae", model.float(), config, x=x, z=z, mean=mean, logvar=logvar, decoded=decoded)


def text_encoder():
    model = torch_models.randomized(CLIPTextModelWithProjection(ENCODER))
    tokens = np.array([18, 3, 4, 11, 19, 19, 19], np.int32)
    out = model.double()(torch.tensor(tokens, dtype=torch.int64)[None], output_hidden_states=True)
    hidden = {"last": out.last_hidden_state[0], "penultimate": out.hidden_states[-2][0]}
    arrays = {name: a.numpy() for name, a in hidden.items()}
    pooled = out.text_embeds[0].numpy()
    save("clip-text", model.float(), ENCODER.to_dict(), tokens=tokens, pooled=pooled, **arrays)


def t5_encoder():
    model = torch_models.randomized(T5EncoderModel(T5_ENCODER))
    tokens = np.random.default_rng(0).integers(0, 20, 30).astype(np.int32)
    with torch_models.precise_means():
        out = model.double()(torch.tensor(tokens, dtype=torch.int64)[None])
    last = out.last_hidden_state[0].numpy()
    save("t5-text", model.float(), T5_ENCODER.to_dict(), tokens=tokens, last=last)


def full_sizes():
    listed = {}
    for name, (cls, options) in FULL_SIZES.items():
        with torch.device("meta"):
            model = cls(**options)
        shapes = {key: list(a.shape) for key, a in model.state_dict().items()}
        listed[name] = {"class": cls.__name__, "config": options, "shapes": shapes}
    text = json.dumps(listed, separators=(",", ":"))
    (GOLDEN / "full_sizes.json.xz").write_bytes(lzma.compress(text.encode(), preset=9))


if __name__ == "__main__":
    with torch_models.precise_times():
        unets()
        text_unets()
        with torch_models.precise_rotations():
            flux()
    autoencoder()
    text_encoder()
    t5_encoder()
    full_sizes()
