"""Checks of the contracts that `apudae/__init__.py` states: bad input ends here, with one sentence."""

import importlib
import math
import numbers
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor, nn

from . import compat  # noqa: F401  every module that needs torchvision comes here first
from .names import check_known  # noqa: F401  with the other checks

LARGEST = torch.finfo(torch.float32).max


def check_images(x: Tensor, bounded: bool = True) -> bool:
    """Raise ValueError unless `x` is a floating-point (n, channels, height, width) tensor of values in [0, 1].

    Whether they are in [0, 1] is returned; without `bounded`, they need not be.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"images are of type {type(x).__name__}; needed: a torch.Tensor (n, channels, height, width)")
    if not x.is_floating_point():
        raise ValueError(f"images have dtype {x.dtype}; needed: float32 in [0, 1] (for bytes: x.float() / 255)")
    if x.ndim != 4:
        raise ValueError(f"images have shape {tuple(x.shape)}; needed: (n, channels, height, width)")
    if x.is_meta:
        raise ValueError("images are on the meta device and have no values; needed: a device with memory")
    if x.numel() == 0:
        raise ValueError(f"images have shape {tuple(x.shape)}, which holds no pixel; needed: at least one image")
    low, high = (value.item() for value in x.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("images hold NaN or infinite values; needed: finite values in [0, 1]")
    if bounded and (low < 0 or high > 1):
        raise ValueError(f"images span [{low:g}, {high:g}]; needed: values in [0, 1] (models normalise inside)")
    return low >= 0 and high <= 1


def check_batch(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """The number of classes of `model`. ValueError unless it can classify `x` and every label in `y` is one of them."""
    check_images(x)
    check_modules(model)
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != x.shape[:1]:
        given = f"{y.dtype} of shape {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"labels are {given}; needed: int64 of shape ({len(x)},), one for each image")
    weight = next(model.parameters(), x)
    if (weight.device, weight.dtype) != (x.device, x.dtype):
        raise ValueError(
            f"images are {x.dtype} on {x.device}, the model is {weight.dtype} on {weight.device}; "
            "needed: the same for both (x.to(device), model.float())"
        )
    if y.device != x.device:
        raise ValueError(f"labels are on {y.device}, images on {x.device}; needed: the same device")
    classes = check_logits(model, x[:1])
    low, high = y.min().item(), y.max().item()
    if low < 0 or high >= classes:
        raise ValueError(f"labels span {low} to {high}; this model knows the classes 0 to {classes - 1}")
    return classes


def check_device(device: str | torch.device) -> None:
    """Raise ValueError for a device that torch does not know or cannot use here."""
    try:
        kind = torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is unknown; needed: such as 'cpu' or 'cuda'") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', and there is no GPU that torch can use here; leave it out, or give 'cpu'")


def check_modules(*models: nn.Module) -> None:
    """Raise ValueError for the first that is no network."""
    for model in models:
        if not isinstance(model, nn.Module):
            raise ValueError(f"the model is of type {type(model).__name__}; needed: a torch.nn.Module")


def check_logits(model: nn.Module, x: Tensor, needed: int = 2) -> int:
    """The number of classes that `model` gives a logit for. ValueError for fewer than `needed`, or if it gives others.

    A warning where the logits look like probabilities: their gradients vanish where the model is sure.
    """
    with torch.no_grad(), frozen(model):
        try:
            logits = model(x)
        except RuntimeError as error:  # shapes that do not fit, by their layer's own words
            raise ValueError(f"the model cannot take images of shape {tuple(x.shape)}: {error}") from error
    if not isinstance(logits, Tensor) or logits.shape[:1] != x.shape[:1] or logits.ndim != 2:
        given = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"type {type(logits).__name__}"
        raise ValueError(f"the model's output is of {given}; needed: logits ({len(x)}, classes), a tensor")
    if logits.shape[1] < needed:
        raise ValueError(f"the model has {logits.shape[1]} classes; needed here: at least {needed}")
    if (logits >= 0).all() and ((logits.sum(1) - 1).abs() < 1e-3).all():
        warnings.warn("the model seems to return probabilities; needed: logits, before any softmax", stacklevel=4)
    return logits.shape[1]


def _scalar(value: object) -> object:
    """What a tensor without dimensions holds."""
    return value.item() if isinstance(value, Tensor) and value.ndim == 0 else value


def check_at_least(minimum: float, **values: float) -> None:
    """Raise ValueError for the first named value that is no finite number of float32 or is below `minimum`."""
    for name, value in values.items():
        value = _scalar(value)
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not minimum <= value <= LARGEST:
            raise ValueError(f"{name} is {value!r}; needed: a finite number of at least {minimum}")


def check_whole(minimum: int, **values: int) -> None:
    """Raise ValueError for the first named value that is no whole number or is below `minimum`."""
    for name, value in values.items():
        value = _scalar(value)
        if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
            raise ValueError(f"{name} is {value!r}; needed: a whole number of at least {minimum}")


def check_noise_std(noise_std: float) -> None:
    """Raise ValueError unless `noise_std`, σ of the noise that a denoiser takes off, is above 0 and at most 1."""
    value = _scalar(noise_std)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value <= 1:
        raise ValueError(f"σ is {value!r}; needed: above 0 and at most 1 (σ is in [0, 1] pixels: 50/255)")


def imported(module: str, what: str, extra: str = "imagenet") -> ModuleType:
    """An optional package's `module`, imported. ValueError, which names the `extra` to install, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0].replace("_", "-")
        raise ValueError(f"{what} needs the package {package} ({error}); pip install -e '.[{extra}]'") from error


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Evaluate `modules` in eval mode and without weight gradients, then restore both, also after an error."""
    check_modules(*modules)
    parts = [part for module in modules for part in module.modules()]
    modes = [part.training for part in parts]
    weights = [weight for part in parts for weight in part.parameters(recurse=False) if weight.requires_grad]
    try:
        if any(modes):  # else nothing is set anew: a step of an attack comes here too
            for module in modules:
                module.eval()
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for part, mode in zip(parts, modes, strict=True):
            if part.training != mode:  # what another library has set in between, too
                part.training = mode
        for weight in weights:
            weight.requires_grad_(True)


def as_generator(seed: int | torch.Generator) -> torch.Generator:
    """A CPU generator for `seed`, or the one given: noise is drawn on the CPU, so every device sees the same."""
    if isinstance(seed, torch.Generator):
        if seed.device.type != "cpu":
            raise ValueError(f"the generator is on {seed.device}; needed: a CPU generator or an integer seed")
        return seed
    check_whole(0, seed=seed)
    return torch.Generator("cpu").manual_seed(seed)


def drawn_seed(seed: int | torch.Generator) -> int:
    """A whole number below 2³¹ that `seed`, or the generator given, decides."""
    return int(torch.randint(2**31, (1,), generator=as_generator(seed), device="cpu"))
