"""What an attacker raises: cross-entropy, margin and difference-of-logits ratio, untargeted and targeted."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contracts import check_known
from ..models.classifiers import margin


def cross_entropy(logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    """−log p_y, or log p_target."""
    if target is None:
        return F.cross_entropy(logits, y, reduction="none")
    return -F.cross_entropy(logits, target, reduction="none")


def negative_margin(logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    """max z_other − z_y, or z_target − z_y (Carlini and Wagner 2017): it does not vanish where a classifier is sure."""
    if target is None:
        return -margin(logits, y)
    rows = torch.arange(len(y), device=y.device)
    return logits[rows, target] - logits[rows, y]


def difference_of_logits_ratio(logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    """The margin over the spread of the largest logits (Croce and Hein 2020): the logits' scale does not matter."""
    largest = logits.sort(1, descending=True).values
    low = largest[:, 2] if target is None else (largest[:, 2] + largest[:, 3]) / 2
    return negative_margin(logits, y, target) / (largest[:, 0] - low + 1e-12)


LOSSES: dict[str, Callable[..., Tensor]] = {  # of logits, labels and targets
    "ce": cross_entropy,
    "margin": negative_margin,
    "dlr": difference_of_logits_ratio,
}


def classes_needed(loss: str, targeted: bool) -> int:
    """How many classes a loss needs: the ratio looks at the third largest logit, towards a target at the fourth."""
    return 3 + targeted if loss == "dlr" else 2


def check_loss(loss: str, classes: int, y: Tensor, target: Tensor | None) -> None:
    """ValueError for an unknown loss, too few classes, or a target that is no other class than the label."""
    check_known("loss", loss, LOSSES)
    needed = classes_needed(loss, target is not None)
    if classes < needed:
        raise ValueError(f"the model has {classes} classes; needed for the loss {loss!r}: at least {needed}")
    if target is None:
        return
    if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.shape != y.shape:
        given = (
            f"{target.dtype} of shape {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
        )
        raise ValueError(f"target is {given}; needed: int64 of shape ({len(y)},), a class for each image")
    if target.device != y.device or not (target.min().item() >= 0 and target.max().item() < classes):
        raise ValueError(
            f"target holds {target.unique().tolist()[:9]}; needed: the classes 0 to {classes - 1}, on {y.device}"
        )
    if (target == y).any():
        raise ValueError("target is the label itself for some images; needed: another class")
