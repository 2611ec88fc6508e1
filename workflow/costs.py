"""What a study costs on paper: operations counted, seconds measured on a CPU, and what a GPU is assumed to do.

A forward pass of a network is counted by torch (a multiply-add is two operations); the gradient of its input is as much
again, that of its weights too. Nothing here was measured on a GPU: RATE and PASS are assumptions.

python workflow/costs.py    # writes the parts of workflow/README.md that stand on it, as `make readme` does
"""

import math
import re
from typing import Any

import pandas as pd
import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from apudae.attacks import attack_settings
from apudae.attacks.common import default_steps
from apudae.checkpoints import load_model
from apudae.contracts import frozen
from apudae.datasets import look_up
from apudae.evaluation.ladder import attack_suite, resolve_budget
from apudae.evaluation.results import read_results
from apudae.files import RESULTS, ROOT, written_aside
from apudae.models.classifiers import ResNet
from apudae.purification.config import PRESETS

RATE = 40e12  # assumed: operations a second of a GPU in such networks; 4 % of what an H100 has in bfloat16
# assumed: seconds of one pass over a batch at least, which the launching of its kernels takes
PASS = {"gradient": 0.005, "training": 0.01}
START = 20  # assumed: seconds that a step spends on its kernel, imports, data, figures and page
BATCH = 256  # images that attacks and purifiers take at once
EXACT = 3.5  # an exact gradient, in purifications: 90 ms by 26 ms (LOG.md, "A stronger attack suite")
AUTOATTACK = 6_900  # gradients and queries of its standard version: Auto-PGD 100 and 9 · 100, FAB 9 · 100, Square 5,000
PHOTOGRAPHS = 50_000  # of ILSVRC-2012's validation set
PAGE = ROOT / "workflow" / "README.md"


def forward_operations(model: nn.Module, shape: tuple[int, int, int]) -> int:
    """Operations of one forward pass of one image of `shape` (C, H, W)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), frozen(model):
        model(torch.full((1, *shape), 0.5))
    return counter.get_total_flops()


def _steps(attack: str, given: dict[str, Any]) -> float:
    """Gradients (of Square: queries) that an attack takes of each image; as many are its steps."""
    if attack in ("random", "fgsm", "r_fgsm"):
        return int(attack != "random")
    if attack in ("bim", "pgd", "counter_attack_b"):
        return default_steps(given["epsilon"], given["step_size"], given.get("steps"))
    times = [given.get(name, 1) for name in ("search_steps", "restarts", "targets")]
    return given.get("queries", given.get("steps")) * math.prod(times)


def suite_operations(
    dataset: str, purifier: str, steps: int, classifier: float, dae: float, other: float = 0.0, until: str = ""
) -> tuple[float, float]:
    """Operations and passes of the `full` suite for one image that stands to the end, or to the attack `until`.

    `classifier`, `dae` and `other` (0: there is none): operations of their forward passes; `steps`: n of Eq. 2.
    """
    config, budget = PRESETS.get(purifier), resolve_budget("full")
    once, direct = 2 * classifier, (2 * (classifier + dae), 1)
    of = {"classifier": (once, 1), "dae": direct, "with_error": direct}  # of one gradient, by surrogate
    of |= {"other": (2 * other, 1)} if other else {}
    purified, taken, draws, reads = 0.0, 0, 1, 1
    if config:
        purified, taken = (dae, 1) if config.direct else (2 * dae * steps, steps)
        draws, reads = (budget.samples, budget.choices + budget.verdicts) if config.is_random else (1, 1)
        exact = EXACT * purified + once
        of |= {"identity": (draws * (purified + once), draws * taken)}
        of |= {"bpda_dae": (draws * (purified + direct[0]), draws * taken)}
        of |= {"trajectory": (draws * (purified + once * (taken + 1)), draws * taken)}
        of |= {"exact": (draws * exact, draws * EXACT * taken), "black_box": (purified + classifier, taken)}
        of |= {"fixed": (exact, EXACT * taken)} if config.is_random else {}
        of |= {"noisy_dae": (draws * direct[0], draws)} if config.noise_std else {}
    gray, total = ["fgsm", "r_fgsm", "bim", "pgd"], [0.0, 0.0]
    for each in attack_suite(attack_settings(dataset, ["bim", "pgd", *gray]), budget, gray):
        if each.surrogate in of:
            gradients = each.share * _steps(each.attack, each.parameters)
            total[0] += gradients * of[each.surrogate][0] + reads * (purified + classifier)
            total[1] += gradients * of[each.surrogate][1] + reads * (taken + 1)
        if each.name == until:
            break
    return total[0], total[1]


def _seconds(images: int, operations: float, passes: float) -> float:
    """Of `images`, each of so many operations, in `passes` over batches of BATCH images."""
    return max(operations * images / RATE, passes * math.ceil(images / BATCH) * PASS["gradient"])


def lane() -> str:
    """The steps of workflow/config/gpu.yaml by notebook, in Markdown: operations, minutes, the longest step's."""
    written = yaml.safe_load((ROOT / "workflow" / "config" / "gpu.yaml").read_text(encoding="utf-8"))
    general, shape = written["parameters"], (3, 32, 32)
    target = forward_operations(load_model(general["classifier"]), shape)
    dae = forward_operations(load_model(look_up("cifar10").dae), shape)
    other = forward_operations(ResNet(16, 4), shape)
    lines = []
    for step in written["steps"].values():
        given = general | step.get("parameters", {})
        attacked = target if given["classifier"] == general["classifier"] else other
        operations, seconds = _step_costs(step["notebook"], given, attacked, dae, other)
        lines.append({"notebook": step["notebook"], "operations": operations / 1e15, "minutes": (seconds + START) / 60})
    table = pd.DataFrame(lines).groupby("notebook", sort=False)
    table = table.agg(
        steps=("minutes", "size"),
        operations=("operations", "sum"),
        minutes=("minutes", "sum"),
        longest=("minutes", "max"),
    )
    table.loc["all"] = table.sum()
    table.loc["all", "longest"] = max(line["minutes"] for line in lines)
    shown = ["| notebook | steps | operations, 10¹⁵ | minutes, estimated | its longest step |", "|---|---|---|---|---|"]
    for name, row in table.iterrows():
        shown.append(f"| {name} | {row.steps:.0f} | {row.operations:.2f} | {row.minutes:.1f} | {row.longest:.1f} |")
    most = {name: suite_operations("cifar10", name, general["steps"], target, dae, other) for name in ("A", "F")}
    told = [f"{_seconds(1000, *costs) / 60:.0f} minutes of {name}" for name, costs in most.items()]
    return "\n".join([*shown, "", f"If every image stood to its end, the suite would take {' and '.join(told)}."])


def _step_costs(notebook: str, given: dict, classifier: float, dae: float, other: float) -> tuple[float, float]:
    """Operations and seconds of one step of the lane."""
    kind, n, steps = notebook[:2], given["n"], given["steps"]
    if kind in ("01", "02", "22"):
        images, inner = steps * given["batch_size"], given.get("attack_steps", 0)
        each = (3 + 2 * inner) * (dae if kind == "02" else other)
        least = steps * (PASS["training"] + inner * PASS["gradient"])
        measured = AUTOATTACK * len(given.get("classifiers", [])) * PASS["gradient"]  # images of one batch
        return each * images, max(each * images / RATE, least) + measured
    if kind == "17":
        return 0.0, 0.0
    if kind == "20":
        # the rows of data/results/cifar10-jpeg.csv: where there is an autoencoder, counter-attack A leaves nothing
        until = "counter_attack_a" if given["classifier"] == "cifar10/resnet18" else ""
        operations, passes = suite_operations("cifar10", given["purifiers"], steps, classifier, dae, other, until)
        return operations * n, _seconds(n, operations, passes)
    if kind == "03":
        settings = attack_settings("cifar10", given["only"])
        settings["cw"]["steps"] = given["cw_steps"]
        gradients = sum(_steps(name, setting) for name, setting in settings.items())
        return 2 * classifier * gradients * n, _seconds(n, 2 * classifier * gradients, gradients)
    if kind == "12":  # clean, FGSM and PGD, on the longest path
        passes = 3 * given["farthest"] * 8
    elif kind in ("18", "19"):  # BIM on the classifier after one pass, then every purifier on it
        passes = (18 + steps * len(given["purifiers"].split())) * len(given.get("betas", "1").split())
    else:
        passes = max([steps, *given.get("further", [])]) * len(given["attacks"])
    return 2 * dae * passes * n, _seconds(n, 2 * dae * passes, passes)


def scale() -> str:
    """The suite on all of ImageNet's validation photographs, on 1, 8 and 64 GPUs, in Markdown; upper bounds."""
    entry, shape = look_up("imagenet"), (3, 224, 224)
    classifier, dae = (forward_operations(load_model(name), shape) for name in (entry.classifier, entry.dae))
    rows = read_results(RESULTS / "imagenet.csv").query("purifier == 'A' and steps == 15 and metric == 'top-1'")
    rows = rows[(rows.dae == entry.dae) & (rows.device == "cpu, bfloat16") & (rows.n >= 100)]
    measured = (rows.seconds / rows.n).median()
    core = 2 * dae * 15 / measured
    suites = {name: suite_operations("imagenet", name, 15, classifier, dae)[0] for name in ("none", *PRESETS)}
    lines = [
        f"A photograph purified by A, n = 15: {2 * dae * 15 / 1e9:.0f} · 10⁹ operations, {measured:.2f} s of a CPU in "
        f"bfloat16 (median of {len(rows)} rows), so {core / 1e9:.0f} · 10⁹ a second. "
        f"Assumed of a GPU: {RATE / 1e12:.0f} · 10¹², {RATE / core:.0f} times as much.",
        "",
        "| defense | operations a photograph, 10¹² | CPU, hours a photograph | GPU, seconds a photograph |",
        "|---|---|---|---|",
    ]
    for name, operations in suites.items():
        lines.append(f"| {name} | {operations / 1e12:.0f} | {operations / core / 3600:.2f} | {operations / RATE:.1f} |")
    days = {name: PHOTOGRAPHS * operations / RATE / 86400 for name, operations in suites.items()}
    lines += [
        "",
        "| GPUs | days, a step for each defense | days, if photographs could be shared out |",
        "|---|---|---|",
    ]
    for gpus in (1, 8, 64):
        lines.append(f"| {gpus} | {_makespan(list(days.values()), gpus):.0f} | {sum(days.values()) / gpus:.0f} |")
    alone = next(gpus for gpus in range(1, len(days) + 1) if _makespan(list(days.values()), gpus) == max(days.values()))
    return "\n".join([*lines, "", f"From {alone} GPUs on, the longest step is all that one waits for."])


def _makespan(days: list[float], gpus: int) -> float:
    """The time of steps that each take one GPU, the longest first, each where it begins soonest."""
    busy = [0.0] * gpus
    for each in sorted(days, reverse=True):
        busy[busy.index(min(busy))] += each
    return max(busy)


def with_costs(text: str) -> str:
    """`text`, each part between its markers counted anew: <!-- costs: NAME --> … <!-- end of costs -->."""
    marked = r"(<!-- costs: (\w+) -->\n\n).*?(\n\n<!-- end of costs -->)"
    return re.sub(marked, lambda found: found[1] + PARTS[found[2]]() + found[3], text, flags=re.DOTALL)


PARTS = {"lane": lane, "scale": scale}

if __name__ == "__main__":
    with written_aside(PAGE) as aside:
        aside.write_text(with_costs(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
