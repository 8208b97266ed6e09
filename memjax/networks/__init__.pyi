from .convolution import conv as conv
from .mlp import ResidualMLP as ResidualMLP
from .unet import UNet as UNet

__all__ = ["ResidualMLP", "UNet", "conv"]
