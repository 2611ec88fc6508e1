"""Stronger attackers through a library: AutoAttack and Square (Croce and Hein 2020; Andriushchenko et al. 2020)."""

import logging
from typing import Any, Literal

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from .attacks import check_attack, project
from .contracts import as_generator, check_known, check_whole, frozen

NAMES = ("autoattack", "square")
VERSIONS = ("standard", "rand")


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
    with torch.no_grad(), frozen(model):
        classes = model(x[:1]).shape[1]
    if classes < 4 and choice["version"] in VERSIONS:
        raise ValueError(f"the model has {classes} classes; AutoAttack's difference-of-logits ratio needs at least 4")
    drawn = int(torch.randint(2**31, (1,), generator=as_generator(seed)))
    if epsilon == 0:
        return x.clone()
    with frozen(model), torch.random.fork_rng():
        attack = AutoAttack(model, eps=epsilon, seed=drawn, device=x.device, **choice)
        attack.logger.setLevel(logging.WARNING)
        attack.square.n_queries = queries
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, classes - 1)
        adversarial, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
    return project(adversarial, x, epsilon)
