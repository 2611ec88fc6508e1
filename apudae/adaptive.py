"""Stronger attackers through a library: AutoAttack and Square (Croce and Hein 2020; Andriushchenko et al. 2020)."""

from typing import Any, Literal

import torch
from pyautoattack import AutoAttack
from torch import Tensor, nn

from .attacks import check_attack
from .contracts import check_at_least, check_known, frozen

VERSIONS = ("standard", "rand")


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    version: Literal["standard", "rand"] = "standard",
    seed: int = 0,
) -> Tensor:
    """AutoAttack: "standard" runs APGD-CE, APGD-T, FAB-T and Square; "rand", for random defenses, APGD with EOT.

    Images that no attack fools come back unchanged. The global random state of torch is as before.
    """
    check_known("version", version, VERSIONS)
    return _run(model, x, y, epsilon, seed, version=version)


def square(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, queries: int = 5000, seed: int = 0) -> Tensor:
    """Square attack: random search with squares of ±epsilon, `queries` looks at the logits, no gradient."""
    check_at_least(1, queries=queries)
    return _run(model, x, y, epsilon, seed, version="custom", attacks=["square"], queries=queries)


def _run(
    model: nn.Module, x: Tensor, y: Tensor, epsilon: float, seed: int, queries: int | None = None, **choice: Any
) -> Tensor:
    x = check_attack(model, x, y, epsilon=epsilon)
    if epsilon == 0:
        return x.clone()
    with frozen(model), torch.random.fork_rng():
        attack = AutoAttack(model, eps=epsilon, seed=seed, device=x.device, **choice)
        if queries is not None:
            attack.square.n_queries = queries
        adversarial, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
    return torch.clamp(adversarial, x - epsilon, x + epsilon).clamp(0, 1)
