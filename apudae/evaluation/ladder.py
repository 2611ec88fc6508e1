"""The attack suite, from the cheapest attack to the strongest, and the worst case of each image over all of it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..contracts import check_batch
from ..files import fingerprint, load_tensors, save_tensors
from ..purification.config import PurifyConfig, resolve_config
from ..purification.purifier import Purifier
from .accuracy import Accuracy, margins
from .grid import run_attack
from .results import Stopwatch, result_row
from .surrogates import surrogates


class SuiteAttack(NamedTuple):
    """One attack of the suite: `attack`, with `parameters`, on one of the defense's surrogates.

    A `warm` one starts from the worst images that those before it have found.
    """

    name: str
    surrogate: str
    attack: str
    parameters: dict[str, Any]
    warm: bool = False


CLEAN = SuiteAttack("clean", "classifier", "clean", {})
GRAY = ("fgsm", "r_fgsm", "bim", "pgd", "deepfool", "cw", "autoattack")


class WorstCase:
    """The worst images (n, C, H, W) found so far for `x`, and in which of `runs` runs each was right, `hits` (n, runs).

    Of images that are right in as many runs, the worse one has the smaller mean of its `margins` (n, runs).
    `broken_by` (n,) is the position of the attack since which no majority of the runs is right, −1 while one is.
    """

    def __init__(self, x: Tensor, runs: int) -> None:
        self.x, self.images = x, x.clone()
        self.margins = torch.full((len(x), runs), torch.inf, device=x.device)
        self.broken_by = torch.full((len(x),), -1, device=x.device)

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
        if not margins.isfinite().all():
            raise ValueError("the classifier's logits are not finite for some images; that is no attack's success")
        if not (far <= epsilon + 1e-6 and low >= 0 and high <= 1):  # so written, NaN is refused too
            raise ValueError(
                f"an attack moved a pixel by {far:g} to [{low:g}, {high:g}]; needed: ε = {epsilon:g}, [0, 1]"
            )
        fewer = (margins > 0).sum(1) - self.hits[todo].sum(1)
        worse = (fewer < 0) | (fewer == 0) & (margins.mean(1) < self.margins[todo].mean(1))
        self.images[todo[worse]], self.margins[todo[worse]] = found[worse], margins[worse]
        lost = 2 * self.hits.sum(1) <= self.hits.shape[1]
        self.broken_by[lost & (self.broken_by < 0)] = position

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
        return {name: getattr(self, name).cpu() for name in ("images", "margins", "broken_by")}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `tensors`."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor.to(self.x.device))


def attack_suite(
    settings: dict[str, dict],
    steps: int = 10,
    queries: int = 20,
    betas: Sequence[float] = (0.01, 0.1, 1),
    gray: Sequence[str] = GRAY,
) -> list[SuiteAttack]:
    """The attack suite, cheapest first; a defense is attacked by those for which it has a surrogate.

    `settings`: those of `attacks.attack_settings`, for ε and for `gray`, the attacks on the classifier alone; `steps`:
    of each attack through the purifier; `queries`: of the black box; `betas`: of counter-attack B.
    """
    bim, epsilon = settings["bim"], settings["bim"]["epsilon"]
    few = {"epsilon": epsilon, "steps": steps}
    long = few | {"step_size": 2.5 * epsilon / steps}  # Madry et al. 2018
    return [
        *(SuiteAttack(f"gray_{name}", "classifier", name, settings[name]) for name in gray),
        SuiteAttack("gray_apgd_dlr", "classifier", "apgd", few | {"loss": "dlr"}),  # where the cross-entropy vanishes
        SuiteAttack("transfer", "other", "pgd", settings["pgd"]),
        SuiteAttack("counter_attack_a", "dae", "bim", bim),
        *(
            SuiteAttack(f"counter_attack_b_{beta:g}", "with_error", "counter_attack_b", bim | {"beta": beta})
            for beta in betas
        ),
        SuiteAttack("bpda_identity", "identity", "bim", long),
        SuiteAttack("bpda_dae", "bpda_dae", "bim", long),
        SuiteAttack("bpda_trajectory", "trajectory", "bim", long),
        SuiteAttack("bpda_apgd_ce", "identity", "apgd", few | {"loss": "ce"}),
        SuiteAttack("bpda_apgd_dlr", "identity", "apgd", few | {"loss": "dlr"}),
        SuiteAttack("square", "black_box", "square", {"epsilon": epsilon, "queries": queries}),
        SuiteAttack("exact_fixed_noise", "fixed", "bim", long),
        SuiteAttack("exact_bim", "exact", "bim", long),
        SuiteAttack("exact_apgd_dlr", "exact", "apgd", few | {"loss": "dlr"}),
        SuiteAttack("exact_warm", "exact", "bim", long, warm=True),
    ]


class Ladder(NamedTuple):
    """A row after each attack and the worst case; a line for each image, with what broke it; the worst images."""

    rows: list[dict]
    record: pd.DataFrame
    images: Tensor


def ladder(
    classifier: nn.Module,
    dae: nn.Module | None,
    config: str | PurifyConfig | nn.Module | None,
    x: Tensor,
    y: Tensor,
    suite: list[SuiteAttack],
    /,
    *,
    other: nn.Module | None = None,
    samples: int = 4,
    runs: int = 5,
    seed: int = 0,
    batch_size: int = 250,
    keep: Path | None = None,
    **facts: Any,
) -> Ladder:
    """Attack a defense by all of `suite` in turn, and keep the worst case of each image.

    The defense is `config`, or a module from images to images, before `classifier`; None: the classifier alone. `other`
    is a classifier to transfer from. An image is right while more than half of its `runs` are, and leaves the work once
    all are wrong; runs and the gradient's `samples` are 1 where nothing is random (a module: `samples=1` says so).
    A row tells what its attack and those before it leave. ValueError for an image outside the ε-ball or [0, 1].
    With the folder `keep`, a killed run goes on where it was. `facts` go into the rows.
    """
    check_batch(classifier, x, y)
    config = resolve_config(config) if isinstance(config, str) else config
    random = config.is_random if isinstance(config, PurifyConfig) else isinstance(config, nn.Module) and samples > 1
    samples, runs = (samples, runs) if random else (1, 1)
    about = {"seed": seed, "device": x.device, "purifier_config": config if isinstance(config, PurifyConfig) else None}
    seen = partial(surrogates, classifier, dae=dae, other=other, samples=samples, probe=x[:1])
    known = seen(_purifier(dae, config, seed))
    chosen = [CLEAN, *(each for each in suite if each.surrogate in known)]
    judges = [nn.Sequential(_purifier(dae, config, seed + run) or nn.Identity(), classifier) for run in range(runs)]
    worst, rows = WorstCase(x, runs), []
    models = [module for module in (judges[0], dae, other) if module is not None]
    path = keep and keep / f"ladder-{fingerprint(models, x, y, chosen, samples, runs, seed, facts)}.safetensors"
    if path and path.is_file():
        tensors, rows = load_tensors(path, advice="delete it, and it is made again")
        worst.load(tensors)
    for position, each in enumerate(progress := tqdm(chosen, desc="attack suite")):
        if position >= len(rows):
            with Stopwatch() as watch:
                purifier = _purifier(dae, config, seed + runs + position)  # not the random numbers of the judges
                todo = worst.todo
                if len(todo):
                    # a random purifier's draws go on from batch to batch, which a batch read from disk would not know
                    folder = keep if samples == 1 or each.surrogate == "classifier" else None
                    options = each.parameters | {"seed": seed, "batch_size": batch_size, "keep": folder}
                    start, model = [worst.images[todo]] if each.warm else [], seen(purifier)[each.surrogate]
                    found = run_attack(each.attack, model, x[todo], y[todo], *start, **options)
                    left = torch.stack([margins(judge, found, y[todo], batch_size) for judge in judges], 1)
                    worst.update(todo, found, left, position, each.parameters.get("epsilon", 0))
            described = {"attack_parameters": each.parameters | {"eot_samples": samples}, "seconds": watch.seconds}
            described |= {"kind": "ladder", "position": position}
            rows.append(_ladder_row(worst, attack=each.name, **described, **about, **facts))
            if path:
                save_tensors(path, worst.tensors, rows)
        progress.set_postfix(worst_case=rows[position]["accuracy"])
    epsilon = max((each.parameters.get("epsilon", 0.0) for each in chosen), default=0.0)
    parameters = {"suite": [each.name for each in chosen], "eot_samples": samples, "epsilon": epsilon}
    described = {"attack_parameters": parameters, "kind": "worst_case", "seconds": sum(row["seconds"] for row in rows)}
    total = _ladder_row(worst, attack="worst_case", **described, **about, **facts)
    broken_by = [[*(each.name for each in chosen), ""][position] for position in worst.broken_by.tolist()]
    record = pd.DataFrame({"label": y.tolist(), "broken_by": broken_by, "runs_right": worst.hits.sum(1).tolist()})
    return Ladder([*rows, total], record, worst.images)


def _purifier(dae: nn.Module | None, config: PurifyConfig | nn.Module | None, seed: int) -> nn.Module | None:
    return Purifier(dae, config, seed=seed) if isinstance(config, PurifyConfig) else config


def _ladder_row(worst: WorstCase, **facts: Any) -> dict:
    majority = Accuracy(int((2 * worst.hits.sum(1) > worst.hits.shape[1]).sum()), len(worst.hits))
    return result_row(majority, **facts) | worst.spread
