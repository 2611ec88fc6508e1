"""Your own images: a folder for each class, read when they are asked for."""

import os
import re
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..contracts import check_whole
from .image_files import class_folders, is_grey, opened, read, size_of


def path_and_size(text: str) -> tuple[Path, int | None]:
    """The folder in "PATH" or "PATH@64", and the size that its images are to have; one that is named so is itself."""
    whole = Path(os.path.expanduser(text))
    found = None if os.path.isdir(whole) else re.fullmatch(r"(.+)@([1-9]\d{0,3})", text)  # "~@64": not of a user @64
    return (Path(os.path.expanduser(found[1])), int(found[2])) if found else (whole, None)


class FolderImages(Dataset):
    """Image files read from disk when they are asked for; grey only if all are grey."""

    def __init__(self, path: Path, split: str, image_size: int | None) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        if image_size is not None:
            check_whole(1, image_size=image_size)
        if not os.path.isdir(path):  # also for a name that no folder can have
            raise ValueError(f"{path} is no folder; needed: a folder with a folder of images for each class")
        ready = [part for part in ("train", "test") if (path / part).is_dir()]
        if len(ready) == 1:
            raise ValueError(
                f"{path} has {ready[0]}/ alone; needed: both train/ and test/, or the class folders directly"
            )
        root = path / split if ready else path
        self.classes = class_folders(root)
        if not self.classes:
            raise ValueError(f"{root} is no folder of images, one folder a class: it holds no folder")
        try:
            self.files = make_dataset(root, {name: label for label, name in enumerate(self.classes)}, IMG_EXTENSIONS)
        except FileNotFoundError as error:
            raise ValueError(f"{root} is no folder of images, one folder a class: {error}") from error
        found = [class_folders(path / part) for part in ready]
        if ready and found[0] != found[1]:
            raise ValueError(f"{path} has the classes {found[0]} in train/, {found[1]} in test/; needed: the same")
        self._examine(root, image_size)
        if not ready:
            numbered = (pair for _, of_class in groupby(self.files, itemgetter(1)) for pair in enumerate(of_class))
            self.files = [sample for i, sample in numbered if (i % 5 == 0) == (split == "test")]
        if not self.files:
            raise ValueError(f"{root} has too few images for a {split} split; needed: at least 2 a class")
        self.labels = torch.tensor([label for _, label in self.files], device="cpu")

    def _examine(self, root: Path, image_size: int | None) -> None:
        from torchvision.transforms import v2

        sizes, grey = set(), True
        for file, _ in self.files:
            with opened(file) as image:
                sizes.add(size_of(image))
                grey &= is_grey(image)
        if image_size is None and len(sizes) > 1:
            raise ValueError(
                f"{root} has images of {len(sizes)} sizes ({min(sizes)} to {max(sizes)}); needed: one, "
                "or such as folder:PATH@64, which resizes and crops to a square"
            )
        resize = [v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)] if image_size else []
        self.mode = "L" if grey else "RGB"
        self.transform = v2.Compose([*resize, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.files[index]
        return self.transform(read(file, self.mode)).as_subclass(Tensor).clamp(0, 1), label
