"""Counter-attack B of Appendix A: fool the classifier and keep the reconstruction error small."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contracts import check_at_least, frozen
from ..models.autoencoders import squared_distance
from .common import check_attack, default_steps, gradient_of, project


class ClassifierWithReconstructionError(nn.Module):
    """`classifier`, and beside it the reconstruction error of an image, `errors(x)`: what counter-attack B attacks."""

    def __init__(self, classifier: nn.Module, dae: nn.Module) -> None:
        super().__init__()
        self.classifier, self.dae = classifier, dae

    def errors(self, x: Tensor) -> Tensor:
        """dist of each image (n,), differentiable."""
        return squared_distance(x, self.dae(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x)


def counter_attack_b(
    model: ClassifierWithReconstructionError,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    beta: float,
    step_size: float = 0.01,
    steps: int | None = None,
) -> Tensor:
    """BIM on J(classifier(x), y) − beta·dist(x) (Eq. 4): fool the classifier and leave the purifier little to see.

    `model` holds the classifier and the autoencoder. ⌊2ε/α + 2⌋ `steps` by default, as of BIM.
    """
    x = check_attack(model, x, y, epsilon=epsilon, step_size=step_size, steps=steps)
    check_at_least(0, beta=beta)
    moved = x
    with frozen(model):
        for _ in range(default_steps(epsilon, step_size, steps)):
            moved = moved.detach().requires_grad_()
            with torch.enable_grad():
                # paper: prints + β and forgets the classifier; here: − β, because the text wants the error small
                loss = F.cross_entropy(model(moved), y, reduction="sum") - beta * model.errors(moved).sum()
            moved = project(moved.detach() + step_size * gradient_of(loss, moved).sign(), x, epsilon)
    return moved
