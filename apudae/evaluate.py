"""Measuring: accuracies, batched runs with progress, the ladder of attacks; `tables` keeps what is measured."""

import inspect
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import adaptive, attacks
from .classifiers import margin
from .contracts import as_generator, check_batch, check_known, frozen
from .files import digest, load_tensors, save_tensors
from .parts import in_halves
from .purify import Purifier, PurifyConfig, resolve_config
from .tables import Accuracy as Accuracy  # these names as they stand: notebooks find all of measuring here
from .tables import Stopwatch as Stopwatch
from .tables import knowing_table as knowing_table
from .tables import main_table as main_table
from .tables import of_study as of_study
from .tables import pivot as pivot
from .tables import published as published
from .tables import read_attacks as read_attacks
from .tables import read_results as read_results
from .tables import record as record
from .tables import result_row as result_row
from .tables import side_by_side as side_by_side
from .tables import with_interval as with_interval

MANY_CLASSES, BEST = 100, (5, 10)  # from so many classes on, top-5 and top-10 are counted too
NUMBERS = {"cpu": 2**18, "cuda": 2**24}  # in a batch at most: 1 and 111 colour images of 224×224, 85 and 5461 of 32×32


def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 512, *, clean: Tensor | None = None) -> Accuracy:
    """Share of the images `x` that `model` classifies as `y`.

    From 100 classes on, the accuracy's `others` are "top-5" and "top-10": `y` is among so many likeliest labels. With
    `clean`, the same images before any attack, also "top-1 of right", …: of those images alone that were right then,
    by the same metric, so that clean images have 1.0, as in the paper's Table 2.
    """
    right = _right(model, x, y, batch_size)
    counts = {name: Accuracy(int(hit.sum()), len(hit)) for name, hit in right.items()}
    if clean is not None and len(right) > 1:
        for name, before in _right(model, clean, y, batch_size).items():
            if before.any():
                counts[f"{name} of right"] = Accuracy(int((right[name] & before).sum()), int(before.sum()))
    first = counts.pop("top-1")
    return Accuracy(first.correct, first.n, counts)


def _right(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> dict[str, Tensor]:
    """Which images are right, by each metric (n,)."""
    found = best_labels(model, x, max(BEST), batch_size) == y[:, None]
    sizes = (1, *BEST) if found.shape[1] > 1 else (1,)
    return {f"top-{size}": found[:, :size].any(1) for size in sizes}


@torch.no_grad()
def best_labels(model: nn.Module, x: Tensor, k: int, batch_size: int = 512) -> Tensor:
    """The `k` likeliest labels, best first (n, k); of fewer than 100 classes the likeliest alone (n, 1)."""

    def best(batch: Tensor) -> Tensor:
        logits = model(batch)
        return logits.topk(k).indices if logits.shape[1] >= MANY_CLASSES else logits.argmax(1, keepdim=True)

    with frozen(model):
        return in_batches(best, x, batch_size=batch_size, name="classify")


def predict(model: nn.Module, x: Tensor, batch_size: int = 512) -> Tensor:
    """Predicted labels (n,)."""
    return best_labels(model, x, 1, batch_size)[:, 0]


@torch.no_grad()
def margins(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 512) -> Tensor:
    """`classifiers.margin` of each image (n,): negative where `model` is wrong."""
    with frozen(model):
        return in_batches(lambda *batch: margin(model(batch[0]), batch[1]), x, y, batch_size=batch_size)


def captions(model: nn.Module, x: Tensor, classes: list[str]) -> list[str]:
    """What `model` reads in each image, in words; a class without a name by its number."""
    return [f"reads {classes[label] if label < len(classes) else label}" for label in predict(model, x).tolist()]


def in_batches(
    function: Callable[..., Tensor],
    *tensors: Tensor,
    batch_size: int = 256,
    name: str = "",
    generator: torch.Generator | None = None,
) -> Tensor:
    """`function(*tensors)` batch by batch, with a progress bar from two seconds on.

    Memory is bounded: large images come in smaller batches, and a batch that does not fit is halved, with `generator`,
    from which `function` draws, set back.
    """
    size = min(batch_size, max(1, NUMBERS[tensors[0].device.type] // tensors[0].shape[1:].numel()))
    batches = zip(*(tensor.split(size) for tensor in tensors), strict=True)
    batches = tqdm(batches, desc=name, total=math.ceil(len(tensors[0]) / size), delay=2, leave=False)
    return torch.cat([in_halves(function, *batch, generator=generator) for batch in batches])


def run_attack(
    name: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *start: Tensor,
    seed: int = 0,
    batch_size: int = 256,
    keep: Path | None = None,
    **parameters: Any,
) -> Tensor:
    """The attack `name` of `apudae.attacks` or `apudae.adaptive` ("clean": none) in batches, with `parameters`.

    `start`, if given, is the images that BIM starts from.
    The ending "_unclipped" names CW and DeepFool without the ε-ball. Attacks with randomness take it from one generator
    for all batches, others do without the `seed`.
    With the folder `keep`, each batch is kept there as it is done, and reused when the same model, attack, parameters
    and images come again: a killed run loses one batch at most.
    """
    if name == "clean":
        return x
    function = _named(name)
    generator = as_generator(seed) if "seed" in inspect.signature(function).parameters else None
    noise = {} if generator is None else {"seed": generator}
    attack = partial(function, model, **noise, **parameters)
    if keep is not None:
        fixed = json.dumps([name, parameters, str(model)], sort_keys=True)
        attack = _kept(attack, keep, name, model, fixed, generator)
    return in_batches(attack, x, y, *start, batch_size=batch_size, name=name, generator=generator)


def _kept(
    function: Callable[..., Tensor],
    keep: Path,
    name: str,
    model: nn.Module,
    about: str,
    generator: torch.Generator | None,
) -> Callable[..., Tensor]:
    """`function`, each batch's images kept in the folder `keep`, and reused for the same `model`, `about` and batch."""
    fixed = digest([tensor.cpu() for tensor in model.state_dict().values()], about)

    def kept_or_made(*tensors: Tensor) -> Tensor:
        state = torch.zeros(0, dtype=torch.uint8) if generator is None else generator.get_state()
        path = keep / f"{name}-{digest([*(tensor.cpu() for tensor in tensors), state], fixed)}.safetensors"
        if path.is_file():
            found, _ = load_tensors(path, advice="delete it, and it is made again")
            if generator is not None:
                generator.set_state(found["state"])
            return found["images"].to(tensors[0])
        made = function(*tensors)
        after = state if generator is None else generator.get_state()
        save_tensors(path, {"images": made.cpu().contiguous(), "state": after}, {"about": about})
        return made

    return kept_or_made


def _named(name: str) -> Callable[..., Tensor]:
    unclipped = [f"{known}{attacks.UNCLIPPED}" for known in ("cw", "deepfool")]
    check_known("attack", name, [*attacks.NAMES, "bim_5", "bim_25", *unclipped, *adaptive.NAMES])
    return getattr(adaptive if name in adaptive.NAMES else attacks, name.removesuffix(attacks.UNCLIPPED))


class Ladder(NamedTuple):
    """A row after each rung and the worst case; a line for each image, with the rung that felled it; worst images."""

    rows: list[dict]
    record: pd.DataFrame
    images: Tensor


def ladder(
    classifier: nn.Module,
    dae: nn.Module | None,
    config: str | PurifyConfig | nn.Module | None,
    x: Tensor,
    y: Tensor,
    rungs: list[adaptive.Rung],
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
    """Attack a defense rung by rung, from the clean images up, and keep the worst case of each image.

    The defense is `config`, or a module from images to images, before `classifier`; None: the classifier alone. `other`
    is a classifier to transfer from. An image is right while more than half of its `runs` are, and leaves the work once
    all are wrong; runs and the gradient's `samples` are 1 where nothing is random (a module: `samples=1` says so).
    A row tells what its rung and those before it leave. ValueError for an image outside the ε-ball or [0, 1].
    With the folder `keep`, a killed run goes on where it was. `facts` go into the rows.
    """
    check_batch(classifier, x, y)
    config = resolve_config(config) if isinstance(config, str) else config
    random = config.is_random if isinstance(config, PurifyConfig) else isinstance(config, nn.Module) and samples > 1
    samples, runs = (samples, runs) if random else (1, 1)
    about = {"seed": seed, "device": x.device, "purifier_config": config if isinstance(config, PurifyConfig) else None}
    views = partial(adaptive.views, classifier, dae=dae, other=other, samples=samples, probe=x[:1])
    chosen = [adaptive.CLEAN, *(rung for rung in rungs if rung.view in views(_purifier(dae, config, seed)))]
    judges = [nn.Sequential(_purifier(dae, config, seed + run) or nn.Identity(), classifier) for run in range(runs)]
    worst, rows = adaptive.WorstCase(x, runs), []
    models = [module for module in (judges[0], dae, other) if module is not None]
    weights = [tensor.cpu() for model in models for tensor in model.state_dict().values()]
    text = json.dumps([str(models), chosen, samples, runs, seed, facts], default=str)
    path = keep and keep / f"ladder-{digest([*weights, x.cpu(), y.cpu()], text)}.safetensors"
    if path and path.is_file():
        tensors, rows = load_tensors(path, advice="delete it, and it is made again")
        worst.load(tensors)
    for position, rung in enumerate(progress := tqdm(chosen, desc="ladder")):
        if position >= len(rows):
            with Stopwatch() as watch:
                purifier = _purifier(dae, config, seed + runs + position)  # not the random numbers of the judges
                todo = worst.todo
                if len(todo):
                    # a random purifier's draws go on from batch to batch, which a batch that was kept would not know
                    kept = keep if samples == 1 or rung.view == "classifier" else None
                    options = rung.parameters | {"seed": seed, "batch_size": batch_size, "keep": kept}
                    start = [worst.images[todo]] if rung.warm else []
                    found = run_attack(rung.attack, views(purifier)[rung.view], x[todo], y[todo], *start, **options)
                    left = torch.stack([margins(judge, found, y[todo], batch_size) for judge in judges], 1)
                    worst.update(todo, found, left, position, rung.parameters.get("epsilon", 0))
            parameters = rung.parameters | {"after": position, "eot_samples": samples}
            rows.append(_ladder_row(worst, rung.name, parameters, seconds=watch.seconds, **about, **facts))
            if path:
                save_tensors(path, worst.tensors, rows)
        progress.set_postfix(worst_case=rows[position]["accuracy"])
    parameters = {"rungs": [rung.name for rung in chosen], "eot_samples": samples}
    total = _ladder_row(worst, "worst_case", parameters, seconds=sum(row["seconds"] for row in rows), **about, **facts)
    felled = [[*(rung.name for rung in chosen), ""][position] for position in worst.felled.tolist()]
    record = pd.DataFrame({"label": y.tolist(), "felled_by": felled, "runs_right": worst.hits.sum(1).tolist()})
    return Ladder([*rows, total], record, worst.images)


def _purifier(dae: nn.Module | None, config: PurifyConfig | nn.Module | None, seed: int) -> nn.Module | None:
    return Purifier(dae, config, seed=seed) if isinstance(config, PurifyConfig) else config


def _ladder_row(worst: adaptive.WorstCase, attack: str, parameters: dict, **facts: Any) -> dict:
    majority = Accuracy(int((2 * worst.hits.sum(1) > worst.hits.shape[1]).sum()), len(worst.hits))
    return result_row(majority, attack=attack, attack_parameters=parameters, **facts) | worst.spread


def purified_rows(
    model: nn.Module,
    dae: nn.Module | None,
    attacked: dict[str, Tensor],
    y: Tensor,
    configs: dict[str, PurifyConfig | nn.Module | None],
    /,
    *,
    parameters: dict[str, dict],
    seed: int = 0,
    batch_size: int = 256,
    keep: Path | None = None,
    bfloat16: bool = False,
    **facts: Any,
) -> tuple[dict[tuple[str, str], Tensor], list[dict]]:
    """Every purifier of `configs` on the images of every attack: purified images, and result rows.

    A module (`apudae.baselines`) is taken as it is, None for no purifier. Fewer images than labels are the first so
    many. `facts` go into the rows. With the folder `keep`, modules are resumable, as `run_attack`; their seconds are
    then those of the batches that were not there yet. More steps of a variant without memory go on from fewer, if
    those stand before them. `bfloat16`: the purifiers' networks compute in bfloat16, and the row's device says so.
    """
    purified, rows = {}, []
    for attack, images in attacked.items():
        seconds: dict[str, float] = {}
        for purifier, config in configs.items():
            start, rest = _gone_on_from(config, {name: configs[name] for name in seconds})
            if isinstance(config, nn.Module):
                defend = config if keep is None else _kept(config, keep, purifier, config, str(config), None)
                config = getattr(config, "config", None)
            else:
                defend = (lambda batch: batch) if rest is None else Purifier(dae, rest, seed=seed)
            autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16)
            with torch.no_grad(), autocast, Stopwatch() as watch:
                ready = purified.get((attack, start), images)
                result = in_batches(defend, ready, batch_size=batch_size, name=f"{purifier} on {attack}")
            about = {"attack": attack, "attack_parameters": parameters[attack], "seed": seed, **facts}
            seconds[purifier] = watch.seconds + seconds.get(start, 0)
            about |= {"purifier": purifier, "purifier_config": config, "seconds": seconds[purifier]}
            clean = attacked["clean"][: len(result)] if "clean" in attacked else None
            found = accuracy(model, result, y[: len(result)], clean=clean)
            rows.append(result_row(found, device=images.device, **about))
            rows[-1]["device"] += ", bfloat16" * (bfloat16 and config is not None)
            purified[attack, purifier] = result
    return purified, rows


def _gone_on_from(
    config: PurifyConfig | nn.Module | None, done: dict[str, PurifyConfig | nn.Module | None]
) -> tuple[str, PurifyConfig | nn.Module | None]:
    """The name among `done` of the longest beginning of `config` ("" if there is none), and what is left to do."""
    if not isinstance(config, PurifyConfig) or config.has_memory:
        return "", config
    begun = [
        (kept.steps, name)
        for name, kept in done.items()
        if isinstance(kept, PurifyConfig) and replace(kept, steps=config.steps) == config and kept.steps <= config.steps
    ]
    steps, name = max(begun, default=(0, ""))
    return name, replace(config, steps=config.steps - steps)
