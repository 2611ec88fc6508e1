"""Reading one image file: whatever its mode, as 8 bits a channel."""

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

ENDINGS = (".jpeg", ".jpg", ".png", ".bmp", ".webp", ".tif", ".tiff")


def image_files(folder: Path) -> list[Path]:
    """The image files of `folder`, by their endings, sorted; none where there is no such folder."""
    return sorted(file for file in folder.glob("*") if file.suffix.lower() in ENDINGS)


def class_folders(folder: Path) -> list[str]:
    """The names of the folders in `folder`, sorted, without hidden ones, such as .ipynb_checkpoints."""
    return sorted(part.name for part in folder.iterdir() if part.is_dir() and part.name[0] != ".")


def read(file: str | Path, mode: str = "RGB") -> Image.Image:
    """The image in `file`, 8 bits a channel, in Pillow's `mode`. ValueError, naming the file, if it is broken."""
    with opened(file) as image:
        try:
            return ImageOps.exif_transpose(_eight_bits(image, file)).convert(mode)  # as its camera was held
        except (OSError, SyntaxError) as error:  # the latter from Pillow's PNG reader
            raise ValueError(f"{file} is a broken image ({error}); replace or remove it") from error


def opened(file: str | Path) -> Image.Image:
    """The image in `file`, its header read. ValueError, naming the file, if it is none."""
    if not Path(file).is_file():
        raise ValueError(f"{file} is no file; replace or remove it")
    try:
        return Image.open(file)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is no image that can be read ({error}); replace or remove it") from error


def size_of(image: Image.Image) -> tuple[int, int]:
    """Width and height as `read` gives them."""
    cameras = ("JPEG", "MPO", "TIFF", "WEBP")  # of others Pillow would have to read the whole file
    turned = image.format in cameras and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return image.size[::-1] if turned else image.size


def is_grey(image: Image.Image) -> bool:
    """Whether an image just opened has one channel."""
    return image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16")


def _eight_bits(image: Image.Image, file: str | Path) -> Image.Image:
    """16-bit grey as 8-bit grey of the same brightness (Pillow's own conversion clips it)."""
    if image.mode in ("I", "F") and image.format != "PPM":  # Pillow's mode for a PGM of 16 bits
        raise ValueError(f"{file} has 32 bits a pixel, whose range nobody knows; needed: 8 or 16; replace or remove it")
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    return image
