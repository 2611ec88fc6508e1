"""AutoAttack, APGD and Square keep the contract of every other attack; what an attacker sees of a defense is right."""

import logging
import math
import weakref

import pytest
import torch
from conftest import LinearDAE, images, linear_classifier, margins, seeded, set_gradients, snapshot, tiny_dae
from pyautoattack.autopgd_base import APGDAttack
from torch import nn

from apudae import Purifier, PurifyConfig, attacks, trajectory
from apudae.attacks import ATTACKS, ClassifierWithReconstructionError, apgd, counter_attack_b, fgsm, joint, square
from apudae.attacks.autoattack import autoattack
from apudae.evaluation.accuracy import accuracy
from apudae.evaluation.grid import run_attack
from apudae.evaluation.surrogates import BPDA, EOT, FixedNoise, Trajectory

both = pytest.mark.parametrize(
    ("name", "options"),
    [("autoattack", {}), ("square", {"queries": 200}), ("apgd", {"steps": 10}), ("fab", {"steps": 10})],
    ids=["autoattack", "square", "apgd", "fab"],
)
X, Y = images(6, 1, 4, 4), torch.tensor([0, 1, 2] * 2)


@both
def test_contract(name, options):
    model = linear_classifier(16, classes=12).train()
    before, x, state = set_gradients(model), X.clone(), torch.random.get_rng_state()
    found = ATTACKS[name](model, x, Y, epsilon=0.1, **options)
    assert (found - X).abs().max() <= 0.1 + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found.shape, found.dtype, found.requires_grad) == (X.shape, X.dtype, False)
    assert torch.equal(x, X)
    assert snapshot(model) == before
    assert torch.equal(torch.random.get_rng_state(), state)


@both
def test_epsilon_zero_returns_the_input(name, options):
    assert torch.equal(ATTACKS[name](linear_classifier(16, 12), X, Y, epsilon=0, **options), X)


@both
def test_a_batch_of_one_and_one_that_is_misclassified_already(name, options, classifier, digits):
    x, y = digits[0][:1], (digits[1][:1] + 1) % 10
    found = ATTACKS[name](classifier, x, y, epsilon=0.1, **options)
    assert (classifier(found).argmax(1) != y).all()


@pytest.mark.slow
@both
def test_seeds_repeat(name, options, classifier, digits):
    x, y = digits[0][:4], digits[1][:4]
    options = options | {"version": "rand"} if name == "autoattack" else options
    attack = ATTACKS[name]
    first = attack(classifier, x, y, epsilon=0.1, seed=1, **options)
    assert torch.equal(attack(classifier, x, y, epsilon=0.1, seed=1, **options), first)
    if name != "fab":  # its only run begins at the image
        assert not torch.equal(attack(classifier, x, y, epsilon=0.1, seed=2, **options), first)
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(attack(classifier, x, y, epsilon=0.1, seed=generator, **options), first)


@both
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"epsilon": -0.1}, r"-0\.1"),
        ({"x": X * 255}, r"\[0, 1\]"),
        ({"x": X.double()}, "float64"),
        ({"y": Y + 100}, "100"),
        ({"seed": "one"}, "seed is 'one'"),
    ],
)
def test_bad_input_is_named(name, options, bad, message):
    arguments = {"x": X, "y": Y, "epsilon": 0.1} | bad
    with pytest.raises(ValueError, match=message):
        ATTACKS[name](linear_classifier(16, 12), arguments.pop("x"), arguments.pop("y"), **arguments, **options)


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_few_classes_are_attacked_too(classes):
    """Your own images may be of two classes: of a linear model FGSM is the worst case, and AutoAttack must reach it."""
    model = linear_classifier(16, classes)
    y = model(X).argmax(1)
    found, known = autoattack(model, X, y, epsilon=0.4), fgsm(model, X, y, epsilon=0.4)
    assert (found - X).abs().max() <= 0.4 + 1e-6
    fooled = {"auto": model(found).argmax(1) != y, "fgsm": model(known).argmax(1) != y}
    assert fooled["fgsm"].any()
    assert fooled["auto"][fooled["fgsm"]].all()


def test_rand_names_too_few_classes():
    with pytest.raises(ValueError, match="3 classes"):
        autoattack(linear_classifier(16, 3), X, Y % 3, epsilon=0.1, version="rand")


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="ce, margin, dlr"):
        apgd(linear_classifier(16, 12), X, Y, epsilon=0.1, loss="hinge")
    with pytest.raises(ValueError, match=r"2 classes.*at least 3"):
        apgd(linear_classifier(16, 2), X, Y % 2, epsilon=0.1, loss="dlr")
    with pytest.raises(ValueError, match="standard, rand"):
        autoattack(linear_classifier(16, 12), X, Y, epsilon=0.1, version="plus")
    with pytest.raises(ValueError, match="queries"):
        square(linear_classifier(16, 12), X, Y, epsilon=0.1, queries=0)


@pytest.mark.slow
def test_strength_on_the_shipped_classifier(classifier, digits):
    x, y = digits[0][:40], digits[1][:40]
    settings = attacks.attack_settings("mnist")
    reached = {
        name: accuracy(classifier, run_attack(name, classifier, x, y, **settings[name]), y).correct
        for name in ("random", "pgd", "square", "autoattack")
    }
    assert reached["autoattack"] <= min(reached["pgd"], reached["square"])
    assert reached["square"] < reached["random"] - 10


# --- what an attacker sees --------------------------------------------------------------------------------------------


def gradient_of(model, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).square().sum(), x)[0]


def test_expectation_of_a_deterministic_model_is_the_model():
    model, x = linear_classifier(16, 12), images(5, 1, 4, 4)
    for samples in (1, 2, 4, 8):
        assert torch.equal(EOT(model, samples)(x), model(x))
        torch.testing.assert_close(gradient_of(EOT(model, samples), x), gradient_of(model, x))
    with pytest.raises(ValueError, match="samples is 0"):
        EOT(model, 0)


@pytest.mark.slow
def test_expectation_and_fixed_noise_of_a_random_model():
    dae, x = tiny_dae(), images(3, 1, 8, 8)
    dae.recon_mu.fill_(0)
    dae.recon_sigma.fill_(1)
    purifier = Purifier(dae, PurifyConfig(steps=2, noise_std=0.1), "exact")
    model = nn.Sequential(purifier, linear_classifier(64, 5))
    single = torch.stack([model(x) for _ in range(20)])
    many = torch.stack([EOT(model, 16)(x) for _ in range(20)])
    assert many.std(0).mean() < 0.5 * single.std(0).mean()
    fixed = FixedNoise(model, purifier)
    assert torch.equal(fixed(x), fixed(x))
    assert not torch.equal(model(x), model(x))


def test_bpda_has_the_value_of_one_and_the_gradient_of_the_other():
    purifier, stand_in, x = nn.Threshold(0.5, 0), linear_classifier(16, 16), images(3, 1, 4, 4)
    shaped = nn.Sequential(stand_in, nn.Unflatten(1, (1, 4, 4)))
    assert torch.equal(BPDA(purifier, shaped)(x), purifier(x))
    above = 2 * purifier(x).flatten(1)
    torch.testing.assert_close(gradient_of(BPDA(purifier, shaped), x).flatten(1), above @ stand_in[1].weight)
    torch.testing.assert_close(gradient_of(BPDA(purifier), x).flatten(1), above)


def test_trajectory_has_the_mean_gradient_of_all_iterates():
    dae, x = LinearDAE(16), images(3, 1, 4, 4, low=0.3, high=0.7, dtype=torch.float64)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(16, 5, dtype=torch.float64), nn.Tanh())
    config = PurifyConfig(steps=3, step_size=0.02)
    model = Trajectory(Purifier(dae, config), classifier)
    path = [step.images for step in trajectory(dae, x, config)]
    assert torch.equal(model(x), classifier(path[-1]))
    above = 2 * classifier(path[-1])
    expected = [torch.autograd.grad((classifier(p) * above.detach()).sum(), p)[0] for p in map(leaf, path)]
    torch.testing.assert_close(gradient_of(model, x), torch.stack(expected).mean(0))


def leaf(x):
    return x.detach().clone().requires_grad_()


class Held:
    """A tensor kept for a backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


def bytes_held(model):
    """Bytes that the graph of `model` holds for a backward pass over two images."""
    alive, x = weakref.WeakSet(), images(2, 1, 16, 16).requires_grad_()

    def pack(tensor):
        held = Held(tensor)
        alive.add(held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        output = model(x)
    assert output.requires_grad
    return sum(held.tensor.numel() * held.tensor.element_size() for held in alive)


def test_memory_of_the_exact_gradient_hardly_grows():
    """A step keeps a few images and none of the autoencoder's activations, which are as many as 28 steps keep."""
    few, many = (bytes_held(Purifier(tiny_dae(width=32), PurifyConfig(steps=n), "exact")) for n in (4, 32))
    image, step = 2 * 16 * 16 * 4, (many - few) / 28
    assert step < 20 * image
    assert many - few < bytes_held(tiny_dae(width=32))


def test_counter_attack_b():
    dae, model = LinearDAE(16), linear_classifier(16, 5, dtype=torch.float64)
    x = images(6, 1, 4, 4, low=0.3, high=0.7, dtype=torch.float64)
    y, with_error = model(x).argmax(1), ClassifierWithReconstructionError(model, dae)
    before, found = set_gradients(with_error), {}
    for beta in (0.0, 1.0, 100.0):
        found[beta] = counter_attack_b(with_error, x, y, epsilon=0.1, beta=beta)
        assert (found[beta] - x).abs().max() <= 0.1 + 1e-6
    assert snapshot(with_error) == before
    assert torch.equal(found[0.0], attacks.bim(model, x, y, epsilon=0.1))
    errors = [with_error.errors(found[beta]).sum() for beta in found]
    assert errors[0] > errors[1] >= errors[2]
    assert errors[2] < with_error.errors(x).sum()
    with pytest.raises(ValueError, match="beta is -1"):
        counter_attack_b(with_error, x, y, epsilon=0.1, beta=-1)


@pytest.mark.slow
def test_joint_attack_keeps_its_bounds(classifier, dae, digits):
    """The loss rises, and the error is where it is told to be; a wider bound never lowers what can be had."""
    x, y = digits[0][:12], digits[1][:12]
    scene = ClassifierWithReconstructionError(classifier, dae)
    before, found = set_gradients(scene), {}
    for low, high in ((None, 0.0), (None, 3.0), (-0.25, 0.25)):
        moved = joint(scene, x, y, epsilon=0.1, low=low, high=high, steps=40, restarts=1)
        errors = scene.errors(moved).detach()
        kept = errors <= dae.recon_mu + high * dae.recon_sigma
        kept &= errors >= dae.recon_mu + (-100 if low is None else low) * dae.recon_sigma
        assert kept.double().mean() > 0.8, (low, high)
        assert (moved - x).abs().max() <= 0.1 + 1e-6
        assert ((moved >= 0) & (moved <= 1)).all()
        found[low, high] = margins(classifier, moved, y)
    assert snapshot(scene) == before
    assert (found[None, 0.0] < margins(classifier, x, y) + 1e-6).double().mean() > 0.8
    assert found[None, 3.0].mean() < found[None, 0.0].mean() - 1
    again = joint(scene, x, y, epsilon=0.1, steps=40, restarts=1, seed=5)
    assert torch.equal(margins(classifier, again, y), found[None, 0.0]), "the first run begins at the image itself"


def test_joint_attack_of_a_linear_model_is_bim_while_the_bound_holds():
    dae, model = LinearDAE(16), linear_classifier(16, 5, dtype=torch.float64)
    x = images(6, 1, 4, 4, low=0.3, high=0.7, dtype=torch.float64)
    y, scene = model(x).argmax(1), ClassifierWithReconstructionError(model, dae)
    found = joint(scene, x, y, epsilon=0.1, high=1e6, loss="ce")
    torch.testing.assert_close(margins(model, found, y), margins(model, attacks.bim(model, x, y, epsilon=0.1), y))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"low": 1.0}, "bounds are 1.0 and 0.0"),
        ({"high": math.nan}, "bounds are None and nan"),
        ({"high": -1e6}, "no reconstruction error is below"),
        ({"restarts": 0}, "restarts is 0"),
        ({"target": torch.zeros(12).long()}, "label itself"),
    ],
)
def test_bad_bounds_of_the_joint_attack_are_named(bad, message, classifier, dae, digits):
    scene = ClassifierWithReconstructionError(classifier, dae)
    with pytest.raises(ValueError, match=message):
        joint(scene, digits[0][:12], torch.arange(12) % 10, **{"epsilon": 0.1} | bad)


def test_apgd_returns_its_best_where_it_cannot_fool(classifier, digits):
    x, y = digits[0][:12], digits[1][:12]
    found = apgd(classifier, x, y, epsilon=0.005, steps=10, loss="margin")
    right = margins(classifier, found, y) > 0
    assert right.sum() > 6
    assert (margins(classifier, found, y)[right] < margins(classifier, x, y)[right]).all()
    more = apgd(classifier, x, y, epsilon=0.005, steps=10, loss="margin", restarts=3)
    assert (margins(classifier, more, y)[right] <= margins(classifier, found, y)[right] + 1e-5).all()
    warm = apgd(classifier, x, y, found, epsilon=0.005, steps=3, loss="margin")
    assert (margins(classifier, warm, y)[right] <= margins(classifier, found, y)[right] + 1e-5).all()


def test_apgd_is_the_librarys_own(classifier, digits):
    """Same loss, steps and seed: the same images are fooled, by the same pixels."""
    right = classifier(digits[0][:20]).argmax(1) == digits[1][:20]
    x, y = digits[0][:20][right], digits[1][:20][right]
    for loss in ("ce", "dlr"):
        seed = int(torch.randint(2**31, (1,), generator=seeded(3)))  # what an attack makes of 3
        options = {"seed": seed, "device": "cpu", "logger": logging.getLogger("test")}
        theirs = APGDAttack(classifier, n_iter=10, eps=0.05, loss=loss, **options)
        with torch.random.fork_rng():
            expected = theirs.perturb(x, y)
        found = apgd(classifier, x, y, epsilon=0.05, loss=loss, steps=10, seed=3)
        fooled = classifier(found).argmax(1) != y
        assert fooled.any()
        assert torch.equal(fooled, classifier(expected).argmax(1) != y)
        torch.testing.assert_close(found[fooled], expected[fooled], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_the_exact_gradient_is_of_use(dae, classifier, digits):
    """Along it the loss of the purified image rises as much as along the identity's (three steps of A)."""
    x, y = digits[0][:20], digits[1][:20]
    config = PurifyConfig(steps=3, step_size=0.05)
    loss = {}
    for backward in ("exact", "identity"):
        model = nn.Sequential(Purifier(dae, config, backward), classifier)
        moved = attacks.bim(model, x, y, epsilon=0.1, step_size=0.03, steps=6)
        loss[backward] = nn.functional.cross_entropy(model(moved), y)
    noise = attacks.r_fgsm(linear_classifier(784, 10), x, y, epsilon=0.1)
    assert loss["exact"] > 0.9 * loss["identity"]
    assert loss["exact"] > 1.5 * nn.functional.cross_entropy(model(noise), y)
