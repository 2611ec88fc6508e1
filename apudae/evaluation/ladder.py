"""The attack suite, from the cheapest attack to the strongest, and the worst case of each image over all of it."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn

from ..attacks.losses import classes_needed
from ..batching import in_batches, progress
from ..contracts import check_batch, check_known, frozen
from ..files import fingerprint, load_tensors, save_tensors
from ..models.classifiers import margin
from ..purification.config import PurifyConfig, resolve_config
from ..purification.purifier import Purifier
from .accuracy import Accuracy
from .grid import run_attack
from .results import Stopwatch, result_row
from .surrogates import surrogates


class SuiteAttack(NamedTuple):
    """One attack of the suite: `attack`, with `parameters`, on one of the defense's surrogates.

    A `warm` one starts from the worst images that those before it have found. `target` k moves each image to the k-th
    likeliest wrong class of the defense on clean images, 0 away from its own. Of the images that still stand, it gets
    the `share` with the smallest margins.
    """

    name: str
    surrogate: str
    attack: str
    parameters: dict[str, Any]
    warm: bool = False
    target: int = 0
    share: float = 1.0


class Budget(NamedTuple):
    """How much work an attack suite is: pairs are steps and restarts."""

    name: str
    apgd: int  # steps of Auto-PGD on the classifier and on one pass through the autoencoder
    targets: int  # likeliest wrong classes that targeted attacks move images to
    joint: tuple[int, int]
    bpda: tuple[int, int]
    exact: tuple[int, int]
    queries: int  # of the black box
    fab: int  # steps of FAB
    samples: int  # draws that a random purifier's gradient is the mean of
    choices: int  # draws by which a random purifier's worst images are chosen
    verdicts: int  # further draws that judge them


BUDGETS = {
    "quick": Budget("quick", 20, 1, (20, 1), (5, 1), (5, 1), 20, 2, 4, 3, 20),
    "full": Budget("full", 100, 3, (80, 3), (40, 1), (50, 1), 500, 20, 16, 5, 20),
    # twice the steps and twice the restarts of "full", to see whether that is enough
    "double": Budget("double", 200, 3, (160, 6), (80, 2), (100, 2), 1000, 40, 16, 5, 20),
}
# shares of the standing images, by smallest margin, that the dearest attacks try; seeds apart from the choosers'
QUARTER, TENTH, JUDGES, ATTACKER = 0.25, 0.1, 10_000, 20_000
CLEAN = SuiteAttack("clean", "classifier", "clean", {})
GRAY = ("fgsm", "r_fgsm", "bim", "pgd", "deepfool", "cw", "autoattack")
BETAS = (0.01, 0.1, 1)  # of the paper's counter-attack B
# bounds of the joint attack, in σ about μ: E leaves it alone, or moves it a little; D raises it; C hardly moves it
BOUNDS = {
    "joint_below_mu": (None, 0.0),
    "joint_above_mu": (None, 1.0),
    "joint_low": (None, -0.5),
    "joint_at_mu": (-0.25, 0.25),
}


class WorstCase:
    """The worst images (n, C, H, W) found so far for `x`, chosen by some draws of a random defense, judged by others.

    `margins` (n, choices) are those of the draws that choose: a candidate is worse if fewer of them are right, or as
    many with a smaller mean. `right` (n, verdicts) tells in which of the other draws the image is right, `voted` (n,)
    whether most of these read its label. `broken_by` (n,) is the position of the attack that made the image which is
    not right in most of them, −1 where it is. Where nothing is random one draw does both.
    """

    def __init__(self, x: Tensor, choices: int, verdicts: int) -> None:
        self.x, self.images = x, x.clone()
        self.margins = torch.full((len(x), choices), torch.inf, device=x.device)
        self.right = torch.ones(len(x), verdicts, dtype=torch.bool, device=x.device)
        self.voted = torch.ones(len(x), dtype=torch.bool, device=x.device)
        self.broken_by = torch.full((len(x),), -1, device=x.device)

    @property
    def todo(self) -> Tensor:
        """Indices of the images that were right in a draw at least."""
        return torch.nonzero((self.margins > 0).any(1)).flatten()

    @property
    def stands(self) -> Tensor:
        """Which images are right in more than half of the draws (n,)."""
        return 2 * self.right.sum(1) > self.right.shape[1]

    def update(self, todo: Tensor, found: Tensor, margins: Tensor, epsilon: float) -> Tensor:
        """Take `found`, of the images `todo`, where it is worse; which of them. ValueError outside the ball."""
        far, low, high = (found - self.x[todo]).abs().max().item(), found.min().item(), found.max().item()
        if not margins.isfinite().all():
            raise ValueError("the classifier's logits are not finite for some images; that is no attack's success")
        if not (far <= epsilon + 1e-6 and low >= 0 and high <= 1):  # so written, NaN is refused too
            raise ValueError(
                f"an attack moved a pixel by {far:g} to [{low:g}, {high:g}]; needed: ε = {epsilon:g}, [0, 1]"
            )
        fewer = (margins > 0).sum(1) - (self.margins[todo] > 0).sum(1)
        worse = (fewer < 0) | (fewer == 0) & (margins.mean(1) < self.margins[todo].mean(1))
        self.images[todo[worse]], self.margins[todo[worse]] = found[worse], margins[worse]
        return worse

    def judge(self, changed: Tensor, labels: Tensor, y: Tensor, position: int) -> None:
        """Take the `labels` (m, verdicts) that the draws read in the images `changed`."""
        self.right[changed] = labels == y[changed, None]
        self.voted[changed] = labels.mode(1).values == y[changed]
        self.broken_by[changed] = torch.where(self.stands[changed], -1, position)

    @property
    def spread(self) -> dict[str, float]:
        """Accuracy over the draws: mean with its 95 % interval over the images, deviation, and the majority's vote."""
        share, means = self.right.double().mean(1), self.right.double().mean(0)
        half = 1.959964 * share.std(correction=0) / math.sqrt(len(share))
        found = {"mean": share.mean(), "mean_low": share.mean() - half, "mean_high": share.mean() + half}
        found |= {"std": means.std(correction=0), "voted": self.voted.double().mean()}
        found |= {"worst_of_runs": self.right.all(1).double().mean()}
        return {"runs": len(means)} | {
            name: round(min(1.0, max(0.0, value.item())), 5) for name, value in found.items()
        }

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All but `x`, to be kept; `load` takes them back."""
        return {name: getattr(self, name).cpu() for name in ("images", "margins", "right", "voted", "broken_by")}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `tensors`."""
        for name, tensor in tensors.items():
            setattr(self, name, tensor.to(self.x.device))


def attack_suite(
    settings: dict[str, dict], budget: str | Budget = "quick", gray: Sequence[str] = GRAY
) -> list[SuiteAttack]:
    """The attack suite, cheapest first; a defense is attacked by those for which it has a surrogate.

    `settings`: those of `attacks.attack_settings`, for ε and for `gray`, the attacks on the classifier alone, which are
    the gray box together with Auto-PGD's there. `budget`: of `BUDGETS`, or one's own.
    """
    budget, bim = resolve_budget(budget), settings["bim"]
    ball = {"epsilon": bim["epsilon"]}

    def apgd(
        name: str, surrogate: str, steps: int, restarts: int = 1, loss: str = "margin", **more: Any
    ) -> SuiteAttack:
        return SuiteAttack(name, surrogate, "apgd", ball | {"steps": steps, "restarts": restarts, "loss": loss}, **more)

    def targeted(name: str, surrogate: str, steps: int, share: float = 1.0) -> list[SuiteAttack]:
        ranks = range(1, budget.targets + 1)
        return [apgd(f"{name}_target_{rank}", surrogate, steps, loss="dlr", target=rank, share=share) for rank in ranks]

    joint = {"steps": budget.joint[0], "restarts": budget.joint[1]}
    steps = budget.exact[0]
    return [
        *(SuiteAttack(f"gray_{name}", "classifier", name, settings[name]) for name in gray),
        apgd("gray_apgd_ce", "classifier", budget.apgd, loss="ce"),
        *targeted("gray_apgd", "classifier", budget.apgd),
        SuiteAttack("transfer", "other", "pgd", settings["pgd"]),
        SuiteAttack("counter_attack_a", "dae", "bim", bim),
        SuiteAttack("counter_attack_a_eot", "noisy_dae", "bim", bim),
        apgd("direct_apgd_ce", "dae", budget.apgd, loss="ce"),
        *targeted("direct_apgd", "dae", budget.apgd),
        *(
            SuiteAttack(f"counter_attack_b_{beta:g}", "with_error", "counter_attack_b", bim | {"beta": beta})
            for beta in BETAS
        ),
        *(
            SuiteAttack(name, "with_error", "joint", ball | {"low": low, "high": high} | joint)
            for name, (low, high) in BOUNDS.items()
        ),
        apgd("bpda_identity", "identity", *budget.bpda),
        apgd("bpda_dae", "bpda_dae", *budget.bpda),
        apgd("bpda_trajectory", "trajectory", *budget.bpda),
        apgd("exact_fixed_noise", "fixed", steps),
        apgd("exact_warm", "exact", steps, warm=True),
        apgd("exact_margin", "exact", *budget.exact, share=QUARTER),
        apgd("exact_dlr", "exact", *budget.exact, loss="dlr", share=QUARTER),
        *targeted("exact", "exact", steps, share=TENTH),
        SuiteAttack("square", "black_box", "square", ball | {"queries": budget.queries}, share=TENTH),
        SuiteAttack("fab", "exact", "fab", ball | {"steps": budget.fab, "targets": 3}, share=TENTH),
    ]


def resolve_budget(budget: str | Budget) -> Budget:
    """The budget of that name, or the budget itself. ValueError for an unknown name."""
    if isinstance(budget, Budget):
        return budget
    check_known("budget", budget, BUDGETS)
    return BUDGETS[budget]


class Ladder(NamedTuple):
    """A row after each attack and the worst case; what became of each image; what each attack did; the worst images.

    `record` has a line for each image: its label, what broke it, in how many draws it is right. `gains` has one for
    each attack: how many images it tried, their mean margin before any attack and under this one, and whether it is a
    `warning`: an attack that raises the margin has lost its way, as with a gradient that is hidden.
    """

    rows: list[dict]
    record: pd.DataFrame
    gains: pd.DataFrame
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
    budget: str | Budget = "quick",
    other: nn.Module | None = None,
    random: bool = False,
    seed: int = 0,
    batch_size: int = 250,
    keep: Path | None = None,
    **facts: Any,
) -> Ladder:
    """Attack a defense by all of `suite` in turn, and keep the worst case of each image.

    The defense is `config`, or a module from images to images (`random`, if it is), before `classifier`; None: the
    classifier alone. `other` is a classifier to transfer from. Of a random defense, `budget.samples` draws make a
    gradient, `choices` draws choose an image's worst case and `verdicts` others judge it: it is right where more than
    half of these are, and leaves the work once all that choose are wrong; else all three are 1.
    A row tells what its attack and those before it leave; attacks that need more classes are left out. ValueError for
    an image outside the ε-ball or [0, 1], and for a random `Purifier` in place of its configuration.
    With the folder `keep`, a killed run goes on where it was. `facts`, such as the names `dataset` and `classifier`,
    go into the rows.

    >>> import apudae
    >>> from apudae.datasets import take
    >>> x, y = take(apudae.load_dataset("mnist5k", "test"), 20)
    >>> found = ladder(apudae.load_model("mnist/classifier"), None, None, x, y, [])
    >>> [(row["attack"], row["correct"]) for row in found.rows]
    [('clean', 19), ('worst_case', 19)]
    """
    check_batch(classifier, x, y)
    config, budget = resolve_config(config) if isinstance(config, str) else config, resolve_budget(budget)
    facts = {"dataset": "", "classifier": ""} | facts
    if isinstance(config, Purifier) and config.config.is_random:  # those that choose and that judge would be the same
        raise ValueError("a random Purifier has one seed for all its draws; needed: its configuration, a PurifyConfig")
    random = config.is_random if isinstance(config, PurifyConfig) else random
    samples, choices, verdicts = (budget.samples, budget.choices, budget.verdicts) if random else (1, 1, 1)
    about = {"seed": seed, "device": x.device, "purifier_config": config if isinstance(config, PurifyConfig) else None}
    seen = partial(surrogates, classifier, dae=dae, other=other, samples=samples, probe=x[:1])
    known = seen(_purifier(dae, config, seed))
    read = partial(_read, classifier, dae, config, batch_size=batch_size)
    clean = read(x, torch.arange(len(x), device="cpu"), range(seed, seed + choices))
    ranks = clean.mean(1).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)
    before, classes = _margins(clean, y).mean(1), clean.shape[2]
    chosen = [CLEAN, *(each for each in suite if each.surrogate in known and _has_room(each, classes))]
    worst, rows, gains = WorstCase(x, choices, verdicts), [], []
    models = [module for module in (classifier, dae, other, config) if isinstance(module, nn.Module)]
    drawn = (samples, choices, verdicts, seed, repr(config))
    path = keep and keep / f"ladder-{fingerprint(models, x, y, chosen, drawn, facts)}.safetensors"
    if path and path.is_file():
        tensors, (rows, gains) = load_tensors(path, advice="delete it, and it is made again")
        worst.load(tensors)
    for position, each in enumerate(bar := progress(chosen, desc="attack suite", delay=0)):
        if position >= len(rows):
            with Stopwatch() as watch:
                purifier = _purifier(dae, config, seed + ATTACKER + position)
                todo = worst.todo
                if each.share < 1:
                    few = worst.margins[todo].mean(1).argsort(stable=True)[: math.ceil(each.share * len(todo))]
                    todo = todo[few.sort().values]
                if len(todo):
                    # a random purifier's draws go on from batch to batch, which a batch read from disk would not know
                    folder = keep if not random or each.surrogate == "classifier" else None
                    options = each.parameters | {"seed": seed, "batch_size": batch_size, "keep": folder}
                    options["start"] = worst.images[todo] if each.warm else None
                    options["target"] = ranks[todo, each.target - 1] if each.target else None
                    found = run_attack(each.attack, seen(purifier)[each.surrogate], x[todo], y[todo], **options)
                    logits = read(found, todo, range(seed, seed + choices))
                    margins = _margins(logits, y[todo])
                    worse = worst.update(todo, found, margins, each.parameters.get("epsilon", 0))
                    logits, changed = logits[worse], todo[worse]
                    if random and len(changed):
                        logits = read(found[worse], changed, range(seed + JUDGES, seed + JUDGES + verdicts))
                    if len(changed):
                        worst.judge(changed, logits.argmax(2), y, position)
                    pair = before[todo].mean().item(), margins.mean().item()
                    gains.append([each.name, len(todo), *pair, pair[1] > pair[0] + 1e-3])
            parameters = each.parameters | {"eot_samples": samples, "budget": budget.name}
            parameters |= {"target": each.target} if each.target else {}
            described = {"attack_parameters": parameters, "seconds": watch.seconds, "kind": "ladder"}
            rows.append(_row(worst, attack=each.name, position=position, **described, **about, **facts))
            if path:
                save_tensors(path, worst.tensors, [rows, gains])
        bar.set_postfix(worst_case=rows[position]["accuracy"])
    epsilon = max((each.parameters.get("epsilon", 0.0) for each in chosen), default=0.0)
    names = [each.name for each in chosen]
    parameters = {"suite": names, "eot_samples": samples, "epsilon": epsilon, "budget": budget.name}
    described = {"attack_parameters": parameters, "seconds": sum(row["seconds"] for row in rows), "kind": "worst_case"}
    total = _row(worst, attack="worst_case", **described, **about, **facts)
    broken_by = [[*names, ""][position] for position in worst.broken_by.tolist()]
    record = pd.DataFrame({"label": y.tolist(), "broken_by": broken_by, "runs_right": worst.right.sum(1).tolist()})
    columns = ["attack", "tried", "margin_before", "margin", "warning"]
    return Ladder([*rows, total], record, pd.DataFrame(gains, columns=columns), worst.images)


def margin_paths(
    classifier: nn.Module,
    dae: nn.Module,
    config: str | PurifyConfig,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int = 10,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean margin of the defense after each step of BIM on each of its surrogates: `surrogate`, `step`, `margin`.

    A path that rises follows a gradient that is hidden, or of no use.
    """
    config, lines = resolve_config(config), []
    models = surrogates(classifier, _purifier(dae, config, seed + ATTACKER), dae, None, 1, x[:1])
    ids = torch.arange(len(x), device="cpu")
    for name in (name for name in models if name not in ("classifier", "with_error", "black_box")):
        at = x
        for step in range(steps + 1):
            logits = _read(classifier, dae, config, at, ids, range(seed, seed + 1), batch_size=250)
            lines.append([name, step, _margins(logits, y).mean().item()])
            size = {"epsilon": epsilon, "step_size": 2.5 * epsilon / steps, "steps": 1}
            at = run_attack("bim", models[name], x, y, start=at, loss="margin", **size) if step < steps else at
    return pd.DataFrame(lines, columns=["surrogate", "step", "margin"])


def _has_room(attack: SuiteAttack, classes: int) -> bool:
    """Whether there are classes enough for the attack's loss and target."""
    return attack.target < classes >= classes_needed(attack.parameters.get("loss", "ce"), attack.target > 0)


def _purifier(dae: nn.Module | None, config: PurifyConfig | nn.Module | None, seed: int) -> nn.Module | None:
    return Purifier(dae, config, seed=seed) if isinstance(config, PurifyConfig) else config


@torch.no_grad()
def _read(
    classifier: nn.Module,
    dae: nn.Module | None,
    config: PurifyConfig | nn.Module | None,
    x: Tensor,
    ids: Tensor,
    seeds: range,
    batch_size: int,
) -> Tensor:
    """Logits (n, seeds, classes) of the defended images; an image's noise comes from the seed and its id alone."""

    def once(purifier: nn.Module | None, x: Tensor, ids: Tensor) -> Tensor:
        given = (x, ids) if isinstance(purifier, Purifier) else (x,)
        return classifier(x if purifier is None else purifier(*given))

    with frozen(classifier, *([config] if isinstance(config, nn.Module) else [])):
        defenses = [_purifier(dae, config, seed) for seed in seeds]
        return torch.stack([in_batches(partial(once, each), x, ids, batch_size=batch_size) for each in defenses], 1)


def _margins(logits: Tensor, y: Tensor) -> Tensor:
    return torch.stack([margin(each, y) for each in logits.unbind(1)], 1)


def _row(worst: WorstCase, **facts: Any) -> dict:
    return result_row(Accuracy(int(worst.stands.sum()), len(worst.x)), **facts) | worst.spread
