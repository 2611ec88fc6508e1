"""Photographs on disk: ImageNet's class folders, read file by file when asked for, BSDS500, and four to look at."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from multiprocessing import current_process
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..contracts import check_whole, imported
from ..files import data_root
from .image_files import class_folders, image_files, read
from .small import TensorImages

IMAGE_SIZE = 224  # of the networks for ImageNet
SMALLEST = 8  # pixels of a side: less is no photograph
EXAMPLES = {  # and what they show, as ImageNet numbers it
    "sklearn/datasets/images/china.jpg": 698,
    "skimage/data/chelsea.png": 282,
    "skimage/data/coffee.png": 967,
    "skimage/data/camera.png": 872,
}


class Photographs(Dataset):
    """Image files, each read when it is asked for, as (3, `size`, `size`) float32 in [0, 1]; nothing is normalised.

    The shorter side becomes 8/7 of `size` (256 for 224, bicubic) and the centre is cut out. An image that is broken or
    has a side below 8 pixels is a ValueError that names it; grey, CMYK and 16-bit images become 8-bit RGB.
    """

    def __init__(self, files: list[tuple[Path, int]], classes: list[str], size: int = IMAGE_SIZE) -> None:
        from torchvision.transforms import v2  # here, as it takes a second, which a command line need not wait for

        check_whole(1, image_size=size)
        self.files, self.classes = files, classes
        self.labels = torch.tensor([label for _, label in files], device="cpu")
        resize = v2.Resize(round(size * 8 / 7), v2.InterpolationMode.BICUBIC)
        self.transform = v2.Compose([resize, v2.CenterCrop(size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.files[index]
        image = read(file)
        if min(image.size) < SMALLEST:
            raise ValueError(
                f"{file} has {image.width}×{image.height} pixels; needed: sides of at least {SMALLEST}; remove it"
            )
        return self.transform(image).as_subclass(Tensor), label

    def without_broken(self) -> "Photographs":
        """Those that can be read, found by reading every one; a warning says how many are left out."""
        with ThreadPoolExecutor() as pool:
            complaints = list(pool.map(self._complaint, range(len(self))))
        broken = [complaint for complaint in complaints if complaint]
        if not broken:
            return self
        warnings.warn(f"{len(broken)} of {len(self)} photographs are left out; the first: {broken[0]}", stacklevel=4)
        self.files = [file for file, complaint in zip(self.files, complaints, strict=True) if not complaint]
        self.labels = self.labels[[not complaint for complaint in complaints]]
        return self

    def _complaint(self, index: int) -> str:
        try:
            self[index]
        except ValueError as error:
            return str(error)
        return ""


def imagenet(folder: Path, size: int = IMAGE_SIZE, skip_broken: bool = False) -> Photographs:
    """ILSVRC-2012 as `folder` has it: a folder for each class, named by its WordNet id.

    Labels are 0 to 999 by the sorted ids of all 1,000 classes, also where `folder` has only some of them. Raises
    ValueError for folders that are no such classes, and where there are no photographs.
    """
    ids, names = imagenet_classes()
    needed = "needed: ImageNet's photographs, a folder for each class named by its WordNet id (n01440764, …)"
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; {needed}; APUDAE_DATA says where data sets lie")
    found = class_folders(folder)
    strange = [name for name in found if name not in ids]
    if strange:
        raise ValueError(f"{folder} has {len(strange)} folders of no ImageNet class ({strange[0]}, …); {needed}")
    files = [(file, ids[name]) for name in found for file in image_files(folder / name)]
    if not files:
        raise ValueError(f"{folder} has no photographs in class folders; {needed}")
    photographs = Photographs(files, names, size)
    return photographs.without_broken() if skip_broken else photographs


def examples(size: int = IMAGE_SIZE) -> Photographs:
    """Four photographs that scikit-learn and scikit-image carry, with ImageNet's labels: nothing to download."""
    _, names = imagenet_classes()
    packages = {place: imported(place.split("/")[0], "the data set photographs") for place in EXAMPLES}
    files = [(Path(packages[place].__file__).parents[1] / place, label) for place, label in EXAMPLES.items()]
    return Photographs(files, names, size)


@cache
def imagenet_classes() -> tuple[dict[str, int], list[str]]:
    """The label of each of the 1,000 WordNet ids, and the first name of each class. ValueError without timm."""
    info = imported("timm.data", "ImageNet").ImageNetInfo()
    ids = {name: label for label, name in enumerate(info.label_names())}
    return ids, [info.index_to_description(label).split(",")[0] for label in range(len(ids))]


def landscapes(files: list[Path]) -> np.ndarray:
    """Photographs of one size, upright ones turned by a quarter, as bytes (n, 3, height, width)."""
    images = [read(file) for file in files]
    images = [image.transpose(Image.Transpose.ROTATE_90) if image.height > image.width else image for image in images]
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        place = files[0].parent
        raise ValueError(f"{place} has photographs of {len(sizes)} sizes ({sizes[0]} to {sizes[-1]}); needed: one")
    return np.stack([np.asarray(image).transpose(2, 0, 1) for image in images])


def readers(dataset: Dataset) -> int:
    """How many processes should read `dataset`: a core each for photographs, none for what is in memory."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    alone = current_process().daemon  # one of several training processes may start no others
    return min(8, len(os.sched_getaffinity(0))) if isinstance(dataset, Photographs) and not alone else 0


def bsds500(split: str, size: int) -> Dataset:
    """BSDS500's photographs at 481×321, upright ones turned; "held_out", its val/, as ImageNet's are seen."""
    folder = data_root() / "bsds500" / {"held_out": "val"}.get(split, split)
    files = image_files(folder)
    if not files:
        raise ValueError(f"{folder} has no photographs; put them there, or set APUDAE_DATA to the folder that has them")
    if split == "held_out":
        return Photographs([(file, 0) for file in files], ["photograph"], size)
    return TensorImages(landscapes(files), np.zeros(len(files), np.int64), ["photograph"])
