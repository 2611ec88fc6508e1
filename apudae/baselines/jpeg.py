"""JPEG as a defense without a network (Dziugaite et al. 2016, Guo et al. 2018); not in the paper."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..contracts import check_images, check_whole

LARGEST = 65_500  # pixels of a side


class JPEG(nn.Module):
    """Images (n, C, H, W) in [0, 1] to what is left of them after compression, C 1 or 3; without a gradient.

    `quality` is the codec's, 1 to 100. Images that were compressed like this before come back nearly as they were.
    ValueError for a quality that there is not, and for what are no images.
    """

    def __init__(self, quality: int = 75) -> None:
        super().__init__()
        check_whole(1, quality=quality)
        if quality > 100:
            raise ValueError(f"quality is {quality}; needed: at most 100")
        self.quality = int(quality)

    def extra_repr(self) -> str:
        return f"quality={self.quality}"

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        if x.shape[1] not in (1, 3):
            raise ValueError(f"images have {x.shape[1]} channels; JPEG needs 1 or 3")
        if max(x.shape[2:], default=0) > LARGEST:
            raise ValueError(f"images have sides {tuple(x.shape[2:])}; JPEG has at most {LARGEST:,} pixels")
        pixels = (255 * x.float()).round().byte().cpu().movedim(1, 3).numpy()
        read = np.stack([self._read_again(image) for image in pixels])
        return torch.from_numpy(read).movedim(3, 1).to(x) / 255

    def _read_again(self, image: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(file, "JPEG", quality=self.quality)
        return np.asarray(Image.open(file)).reshape(image.shape)
