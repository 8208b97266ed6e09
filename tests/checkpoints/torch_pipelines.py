"""Tiny random pipelines of diffusers, written as their users write them."""

import json
import math
import warnings

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

torch.set_num_threads(1)

MERGES = [
    *(
        "t h",
        "th e</w>",
        "c a",
        "ca t</w>",
        "d o",
        "do g</w>",
        "i n",
        "in g</w>",
        "a n",
        "an d</w>",
    ),
    *("p h", "ph o", "pho t", "phot o</w>", "o f</w>", "' s</w>", ". .", ".. .</w>", "! !</w>"),
    *("\u00c3 \u00a9</w>", "ca f", "caf \u00c3\u00a9</w>"),  # the two bytes of an accented e
]


def _alphabet():
    """The printable characters that stand for the 256 bytes in CLIP's vocabulary."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return [chr(byte) for byte in kept] + [chr(256 + k) for k in range(len(others))]


def vocabulary():
    """The ids of CLIP's kind: characters, characters that end a word, merges, two marks."""
    letters = _alphabet()
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    words += [merge.replace(" ", "") for merge in MERGES]
    words = [*dict.fromkeys(words), "<|startoftext|>", "<|endoftext|>"]
    return {word: index for index, word in enumerate(words)}


def write_tokenizer(folder, pad="<|endoftext|>"):
    """vocab.json, merges.txt and the settings, as the first folders of Stable Diffusion."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    special = {
        "bos_token": {"content": "<|startoftext|>", "lstrip": False, "normalized": True,
                      "rstrip": False, "single_word": False},
        "eos_token": {"content": "<|endoftext|>", "lstrip": False, "normalized": True,
                      "rstrip": False, "single_word": False},
        "pad_token": pad,
        "unk_token": "<|endoftext|>",
    }  # fmt: skip
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {
        "model_max_length": 77,
        "pad_token": "<|endoftext|>",
        "do_lower_case": True,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def tokenizer(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return CLIPTokenizer.from_pretrained(folder)


PIECES = ["the", "cat", "dog", "and", "photo", "of", "a", "caf\u00e9", "\u732b", "s"]


def t5_tokenizer(**options):
    """A tokenizer of T5's kind: words that begin and others, letters, two marks of gaps."""
    letters = "abcdefghijklmnopqrstuvwxyzACP0129.,!'-"
    words = [("\u2581" + piece, -2.0 - 0.1 * i) for i, piece in enumerate(PIECES)]
    words += [("ing", -4.0), ("at", -4.5), ("\u2581", -3.0)]
    words += [(letter, -6.0 - 0.01 * i) for i, letter in enumerate(letters)]
    marks = [("<extra_id_1>", 0.0), ("<extra_id_0>", 0.0)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *words, *marks]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=2, **{"model_max_length": 512} | options)


def randomized(model, seed):
    """The model with every weight drawn, so that no norm or bias is at its initial value."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for p in model.parameters():
            draw = rng.normal(size=p.shape)
            draw = p.numpy() + 0.3 * draw if p.ndim == 1 else draw / math.sqrt(p[0].numel())
            p.copy_(torch.tensor(draw.astype(np.float16).astype(np.float32)))
    return model.eval().requires_grad_(False)


def unet2d(**options):
    config = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "layers_per_block": 1,
    }
    torch.manual_seed(0)
    return randomized(UNet2DModel(**config | options), 0)


def ddpm(folder, **options):
    """A pipeline of pixels, saved."""
    pipeline = DDPMPipeline(unet=unet2d(), scheduler=DDPMScheduler())
    pipeline.save_pretrained(folder, **options)
    return pipeline


def _text_encoder(kind, seed, **options):
    words = len(vocabulary())
    config = CLIPTextConfig(
        vocab_size=words,
        hidden_size=16,
        intermediate_size=32,
        projection_dim=12,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=words - 2,
        eos_token_id=words - 1,
        pad_token_id=words - 1,
        **options,
    )
    return randomized(kind(config), seed)


def _vae(scaling, **options):
    config = {
        "block_out_channels": (4, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 2,
        "latent_channels": 4,
        "sample_size": 16,
        "scaling_factor": scaling,
    }
    return randomized(AutoencoderKL(**config | options), 1)


def _unet(width, **options):
    config = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": width,
    }
    return randomized(UNet2DConditionModel(**config | options), 2)


def _betas():
    return {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }


def stable_diffusion(folder, *, pad="<|endoftext|>"):
    """A pipeline of the shape of Stable Diffusion 1.x or, by its padding, 2.x, saved."""
    write_tokenizer(folder / "words", pad)
    pipeline = StableDiffusionPipeline(
        vae=_vae(0.3),
        text_encoder=_text_encoder(CLIPTextModel, 3),
        tokenizer=tokenizer(folder / "words"),
        unet=_unet(16),
        scheduler=DDIMScheduler(**_betas()),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return pipeline


def stable_diffusion_xl(folder):
    """A pipeline of the shape of Stable Diffusion XL, saved."""
    write_tokenizer(folder / "words")
    write_tokenizer(folder / "words_2", "!")
    pipeline = StableDiffusionXLPipeline(
        vae=_vae(0.2),
        text_encoder=_text_encoder(CLIPTextModel, 3),
        text_encoder_2=_text_encoder(CLIPTextModelWithProjection, 4, hidden_act="gelu"),
        tokenizer=tokenizer(folder / "words"),
        tokenizer_2=tokenizer(folder / "words_2"),
        unet=_unet(
            32,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 12,
        ),
        scheduler=DDIMScheduler(**_betas()),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return pipeline


def flux(folder, *, guidance, **texts):
    """A pipeline of the shape of Flux dev or, without guidance, schnell, saved.

    Its text encoders and tokenizers are those given; without any the network stands with its
    autoencoder alone.
    """
    network = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 2,
        "joint_attention_dim": 10,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (2, 4, 6),
        "guidance_embeds": guidance,
    }
    names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipeline = FluxPipeline(
        transformer=randomized(FluxTransformer2DModel(**network), 5),
        vae=_vae(0.36, shift_factor=0.12, use_quant_conv=False, use_post_quant_conv=False),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance else 1.0),
        **dict.fromkeys(names) | texts,
    )
    pipeline.save_pretrained(folder)
    return pipeline


def flux_text(folder, **options):
    """The text encoders and tokenizers of a pipeline of Flux's shape, by their names in it."""
    write_tokenizer(folder / "words")
    words = t5_tokenizer(**options)
    config = T5Config(
        vocab_size=len(words) + 3,  # as published: more rows than words
        d_model=10,
        d_kv=6,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return {
        "text_encoder": _text_encoder(CLIPTextModel, 3),
        "tokenizer": tokenizer(folder / "words"),
        "text_encoder_2": randomized(T5EncoderModel(config), 5),
        "tokenizer_2": words,
    }


def tensor(image):
    """[h, w, c] -> [1, c, h, w]."""
    return torch.tensor(np.asarray(image).transpose(2, 0, 1).copy())[None]


def array(tensor):
    """[1, c, h, w] -> [h, w, c]."""
    return tensor[0].detach().numpy().transpose(1, 2, 0)
