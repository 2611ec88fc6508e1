"""Networks: the autoencoders, the target classifiers, and networks of other packages."""

from .autoencoders import DAE, FFDNet, ResidualUNet, UNet, calibrate, recon_error
from .classifiers import CNN, MLP, Normalize, ResNet, ResNet8, StridedCNN, margin
from .pretrained import pretrained

__all__ = [
    "CNN",
    "DAE",
    "MLP",
    "FFDNet",
    "Normalize",
    "ResNet",
    "ResNet8",
    "ResidualUNet",
    "StridedCNN",
    "UNet",
    "calibrate",
    "margin",
    "pretrained",
    "recon_error",
]
