from .autoencoder_kl import AutoencoderKL as AutoencoderKL
from .classifier import MLPClassifier as MLPClassifier
from .classifier import ResNetClassifier as ResNetClassifier
from .clip_text import CLIPTextModel as CLIPTextModel
from .clip_text import CLIPTextModelWithProjection as CLIPTextModelWithProjection
from .clip_text import TextEncoding as TextEncoding
from .convolution import conv as conv
from .flux import FluxTransformer2DModel as FluxTransformer2DModel
from .lora import LearnedConditions as LearnedConditions
from .lora import LowRank as LowRank
from .lora import low_rank_adapters as low_rank_adapters
from .lora import merge_adapters as merge_adapters
from .mlp import ResidualMLP as ResidualMLP
from .t5_encoder import T5EncoderModel as T5EncoderModel
from .unet import UNet as UNet
from .unet2d import UNet2DModel as UNet2DModel
from .unet2d_condition import TextCondition as TextCondition
from .unet2d_condition import UNet2DConditionModel as UNet2DConditionModel
from .unet2d_linen import LinenUNet2D as LinenUNet2D

__all__ = [
    "AutoencoderKL",
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "FluxTransformer2DModel",
    "LearnedConditions",
    "LinenUNet2D",
    "LowRank",
    "MLPClassifier",
    "ResNetClassifier",
    "ResidualMLP",
    "T5EncoderModel",
    "TextCondition",
    "TextEncoding",
    "UNet",
    "UNet2DConditionModel",
    "UNet2DModel",
    "conv",
    "low_rank_adapters",
    "merge_adapters",
]
