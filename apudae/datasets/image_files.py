"""Reading one image file: whatever its mode, as 8 bits a channel."""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

ENDINGS = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def image_files(folder: Path) -> list[Path]:
    """The image files of `folder`, by their endings, sorted; none where there is no such folder."""
    return sorted(file for file in folder.glob("*") if file.suffix.lower() in ENDINGS)


def read(file: str | Path, mode: str = "RGB") -> Image.Image:
    """The image in `file`, 8 bits a channel, in Pillow's `mode`. ValueError, naming the file, if it is broken."""
    with opened(file) as image:
        try:
            return _eight_bits(image).convert(mode)
        except (OSError, SyntaxError) as error:  # the latter from Pillow's PNG reader
            raise ValueError(f"{file} is a broken image ({error}); replace or remove it") from error


def opened(file: str | Path) -> Image.Image:
    """The image in `file`, its header read. ValueError, naming the file, if it is none."""
    try:
        return Image.open(file)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is no image that can be read ({error}); replace or remove it") from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey of the same brightness (Pillow's own conversion clips it)."""
    return Image.fromarray((np.asarray(image) // 257).astype(np.uint8)) if image.mode.startswith("I;16") else image
