"""What an attacker can attack in place of a defense: stand-ins, expectation, the trajectory, all steps."""

import torch
from torch import Tensor, nn

from ..attacks import ClassifierWithReconstructionError
from ..autograd import StraightThrough
from ..contracts import check_whole
from ..purification.config import PurifyConfig
from ..purification.purifier import Purifier


class BPDA(nn.Module):
    """The images of `purifier`, any module, with the gradient of `stand_in` or the identity (Athalye et al. 2018)."""

    def __init__(self, purifier: nn.Module, stand_in: nn.Module | None = None) -> None:
        super().__init__()
        self.purifier, self.stand_in = purifier, stand_in or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return StraightThrough.apply(self.stand_in(x), self.purifier(x.detach()).detach())


class EOT(nn.Module):
    """The mean logits of `samples` draws of a random `model`: expectation over transformation (Athalye et al. 2018)."""

    def __init__(self, model: nn.Module, samples: int) -> None:
        super().__init__()
        check_whole(1, samples=samples)
        self.model, self.samples = model, samples

    def extra_repr(self) -> str:
        return f"samples={self.samples}"

    def forward(self, x: Tensor) -> Tensor:
        draws = torch.stack([self.model(x) for _ in range(self.samples)])
        return draws[0] + (draws - draws[0]).mean(0)  # so that equal draws give themselves, bit for bit


class FixedNoise(nn.Module):
    """`model`, with the random numbers of `purifier`, a part of it, the same in each call."""

    def __init__(self, model: nn.Module, purifier: nn.Module) -> None:
        super().__init__()
        self.model, self.purifier, self.calls = model, purifier, purifier.calls

    def forward(self, x: Tensor) -> Tensor:
        self.purifier.calls = self.calls
        return self.model(x)


class Trajectory(nn.Module):
    """The logits of the purified image, with the mean of the classifier's gradients at all iterates of Eq. 2.

    The purifier counts as the identity on the way back, at each iterate. An attacker of this model moves the whole path
    into the wrong class, not its end alone: the intermediate states of DiffAttack (Kang et al. 2023), with the
    classifier's loss in place of their reconstruction loss.
    """

    def __init__(self, purifier: Purifier, classifier: nn.Module) -> None:
        super().__init__()
        self.purifier, self.classifier = purifier, classifier

    def forward(self, x: Tensor) -> Tensor:
        purified, lines = self.purifier.recorded(x)
        logits = self.classifier(StraightThrough.apply(x, purified))
        along = [self.classifier(StraightThrough.apply(x, line.images)) for line in lines]
        return StraightThrough.apply(torch.stack([*along, logits]).mean(0), logits.detach())


def surrogates(
    classifier: nn.Module,
    purifier: nn.Module | None,
    dae: nn.Module | None,
    other: nn.Module | None,
    samples: int,
    probe: Tensor,
) -> dict[str, nn.Module]:
    """What an attacker can attack in place of `purifier` and `classifier`, by name; only what this defense has.

    `other` is a classifier to transfer from, `samples` the draws that a gradient is the mean of where the purifier is
    random (1: it is not), `probe` an image that tells whether a purifier that is no `Purifier` can be differentiated.
    """
    found = {"classifier": classifier} | ({} if other is None else {"other": other})
    if dae is not None:
        direct = Purifier(dae, "direct", "exact")
        found |= {
            "dae": nn.Sequential(direct, classifier),
            "with_error": ClassifierWithReconstructionError(classifier, dae),
        }
    if purifier is None:
        return found
    found["black_box"] = nn.Sequential(purifier, classifier)
    through = {"identity": nn.Sequential(BPDA(purifier), classifier)}
    if dae is not None:
        through["bpda_dae"] = nn.Sequential(BPDA(purifier, direct), classifier)
    if isinstance(purifier, Purifier):
        exact = Purifier(purifier.dae, purifier.config, "exact", purifier.seed)
        through |= {"trajectory": Trajectory(purifier, classifier), "exact": nn.Sequential(exact, classifier)}
        if samples > 1:
            found["fixed"] = FixedNoise(through["exact"], exact)
        if purifier.config.noise_std:  # counter-attack A by who knows the noise
            one_pass = PurifyConfig(direct=True, noise_std=purifier.config.noise_std)
            noisy = Purifier(purifier.dae, one_pass, "exact", purifier.seed)
            through["noisy_dae"] = nn.Sequential(noisy, classifier)
    elif purifier(probe.detach().clone().requires_grad_()).requires_grad:
        through["exact"] = found["black_box"]
    return found | ({name: EOT(model, samples) for name, model in through.items()} if samples > 1 else through)
