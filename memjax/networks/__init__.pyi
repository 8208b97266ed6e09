from .convolution import conv as conv
from .mlp import ResidualMLP as ResidualMLP
from .unet import UNet as UNet
from .unet2d import UNet2DModel as UNet2DModel

__all__ = ["ResidualMLP", "UNet", "UNet2DModel", "conv"]
