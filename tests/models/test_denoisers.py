import inspect
import pickletools
import sys
import zipfile
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import images
from torch import nn

import apudae
from apudae import load_model, recon_error
from apudae.models import calibrate
from apudae.models.denoisers import OneStepDiffusion
from apudae.models.pretrained import DEEPINV

SMALL = {  # DeepInverse's larger networks, as it lets one ask for them
    "DRUNet": {"nc": (8, 8, 8, 8), "nb": 1},
    "Restormer": {"dim": 8, "num_blocks": (1, 1, 1, 1), "num_refinement_blocks": 1},
    "SCUNet": {"config": (1, 1, 1, 1, 1, 1, 1)},
}


@pytest.mark.parametrize("denoiser", ["pretrained:ffdnet", "deepinv:DRUNet", "diffusers:google/ddpm-cifar10-32"])
@pytest.mark.parametrize(
    ("noise", "named"),
    [
        ("", r"does not say σ, the noise it takes off; needed: such as {}@0\.1$"),
        ("@much", r"names no σ; needed: such as {}@0\.1 or {}@25/255$"),
        ("@50", r"^σ is 50\.0; needed: above 0 and at most 1 \(σ is in \[0, 1\] pixels: 50/255\)$"),
        ("@2", r"^σ is 2\.0; needed"),
        ("@0", r"^σ is 0\.0; needed"),
        ("@-1", r"^σ is -1\.0; needed"),
        ("@nan", r"^σ is nan; needed"),
    ],
)
def test_a_denoiser_must_be_told_its_noise(denoiser, noise, named):
    with pytest.raises(ValueError, match=named.format(denoiser, denoiser)):
        load_model(denoiser + noise)


@pytest.mark.parametrize("name", ["deepinv:DRUNet@0.1", "diffusers:google/ddpm-cifar10-32@0.1"])
def test_a_missing_library_is_named(monkeypatch, name):
    library = name.partition(":")[0]
    for module in (library, f"{library}.models"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ValueError, match=rf"{name} needs the package {library} \(.*; pip install -e '\.\[{library}\]'$"
    ):
        load_model(name)


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("deepinv:Blur@0.1", "denoiser of deepinv 'Blur' is unknown; there is: DRUNet, DRUNet:gray, "),
        ("deepinv:DnCNN@0.1", "DnCNN has weights for one noise alone; needed: deepinv:DnCNN@2/255"),
        ("diffusers:no/such/folder@0.1", "no/such/folder"),
    ],
)
def test_an_unknown_denoiser_is_named(name, named):
    pytest.importorskip(name.partition(":")[0])
    with pytest.raises(ValueError, match=named) as refused:
        load_model(name)
    assert "\n" not in str(refused.value)


def follows_the_contract(dae, channels):
    """Any size, differentiable, one image as in a batch, calibrated, of `channels` channels alone; it purifies."""
    x = images(3, channels, 13, 18)
    output = dae(x)
    assert output.shape == x.shape
    assert not dae.training
    torch.testing.assert_close(dae(x[1:2]), output[1:2])
    assert dae(images(1, channels, 3, 1)).shape == (1, channels, 3, 1)
    recon_error(dae, x.requires_grad_()).sum().backward()
    assert x.grad.abs().flatten(1).sum(1).min() > 0
    assert dae.recon_mu.isnan()
    assert dae.recon_sigma.isnan()
    calibrate(dae, x.detach())
    torch.testing.assert_close(dae.recon_mu, recon_error(dae, x.detach()).mean())
    purified = apudae.purify(dae, x.detach()[:1], replace(apudae.PRESETS["D"], steps=2))
    assert purified.shape == x[:1].shape
    with pytest.raises(ValueError, match=rf"this autoencoder needs \(n, {channels}, height, width\)"):
        dae(images(1, 4 - channels, 8, 8))


# --- DeepInverse ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind == "SCUNet")) for kind in DEEPINV]
)
def test_denoisers_of_deepinverse(monkeypatch, kind):
    """With random weights in place of a download, in the library's own class, and small."""
    models = pytest.importorskip("deepinv.models")
    (weights, options, _, _), (name, _, gray) = DEEPINV[kind], kind.partition(":")
    made = partial(getattr(models, name), **SMALL.get(name, {}))
    source = inspect.getsource(sys.modules[made.func.__module__])
    assert all(f'"{part}"' in source for part in weights.split("/")), "the library's own weights"
    torch.manual_seed(0)
    theirs, asked = made(**options, pretrained=None).eval(), {}
    found = {"params": theirs.state_dict()} if name == "Restormer" else theirs.state_dict()
    monkeypatch.setattr(models, name, made)
    monkeypatch.setattr(models.utils, "load_state_dict_from_url", lambda url, **how: asked.update(how) or found)
    channels, level = 1 if gray else 3, 2 if name == "DnCNN" else 25
    dae = load_model(f"deepinv:{kind}@{level}/255")
    assert asked["weights_only"]
    follows_the_contract(dae, channels)
    x = images(2, channels, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(dae(x), theirs(x, level / 255))
        told = not torch.equal(theirs(x, 0.1), theirs(x, 0.2))
    assert told == (name in ("DRUNet", "FFDNet"))


class Unpickled:
    """Says so when it is."""

    done = False

    def __reduce__(self):
        return setattr, (Unpickled, "done", True)


def test_downloaded_weights_are_read_and_nothing_is_unpickled(monkeypatch, tmp_path):
    """What the library finds among its downloads is random here; the second time it is a pickle that runs code."""
    models = pytest.importorskip("deepinv.models")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(1)
    theirs, file = models.DnCNN(pretrained=None), tmp_path / "hub" / "checkpoints" / "dncnn_sigma2_color.pth"
    file.parent.mkdir(parents=True)
    torch.save(theirs.state_dict(), file)
    x = images(2, 3, 9, 8)
    torch.testing.assert_close(load_model("deepinv:DnCNN@2/255")(x), theirs(x))
    torch.save(theirs.state_dict() | {"more": Unpickled()}, file)
    with pytest.raises(ValueError, match=r"the weights of deepinv:DnCNN@2/255 could not be had"):
        load_model("deepinv:DnCNN@2/255")
    assert not Unpickled.done
    with zipfile.ZipFile(file) as parts:  # what the pickle would do, read and not done
        (pickled,) = (parts.read(part) for part in parts.namelist() if part.endswith("data.pkl"))
    told = [(operation.name, argument) for operation, argument, _ in pickletools.genops(pickled)]
    assert ("GLOBAL", "builtins setattr") in told or ("GLOBAL", "__builtin__ setattr") in told, "it would run code"


# --- diffusion models -------------------------------------------------------------------------------------------------


def tiny(channels=3, out_channels=None, **options):
    """A diffusion model's network of 6,000 weights."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=out_channels or channels, **sizes, **blocks, **options
    ).eval()


def saved(folder, network, safe=True, **schedule):
    """`network` and a DDPM schedule in `folder`, as on the hub; the name of the denoiser at σ = .1."""
    diffusers = pytest.importorskip("diffusers")
    pipeline = diffusers.DDPMPipeline(network, diffusers.DDPMScheduler(**schedule))
    pipeline.save_pretrained(folder, safe_serialization=safe)
    return f"diffusers:{folder}@0.1"


@pytest.mark.parametrize("channels", [1, 3])
def test_diffusion_models(tmp_path, channels):
    follows_the_contract(load_model(saved(tmp_path, tiny(channels))), channels)


def test_a_step_is_the_librarys(tmp_path):
    """x̂₀ as the library's scheduler has it, at the step whose noise is nearest; also from files without folders."""
    diffusers = pytest.importorskip("diffusers")
    network, x = tiny(), images(2, 3, 8, 8)
    name = saved(tmp_path, network)
    dae, schedule = load_model(name), diffusers.DDPMScheduler(clip_sample=False)
    noise_of = [((1 - alpha) / alpha).sqrt().item() / 2 for alpha in schedule.alphas_cumprod]
    step = min(range(1000), key=lambda step: abs(noise_of[step] - 0.1))
    assert dae.timestep == step
    with torch.no_grad():
        seen = schedule.alphas_cumprod[step].sqrt() * (2 * x - 1)
        theirs = schedule.step(network(seen, step).sample, step, seen).pred_original_sample
        torch.testing.assert_close(dae(x), (theirs + 1) / 2)
        for part in ("unet", "scheduler"):
            for file in (tmp_path / part).iterdir():
                file.rename(tmp_path / file.name)
            (tmp_path / part).rmdir()
        torch.testing.assert_close(load_model(name)(x), dae(x))


class TrueNoise(nn.Module):
    """A network that knows the noise; `seen` and `step` are what it was given."""

    def __init__(self, noise):
        super().__init__()
        self.config = tiny().config
        self.noise = nn.Parameter(noise)

    def forward(self, x, step):
        self.seen, self.step = x, step
        return type("Output", (), {"sample": torch.cat([self.noise, self.noise + 1], 1)})  # and a variance


@pytest.mark.parametrize("step", [0, 37, 300])
def test_who_knows_the_noise_gives_the_clean_image_back(step):
    """With the same β at every step ᾱ_t = (1 − β)^(t + 1), so that σ² = ((1 − β)^−(t + 1) − 1)/4."""
    diffusers = pytest.importorskip("diffusers")
    schedule = diffusers.DDPMScheduler(num_train_timesteps=500, beta_start=0.005, beta_end=0.005)
    noise_std = (0.995 ** -(step + 1) - 1) ** 0.5 / 2
    clean, noise = images(2, 3, 6, 6), torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    network = TrueNoise(noise)
    dae = OneStepDiffusion(network, schedule.alphas_cumprod, noise_std)
    torch.testing.assert_close(dae(clean + noise_std * noise), clean, rtol=0, atol=1e-5)
    assert network.step == step
    torch.testing.assert_close(network.seen, schedule.add_noise(2 * clean - 1, noise, torch.tensor(step)))


def test_noise_beyond_the_last_step_is_refused():
    network = TrueNoise(images(1, 3, 4, 4))
    assert OneStepDiffusion(network, torch.tensor([0.99, 0.9]), 0.16).timestep == 1
    with pytest.raises(ValueError, match=r"σ is 0\.2; this diffusion model knows noise up to 0\.167"):
        OneStepDiffusion(network, torch.tensor([0.99, 0.9]), 0.2)


@pytest.mark.parametrize(
    ("network", "options", "named"),
    [
        ({}, {"safe": False}, r"could not be had \(.*no file named diffusion_pytorch_model\.safetensors"),
        ({}, {"prediction_type": "v_prediction"}, "is a DDPMPipeline; needed: a UNet2DModel without classes that pred"),
        ({"num_class_embeds": 10}, {}, "is a DDPMPipeline; needed: a UNet2DModel without classes that predicts the n"),
    ],
)
def test_other_diffusion_models_are_refused(tmp_path, network, options, named):
    name = saved(tmp_path, tiny(**network), **options)
    with pytest.raises(ValueError, match=named):
        load_model(name)
