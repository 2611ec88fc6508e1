"""AutoAttack and Square keep the contract of every other attack, and are as strong as their names say."""

import pytest
import torch
from conftest import images, linear_classifier, set_gradients, snapshot

from apudae import adaptive, attacks
from apudae.evaluate import accuracy, run_attack

both = pytest.mark.parametrize(
    ("name", "options"), [("autoattack", {}), ("square", {"queries": 200})], ids=adaptive.NAMES
)
X, Y = images(6, 1, 4, 4), torch.tensor([0, 1, 2] * 2)


@both
def test_contract(name, options):
    model = linear_classifier(16, classes=12).train()
    before, x, state = set_gradients(model), X.clone(), torch.random.get_rng_state()
    found = getattr(adaptive, name)(model, x, Y, epsilon=0.1, **options)
    assert (found - X).abs().max() <= 0.1 + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert (found.shape, found.dtype, found.requires_grad) == (X.shape, X.dtype, False)
    assert torch.equal(x, X)
    assert snapshot(model) == before
    assert torch.equal(torch.random.get_rng_state(), state)


@both
def test_epsilon_zero_returns_the_input(name, options):
    assert torch.equal(getattr(adaptive, name)(linear_classifier(16, 12), X, Y, epsilon=0, **options), X)


@both
def test_a_batch_of_one_and_one_that_is_misclassified_already(name, options, classifier, digits):
    x, y = digits[0][:1], (digits[1][:1] + 1) % 10
    found = getattr(adaptive, name)(classifier, x, y, epsilon=0.1, **options)
    assert (classifier(found).argmax(1) != y).all()


@both
def test_seeds_repeat(name, options, classifier, digits):
    x, y = digits[0][:4], digits[1][:4]
    options = options | {"version": "rand"} if name == "autoattack" else options
    attack = getattr(adaptive, name)
    first = attack(classifier, x, y, epsilon=0.1, seed=1, **options)
    assert torch.equal(attack(classifier, x, y, epsilon=0.1, seed=1, **options), first)
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
        getattr(adaptive, name)(
            linear_classifier(16, 12), arguments.pop("x"), arguments.pop("y"), **arguments, **options
        )


def test_few_classes_are_named():
    with pytest.raises(ValueError, match="3 classes"):
        adaptive.autoattack(linear_classifier(16, 3), X, Y, epsilon=0.1)
    found = adaptive.autoattack(linear_classifier(16, 5), X, Y, epsilon=0.1)
    assert found.shape == X.shape


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="standard, rand"):
        adaptive.autoattack(linear_classifier(16, 12), X, Y, epsilon=0.1, version="plus")
    with pytest.raises(ValueError, match="queries"):
        adaptive.square(linear_classifier(16, 12), X, Y, epsilon=0.1, queries=0)


def test_strength_on_the_shipped_classifier(classifier, digits):
    x, y = digits[0][:40], digits[1][:40]
    reached = {
        name: accuracy(classifier, run_attack(name, classifier, x, y, **attacks.PAPER["mnist"][name]), y).correct
        for name in ("random", "pgd", "square", "autoattack")
    }
    assert reached["autoattack"] <= min(reached["pgd"], reached["square"])
    assert reached["square"] < reached["random"] - 10
