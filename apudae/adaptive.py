"""Attackers who know the defense: the paper's Appendix A, and what has broken other purifiers.

Attacks here have the contract of `apudae.attacks`. What an attacker sees of a purifier is a model (`views`), on which
any attack can run: with a stand-in's gradients, along the trajectory, through all steps, in expectation.
AutoAttack, APGD and Square come through a library (Croce and Hein 2020; Andriushchenko et al. 2020).
"""

import logging
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from .attacks import check_attack, default_steps, project
from .contracts import as_generator, check_at_least, check_known, check_whole, frozen
from .parts import BPDA, EOT, FixedNoise, StraightThrough, Watched  # wrappers of models, for every attacker
from .purify import Purifier

NAMES = ("autoattack", "square", "apgd", "counter_attack_b")
VERSIONS, LOSSES = ("standard", "rand"), ("ce", "dlr")


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    version: Literal["standard", "rand"] = "standard",
    seed: int | torch.Generator = 0,
) -> Tensor:
    """AutoAttack: "standard" runs APGD-CE, APGD-T, FAB-T and Square; "rand", for random defenses, APGD with EOT.

    Images that no attack fools come back unchanged. The global random state of torch is as before.
    """
    check_known("version", version, VERSIONS)
    return _run(model, x, y, epsilon, seed, version=version)


def square(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    queries: int = 5000,
    seed: int | torch.Generator = 0,
) -> Tensor:
    """Square attack: random search with squares of ±epsilon, `queries` looks at the logits, no gradient."""
    check_whole(1, queries=queries)
    return _run(model, x, y, epsilon, seed, version="custom", attacks=["square"], queries=queries)


def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    loss: Literal["ce", "dlr"] = "ce",
    steps: int = 100,
    seed: int | torch.Generator = 0,
) -> Tensor:
    """Auto-PGD, whose step size halves where the loss stalls (Croce and Hein 2020).

    `loss`: the cross-entropy, or the difference-of-logits ratio, which does not vanish where a classifier is sure.
    Images that it cannot fool come back unchanged.
    """
    x = check_attack(model, x, y, epsilon=epsilon, steps=steps)
    check_known("loss", loss, LOSSES)
    _classes(model, x, needed=3 if loss == "dlr" else 2)
    drawn = _drawn(seed)
    if epsilon == 0:
        return x.clone()
    options = {"n_iter": steps, "loss": loss, "seed": drawn, "device": x.device, "logger": logging.getLogger("apgd")}
    options["logger"].setLevel(logging.ERROR)  # of zero gradients, which are why there are other rungs
    with frozen(model), torch.random.fork_rng():
        found = APGDAttack(model, eps=epsilon, **options).perturb(x, y)
    return project(found.detach(), x, epsilon)


def counter_attack_b(
    model: Watched,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    beta: float,
    step_size: float = 0.01,
    steps: int | None = None,
) -> Tensor:
    """BIM on J(classifier(x), y) − beta·dist(x) (Eq. 4): fool the classifier and leave the purifier little to see.

    `model` is the classifier as `Watched` by the autoencoder. ⌊2ε/α + 2⌋ `steps` by default, as of BIM.
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
            (gradient,) = torch.autograd.grad(loss, moved)
            moved = project(moved.detach() + step_size * gradient.sign(), x, epsilon)
    return moved


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
        self.purifier.record = lines = []
        try:
            purified = self.purifier(x).detach()
        finally:
            self.purifier.record = None
        logits = self.classifier(StraightThrough.apply(x, purified))
        along = [self.classifier(StraightThrough.apply(x, line.images)) for line in lines]
        return StraightThrough.apply(torch.stack([*along, logits]).mean(0), logits.detach())


class Rung(NamedTuple):
    """One rung of the ladder: the attack named `attack`, with `parameters`, on one of the defense's `views`.

    A `warm` one starts from the worst images that the rungs before it have found.
    """

    name: str
    view: str
    attack: str
    parameters: dict[str, Any]
    warm: bool = False


CLEAN = Rung("clean", "classifier", "clean", {})


class WorstCase:
    """The worst images (n, C, H, W) found so far for `x`, and in which of `runs` runs each was right, `hits` (n, runs).

    Of images that are right in as many runs, the worse one has the smaller mean of its `margins` (n, runs).
    `felled` (n,) is the position of the rung since which no majority of the runs is right, −1 while one is.
    """

    def __init__(self, x: Tensor, runs: int) -> None:
        self.x, self.images = x, x.clone()
        self.margins = torch.full((len(x), runs), torch.inf, device=x.device)
        self.felled = torch.full((len(x),), -1, device=x.device)

    @property
    def hits(self) -> Tensor:
        """In which of the runs each image is right (n, runs)."""
        return self.margins > 0

    @property
    def todo(self) -> Tensor:
        """Indices of the images that were right in a run at least."""
        return torch.nonzero(self.hits.any(1)).flatten()

    def update(self, todo: Tensor, found: Tensor, margins: Tensor, position: int, epsilon: float) -> None:
        """Take `found`, of the images `todo`, where it is worse. ValueError outside the ε-ball or [0, 1]."""
        far, low, high = (found - self.x[todo]).abs().max().item(), found.min().item(), found.max().item()
        if far > epsilon + 1e-6 or low < 0 or high > 1:
            raise ValueError(
                f"an attack moved a pixel by {far:g} to [{low:g}, {high:g}]; needed: ε = {epsilon:g}, [0, 1]"
            )
        fewer = (margins > 0).sum(1) - self.hits[todo].sum(1)
        worse = (fewer < 0) | (fewer == 0) & (margins.mean(1) < self.margins[todo].mean(1))
        self.images[todo[worse]], self.margins[todo[worse]] = found[worse], margins[worse]
        lost = 2 * self.hits.sum(1) <= self.hits.shape[1]
        self.felled[lost & (self.felled < 0)] = position

    @property
    def spread(self) -> dict[str, float]:
        """Mean and standard deviation of the runs' accuracies, and the share of images that are right in all runs."""
        means = self.hits.double().mean(0)
        found = {
            "mean": means.mean(),
            "std": means.std(correction=0),
            "worst_of_runs": self.hits.all(1).double().mean(),
        }
        return {"runs": len(means)} | {name: round(value.item(), 5) for name, value in found.items()}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All but `x`, to be kept; `load` takes them back."""
        return {name: getattr(self, name).cpu() for name in ("images", "margins", "felled")}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `tensors`."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor.to(self.x.device))


GRAY = ("fgsm", "r_fgsm", "bim", "pgd", "deepfool", "cw", "autoattack")


def rungs(
    paper: dict[str, dict],
    steps: int = 10,
    queries: int = 20,
    betas: Sequence[float] = (0.01, 0.1, 1),
    gray: Sequence[str] = GRAY,
) -> list[Rung]:
    """The ladder, cheapest rung first; a defense is attacked on those rungs for which it has a view.

    `paper`: one of `attacks.PAPER`, for ε and the attacks of the paper; `steps`: of each attack through the purifier;
    `queries`: of the black box; `betas`: of counter-attack B; `gray`: the attacks on the classifier alone.
    """
    bim, epsilon = paper["bim"], paper["bim"]["epsilon"]
    few = {"epsilon": epsilon, "steps": steps}
    long = few | {"step_size": 2.5 * epsilon / steps}  # Madry et al. 2018
    return [
        *(Rung(f"gray_{name}", "classifier", name, paper[name]) for name in gray),
        Rung("transfer", "other", "pgd", paper["pgd"]),
        Rung("counter_attack_a", "dae", "bim", bim),
        *(Rung(f"counter_attack_b_{beta:g}", "watched", "counter_attack_b", bim | {"beta": beta}) for beta in betas),
        Rung("bpda_identity", "identity", "bim", long),
        Rung("bpda_dae", "bpda_dae", "bim", long),
        Rung("bpda_trajectory", "trajectory", "bim", long),
        Rung("bpda_apgd_ce", "identity", "apgd", few | {"loss": "ce"}),
        Rung("bpda_apgd_dlr", "identity", "apgd", few | {"loss": "dlr"}),
        Rung("square", "black_box", "square", {"epsilon": epsilon, "queries": queries}),
        Rung("exact_fixed_noise", "fixed", "bim", long),
        Rung("exact_bim", "exact", "bim", long),
        Rung("exact_apgd_dlr", "exact", "apgd", few | {"loss": "dlr"}),
        Rung("exact_warm", "exact", "bim", long, warm=True),
    ]


def views(
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
        found |= {"dae": nn.Sequential(direct, classifier), "watched": Watched(classifier, dae)}
    if purifier is None:
        return found
    found["black_box"] = nn.Sequential(purifier, classifier)
    through = {"identity": nn.Sequential(BPDA(purifier), classifier)}
    if dae is not None:
        through["bpda_dae"] = nn.Sequential(BPDA(purifier, direct), classifier)
    if isinstance(purifier, Purifier):
        exact = Purifier(purifier.dae, purifier.config, "exact", purifier.generator)
        through |= {"trajectory": Trajectory(purifier, classifier), "exact": nn.Sequential(exact, classifier)}
        if samples > 1:
            found["fixed"] = FixedNoise(through["exact"], exact)
    elif purifier(probe.detach().clone().requires_grad_()).requires_grad:
        through["exact"] = found["black_box"]
    return found | ({name: EOT(model, samples) for name, model in through.items()} if samples > 1 else through)


def _run(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    seed: int | torch.Generator,
    queries: int = 5000,
    **choice: Any,
) -> Tensor:
    x = check_attack(model, x, y, epsilon=epsilon)
    classes = _classes(model, x, needed=4 if choice["version"] in VERSIONS else 2)
    drawn = _drawn(seed)
    if epsilon == 0:
        return x.clone()
    with frozen(model), torch.random.fork_rng():
        attack = AutoAttack(model, eps=epsilon, seed=drawn, device=x.device, **choice)
        attack.logger.setLevel(logging.ERROR)  # its warnings of random and of dynamic defenses: the ladder is for these
        attack.square.n_queries = queries
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
        adversarial, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
    return project(adversarial, x, epsilon)


def _classes(model: nn.Module, x: Tensor, needed: int) -> int:
    with torch.no_grad(), frozen(model):
        classes = model(x[:1]).shape[1]
    if classes < needed:
        raise ValueError(f"the model has {classes} classes; the difference-of-logits ratio needs at least {needed}")
    return classes


def _drawn(seed: int | torch.Generator) -> int:
    return int(torch.randint(2**31, (1,), generator=as_generator(seed)))
