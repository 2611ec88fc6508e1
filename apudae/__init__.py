"""Adversarial purification with denoising autoencoders (Kalaria, Hazra, Chakrabarti 2022), and what is left of it.

The contracts, stated once:

- Images are float32 tensors (n, channels, height, width) with values in [0, 1]; labels are int64 (n,).
- Models return logits and normalise inside, so attacks and purifiers see pixels.
- `attack(model, x, y, *, epsilon, …) -> x_adv` is a pure function: inside the ε-ball and [0, 1]; weights, their
  gradients and the model's mode are as before; device and dtype are kept.
- `purify(dae, x, config, seed, ids) -> x_pur`; `Purifier(dae, config, backward="none")` is a module, so
  `nn.Sequential(Purifier(…), classifier)` is a classifier that any attack library can attack. `steps=0` is the
  identity.
- Randomness comes from an explicit seed or CPU generator. An image's noise comes from the seed and its entry in `ids`
  (by default its place in the call): its result never depends on its batch.
- Wrong input raises ValueError: what was given, what is needed and, for a name, what there is.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import attacks
    from .checkpoints import load_model
    from .datasets import load_dataset
    from .models import recon_error
    from .purification import PRESETS, Purifier, PurifyConfig, purify, trajectory

# name to its module, which is imported when it is asked for: torch takes seconds, `apudae --help` none
_HOMES = {"load_dataset": "datasets", "load_model": "checkpoints", "recon_error": "models"}
_HOMES |= dict.fromkeys(["PRESETS", "Purifier", "PurifyConfig", "purify", "trajectory"], "purification")


def __getattr__(name: str) -> Any:
    if name == "attacks":
        return import_module(".attacks", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; there is: {', '.join(__all__)}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]


__all__ = [
    "PRESETS",
    "Purifier",
    "PurifyConfig",
    "attacks",
    "load_dataset",
    "load_model",
    "purify",
    "recon_error",
    "trajectory",
]
