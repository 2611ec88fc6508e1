"""Networks: the autoencoders, the target classifiers, and networks of other packages."""

from .autoencoders import DAE, FFDNet, ResidualUNet, UNet, calibrate, recon_error, squared_distance
from .classifiers import CNN, MLP, Normalize, ResNet, ResNet8, StridedCNN, margin
from .pretrained import PRETRAINED, is_pretrained, pretrained

__all__ = [
    "CNN",
    "DAE",
    "MLP",
    "PRETRAINED",
    "FFDNet",
    "Normalize",
    "ResNet",
    "ResNet8",
    "ResidualUNet",
    "StridedCNN",
    "UNet",
    "calibrate",
    "is_pretrained",
    "margin",
    "pretrained",
    "recon_error",
    "squared_distance",
]
