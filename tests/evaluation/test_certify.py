"""A certificate is what mathematics says, and no attack within it succeeds."""

import math

import pytest
import torch
from conftest import images, linear_classifier
from scipy.stats import norm
from torch import nn

from apudae import Purifier, attacks
from apudae.evaluation.certify import ABSTAINS, certified_accuracy, certify


def test_radius_of_a_linear_classifier_is_the_distance_to_its_border():
    """There the smoothed classifier is the classifier; the bound lies below the distance, and near it."""
    model, x = linear_classifier(16, dtype=torch.float64), images(6, 1, 4, 4, dtype=torch.float64)
    y = model(x).argmax(1)
    weight = model[1].weight.detach()
    logits = model(x).detach()
    distance = (logits[:, 0] - logits[:, 1]).abs() / (weight[0] - weight[1]).norm()
    found = certify(model, x, y, noise_std=float(distance.mean()), draws=4000)
    radius = torch.tensor(found.radius.to_numpy())
    assert (radius <= distance).all()
    sure = found.read != ABSTAINS
    assert sure.sum() >= 3
    assert (radius[sure.to_numpy()] >= 0.5 * distance[sure.to_numpy()] - 0.1).all()
    assert found.right[sure].all()


def test_bound_is_clopper_and_pearsons():
    """All of n draws alike: the bound is α^(1/n)."""

    class Always(nn.Module):
        def forward(self, x):
            return torch.tensor([[0.0, 1.0]]).expand(len(x), 2) + 0 * x.flatten(1)[:, :1]

    found = certify(Always(), images(2, 1, 2, 2), torch.tensor([1, 0]), noise_std=0.5, draws=200, alpha=0.01)
    assert found.radius.tolist() == pytest.approx([0.5 * norm.ppf(0.01 ** (1 / 200))] * 2)
    assert found.right.tolist() == [True, False]


def test_a_coin_abstains():
    class Coin(nn.Module):
        def forward(self, x):
            heads = (x.flatten(1)[:, 0] > 0.5).float()
            return torch.stack([heads, 1 - heads], 1)

    found = certify(Coin(), torch.full((1, 1, 2, 2), 0.5), torch.tensor([0]), noise_std=0.3)
    assert found.read.tolist() == [ABSTAINS]
    assert found.radius.tolist() == [0]
    assert not found.right.any()


@pytest.mark.slow
def test_no_attack_within_the_radius_succeeds(classifier, dae, digits):
    """PGD in L2 on the smoothed digits, by the mean of eight draws, judged by 200 fresh ones."""
    x, y = digits[0][:8], digits[1][:8]
    model = nn.Sequential(Purifier(dae, "direct", "exact"), classifier)
    found = certify(model, x, y, noise_std=0.25, draws=400)
    chosen = torch.tensor((found.right & (found.radius > 0.2)).to_numpy())
    assert chosen.sum() >= 4
    for image, label, radius in zip(x[chosen], y[chosen], found.radius[chosen.numpy()], strict=True):
        moved = attacks.pgd(
            model, image[None], label[None], epsilon=radius, step_size=radius / 4, steps=8, norm="l2", loss="margin"
        )
        again = certify(model, moved, label[None], noise_std=0.25, draws=200, seed=9)
        assert again.read.tolist() in ([label.item()], [ABSTAINS])


def test_certified_accuracy_falls_with_the_radius():
    model, x = linear_classifier(16, 3), images(12, 1, 4, 4)
    found = certify(model, x, model(x).argmax(1), noise_std=0.1, draws=100)
    curve = certified_accuracy(found, [0, 0.05, 0.1, 1])
    values = [each.value for each in curve.values()]
    assert values == sorted(values, reverse=True)
    assert values[-1] == 0
    assert {each.n for each in curve.values()} == {12}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"noise_std": 0}, "noise_std is 0"),
        ({"noise_std": 0.1, "draws": 0}, "draws is 0"),
        ({"alpha": 1.0}, "alpha is 1"),
    ],
)
def test_bad_input_is_named(bad, message):
    with pytest.raises(ValueError, match=message):
        certify(linear_classifier(16, 3), images(2, 1, 4, 4), torch.tensor([0, 1]), **{"noise_std": 0.1} | bad)
    with pytest.raises(ValueError, match="radii"):
        certified_accuracy(
            certify(linear_classifier(4, 2), images(1, 1, 2, 2), torch.tensor([0]), noise_std=1), [math.nan]
        )
