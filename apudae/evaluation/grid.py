"""Attack × purifier: every attack in batches, every purifier on the images of every attack, rows of both."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import ATTACKS, parse_spec
from ..batching import in_batches, progress
from ..contracts import as_generator, check_known, check_whole
from ..files import fingerprint, load_tensors, save_tensors
from ..purification.config import PurifyConfig
from ..purification.purifier import Purifier
from .accuracy import counted, right
from .results import Stopwatch, result_row


def run_attack(
    name: str,
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    start: Tensor | None = None,
    target: Tensor | None = None,
    seed: int = 0,
    batch_size: int = 256,
    keep: Path | None = None,
    **parameters: Any,
) -> Tensor:
    """The attack `name` of `apudae.attacks.ATTACKS` ("clean": none) in batches, with `parameters`.

    `start` is the images that it starts from, `target` the classes that it moves to, for attacks that take these.
    Attacks with randomness take it from one generator for all batches, others do without the `seed`.
    With the folder `keep`, each batch is kept there as it is done, and reused when the same model, attack, parameters
    and images come again: a killed run loses one batch at most.
    """
    if name == "clean":
        return x
    check_known("attack", name, ["clean", *ATTACKS])
    generator = as_generator(seed) if "seed" in inspect.signature(ATTACKS[name]).parameters else None
    noise = {} if generator is None else {"seed": generator}
    further = {key: value for key, value in {"start": start, "target": target}.items() if value is not None}

    def attack(x: Tensor, y: Tensor, *more: Tensor) -> Tensor:
        return ATTACKS[name](model, x, y, **dict(zip(further, more, strict=True)), **noise, **parameters)

    if keep is not None:
        attack = _resumable(attack, keep, name, generator, fingerprint(name, parameters, [*further], model))
    return in_batches(attack, x, y, *further.values(), batch_size=batch_size, name=name, generator=generator)


def _resumable(
    function: Callable[..., Tensor], folder: Path, name: str, generator: torch.Generator | None, about: str
) -> Callable[..., Tensor]:
    """`function`, each batch's images written to `folder`, and read there when `about`, batch and generator agree."""

    def read_or_made(*tensors: Tensor) -> Tensor:
        state = torch.zeros(0, dtype=torch.uint8, device="cpu") if generator is None else generator.get_state()
        path = folder / f"{name}-{fingerprint(about, tensors, state)}.safetensors"
        if path.is_file():
            found, _ = load_tensors(path, advice="delete it, and it is made again")
            if generator is not None:
                generator.set_state(found["state"])
            return found["images"].to(tensors[0])
        made = function(*tensors)
        after = state if generator is None else generator.get_state()
        save_tensors(path, {"images": made.cpu().contiguous(), "state": after}, {"about": about})
        return made

    return read_or_made


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
    images: bool = True,
    **facts: Any,
) -> tuple[dict[tuple[str, str], Tensor], list[dict]]:
    """Every purifier of `configs` on the images of every attack ("pgd", "bim@5/255"): purified images, result rows.

    A module (`apudae.baselines`) is taken as it is, None for no purifier. Fewer images than labels are the first so
    many. `facts` go into the rows. With the folder `keep`, modules are resumable, as `run_attack`; their seconds are
    then those of the batches that were not there yet. More steps of a variant without memory go on from fewer, if
    those stand before them. `bfloat16`: the purifiers' networks compute in bfloat16, and the row's device says so.
    Without `images` those of each attack are let go of when their rows are made, and none come back: for many images.
    """
    purified, rows, before = {}, [], None
    for attack, x in attacked.items():
        seconds: dict[str, float] = {}
        for purifier, config in configs.items():
            start, rest = _gone_on_from(config, {name: configs[name] for name in seconds})
            if isinstance(config, nn.Module):
                defend = config if keep is None else _resumable(config, keep, purifier, None, fingerprint(config))
                config = getattr(config, "config", None)
            else:
                defend = nn.Identity() if rest is None else Purifier(dae, rest, seed=seed)
            autocast = torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16)
            with torch.no_grad(), autocast, Stopwatch() as watch:
                ready = purified.get((attack, start), x)
                given = [ready, torch.arange(len(ready), device="cpu")] if isinstance(defend, Purifier) else [ready]
                result = in_batches(defend, *given, batch_size=batch_size, name=f"{purifier} on {attack}")
            about = {"attack": parse_spec(attack)[0], "attack_parameters": parameters[attack], "seed": seed, **facts}
            seconds[purifier] = watch.seconds + seconds.get(start, 0)
            about |= {"purifier": purifier, "purifier_config": config, "seconds": seconds[purifier]}
            hits = right(model, result, y[: len(result)])
            if before is None:  # once for all rows; few classes have no metric that asks
                many = "clean" in attacked and len(hits) > 1
                before = right(model, attacked["clean"], y[: len(attacked["clean"])]) if many else {}
            found = counted(hits, {name: first[: len(result)] for name, first in before.items()})
            rows.append(result_row(found, device=x.device, **about))
            rows[-1]["device"] += ", bfloat16" * (bfloat16 and config is not None)
            purified[attack, purifier] = result
        purified = purified if images else {}
    return purified, rows


def right_of_draws(
    model: nn.Module,
    dae: nn.Module,
    x: Tensor,
    y: Tensor,
    config: PurifyConfig,
    counts: Sequence[int],
    /,
    *,
    seed: int = 0,
    batch_size: int = 50,
    bfloat16: bool = False,
) -> dict[tuple[int, str], dict[str, Tensor]]:
    """Which images are `right` after a random purifier is drawn k times, for each k of `counts` and both ways on.

    (k, "mean"): the mean of the k purified images is classified. (k, "vote"): each is, and the mean of their
    probabilities decides; for k = 1 both are the same, and the vote alone comes back. Draw i is `purify` with `seed`
    + i. The draws of `batch_size` images are held at a time. ValueError for no count, and for one below 1.
    """
    check_whole(1, **{"the number of counts": len(counts)}, **{f"draws {k}": k for k in counts})
    counts = sorted({*counts})
    hits: dict[tuple[int, str], list[dict[str, Tensor]]] = {}
    for ids in progress(torch.arange(len(x)).split(batch_size), desc=f"{max(counts)} draws"):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            drawn = [Purifier(dae, config, seed=seed + i)(x[ids], ids) for i in range(max(counts))]
        for k in counts:
            ways = ({"mean": torch.stack(drawn[:k]).mean(0)} if k > 1 else {}) | {"vote": drawn[:k]}
            for way, images in ways.items():
                hits.setdefault((k, way), []).append(right(model, images, y[ids]))
    return {
        of: {metric: torch.cat([hit[metric] for hit in found]) for metric in found[0]} for of, found in hits.items()
    }


def _gone_on_from(
    config: PurifyConfig | nn.Module | None, done: dict[str, PurifyConfig | nn.Module | None]
) -> tuple[str, PurifyConfig | nn.Module | None]:
    """The name among `done` of the longest beginning of `config` ("" if there is none), and what is left to do."""
    if not isinstance(config, PurifyConfig) or config.has_memory:
        return "", config
    same = {name: other for name, other in done.items() if isinstance(other, PurifyConfig)}
    same = {name: other.steps for name, other in same.items() if replace(other, steps=config.steps) == config}
    begun = [(count, name) for name, count in same.items() if count <= config.steps]
    steps, name = max(begun, default=(0, ""))
    return name, replace(config, steps=config.steps - steps)
