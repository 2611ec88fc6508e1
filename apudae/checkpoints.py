"""Trained weights as safetensors beside a JSON file that says what they are. Nothing is ever unpickled.

Networks of others (`models.pretrained`) have the same entrance; of their files only tensors are read.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .baselines.defense_gan import Generator
from .baselines.magnet import MagNet
from .contracts import check_device, check_known
from .files import CHECKPOINTS, ROOT, digest, provenance, written_aside
from .models.autoencoders import DAE, FFDNet, ResidualUNet, UNet
from .models.classifiers import CNN, MLP, ResNet, ResNet8, StridedCNN
from .models.pretrained import PRETRAINED, FittedResNet18, is_pretrained, pretrained
from .names import split_number

ARCHITECTURES = {"mlp": MLP, "cnn": CNN, "strided_cnn": StridedCNN, "resnet": ResNet, "resnet8": ResNet8}
ARCHITECTURES |= {"fitted_resnet18": FittedResNet18}
ARCHITECTURES |= {"dae": DAE, "unet": UNet, "residual_unet": ResidualUNet, "ffdnet": FFDNet}
ARCHITECTURES |= {"magnet": MagNet, "generator": Generator}


def save_model(path: str | Path, model: nn.Module, *, half: bool = False, **facts: Any) -> None:
    """Write `path`.safetensors and `path`.json: architecture, `facts` (data, recipe, metrics …), commit, SHA-256.

    With `half`, weights take half the space, rounded to float16 (buffers stay); `load_model` gives float32 again.
    """
    path = Path(path)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if half:
        weights |= {name: weights[name].half() for name, _ in model.named_parameters()}
    with written_aside(_file(path, "safetensors")) as aside, written_aside(_file(path, "json")) as sidecar:
        save_file(weights, aside)
        described = {"architecture": model.architecture, "sha256": digest(aside), **facts, **provenance()}
        sidecar.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def load_model(name: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """The trained network `name`, in eval mode: "mnist/dae", "mnist/classifier", …, or a path without its
    ending, from the working folder or from the repository. An autoencoder that reads the noise takes another σ after an
    @ ("…@25/255"), without μ and σ of its error, which were measured at its own.
    Networks of others, and your own from a function: the names of `models.pretrained`.
    Raises ValueError for an unknown name, and for weights that are truncated or differ from what their JSON file says.
    """
    if not isinstance(name, str | Path):
        raise ValueError(f"a network's name is {name!r}; needed: text, or a path")
    check_device(device)
    if is_pretrained(str(name)):
        return pretrained(str(name)).to(device, memory_format=torch.channels_last)
    path = _found(name)
    if path is None:
        return _told(str(name), device)
    described, weights = _read_sidecar(_file(path, "json")), _file(path, "safetensors")
    if not weights.is_file():
        raise ValueError(f"{weights} is missing beside its JSON file; restore it (git checkout) or train it again")
    if digest(weights) != described["sha256"]:
        raise ValueError(
            f"{weights} is not the file its JSON file describes (SHA-256 differs: truncated or changed); "
            "restore it (git checkout) or train it again"
        )
    check_known("architecture", described["architecture"]["name"], ARCHITECTURES)
    try:
        model = _built(described["architecture"], load_file(weights))
    except (SafetensorError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{weights} does not hold the weights of {described['architecture']}: {reason}") from error
    if strange := [name for name, weight in model.named_parameters() if not weight.isfinite().all()]:
        raise ValueError(f"{weights} holds weights that are no finite numbers ({strange[0]}); train it again")
    convolution = next((layer for layer in model.modules() if isinstance(layer, nn.Conv2d)), None)
    colour = convolution is not None and convolution.in_channels > 1
    layout = torch.channels_last if colour else torch.preserve_format  # a third faster, on a CPU too
    return model.to(device, memory_format=layout).eval()


def _found(name: str | Path) -> Path | None:
    """The checkpoint `name`: shipped, from the working folder or from the repository; None where it is not."""
    places = CHECKPOINTS / name, Path(name), ROOT / name
    return next((place for place in places if os.path.isfile(_file(place, "json"))), None)  # any text is a name here


def _told(name: str, device: str | torch.device) -> nn.Module:
    """The checkpoint before the last @ of `name`, told the noise after it. ValueError where there is none."""
    kept, mark, _ = name.rpartition("@")
    if not mark or _found(kept) is None:
        check_known("checkpoint", name[:100], [*checkpoint_names(), *PRETRAINED])
    model = load_model(kept, device)
    noise_std = split_number("…" + name[len(kept) :], "σ", "…@0.1 or …@25/255")[1]
    if not getattr(model, "reads_noise", False):
        raise ValueError(f"{kept} reads no noise; needed: its name without the @")
    if noise_std != model.noise_std:
        model.told(noise_std)
    return model


def _built(architecture: dict[str, Any], weights: dict[str, Tensor]) -> nn.Module:
    """The network with these weights, once it is known that they fit: a wrong description asks for any time and memory.

    ValueError where they do not.
    """
    network, sizes = ARCHITECTURES[architecture["name"]], {k: v for k, v in architecture.items() if k != "name"}
    most = max([len(weights), *(side for weight in weights.values() for side in weight.shape)])
    if strange := [f"{key} {size}" for key, size in sizes.items() if isinstance(size, int) and size > most]:
        raise ValueError(f"{strange[0]} is more than any side of them, and than there are")
    with torch.device("meta"):
        needed = {name: tensor.shape for name, tensor in network(**sizes).state_dict().items()}
    if strange := sorted(set(needed.items()) ^ {(name, tensor.shape) for name, tensor in weights.items()}):
        raise ValueError(
            f"{strange[0][0]} is missing, too many or of another shape, and so are {len(strange) - 1} more"
        )
    model = network(**sizes)
    model.load_state_dict(weights)
    return model


def _file(path: Path, ending: str) -> Path:
    return Path(f"{path}.{ending}")  # a name may hold dots


def _read_sidecar(file: Path) -> dict[str, Any]:
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON file ({error}); restore it (git checkout)") from error
    described = described if isinstance(described, dict) else {}
    architecture = described.get("architecture")
    if "sha256" not in described or not isinstance(architecture, dict) or "name" not in architecture:
        raise ValueError(f"{file} does not say architecture and sha256; restore it (git checkout)")
    return described


def checkpoint_names() -> list[str]:
    """The names that `load_model` knows."""
    found = CHECKPOINTS.rglob("[!.]*.json")  # no hidden ones: a killed writer leaves such
    return sorted(str(path.relative_to(CHECKPOINTS)).removesuffix(".json") for path in found)


def describe_checkpoint(name: str) -> dict[str, Any]:
    """The JSON file of checkpoint `name`: architecture, data, recipe, metrics, training curve, commit."""
    check_known("checkpoint", name, checkpoint_names())
    return _read_sidecar(_file(CHECKPOINTS / name, "json"))
