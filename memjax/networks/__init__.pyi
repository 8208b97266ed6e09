from .convolution import conv as conv
from .mlp import ResidualMLP as ResidualMLP
from .unet import UNet as UNet
from .unet2d import UNet2DModel as UNet2DModel
from .unet2d_condition import TextCondition as TextCondition
from .unet2d_condition import UNet2DConditionModel as UNet2DConditionModel

__all__ = ["ResidualMLP", "TextCondition", "UNet", "UNet2DConditionModel", "UNet2DModel", "conv"]
