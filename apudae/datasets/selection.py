"""Choosing images of a data set: a stratified few, those held out, a part as tensors."""

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..contracts import as_generator, check_whole


def take(dataset: Dataset, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """`n` images and labels as tensors, a fixed stratified choice: class by class in turn, so any first part is too."""
    check_whole(1, n=n)
    if n > len(dataset):
        raise ValueError(f"{n} images asked for; there are {len(dataset)}: give n = {len(dataset)}, or less")
    order = torch.randperm(len(dataset), generator=as_generator(seed), device="cpu")
    labels = dataset.labels[order]
    rank = torch.zeros_like(order)  # an image's place among its class, in the shuffled order
    for label in labels.unique():
        rank[labels == label] = torch.arange(int((labels == label).sum()), device="cpu")
    return stack(dataset, order[rank.argsort(stable=True)[:n]])


def stack(dataset: Dataset, indices: Tensor | range | None = None) -> tuple[Tensor, Tensor]:
    """The images and labels at `indices` (all by default) as tensors (n, C, H, W) and (n,)."""
    chosen = list(range(len(dataset)) if indices is None else map(int, indices))
    fetch = getattr(dataset, "__getitems__", lambda wanted: [dataset[i] for i in wanted])
    images, labels = zip(*fetch(chosen), strict=True)
    return torch.stack(images), torch.as_tensor(labels)


def hold_out(dataset: Dataset, n: int | None = None) -> tuple[Tensor, Tensor]:
    """Indices (fit, held_out) of a training set: `n` evenly spread images (by default a thirtieth, 4 to 2,000)."""
    n = max(4, min(len(dataset) // 30, 2000)) if n is None else n
    check_whole(1, n=n)
    if n >= len(dataset):
        raise ValueError(f"{n} images are to be held out of {len(dataset)}; needed: fewer")
    held_out = torch.linspace(0, len(dataset) - 1, n, dtype=torch.float64, device="cpu").long()
    fit = torch.ones(len(dataset), dtype=torch.bool, device="cpu").index_fill(0, held_out, False)
    return fit.nonzero().flatten(), held_out
