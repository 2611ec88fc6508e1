"""AutoAttack, Auto-PGD and Square (Croce and Hein 2020; Andriushchenko et al. 2020), through a library."""

import logging
from typing import Any, Literal

import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from ..contracts import as_generator, check_known, check_logits, check_whole, frozen
from .common import check_attack, project

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
    check_logits(model, x[:1], needed=3 if loss == "dlr" else 2)  # of the difference-of-logits ratio
    number = _as_integer(seed)
    if epsilon == 0:
        return x.clone()
    options = {"n_iter": steps, "loss": loss, "seed": number, "device": x.device, "logger": logging.getLogger("apgd")}
    options["logger"].setLevel(logging.ERROR)  # of zero gradients: the suite has attacks for these
    with frozen(model), torch.random.fork_rng():
        found = APGDAttack(model, eps=epsilon, **options).perturb(x, y)
    return project(found.detach(), x, epsilon)


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
    classes = check_logits(model, x[:1], needed=4 if choice["version"] in VERSIONS else 2)
    number = _as_integer(seed)
    if epsilon == 0:
        return x.clone()
    with frozen(model), torch.random.fork_rng():
        attack = AutoAttack(model, eps=epsilon, seed=number, device=x.device, **choice)
        attack.logger.setLevel(logging.ERROR)  # its warnings of random and of dynamic defenses: the ladder is for these
        attack.square.n_queries = queries
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
        adversarial, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
    return project(adversarial, x, epsilon)


def _as_integer(seed: int | torch.Generator) -> int:
    return int(torch.randint(2**31, (1,), generator=as_generator(seed)))
