import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import images, linear_classifier, seeded, set_gradients, snapshot
from PIL import Image
from torch import nn
from torch.utils.data import Subset

from apudae import load_dataset, load_model
from apudae.baselines import JPEG, Critic, DefenseGAN, Generator, MagNet, ProjectionConfig, train_gan, train_magnet
from apudae.baselines.defense_gan import gradient_penalty
from apudae.baselines.magnet import TEMPERATURES, _divergence
from apudae.checkpoints import save_model
from apudae.evaluation.grid import purified_rows
from apudae.models import StridedCNN
from apudae.training.loop import Recipe

FAST = ProjectionConfig(restarts=3, steps=4)


@pytest.fixture(scope="module")
def few():
    """320 training digits, 32 of each class."""
    digits = load_dataset("mnist5k", "train")
    return Subset(digits, list(range(0, 4000, 12))[:320])


@pytest.fixture
def gan():
    """A narrow generator whose images differ from pixel to pixel."""
    torch.manual_seed(0)
    generator = Generator(width=2)
    with torch.no_grad():
        for weight in generator.parameters():
            weight.mul_(4)
    return generator.eval()


# --- MagNet -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "weights"), [((2, 1, 28, 28), 310 + 142), ((2, 3, 32, 32), 252)])
def test_reformer_has_the_original_size_and_gives_images(shape, weights):
    magnet = MagNet(shape[1])
    assert sum(weight.numel() for weight in magnet.parameters()) == weights
    reformed = magnet(images(*shape))
    assert reformed.shape == shape
    assert 0 <= reformed.min() <= reformed.max() <= 1


@pytest.mark.slow
def test_magnet_learns_to_denoise(few, digits):
    torch.manual_seed(0)
    magnet, (x, _) = MagNet(), digits
    before = (magnet(x) - x).square().mean()
    curves = train_magnet(magnet, few, Recipe(steps=60, batch_size=64, learning_rate=2e-2))
    assert [curve[-1]["step"] for curve in curves] == [60, 60]
    assert (magnet(x) - x).square().mean() < 0.6 * before
    assert not magnet.training


def test_thresholds_drop_at_most_their_share_of_the_calibration_images():
    magnet, x = MagNet(), images(400, 1, 8, 8)
    for rate, most in ((0.0, 0), (0.001, 0), (0.01, 4), (0.1, 40)):
        magnet.calibrate(x, drop_rates=[rate, 0])
        assert int(magnet.detected(x).sum()) == most
    magnet.calibrate(x)
    assert not magnet.detected(x).any()
    assert magnet.detected((x + 0.5).clamp(0, 1)).float().mean() > 0.9, "images of another kind are dropped"


def test_scores_are_mean_powers_of_the_reconstruction_error():
    magnet, x = MagNet(), images(5, 1, 8, 8)
    first, second = ((x - network(x)).detach() for network in magnet.autoencoders)
    expected = torch.stack([first.square().mean((1, 2, 3)), second.abs().mean((1, 2, 3))], 1)
    assert torch.allclose(magnet.scores(x), expected)


def test_divergence_detectors():
    """Jensen–Shannon by its definition; 0 where the reformer changes nothing, at most log 2."""
    magnet, classifier, x = MagNet(3, TEMPERATURES), linear_classifier(192, 4), images(6, 3, 8, 8)
    found = magnet.scores(x, classifier)[:, 1:]
    for column, temperature in enumerate((10, 40)):
        p, q = (classifier(image).div(temperature).softmax(1) for image in (x, magnet(x)))
        m = (p + q) / 2
        expected = ((p * (p / m).log()).sum(1) + (q * (q / m).log()).sum(1)) / 2
        assert torch.allclose(found[:, column], expected, atol=1e-6)
    with torch.no_grad():
        sharp = torch.tensor([[200.0, 0.0], [0.0, 200.0]])
        assert torch.allclose(_divergence(sharp, sharp.flip(1)), torch.full((2,), 2.0).log())
        assert torch.allclose(_divergence(sharp, sharp), torch.zeros(2), atol=1e-6)
    magnet.calibrate(x, classifier, drop_rates=[0.2, 0.2, 0.2])
    assert magnet.detected(x, classifier).any()


def test_magnet_leaves_networks_alone_and_has_an_exact_gradient():
    magnet, classifier, x = MagNet(3, (10,)), linear_classifier(192, 4), images(3, 3, 8, 8)
    before = set_gradients(magnet), set_gradients(classifier)
    magnet.scores(x, classifier)
    assert (snapshot(magnet), snapshot(classifier)) == before
    assert torch.autograd.gradcheck(MagNet().double(), images(1, 1, 4, 4, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: MagNet().detected(x), "no thresholds"),
        (lambda x: MagNet().calibrate(x, drop_rates=[0.1]), "drop_rates"),
        (lambda x: MagNet().calibrate(x, drop_rates=[0.1, 1.0]), "drop_rates"),
        (lambda x: MagNet(1, (10,)).scores(x), "classifier"),
        (lambda x: MagNet(3)(x), "3, height, width"),
        (lambda x: MagNet()(x[..., 1:]), "even"),
        (lambda x: MagNet()(x * 2), "span"),
        (lambda x: train_magnet(MagNet(), [], Recipe(1), noise_std=-1), "noise_std"),
    ],
)
def test_bad_input_to_magnet(call, message):
    with pytest.raises(ValueError, match=message):
        call(images(4, 1, 8, 8))


def test_weights_and_thresholds_come_back_from_a_checkpoint(tmp_path, gan):
    magnet = MagNet(3, (10.0,))
    magnet.calibrate(images(20, 3, 8, 8), linear_classifier(192, 4), drop_rates=[0.1, 0.1])
    for name, module in {"magnet": magnet, "generator": gan, "strided": StridedCNN(2)}.items():
        save_model(tmp_path / name, module)
        found = load_model(tmp_path / name)
        assert str(found) == str(module)
        pairs = zip(found.state_dict().values(), module.state_dict().values(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


# --- Defense-GAN ------------------------------------------------------------------------------------------------------


def test_networks_have_the_original_size():
    """128·4096 + 4096, 25·256·128 + 128, 25·128·64 + 64, 25·64 + 1; the critic's convolutions and its last layer."""
    sizes = [sum(weight.numel() for weight in network.parameters()) for network in (Generator(), Critic())]
    assert sizes == [528_384 + 819_328 + 204_864 + 1_601, 1_664 + 204_928 + 819_456 + 4_097]
    made = Generator(2)(torch.zeros(3, 128))
    assert made.shape == (3, 1, 28, 28)
    assert 0 < made.min() <= made.max() < 1
    assert Critic(2)(made).shape == (3, 1)


def test_projection_comes_nearer_with_steps_and_restarts(gan):
    x = gan(torch.randn(4, 128, generator=seeded())).detach()
    errors = {
        (restarts, steps): (DefenseGAN(gan, ProjectionConfig(restarts, steps))(x) - x).square().flatten(1).mean(1)
        for restarts, steps in ((1, 1), (1, 20), (4, 20))
    }
    assert (errors[1, 20] < errors[1, 1]).all()
    assert (errors[4, 20] <= errors[1, 20] + 1e-7).all()
    assert errors[4, 20].mean() < errors[1, 1].mean() / 2


def test_projection_follows_the_rule(gan):
    """One restart, two steps: v ← .7·v + ∇, z ← z − 10·v, by torch.optim.SGD."""
    x = images(2, 1, 28, 28)
    defense = DefenseGAN(gan, ProjectionConfig(restarts=1, steps=2), seed=3)
    z = nn.Parameter(defense.starts.repeat(2, 1))
    optimizer = torch.optim.SGD([z], lr=10.0, momentum=0.7)
    for _ in range(2):
        optimizer.zero_grad()
        (gan(z) - x).square().mean((1, 2, 3)).sum().backward(inputs=[z])
        optimizer.step()
    assert torch.allclose(defense(x), gan(z), atol=1e-6)


def test_projection_does_not_depend_on_the_batch(gan):
    x = images(5, 1, 28, 28)
    defense = DefenseGAN(gan, FAST)
    together = defense(x)
    assert torch.allclose(together, torch.cat([defense(image) for image in x.split(1)]), atol=1e-5)
    assert torch.allclose(together.flip(0), defense(x.flip(0)), atol=1e-5)
    assert not torch.equal(together, DefenseGAN(gan, FAST, seed=1)(x))


def test_projection_leaves_the_generator_alone_and_works_without_gradients(gan):
    gan.train()
    before, x = set_gradients(gan), images(2, 1, 28, 28)
    with torch.no_grad():
        quiet = DefenseGAN(gan, FAST)(x)
    with torch.inference_mode():
        quieter = DefenseGAN(gan, FAST)(x)
    assert snapshot(gan) == before
    assert torch.equal(quiet, quieter)
    assert not quiet.requires_grad


def test_what_an_attacker_sees(gan):
    x = images(2, 1, 28, 28).requires_grad_()
    assert not DefenseGAN(gan, FAST)(x).requires_grad
    seen = DefenseGAN(gan, FAST, backward="identity")(x)
    assert torch.equal(seen.detach(), DefenseGAN(gan, FAST)(x))
    above = images(2, 1, 28, 28, seed=4)
    assert torch.equal(torch.autograd.grad(seen, x, above)[0], above)


class CountedGAN(DefenseGAN):
    """Counts its batches, and can be killed."""

    _done, _last = 0, 100  # private: a public attribute is part of the fingerprint

    def forward(self, x):
        if self._done == self._last:
            raise KeyboardInterrupt
        self._done += 1
        return super().forward(x)


def test_projections_are_resumed_batch_by_batch(gan, tmp_path):
    x, y = images(6, 1, 28, 28), torch.arange(6)
    facts = {"dataset": "noise", "classifier": "linear", "parameters": {"clean": {}}, "batch_size": 2}
    measure = (linear_classifier(784, 10), None, {"clean": x}, y)
    defense = CountedGAN(gan, FAST)
    defense._last = 2
    with pytest.raises(KeyboardInterrupt):
        purified_rows(*measure, {"defense_gan": defense}, keep=tmp_path, **facts)
    again = CountedGAN(gan, FAST)
    resumed, (row,) = purified_rows(*measure, {"defense_gan": again}, keep=tmp_path, **facts)
    assert (defense._done, again._done) == (2, 1)
    assert torch.equal(resumed["clean", "defense_gan"], torch.cat([DefenseGAN(gan, FAST)(two) for two in x.split(2)]))
    assert json.loads(row["purifier_parameters"]) == asdict(FAST)
    for other in (CountedGAN(gan, FAST, seed=1), CountedGAN(gan, ProjectionConfig(3, 5))):
        purified, _ = purified_rows(*measure, {"defense_gan": other}, keep=tmp_path, **facts)
        assert not torch.equal(purified["clean", "defense_gan"], resumed["clean", "defense_gan"])


@pytest.mark.parametrize("bad", [{"restarts": 0}, {"steps": 0}, {"learning_rate": -1.0}, {"momentum": float("nan")}])
def test_bad_projection(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ProjectionConfig(**bad)


def test_bad_input_to_defense_gan(gan):
    with pytest.raises(ValueError, match=r"3, 32, 32.*1, 28, 28"):
        DefenseGAN(gan, FAST)(images(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"'exact' is unknown.*identity"):
        DefenseGAN(gan, FAST, backward="exact")


# --- WGAN-GP ----------------------------------------------------------------------------------------------------------


def test_gradient_penalty_of_a_linear_critic():
    """critic(x) = w·x has the gradient w everywhere: the penalty is (‖w‖ − 1)², its gradient 2(‖w‖ − 1)w/‖w‖."""
    critic = nn.Sequential(nn.Flatten(), nn.Linear(784, 1))
    real, made = images(6, 1, 28, 28), images(6, 1, 28, 28, seed=1)
    penalty = gradient_penalty(critic, real, made, seeded())
    weight = critic[1].weight
    assert penalty.item() == pytest.approx((weight.norm().item() - 1) ** 2, rel=1e-5)
    (gradient,) = torch.autograd.grad(penalty, weight)
    assert torch.allclose(gradient, 2 * (weight.norm() - 1) * weight / weight.norm(), rtol=1e-4, atol=1e-7)


def trained(few, run_dir=None, steps=6, first=0, **changed):
    torch.manual_seed(first)
    generator, critic = Generator(2), Critic(2)
    recipe = Recipe(steps, 16, 1e-3, changed.pop("seed", 0))
    curve = train_gan(generator, critic, few, recipe, run_dir=run_dir, save_every=2, **{"critic_steps": 2} | changed)
    return weights(generator, critic), curve


def weights(*networks):
    return torch.cat([weight.detach().flatten() for network in networks for weight in network.parameters()])


def test_generator_moves_in_every_so_many_steps(few):
    start = Generator(2), Critic(2)
    before = [weights(network) for network in start]
    train_gan(*start, few, Recipe(1, 16), critic_steps=2)
    assert [torch.equal(weights(n), b) for n, b in zip(start, before, strict=True)] == [True, False]
    train_gan(*start, few, Recipe(2, 16), critic_steps=2)
    assert not torch.equal(weights(start[0]), before[0])


def test_longer_recipe_goes_on_to_the_undisturbed_result(few, tmp_path):
    whole, curve = trained(few)
    trained(few, tmp_path, steps=4)
    resumed, same_curve = trained(few, tmp_path)
    assert torch.equal(whole, resumed)
    assert curve == same_curve
    assert [point["step"] for point in curve] == [2, 4, 6]
    with pytest.raises(ValueError, match="6 steps of training already"):
        trained(few, tmp_path, steps=4)
    for changed in ({"seed": 1}, {"critic_steps": 3}, {"penalty": 1.0}, {"first": 1}):
        with pytest.raises(ValueError, match="belongs to another training"):
            trained(few, tmp_path, **changed)
    with pytest.raises(ValueError, match="belongs to another training"):
        trained(Subset(few, range(len(few) - 1, -1, -1)), tmp_path)


TO_BE_KILLED = """
import sys
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/.."]
import torch, test_baselines
torch.set_num_threads(1)
test_baselines.train_to_be_killed(sys.argv[1])
"""


def train_to_be_killed(run_dir):
    digits = Subset(load_dataset("mnist5k", "train"), range(0, 4000, 12))
    return trained(digits, run_dir, steps=100)


@pytest.mark.slow
def test_killed_training_goes_on_to_the_same_result(tmp_path):
    command = [sys.executable, "-c", TO_BE_KILLED, str(tmp_path / "killed"), os.path.dirname(__file__)]
    process, state = subprocess.Popen(command), tmp_path / "killed" / "state.safetensors"
    while process.poll() is None and not state.is_file():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(600) == -signal.SIGKILL, "it ended before it could be killed"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    resumed, undisturbed = (train_to_be_killed(tmp_path / name) for name in ("killed", "undisturbed"))
    torch.set_num_threads(threads)
    assert torch.equal(resumed[0], undisturbed[0])
    assert resumed[1] == undisturbed[1]


# --- JPEG -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_takes_fine_detail_off_and_is_that_of_pillow(channels):
    noisy = (0.5 + 0.006 * (-1) ** torch.arange(16.0)).expand(2, channels, 16, 16)
    left = JPEG()(noisy)
    assert left.shape == noisy.shape
    assert left.std() == 0, "stripes a pixel wide are gone"
    file = io.BytesIO()
    pixels = (255 * noisy[0]).round().byte().movedim(0, 2).numpy()
    Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels).save(file, "JPEG", quality=30)
    read = torch.from_numpy(np.asarray(Image.open(file)).reshape(16, 16, channels).copy()).movedim(2, 0)
    assert torch.equal(JPEG(30)(noisy)[0] * 255, read.float())


@pytest.mark.parametrize("quality", [0, 101, 7.5, True])
def test_a_quality_that_there_is_not_is_named(quality):
    with pytest.raises(ValueError, match=f"quality is {quality}; needed: "):
        JPEG(quality)


def test_jpeg_refuses_two_channels_and_sides_that_no_file_has():
    with pytest.raises(ValueError, match="images have 2 channels; JPEG needs 1 or 3"):
        JPEG()(images(1, 2, 8, 8))
    with pytest.raises(ValueError, match=r"images have sides \(1, 65501\); JPEG has at most 65,500 pixels"):
        JPEG()(images(1, 1, 1, 65_501))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_jpeg_sees_the_pixels_of_any_precision(dtype):
    x = images(2, 3, 16, 16).to(dtype)
    assert (JPEG()(x).float() - JPEG()(x.float())).abs().max() < 0.004, "but for the rounding of what comes back"
