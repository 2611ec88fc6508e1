import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import images, seeded, tiny_dae
from safetensors import safe_open
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.utils.data import Dataset, Subset, TensorDataset

from apudae import attacks, load_dataset
from apudae.datasets import stack, take
from apudae.datasets.small import TensorImages
from apudae.models import DAE, MLP, ResNet
from apudae.training.distributed import in_processes
from apudae.training.loop import Recipe, fit
from apudae.training.objectives import _augmented, train_adversarial, train_classifier, train_dae

SHORT = Recipe(steps=30, batch_size=32, seed=1)


@pytest.fixture(scope="module")
def few():
    """320 training digits, 32 of each class."""
    digits = load_dataset("mnist5k", "train")
    return Subset(digits, list(range(0, 4000, 12))[:320])


def weights(model):
    """All weights and buffers in one row; NaN (no calibration yet) equals itself."""
    return torch.cat([value.flatten().double() for value in model.state_dict().values()]).nan_to_num(-1)


def trained(few, run_dir=None, recipe=SHORT, noise_std_max=0.5, width=4, first=0):
    torch.manual_seed(first)
    dae = DAE(1, 2, width)
    curve = train_dae(dae, few, recipe, noise_std_max=noise_std_max, run_dir=run_dir)
    return dae, curve


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train", [train_classifier, partial(train_adversarial, epsilon=0.1, step_size=0.1, steps=1)])
def test_images_that_do_not_fit_the_classifier_are_named_before_the_training(tmp_path, train):
    few = TensorImages(np.zeros((8, 1, 16, 16), np.uint8), np.arange(8), list("abcdefgh"))
    with pytest.raises(ValueError, match=r"cannot take images of shape \(1, 1, 16, 16\)"):
        train(MLP(), few, Recipe(steps=2), run_dir=tmp_path)
    assert not any(tmp_path.iterdir())


def test_classifier_learns(few, digits):
    torch.manual_seed(0)
    classifier, (x, y) = MLP(), digits
    before = F.cross_entropy(classifier(x), y)
    curve = train_classifier(classifier, few, Recipe(steps=120, batch_size=64), shift=1)
    assert not classifier.training
    assert F.cross_entropy(classifier(x), y) < before / 2
    assert (classifier(x).argmax(1) == y).float().mean() > 0.6
    assert curve[-1]["step"] == 120
    assert curve[-1]["loss"] < before


@pytest.mark.slow
def test_adversarial_training_makes_the_attack_fail(few, digits):
    """As many steps of ordinary training leave the loss under attack far above."""
    x, y = digits
    losses = {}
    for training, about in (
        (train_classifier, {}),
        (train_adversarial, {"epsilon": 0.1, "step_size": 0.05, "steps": 3}),
    ):
        torch.manual_seed(0)
        model = MLP()
        training(model, few, Recipe(steps=80, batch_size=64), **about)
        losses[training] = F.cross_entropy(model(attacks.pgd(model, x, y, epsilon=0.1)), y).item()
    assert losses[train_adversarial] < losses[train_classifier] / 1.5


@pytest.mark.parametrize(("step_size", "steps"), [(0.125, 1), (0.05, 3)])
def test_images_of_adversarial_training_fill_the_ball(few, step_size, steps):
    """The network learns, in training mode, from images that the inner attack moved inside the ball and [0, 1]."""
    seen = []

    class Spy(MLP):
        def forward(self, x):
            seen.append((self.training, x.detach()))
            return super().forward(x)

    few = Subset(few, range(48))
    train_adversarial(Spy(), few, Recipe(steps=2, batch_size=48), epsilon=0.1, step_size=step_size, steps=steps)
    del seen[0]  # the first image alone: do images and labels fit?
    assert [mode for mode, _ in seen] == 2 * ([False] * steps + [True])
    originals = stack(few)[0][None]
    for _, attacked in seen:
        distances = (attacked[:, None] - originals).abs().flatten(2).amax(2).amin(1)  # to the nearest original
        assert distances.max() <= 0.1 + 1e-6
        assert distances.median() > 0.09
        assert 0 <= attacked.min() <= attacked.max() <= 1


def test_autoencoder_learns(few, digits):
    x = digits[0]
    noisy = x + 0.3 * torch.randn(x.shape, generator=seeded())
    torch.manual_seed(0)
    dae = DAE(1, 3, 8)
    identity = F.mse_loss(noisy, x)
    train_dae(dae, few, Recipe(steps=60, batch_size=32, learning_rate=5e-3), noise_std_max=0.5)
    assert not dae.training
    assert F.mse_loss(dae(noisy), x) < 0.7 * identity


class Bright(torch.nn.Module):
    """Two classes, split at a mean brightness of .5, which one weight a pixel can be attacked through."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(40.0))

    def forward(self, x):
        logit = self.weight * (x.flatten(1).mean(1) - 0.5)
        return torch.stack([-logit, logit], 1)


def test_verdict_of_a_classifier_is_kept_stable():
    """A heavy weight on the classifier's verdict pulls denoised images of .45 and .55 apart; its weights stay."""
    x = torch.cat([torch.full((32, 1, 8, 8), 0.47), torch.full((32, 1, 8, 8), 0.53)])
    classifier, margins = Bright().train(), {}
    for stability in (0.0, 1.0):
        torch.manual_seed(0)
        dae = DAE(1, 2, 4)
        dataset, recipe = list(zip(x, [0] * 64, strict=True)), Recipe(steps=80, batch_size=32, learning_rate=1e-2)
        train_dae(dae, dataset, recipe, noise_std_max=0.1, classifier=classifier, stability=stability)
        logits = classifier(dae(x)).detach()
        margins[stability] = (logits[32:, 1] - logits[32:, 0]).mean() + (logits[:32, 0] - logits[:32, 1]).mean()
    assert margins[1.0] > margins[0.0] + 1
    assert classifier.weight.item() == 40
    assert classifier.weight.grad is None
    assert classifier.training


def test_half_of_the_images_are_attacked_before_the_noise():
    """On black and white images the attack of one weight moves all pixels of an image the same way, by at most ε."""
    x, seen = torch.cat([torch.full((64, 1, 8, 8), 0.4), torch.full((64, 1, 8, 8), 0.6)]), []

    class Spy(DAE):
        def forward(self, images):
            seen.append(images.detach())
            return super().forward(images)

    dataset, options = list(zip(x, [0] * 128, strict=True)), {"classifier": Bright(), "epsilon": 0.05}
    train_dae(Spy(1, 2, 4), dataset, Recipe(steps=3, batch_size=128), noise_std_max=0.0, **options)
    images = torch.cat(seen)
    dark = images.flatten(1).mean(1) < 0.5
    change = images - torch.where(dark, 0.4, 0.6)[:, None, None, None]
    attacked = change.flatten(1).abs().amax(1) > 1e-6
    assert 0.4 < attacked.float().mean() < 0.6
    assert change.abs().max() <= 0.05 + 1e-6
    assert (change[attacked & dark] > 0.04).all(), "dark images are made brighter, all the way"
    assert (change[attacked & ~dark] < -0.04).all()


def test_attack_in_the_training_needs_a_classifier(few):
    with pytest.raises(ValueError, match=r"epsilon is 0.1, without a classifier to attack"):
        train_dae(tiny_dae(), few, SHORT, noise_std_max=0.1, epsilon=0.1)


def test_curve_is_the_mean_loss_since_the_last_point(few):
    values = []

    def loss(model, x, y, generator):
        values.append(F.mse_loss(model(x + 0.1), x))
        return values[-1]

    curve = fit(tiny_dae(), loss, few, Recipe(steps=25, batch_size=32), save_every=10)
    assert [point["step"] for point in curve] == [10, 20, 25]
    means = [torch.stack(values[a:b]).mean().item() for a, b in ((0, 10), (10, 20), (20, 25))]
    assert [point["loss"] for point in curve] == pytest.approx(means, rel=1e-5)


def test_epochs_show_every_image_once():
    x, seen = images(12, 1, 1, 1), []
    dataset = list(zip(x, torch.arange(12), strict=True))

    def loss(model, x, y, generator):
        seen.extend(y.tolist())
        return model(x).square().mean()

    fit(tiny_dae(), loss, dataset, Recipe(steps=6, batch_size=4))
    first, second = seen[:12], seen[12:]
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def noisy_black(steps, **strengths):
    """The images that an autoencoder sees in training on black ones."""
    found = []

    class Spy(DAE):
        def forward(self, x):
            found.append(x.detach())
            return super().forward(x)

    black = [(torch.zeros(1, 16, 16), 0)] * 64
    train_dae(Spy(1, 2, 4), black, Recipe(steps=steps, batch_size=64), **strengths)
    return torch.cat(found)


def test_noise_is_drawn_for_each_image():
    """Eq. 1: every black image gets a noise strength of its own, uniform in [0, σ_max], and is never clipped."""
    seen = noisy_black(20, noise_std_max=0.6)
    stds = seen.flatten(1).std(1)
    assert stds.max() < 0.75
    assert torch.histc(stds, 4, 0, 0.6).min() > 0.2 * len(stds)  # uniform, up to the noise of 256 pixels
    assert (seen < 0).any()


def test_shifts_move_each_image_by_itself():
    x = torch.zeros(200, 1, 7, 7)
    x[:, 0, 3, 3] = 1
    moved = _augmented(x, 2, False, seeded())
    assert moved.shape == x.shape
    assert torch.equal(moved.flatten(1).sum(1), torch.ones(200))
    places = {tuple(place) for place in moved[:, 0].nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in range(1, 6) for column in range(1, 6)}
    assert torch.equal(_augmented(x, 0, False, seeded()), x)


def test_flips_are_for_each_image_and_keep_colours_together():
    x = images(200, 3, 4, 4)
    flipped = _augmented(x, 0, True, seeded())
    mirrored = (flipped == x.flip(3)).flatten(1).all(1)
    assert torch.equal(flipped[~mirrored], x[~mirrored])
    assert 60 < mirrored.sum() < 140
    assert torch.equal(_augmented(x, 0, False, seeded()), x)


UNATTACKED = partial(train_adversarial, epsilon=0.0, step_size=0.0, steps=1)


@pytest.mark.parametrize("train", [train_classifier, UNATTACKED, partial(train_dae, noise_std_max=0.0)])
def test_training_sees_augmented_images(train):
    """A dot in a corner: with shift and flip the network sees it elsewhere, on either side, in all colours alike."""
    seen = []

    class Spy(DAE):
        def forward(self, x):
            seen.append(x.detach())
            return super().forward(x)

    class Reader(ResNet):
        def forward(self, x):
            seen.append(x.detach())
            return super().forward(x)

    x = torch.zeros(3, 8, 8)
    x[:, 2, 2] = 1
    network = Reader(10, 1) if train in (train_classifier, UNATTACKED) else Spy(3, 2, 4)
    train(network, [(x, 0)] * 32, Recipe(steps=4, batch_size=32), shift=1, flip=True)
    shown = torch.cat(seen)
    assert {tuple(place) for place in shown[:, 0].nonzero()[:, 1:].tolist()} == {
        (row, column) for row in (1, 2, 3) for column in (1, 2, 3, 4, 5, 6)
    }
    assert torch.equal(shown[:, 0], shown[:, 2])


def test_noise_between_two_strengths():
    stds = noisy_black(5, noise_std_min=0.3, noise_std_max=0.6).flatten(1).std(1)
    assert 0.24 < stds.min() < 0.33
    assert 0.57 < stds.max() < 0.75


def test_average_of_the_weights(few):
    """Its value by hand: each step's weights, the older the less."""
    decay, passed = 0.8, []

    def loss(model, x, y, generator):
        passed.append([weight.detach().clone() for weight in model.parameters()])
        return F.mse_loss(model(x + 0.1), x)

    torch.manual_seed(0)
    averaged, plain = DAE(1, 2, 4), DAE(1, 2, 4)
    plain.load_state_dict(averaged.state_dict())
    fit(averaged, loss, few, Recipe(steps=6, batch_size=32, ema_decay=decay))
    fit(plain, loss, few, Recipe(steps=6, batch_size=32))
    after = [*passed[7:12], [weight.detach() for weight in plain.parameters()]]  # of the plain run: the same steps
    for weight, *values in zip(averaged.parameters(), *after, strict=True):
        expected = values[0]
        for value in values[1:]:
            expected = decay * expected + (1 - decay) * value
        torch.testing.assert_close(weight, expected)
    assert not torch.equal(weights(averaged), weights(plain))


def test_weight_decay_shrinks_what_no_gradient_holds(few):
    dae = DAE(1, 2, 4)
    before = [weight.detach().clone() for weight in dae.parameters()]
    still = lambda model, x, y, generator: 0 * model(x).mean()  # noqa: E731
    fit(dae, still, few, Recipe(steps=5, batch_size=32, weight_decay=0.5))
    assert all((now.abs() <= then.abs()).all() for now, then in zip(dae.parameters(), before, strict=True))
    assert dae.encoder[0][0].weight.norm() < before[0].norm()


# --- repeatable and resumable -----------------------------------------------------------------------------------------


def test_same_seed_same_weights(few):
    first, second, other = trained(few), trained(few), trained(few, recipe=Recipe(steps=30, batch_size=32, seed=2))
    assert torch.equal(weights(first[0]), weights(second[0]))
    assert first[1] == second[1]
    assert not torch.equal(weights(first[0]), weights(other[0]))


def test_run_folder_changes_no_result_and_stays_tidy(few, tmp_path):
    plain, kept = trained(few), trained(few, tmp_path / "run")
    assert torch.equal(weights(plain[0]), weights(kept[0]))
    assert plain[1] == kept[1]
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["state.safetensors"]


def test_finished_run_is_not_trained_again(few, tmp_path):
    first, curve = trained(few, tmp_path)
    stamp = (tmp_path / "state.safetensors").stat().st_mtime_ns
    again, same_curve = trained(few, tmp_path)
    assert torch.equal(weights(first), weights(again))
    assert curve == same_curve
    assert (tmp_path / "state.safetensors").stat().st_mtime_ns == stamp
    assert not again.training


@pytest.mark.parametrize(
    "changed",
    [
        {"recipe": Recipe(steps=40, batch_size=32, seed=1)},
        {"noise_std_max": 0.4},
        {"images": range(100)},
        {"images": range(319, -1, -1)},
        {"width": 5},
        {"first": 1},
    ],
)
def test_run_folder_of_another_training_is_refused(few, tmp_path, changed):
    trained(few, tmp_path)
    dataset = Subset(few, changed.pop("images", range(len(few))))
    with pytest.raises(ValueError, match=r"state\.safetensors belongs to another training"):
        trained(dataset, tmp_path, **changed)


SLOW_TRAINING = """
import sys, time
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/.."]
import torch, test_training
torch.set_num_threads(1)
test_training.train_to_be_killed(sys.argv[1], pause=0.05)
"""


def train_to_be_killed(run_dir, pause=0.0):
    """40 steps, kept every 4; with a pause in each, there is time to kill them."""
    torch.manual_seed(0)
    dae = DAE(1, 2, 4)

    def loss(model, x, y, generator):
        time.sleep(pause)
        return F.mse_loss(model(x + 0.3 * torch.randn(x.shape, generator=generator)), x)

    digits = Subset(load_dataset("mnist5k", "train"), range(0, 4000, 25))
    curve = fit(dae, loss, digits, Recipe(steps=40, batch_size=16), run_dir=run_dir, save_every=4)
    return dae, curve


def kill_once_kept(run_dir, after):
    """Start the training in another process, and kill -9 it when its state was written after `after`."""
    command = [sys.executable, "-c", SLOW_TRAINING, str(run_dir), os.path.dirname(__file__)]
    process, state = subprocess.Popen(command), run_dir / "state.safetensors"
    while process.poll() is None and not (state.is_file() and state.stat().st_mtime_ns > after):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(600) == -signal.SIGKILL, "it ended before it could be killed"
    with safe_open(state, framework="pt") as kept:
        return state.stat().st_mtime_ns, len(json.loads(kept.metadata()["settings"])["curve"])


@pytest.mark.slow
def test_killed_training_goes_on_to_the_same_result(tmp_path):
    written, points = kill_once_kept(tmp_path / "killed", after=0)
    _, more_points = kill_once_kept(tmp_path / "killed", after=written)
    assert 1 <= points < more_points < 10
    (tmp_path / "killed" / ".state.1.partial.safetensors").write_bytes(b"half a file, as a kill leaves it")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    resumed, undisturbed = (train_to_be_killed(tmp_path / name) for name in ("killed", "undisturbed"))
    torch.set_num_threads(threads)
    assert resumed[1] == undisturbed[1]
    assert torch.equal(weights(resumed[0]), weights(undisturbed[0]))


@pytest.mark.slow
def test_interrupted_average_goes_on_to_the_same_result(tmp_path):
    recipe, steps = Recipe(steps=12, batch_size=16, ema_decay=0.9), []
    colours = [(image, 0) for image in images(64, 3, 8, 8)]

    def once(run_dir, stop_at=None):
        torch.manual_seed(0)
        dae = DAE(3, 2, 4)

        def loss(model, x, y, generator):
            steps.append(1)
            if len(steps) == stop_at:
                raise KeyboardInterrupt
            return F.mse_loss(model(x + 0.1 * torch.randn(x.shape, generator=generator)), x)

        fit(dae, loss, colours, recipe, run_dir=run_dir, save_every=4)
        return dae

    with pytest.raises(KeyboardInterrupt):
        once(tmp_path / "stopped", stop_at=7)
    steps.clear()
    resumed = once(tmp_path / "stopped")
    assert len(steps) == 8
    assert torch.equal(weights(resumed), weights(once(tmp_path / "undisturbed")))
    assert torch.equal(weights(resumed), weights(once(tmp_path / "stopped"))), "a finished one is the average too"


# --- two processes ----------------------------------------------------------------------------------------------------


def shared_training(processes, run_dir, pause=0.0):
    """An autoencoder with batch normalisation on Eq. 1, 40 steps kept every 2, in so many processes; in float64."""
    torch.manual_seed(0)
    dae = DAE(1, 3, 8).double()
    digits = Subset(Slow(load_dataset("mnist5k", "train"), pause), range(0, 4000, 25))
    recipe = Recipe(steps=40, batch_size=16, learning_rate=5e-3)
    curve = in_processes(processes, train_dae, dae, digits, recipe, noise_std_max=0.5, run_dir=run_dir)
    return dae, curve


class Slow(Dataset):
    """A data set that can be slow, so that there is time to kill its training."""

    def __init__(self, whole, pause):
        self.whole, self.pause = whole, pause

    def __getitem__(self, index):
        time.sleep(self.pause)
        image, label = self.whole[index]
        return image.double(), label


@pytest.mark.slow
def test_two_processes_train_as_one_and_go_on_after_a_kill(tmp_path):
    """The curve of two gloo processes is that of one with the whole batch, up to rounding; also after kill -9."""
    code = "import sys; sys.path[:0] = [sys.argv[2], sys.argv[2] + '/..']\n"
    code += "from pathlib import Path; import test_training\n"
    code += "if __name__ == '__main__': test_training.shared_training(2, Path(sys.argv[1]), pause=0.02)"
    command = [sys.executable, "-c", code, str(tmp_path / "killed"), os.path.dirname(__file__)]
    with subprocess.Popen(command, env=os.environ | {"APUDAE_TEST": str(tmp_path)}) as process:
        while process.poll() is None and not (tmp_path / "killed" / "state.safetensors").is_file():
            time.sleep(0.02)
        workers = [pid for pid in living(f"APUDAE_TEST={tmp_path}") if pid != process.pid]
        process.send_signal(signal.SIGKILL)
        assert process.wait(600) == -signal.SIGKILL, "it ended before it could be killed"
    assert len(workers) >= 2
    end = time.monotonic() + 60
    while living(f"APUDAE_TEST={tmp_path}"):
        assert time.monotonic() < end, "orphans"
        time.sleep(0.1)
    with safe_open(tmp_path / "killed" / "state.safetensors", framework="pt") as kept:
        assert len(json.loads(kept.metadata()["settings"])["curve"]) < 20
    one, two = shared_training(1, None), shared_training(2, tmp_path / "killed")
    assert [point["step"] for point in two[1]] == [point["step"] for point in one[1]] == list(range(2, 41, 2))
    assert [point["loss"] for point in two[1]] == pytest.approx(
        [point["loss"] for point in one[1]], rel=1e-6
    )  # added up in float32
    torch.testing.assert_close(weights(two[0]), weights(one[0]), rtol=1e-9, atol=1e-9)
    assert not two[0].training
    assert one[1][-1]["loss"] < one[1][0]["loss"] / 2


ADVERSARIAL = {"epsilon": 0.1, "step_size": 0.05, "steps": 2}


@pytest.mark.slow
def test_attack_and_average_in_two_processes(tmp_path):
    """The inner attack and the average of the weights are those of one process; what the caller has stays the same."""
    colours = [(image, index % 10) for index, image in enumerate(images(32, 3, 8, 8).double())]
    recipe, networks = Recipe(steps=4, batch_size=16, ema_decay=0.5, learning_rate=1e-2), []
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    for processes in (1, 2):
        torch.manual_seed(0)
        network, run_dir = ResNet(10, 1).double(), tmp_path / str(processes)
        classes, environment = [type(part) for part in network.modules()], dict(os.environ)
        in_processes(processes, train_adversarial, network, colours, recipe, run_dir=run_dir, **ADVERSARIAL)
        assert [type(part) for part in network.modules()] == classes
        networks.append(network)
    torch.testing.assert_close(weights(networks[1]), weights(networks[0]), rtol=1e-9, atol=1e-9)
    states = [load_file(tmp_path / name / "state.safetensors") for name in ("1", "2")]
    assert states[0].keys() == states[1].keys()
    assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
    assert dict(os.environ) == environment, "of two processes, that is: the optimiser writes there"


def failing_training(model, dataset, recipe, *, device):
    """A training that the second process cannot do."""
    if torch.distributed.get_rank() == 1:
        raise OSError("the disk is full")
    torch.distributed.barrier()


@pytest.mark.slow
def test_error_of_one_process_ends_all(few):
    with pytest.raises(ChildFailedError, match="the disk is full"):
        in_processes(2, failing_training, tiny_dae(), few, SHORT)


def living(mark):
    """Numbers of the processes with `mark` in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_processes_that_cannot_be(few):
    for processes in (0, 1.5):
        with pytest.raises(ValueError, match="processes"):
            in_processes(processes, train_dae, tiny_dae(), few, SHORT, noise_std_max=0.5)
    gpus = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"processes need a GPU each; there are {gpus} here"):
        in_processes(gpus + 2, train_dae, tiny_dae(), few, SHORT, noise_std_max=0.5, device="cuda")
    recipe = Recipe(steps=5, batch_size=9)
    with pytest.raises(ValueError, match="batch_size is 9; needed: a multiple of the 2 processes"):
        in_processes(2, train_dae, tiny_dae(), few, recipe, noise_std_max=0.5)


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"steps": 2.5},
        {"steps": "9"},
        {"batch_size": 0},
        {"batch_size": 8.5},
        {"learning_rate": -1.0},
        {"learning_rate": float("nan")},
        {"weight_decay": -0.1},
        {"ema_decay": -0.1},
        {"ema_decay": 1.0},
        {"seed": -1},
        {"seed": 0.5},
    ],
)
def test_bad_recipe_is_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Recipe(**{"steps": 5} | bad)


def test_batch_larger_than_the_data_set(few):
    with pytest.raises(ValueError, match=r"320 images.*400; give batch_size = 320, or less"):
        trained(few, recipe=Recipe(steps=5, batch_size=400))


class Seen(torch.nn.Module):
    """Keeps what it was shown."""

    architecture = {"name": "seen"}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.shown, self.weight = [], torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        self.shown.append(x)
        return x + self.weight


@pytest.mark.parametrize(("shrink", "guided"), [(1, False), (3, False), (1, True)])
def test_squares_are_cut_from_bytes_as_from_numbers(shrink, guided, monkeypatch):
    """Every square is the mean of k×k pixels of a part of its image, whatever holds the image.

    It is turned by quarters, unless a classifier reads it.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 20, 26), np.uint8)
    in_bytes = TensorImages(pixels, np.arange(6), [*"abcdef"])
    full, labels = stack(in_bytes)
    in_numbers = TensorDataset(full, labels)
    shown, guide = [], torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(108, 2)) if guided else None
    monkeypatch.setattr(TensorImages, "__getitems__", lambda *_: pytest.fail("whole images became numbers"))
    for dataset in (in_bytes, Subset(in_bytes, range(6)), in_numbers):
        model = Seen()
        train_dae(model, dataset, Recipe(4, 6), noise_std_max=0.0, shrink=shrink, patch=6, classifier=guide)
        shown.append(torch.cat(model.shown))
    assert shown[0].equal(shown[1])
    assert shown[0].equal(shown[2])
    assert shown[0].shape == (24, 3, 6, 6)
    scales = [F.avg_pool2d(full, k, 1) for k in range(1, shrink + 1)]
    for square in shown[0]:
        parts = [
            full[:, :, a : a + 6 * k : k, b : b + 6 * k : k]
            for k, full in enumerate(scales, start=1)
            for a in range(full.shape[2] - 6 * k + k)
            for b in range(full.shape[3] - 6 * k + k)
        ]
        turned = [square.rot90(quarter, (1, 2)) for quarter in range(1 if guided else 4)]
        assert min((torch.cat(parts) - each).abs().amax((1, 2, 3)).min() for each in turned) < 1e-6


def test_bad_noise_and_shift(few):
    with pytest.raises(ValueError, match="noise_std_max"):
        trained(few, noise_std_max=-0.1)
    with pytest.raises(ValueError, match="noise_std_max"):
        train_dae(tiny_dae(), few, SHORT, noise_std_max=0.1, noise_std_min=0.2)
    for shift in (-1, 1.5):
        with pytest.raises(ValueError, match="shift"):
            train_classifier(MLP(), few, SHORT, shift=shift)


@pytest.mark.parametrize("bad", [{"epsilon": -0.1}, {"step_size": float("nan")}, {"steps": 0}])
def test_bad_inner_attack(few, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        train_adversarial(MLP(), few, SHORT, **{"epsilon": 0.1, "step_size": 0.05, "steps": 1} | bad)


def test_loss_that_explodes_is_reported_and_not_kept(few, tmp_path):
    def loss(model, x, y, generator):
        return model(x).mean() * torch.inf

    with pytest.raises(ValueError, match="learning_rate"):
        fit(tiny_dae(), loss, few, SHORT, run_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_same_choice_of_digits_for_training_and_tests(few):
    """The digits of these tests are training digits: none is among the held-out ones of the fixtures."""
    shown = {image.numpy().tobytes() for image in take(load_dataset("mnist5k", "test"), 1000)[0]}
    assert not shown & {image.numpy().tobytes() for image in stack(few)[0]}
