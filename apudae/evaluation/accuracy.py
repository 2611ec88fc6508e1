"""Counting: which images a classifier gets right, by which metric, with which interval."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..batching import in_batches
from ..contracts import check_batch, frozen


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `n` images, with the 95 % Wilson score interval; `others`: the same by other metrics, by name."""

    correct: int
    n: int
    others: dict[str, "Accuracy"] = field(default_factory=dict, compare=False, repr=False)

    @property
    def value(self) -> float:
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The Wilson score interval (Wilson 1927), which stays in [0, 1] and is sensible at 0 and at 1."""
        z = 1.959964
        centre = self.value + z**2 / (2 * self.n)
        half = z * math.sqrt(self.value * (1 - self.value) / self.n + z**2 / (4 * self.n**2))
        return max(0.0, (centre - half) / (1 + z**2 / self.n)), min(1.0, (centre + half) / (1 + z**2 / self.n))

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}]"


NO_LABEL = -1
MANY_CLASSES, BEST = 100, (5, 10)  # from so many classes on, top-5 and top-10 are counted too


def accuracy(model: nn.Module, x: Tensor | Sequence[Tensor], y: Tensor, *, clean: Tensor | None = None) -> Accuracy:
    """Share of the images `x` that `model` classifies as `y`; of several draws of each the mean probabilities decide.

    From 100 classes on, the accuracy's `others` are "top-5" and "top-10": `y` is among so many likeliest labels. With
    `clean`, the same images before any attack, also "top-1 of right", …: of those images alone that were right then,
    by the same metric, so that clean images have 1.0, as in the paper's Table 2.
    """
    hits = right(model, x, y)
    return counted(hits, right(model, clean, y) if clean is not None and len(hits) > 1 else {})


def counted(hits: dict[str, Tensor], before: dict[str, Tensor]) -> Accuracy:
    """The `accuracy` of `hits`, what `right` says of images; `before` is what it said of them before the attack.

    Of fewer than 100 classes no metric asks for that.
    """
    counts = {name: Accuracy(int(hit.sum()), len(hit)) for name, hit in hits.items()}
    for name, first in before.items():
        if len(hits) > 1 and first.any():
            counts[f"{name} of right"] = Accuracy(int((hits[name] & first).sum()), int(first.sum()))
    first = counts.pop("top-1")
    return Accuracy(first.correct, first.n, counts)


def right(model: nn.Module, x: Tensor | Sequence[Tensor], y: Tensor) -> dict[str, Tensor]:
    """Which images are right, by each metric (n,)."""
    for draw in _draws(x):
        check_batch(model, draw, y)
    found = best_labels(model, x, max(BEST)) == y[:, None]
    sizes = (1, *BEST) if found.shape[1] > 1 else (1,)
    return {f"top-{size}": found[:, :size].any(1) for size in sizes}


@torch.no_grad()
def best_labels(model: nn.Module, x: Tensor | Sequence[Tensor], k: int, batch_size: int = 512) -> Tensor:
    """The `k` likeliest labels, best first (n, k); of fewer than 100 classes the likeliest alone (n, 1).

    Of several draws of each image, by the mean of their probabilities (a soft vote).
    −1, with a warning, where the logits are no finite numbers: such an image is never right.
    """

    def best(*batches: Tensor) -> Tensor:
        logits = torch.stack([*map(model, batches)])
        votes = logits.double().softmax(-1).mean(0) if len(batches) > 1 else logits[0]
        labels = votes.topk(k).indices if votes.shape[1] >= MANY_CLASSES else votes.argmax(1, keepdim=True)
        return labels.masked_fill(~logits.isfinite().all(2).all(0)[:, None], NO_LABEL)

    with frozen(model):
        labels = in_batches(best, *_draws(x), batch_size=batch_size, name="classify")
    if strange := int((labels[:, 0] == NO_LABEL).sum()):
        warnings.warn(
            f"{strange} of {len(labels)} images have logits that are not finite: counted as wrong", stacklevel=3
        )
    return labels


def _draws(x: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    if isinstance(x, list | tuple) and not x:
        raise ValueError("there are no draws of the images; needed: one or more")
    return x if isinstance(x, list | tuple) else [x]


def predict(model: nn.Module, x: Tensor, batch_size: int = 512) -> Tensor:
    """Predicted labels (n,)."""
    return best_labels(model, x, 1, batch_size)[:, 0]


def captions(model: nn.Module, x: Tensor, classes: list[str]) -> list[str]:
    """What `model` reads in each image, in words; a class without a name by its number."""
    names = dict(enumerate(classes)) | {NO_LABEL: "nothing"}
    return [f"reads {names.get(label, label)}" for label in predict(model, x).tolist()]
