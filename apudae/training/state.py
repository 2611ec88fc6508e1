"""The state of a training on disk: weights, optimiser, curve, and whose training it is."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ..files import fingerprint, load_tensors, save_tensors


def whose(dataset: Dataset, networks: nn.Module, **facts: Any) -> dict[str, Any]:
    """What tells a training from others: `facts`, size and some images of the data set, the first weights."""
    some = [dataset[index] for index in range(len(dataset))[:: max(1, (len(dataset) - 1) // 2)]]
    found = {"some_images": fingerprint(some), "first_weights": fingerprint(networks.state_dict())}
    return facts | {"images": len(dataset)} | found


def keep_training(
    state: Path | None, networks: nn.Module, optimizer: torch.optim.Optimizer, identity: dict, curve: list
) -> None:
    """Write weights, optimiser, `identity` (whose training it is) and curve to the file `state`; None: do not."""
    if state is None:
        return
    tensors = {name: tensor.contiguous() for name, tensor in networks.state_dict().items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value.contiguous() for name, value in values.items()}
    save_tensors(state, tensors, {"identity": identity, "curve": curve})


def restore_training(
    state: Path | None, networks: nn.Module, optimizer: torch.optim.Optimizer, identity: dict
) -> tuple[int, list[dict[str, float]]]:
    """Load what `keep_training` wrote: the steps done and the curve. ValueError if it is broken, or another training's.

    What is broken is not trained over, as it may be the work of days.
    """
    if state is None or not state.is_file():
        return 0, []
    advice = "give another run folder, or delete this one to start over"
    tensors, kept = load_tensors(state, advice)
    if kept["identity"] != json.loads(json.dumps(identity)):
        raise ValueError(f"{state} belongs to another training ({json.dumps(kept['identity'])}); {advice}")
    weights, moments, curve = {}, {}, kept["curve"]
    for key, tensor in tensors.items():
        if not key.startswith("optimizer."):
            weights[key] = tensor
        else:
            _, index, name = key.split(".", 2)
            moments.setdefault(int(index), {})[name] = tensor
    networks.load_state_dict(weights)
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return curve[-1]["step"], curve
