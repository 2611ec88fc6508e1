"""The defenses that the paper compares itself with: MagNet and Defense-GAN (adversarial training: `training`); JPEG.

All are modules from images to images, as `Purifier` is: `nn.Sequential(defense, classifier)` is a classifier.
"original" in a comment is the code that their authors published.
"""

from .defense_gan import Critic, DefenseGAN, Generator, ProjectionConfig, train_gan
from .jpeg import JPEG
from .magnet import DROP_RATES, MagNet, train_magnet

__all__ = ["DROP_RATES", "JPEG", "Critic", "DefenseGAN", "Generator", "MagNet", "ProjectionConfig", "train_gan"]
__all__ += ["train_magnet"]
