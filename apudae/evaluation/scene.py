"""One image attacked and purified, with all that there is to see of it: what the explorer shows."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..attacks import attack_settings
from ..batching import in_batches
from ..contracts import check_whole, frozen
from ..datasets.image_files import is_grey, opened, read, size_of
from ..models import recon_error
from ..purification import PurifyConfig, preset, trajectory
from .grid import run_attack
from .study import Study


@dataclass(frozen=True)
class Scene:
    """Images (n + 3, C, H, W), their reconstruction errors (n + 3,), the classifier's probabilities (n + 3, classes).

    The first is clean, the second attacked, the others are X_pur,0 … X_pur,n; of "direct" the attacked and its output.
    """

    images: Tensor
    errors: Tensor
    probabilities: Tensor

    @property
    def steps(self) -> int:
        """n, or 1 of "direct"."""
        return len(self.errors) - 3

    def best(self, position: int, classes: list[str], k: int = 5) -> dict[str, float]:
        """The `k` likeliest labels of an image, best first, with their probabilities; one without a name by number."""
        values, labels = self.probabilities[position].topk(min(k, self.probabilities.shape[1]))
        names = dict(enumerate(classes))
        return {names.get(i, str(i)): value for i, value in zip(labels.tolist(), values.tolist(), strict=True)}


def attacked(study: Study, x: Tensor, y: Tensor, attack: str, epsilon: float) -> Tensor:
    """The image `x` (1, C, H, W) with the label `y` (1,) under an attack of the study's classifier; ε of 0 is none."""
    if attack == "clean" or epsilon == 0:
        return x
    setting = attack_settings(study.names["dataset"], [attack], epsilon)[attack]
    return run_attack(attack, study.classifier, x, y, seed=study.names["seed"], **setting)


def variant(name: str, steps: int, step_size: float, noise_std: float) -> PurifyConfig:
    """The preset `name` with this n (at least 1), this α and just this γ. ValueError for others."""
    check_whole(1, n=steps)
    return replace(preset(name, steps, step_size), noise_std=noise_std)


def scene(study: Study, x: Tensor, x_adv: Tensor, config: PurifyConfig, image: int = 0) -> Scene:
    """The image `x` (1, C, H, W), and `x_adv` on its way through `config`, with the noise of the study's `image`-th."""
    path = trajectory(study.dae, x_adv, config, study.names["seed"], torch.tensor([image], device="cpu"))
    images = torch.cat([x, x_adv, *[x_adv] * config.direct, *[step.images for step in path]])
    errors = recon_error(study.dae, images[:2]).detach()
    errors = torch.cat([errors, *[errors[1:]] * config.direct, *[step.errors for step in path]])
    with frozen(study.classifier), torch.no_grad():
        probabilities = in_batches(lambda batch: study.classifier(batch).softmax(1), images)
    return Scene(images, errors, probabilities)


def uploaded(name: str, content: bytes, like: Tensor) -> Tensor:
    """The image file `content` as (1, C, H, W) in [0, 1]. ValueError unless channels and size are those of `like`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image")
        path.write_bytes(content)
        try:
            with opened(path) as image:
                grey, (width, height) = is_grey(image), size_of(image)
            given, needed = (1 if grey else 3, height, width), tuple(like.shape[1:])
            if given != needed:
                shapes = ("{} channel(s) of {}×{} pixels".format(*shape) for shape in (given, needed))
                raise ValueError("{} has {}; needed here: {}".format(name, *shapes))
            picture = read(path, "L" if grey else "RGB")
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), name)) from error
    pixels = np.asarray(picture, np.float32).reshape(1, height, width, -1) / 255
    return torch.from_numpy(pixels).movedim(-1, 1).contiguous().to(like)
