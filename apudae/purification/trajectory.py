"""Every step of a purification: images, errors, step sizes."""

import torch
from torch import Tensor, nn

from ..batching import CACHE, parts
from ..contracts import check_images, frozen
from ..models.autoencoders import squared_distance
from .config import PurifyConfig
from .purifier import Purifier
from .steps import Step


def trajectory(
    dae: nn.Module,
    x: Tensor,
    config: str | PurifyConfig = "A",
    seed: int | torch.Generator = 0,
    ids: Tensor | None = None,
) -> list[Step]:
    """Every step of `purify`, and the end with step sizes 0: `steps` + 1 lines, however early all images rest."""
    check_images(x)
    purifier = Purifier(dae, config, seed=seed)
    cut = parts(x, CACHE)  # as `purify` does, bit for bit
    ids = torch.arange(len(x), device="cpu") if ids is None else ids
    paths = [_path(purifier, *part) for part in zip(cut, ids.split(len(cut[0])), strict=True)]
    return [Step(*map(torch.cat, zip(*steps, strict=True))) for steps in zip(*paths, strict=True)]


def _path(purifier: Purifier, x: Tensor, ids: Tensor) -> list[Step]:
    purified, lines = purifier.recorded(x, ids)
    with torch.no_grad(), frozen(purifier.dae):
        errors = squared_distance(purified, purifier.dae(purified))
    end = Step(purified, errors, torch.zeros_like(errors))
    return lines + [end] * (1 if purifier.config.direct else purifier.config.steps + 1 - len(lines))
