"""AutoAttack, its Auto-PGD, FAB and Square (Croce and Hein 2020; Andriushchenko et al. 2020), through a library."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import APGDAttack
from torch import Tensor, nn

from ..contracts import check_known, check_logits, check_whole, drawn_seed, frozen
from .common import Norm, check_attack, check_start, finite, project
from .losses import LOSSES


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

    The targeted difference-of-logits ratio of APGD-T compares four logits: a model of fewer classes meets the other
    three ("rand" refuses it). Images that no attack fools come back unchanged. The global random state of torch is as
    before.
    """
    check_known("version", version, ("standard", "rand"))
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


def fab(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    targets: int = 9,
    steps: int = 100,
    seed: int | torch.Generator = 0,
) -> Tensor:
    """FAB-T: the nearest image of each of the `targets` likeliest wrong classes (Croce and Hein 2020)."""
    check_whole(1, targets=targets, steps=steps)
    return _run(model, x, y, epsilon, seed, version="custom", attacks=["fab-t"], targets=targets, steps=steps)


class _AutoPGD(APGDAttack):
    """The library's, on any loss (n,) of logits and labels."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], **options: Any) -> None:
        super().__init__(lambda x: model(_with_finite_gradient(x)), loss="dlr", **options)
        self.dlr_loss = loss


def _with_finite_gradient(x: Tensor) -> Tensor:
    """`x`; on the way back 0 where the gradient is no finite number, as `common.gradient_of` has it."""
    x = x.clone()
    if x.requires_grad:
        x.register_hook(finite)
    return x


def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    start: Tensor | None = None,
    *,
    epsilon: float,
    loss: str = "ce",
    steps: int = 100,
    restarts: int = 1,
    target: Tensor | None = None,
    norm: Norm = "linf",
    seed: int | torch.Generator = 0,
) -> Tensor:
    """Auto-PGD: momentum, and a step size that halves where the loss stalls (Croce and Hein 2020).

    `loss` is one of `losses.LOSSES`, towards the class `target` (n,) if that is given; `norm` "l2" makes `epsilon` a
    length. The first run begins at `start`, if given; an image leaves the work once a run has fooled the model. The
    others come back where their loss was highest.
    """
    x = check_attack(model, x, y, epsilon=epsilon, steps=steps, loss=loss, target=target, norm=norm)
    check_whole(1, restarts=restarts)
    begin, number = None if start is None else check_start(start, x, epsilon, norm), drawn_seed(seed)
    if epsilon == 0:
        return x.clone()
    logger = logging.getLogger("apgd")
    logger.setLevel(logging.ERROR)  # of zero gradients: the suite has attacks for these
    options = {"eps": epsilon, "n_iter": int(steps), "norm": {"linf": "Linf", "l2": "L2"}[norm], "device": x.device}
    best, highest = x.clone(), torch.full_like(x[:, 0, 0, 0], -torch.inf)
    with frozen(model), torch.random.fork_rng():
        torch.manual_seed(number)
        with torch.no_grad():
            todo = torch.nonzero(model(x).argmax(1) == y).flatten()
        for run in range(restarts):
            if len(todo) == 0:
                break
            goal = None if target is None else target[todo]
            attack = _AutoPGD(model, partial(LOSSES[loss], target=goal), logger=logger, **options)
            attack.init_hyperparam(x)
            first = begin[todo] if begin is not None and run == 0 else None
            reached, right, losses, fooling = attack.attack_single_run(x[todo], y[todo], x_init=first)
            losses = losses.masked_fill(~right, torch.inf)
            reached[~right] = fooling[~right]
            better = losses > highest[todo]
            best[todo[better]], highest[todo[better]] = reached[better], losses[better]
            todo = todo[right]
    return project(best.detach(), x, epsilon, norm)


def _run(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    epsilon: float,
    seed: int | torch.Generator,
    queries: int = 5000,
    targets: int = 9,
    steps: int = 100,
    **choice: Any,
) -> Tensor:
    x = check_attack(model, x, y, epsilon=epsilon)
    classes = check_logits(model, x[:1], needed=4 if choice["version"] == "rand" else 2)
    if choice["version"] == "standard" and classes < 4:
        choice = {"version": "custom", "attacks": ["apgd-ce", "fab-t", "square"]}
    number = drawn_seed(seed)
    if epsilon == 0:
        return x.clone()
    with frozen(model), torch.random.fork_rng():
        attack = AutoAttack(model, eps=epsilon, seed=number, device=x.device, **choice)
        attack.logger.setLevel(logging.ERROR)  # its warnings of random and of dynamic defenses: the ladder is for these
        attack.square.n_queries = queries
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(targets, classes - 1)
        attack.fab.n_iter = steps
        adversarial, _ = attack.run_standard_evaluation(x, y, batch_size=len(x))
    return project(adversarial, x, epsilon)
