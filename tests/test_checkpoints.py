import json
import re
import time

import pytest
import torch
from conftest import images, tiny_dae
from safetensors.torch import save_file
from torch import nn

from apudae import load_model
from apudae.checkpoints import ARCHITECTURES, checkpoint_names, describe_checkpoint, save_model
from apudae.files import CHECKPOINTS, ROOT, digest
from apudae.models import CNN, MLP, ResNet, ResNet8, UNet, calibrate

SHIPPED = ["mnist/classifier", "mnist/cnn", "mnist/dae"]


@pytest.fixture
def saved(tmp_path):
    """A saved tiny autoencoder: its path without ending."""
    save_model(tmp_path / "dae", tiny_dae(), data="noise", recipe={"steps": 3}, metrics={"loss": 0.5})
    return tmp_path / "dae"


def edit(saved, **changes):
    sidecar = saved.with_suffix(".json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | changes))


MODELS = [MLP(), CNN(), ResNet(10, 1), ResNet8(4), tiny_dae(3, 5, 4).train(), UNet(3, 2, 4)]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_round_trip(tmp_path, model):
    save_model(tmp_path / "below" / "it", model, data="noise")
    loaded = load_model(tmp_path / "below" / "it")
    assert type(loaded) is type(model)
    assert not any(part.training for part in loaded.modules())
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0, equal_nan=True)
    assert sorted(file.name for file in (tmp_path / "below").iterdir()) == ["it.json", "it.safetensors"]


def test_half_precision_takes_half_the_space_and_comes_back_as_float32(tmp_path):
    dae = tiny_dae(3, 5, 16)
    calibrate(dae, images(10, 3, 8, 8))
    save_model(tmp_path / "whole", dae)
    save_model(tmp_path / "half", dae, half=True)
    assert (tmp_path / "half.safetensors").stat().st_size < 0.6 * (tmp_path / "whole.safetensors").stat().st_size
    loaded = load_model(tmp_path / "half")
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float32}
    for name, weight in dae.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight.half().float())
    for name, buffer in dae.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer)  # μ and σ, and the batch statistics, to the last bit
    save_model(tmp_path / "again", loaded, half=True)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "half.safetensors").read_bytes()


def test_sidecar_says_what_the_weights_are(saved):
    described = json.loads(saved.with_suffix(".json").read_text())
    assert described["architecture"] == {"name": "dae", "channels": 1, "depth": 4, "width": 6}
    assert (described["data"], described["recipe"], described["metrics"]) == ("noise", {"steps": 3}, {"loss": 0.5})
    assert described["sha256"] == digest(saved.with_suffix(".safetensors"))
    assert described["commit"]


def test_names_that_differ_after_a_dot_are_different(tmp_path):
    save_model(tmp_path / "dae-0.5", tiny_dae(width=5))
    save_model(tmp_path / "dae-0.3", tiny_dae(width=3))
    assert load_model(tmp_path / "dae-0.5").architecture["width"] == 5
    assert load_model(tmp_path / "dae-0.3").architecture["width"] == 3


def test_failed_save_leaves_the_former_weights(saved):
    with pytest.raises(TypeError):
        save_model(saved, tiny_dae(width=3), metrics=object())  # JSON cannot hold it
    assert load_model(saved).architecture["width"] == 6
    assert sorted(file.name for file in saved.parent.iterdir()) == ["dae.json", "dae.safetensors"]


@pytest.mark.parametrize("name", ["mnist/nothing", "mnist", "cifar10/dae"])
def test_unknown_name_lists_what_there_is(name):
    with pytest.raises(ValueError, match=f"'{name}' is unknown; there is: .*mnist/classifier"):
        load_model(name)
    with pytest.raises(ValueError, match=r"there is: .*mnist/classifier"):
        describe_checkpoint(name)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_truncated_weights(saved, kept):
    weights = saved.with_suffix(".safetensors")
    weights.write_bytes(weights.read_bytes()[: int(kept * weights.stat().st_size)])
    with pytest.raises(ValueError, match=r"dae\.safetensors.*truncated or changed.*git checkout"):
        load_model(saved)


@pytest.mark.parametrize("place", [0, 0.3, 0.999])
def test_one_flipped_bit(saved, place):
    weights = saved.with_suffix(".safetensors")
    content = bytearray(weights.read_bytes())
    content[int(place * len(content))] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"dae\.safetensors.*SHA-256 differs"):
        load_model(saved)


def test_missing_weights(saved):
    saved.with_suffix(".safetensors").unlink()
    with pytest.raises(ValueError, match=r"dae\.safetensors is missing"):
        load_model(saved)


def test_unknown_architecture_lists_what_there_is(saved):
    edit(saved, architecture={"name": "transformer"})
    with pytest.raises(ValueError, match=f"'transformer' is unknown; there is: {', '.join(ARCHITECTURES)}"):
        load_model(saved)


@pytest.mark.parametrize("architecture", [{"name": "cnn"}, {"name": "dae", "channels": 1, "depth": 4, "width": 7}])
def test_weights_of_another_architecture(saved, architecture):
    edit(saved, architecture=architecture)
    with pytest.raises(ValueError, match=r"dae\.safetensors does not hold the weights of"):
        load_model(saved)


def test_file_that_is_no_safetensors_at_all(saved):
    weights = saved.with_suffix(".safetensors")
    weights.write_bytes(b"not weights")
    edit(saved, sha256=digest(weights))
    with pytest.raises(ValueError, match=r"dae\.safetensors"):
        load_model(saved)


def test_weights_of_the_wrong_names(saved):
    weights = saved.with_suffix(".safetensors")
    save_file({"nothing": torch.zeros(1)}, weights)
    edit(saved, sha256=digest(weights))
    with pytest.raises(ValueError, match=r"dae\.safetensors"):
        load_model(saved)


@pytest.mark.parametrize(
    "content",
    ["", '{"architecture": ', "[1, 2]", "{}", '{"architecture": {"name": "mlp"}}', '{"sha256": "0"}'],
)
def test_broken_sidecar_is_named(saved, content):
    saved.with_suffix(".json").write_text(content)
    with pytest.raises(ValueError, match="dae"):
        load_model(saved)


@pytest.mark.parametrize("architecture", ["dae", {}, {"name": "dae", "heads": 4}, {"name": "dae", "width": "six"}])
def test_broken_architecture_is_named(saved, architecture):
    edit(saved, architecture=architecture)
    with pytest.raises(ValueError, match=r"architecture|dae"):
        load_model(saved)


# --- what the repository ships ----------------------------------------------------------------------------------------


def test_what_is_shipped():
    assert set(SHIPPED) <= set(checkpoint_names())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_checkpoint_loads_and_says_where_it_came_from(name):
    model, described = load_model(name), describe_checkpoint(name)
    assert all(weight.isfinite().all() for weight in model.state_dict().values())
    assert not model.training
    assert described["data"] == "mnist"
    assert described["fitted_on"] <= 59_000
    assert described["recipe"]["steps"] > 0
    assert described["metrics"]
    assert re.fullmatch(r"[0-9a-f]{10,40}", described["commit"]), "trained from a commit, without uncommitted changes"


def test_all_checkpoints_are_small_and_nothing_else_lies_there():
    files = [file for file in CHECKPOINTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 40_000_000
    assert {file.suffix for file in files} == {".json", ".safetensors"}


def test_nothing_is_ever_unpickled():
    """Files of other packages are read by torch's reader of tensors alone, which runs no code."""
    for module in (ROOT / "apudae").rglob("*.py"):
        text = re.sub(r"torch\.load\([^()]*weights_only=True\)", "", module.read_text())
        assert not re.search(r"\bpickle|torch\.(load|save)\b|allow_pickle|joblib|\bshelve", text), module


def test_networks_of_colour_images_come_channels_last():
    convolutions = [layer for layer in load_model("cifar10/residual_unet_10").modules() if isinstance(layer, nn.Conv2d)]
    assert all(layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in convolutions)
    digits = [layer for layer in load_model("mnist/dae").modules() if isinstance(layer, nn.Conv2d)]
    assert all(layer.weight.is_contiguous() for layer in digits), "slower for these"


@pytest.mark.parametrize("name", [None, 3, b"mnist/dae", ["mnist/dae"]])
def test_what_is_no_name_is_told(name):
    with pytest.raises(ValueError, match=r"a network's name is .*; needed: text, or a path"):
        load_model(name)


@pytest.mark.parametrize("device", ["gpu", "", None, *([] if torch.cuda.is_available() else ["cuda", "cuda:1"])])
def test_a_device_that_is_not_there_is_told(device):
    with pytest.raises(ValueError, match=r"device .* is unknown|no GPU that torch can use here"):
        load_model("mnist/dae", device)


@pytest.mark.parametrize("name", ["", ".", "..", "/", "mnist", "x" * 300, "x/" * 3000, "a\0b", "mnist/dae.json", "🙂"])
def test_a_name_of_no_checkpoint_lists_what_there_is(name):
    with pytest.raises(ValueError, match=r"checkpoint .* is unknown; there is: .*mnist/dae, ") as said:
        load_model(name)
    assert len(str(said.value)) < 1500


@pytest.mark.parametrize(
    "size", [{"depth": 10**8}, {"width": 10**8}, {"width": 10**30}, {"depth": 6, "width": 6, "channels": 6}]
)
def test_a_sidecar_that_asks_for_too_much_is_named_at_once(saved, size):
    edit(saved, architecture={"name": "dae", "channels": 1, "depth": 4, "width": 6} | size)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"dae.safetensors does not hold the weights of"):
        load_model(saved)
    assert time.monotonic() - start < 5
