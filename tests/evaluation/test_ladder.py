"""The ladder keeps each image's worst case, drops what has fallen, goes on after a kill, and breaks what is broken."""

import functools
import json
from dataclasses import replace

import pytest
import torch
from conftest import images, linear_classifier
from torch import nn

from apudae import PRESETS, Purifier, attacks
from apudae.evaluation.accuracy import accuracy, margins, predict
from apudae.evaluation.ladder import SuiteAttack, attack_suite, ladder
from apudae.evaluation.sanity import Quantised
from apudae.models import margin

SETTINGS = attacks.attack_settings("mnist")
FACTS = {"dataset": "mnist5k", "classifier": "mnist/classifier", "purifier": "it"}
FEW = {"gray": ("fgsm", "pgd"), "steps": 4, "queries": 5, "betas": (1,)}


@pytest.fixture
def few(digits):
    return digits[0][:24], digits[1][:24]


@pytest.mark.slow
@pytest.mark.parametrize("broken", [Quantised(8), Quantised(256)], ids=["8 levels", "masked gradient"])
def test_a_broken_defense_falls(broken, classifier, digits):
    x, y = digits[0][:40], digits[1][:40]
    defended = nn.Sequential(broken, classifier)
    masked = attacks.pgd(defended, x, y, **SETTINGS["pgd"])
    assert accuracy(defended, masked, y).value > 0.6, "its own gradients say that it is strong"
    found = ladder(
        classifier, None, broken, x, y, attack_suite(SETTINGS, gray=("fgsm",), steps=10, queries=5), samples=1, **FACTS
    )
    assert found.rows[-1]["accuracy"] < 0.3
    alone = ladder(classifier, None, None, x, y, attack_suite(SETTINGS, gray=("pgd",)), **FACTS)
    assert found.rows[-1]["correct"] <= alone.rows[-1]["correct"] + 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["direct", "A", "F"])
def test_rows_and_record_agree_with_the_images(name, classifier, cnn, dae, digits):
    config, x, y = replace(PRESETS[name], steps=2, step_size=0.05), digits[0][:6], digits[1][:6]
    suite = attack_suite(SETTINGS, **FEW | {"steps": 2})
    found = ladder(classifier, dae, config, x, y, suite, other=cnn, samples=2, runs=3, **FACTS)
    left = [row["correct"] for row in found.rows]
    assert left == sorted(left, reverse=True)
    assert left[-1] == left[-2] == (found.record.broken_by == "").sum()
    assert found.rows[-1]["attack"] == "worst_case"
    assert {row["runs"] for row in found.rows} == {3 if name == "F" else 1}
    assert {json.loads(row["attack_parameters"])["eot_samples"] for row in found.rows} == {2 if name == "F" else 1}
    assert (found.images - x).abs().max() <= 0.1 + 1e-6
    assert not found.images.requires_grad
    if name != "F":
        assert (
            found.record.runs_right.tolist()
            == (predict(nn.Sequential(Purifier(dae, config), classifier), found.images) == y).int().tolist()
        )
    names = [row["attack"] for row in found.rows]
    assert ("exact_fixed_noise" in names) == (name == "F")
    assert set(found.record.broken_by) <= {*names, ""}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["direct", *"ABCDEFG"])
def test_white_box_is_never_weaker(name, classifier, cnn, dae, digits):
    """Each ladder on its own, 100 digits; three larger steps for fifteen, so that it takes seconds."""
    config, (x, y) = replace(PRESETS[name], steps=3, step_size=0.05), (tensor[:100] for tensor in digits)
    every = attack_suite(SETTINGS, gray=("fgsm", "pgd"), steps=4, queries=5)
    blind = [each for each in every if each.surrogate in ("classifier", "other", "black_box")]
    knowing = [each for each in every if each.name in ("counter_attack_a", "bpda_identity", "bpda_apgd_dlr")]
    left = {
        kind: ladder(classifier, dae, config, x, y, chosen, other=cnn, samples=2, runs=3, **FACTS).rows[-1]["correct"]
        for kind, chosen in {"blind": blind, "knowing": knowing}.items()
    }
    assert left["knowing"] <= left["blind"]


def suite_attack(name, attack, surrogate="classifier", warm=False, **parameters):
    return SuiteAttack(name, surrogate, attack, parameters, warm)


def test_a_warm_attack_goes_on_from_the_worst_images(classifier, few):
    """Two attacks of three steps are one of six where the second is warm; a cold one finds what the first found."""
    x, y = few
    step = {"epsilon": 0.04, "step_size": 0.005}
    first, six = suite_attack("first", "bim", steps=3, **step), attacks.bim(classifier, x, y, steps=6, **step)
    cold, warm = (
        ladder(classifier, None, None, x, y, [first, suite_attack("next", "bim", steps=3, warm=warm, **step)], **FACTS)
        for warm in (False, True)
    )
    stands = (warm.record.broken_by != "first").to_numpy() & (warm.record.broken_by != "clean").to_numpy()
    assert stands.any()
    assert torch.equal(cold.images[stands], attacks.bim(classifier, x, y, steps=3, **step)[stands])
    assert torch.equal(warm.images[stands], six[stands])
    lower = margins(classifier, warm.images, y) - margins(classifier, cold.images, y)
    assert (lower <= 0).all()
    assert (lower[stands] < 0).all()


def test_a_margin_is_negative_where_the_classifier_is_wrong(classifier, digits):
    x, y = digits
    x = attacks.fgsm(classifier, x, y, epsilon=0.1)
    assert ((margins(classifier, x, y) > 0) == (predict(classifier, x) == y)).all()
    assert margin(torch.tensor([[1.0, 5, 2], [4, 1, 3]]), torch.tensor([1, 2])).tolist() == [3, -1]


def test_what_has_fallen_leaves_the_work(classifier, few, monkeypatch):
    sizes, attack = [], attacks.bim
    monkeypatch.setitem(
        attacks.ATTACKS,
        "bim",
        functools.wraps(attack)(lambda m, x, y, **k: sizes.append(len(x)) or attack(m, x, y, **k)),
    )
    chosen = [
        suite_attack("one", "bim", epsilon=0.05),
        suite_attack("two", "bim", epsilon=0.1),
        suite_attack("three", "bim", epsilon=0.1),
    ]
    found = ladder(classifier, None, None, *few, chosen, **FACTS)
    left = [row["correct"] for row in found.rows]
    assert sizes == left[:3]
    assert left[0] > left[1] > left[2] == left[3]
    assert (found.record.broken_by == "two").sum() == left[1] - left[2]


def test_a_killed_ladder_goes_on_where_it_was(tmp_path, classifier, few, monkeypatch):
    chosen = [
        suite_attack("one", "bim", epsilon=0.05),
        suite_attack("two", "pgd", epsilon=0.1, steps=4),
        suite_attack("three", "bim", epsilon=0.1),
    ]
    options = FACTS | {"batch_size": 10, "keep": tmp_path}
    expected, calls, attack = (
        ladder(classifier, None, None, *few, chosen, **FACTS | {"batch_size": 10}),
        [],
        attacks.pgd,
    )

    def killed_in_the_second_batch(*arguments, **parameters):
        calls.append(len(arguments[1]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return attack(*arguments, **parameters)

    monkeypatch.setitem(attacks.ATTACKS, "pgd", functools.wraps(attack)(killed_in_the_second_batch))
    with pytest.raises(KeyboardInterrupt):
        ladder(classifier, None, None, *few, chosen, **options)
    monkeypatch.setitem(
        attacks.ATTACKS, "bim", functools.wraps(attacks.bim)(lambda m, x, y, epsilon: calls.append(epsilon) or x)
    )
    calls[:] = ["the first batch is kept"]
    with pytest.raises(KeyboardInterrupt):
        ladder(classifier, None, None, *few, chosen, **options)
    monkeypatch.undo()
    found = ladder(classifier, None, None, *few, chosen, **options)
    assert 0.05 not in calls
    assert found.record.equals(expected.record)
    assert torch.equal(found.images, expected.images)
    again = ladder(classifier, None, None, *few, chosen, **options)
    assert [row["seconds"] for row in again.rows] == [row["seconds"] for row in found.rows]


def test_an_attack_that_cheats_is_named(classifier, few, monkeypatch):
    monkeypatch.setitem(attacks.ATTACKS, "fgsm", lambda model, x, y, *, epsilon: (x + 3 * epsilon).clamp(0, 1))
    with pytest.raises(ValueError, match=r"moved a pixel by 0\.3.*needed: ε = 0\.1"):
        ladder(classifier, None, None, *few, [suite_attack("cheat", "fgsm", epsilon=0.1)], **FACTS)


def test_majority_mean_and_worst_of_runs(few):
    """A coin in the place of a purifier: the runs differ, and the row says by how much."""
    x, y = few
    coin = Coin()
    model = linear_classifier(784, 10)
    y = model(x).argmax(1)
    row = ladder(model, None, coin, x, y, [], runs=5, samples=2, **FACTS).rows[-1]
    assert 0 < row["worst_of_runs"] < row["mean"] < 1
    assert row["std"] > 0
    assert row["worst_of_runs"] < row["accuracy"]


class Coin(nn.Module):
    """Turns a quarter of the images upside down, by its own generator."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        flips = torch.rand(len(x), generator=self.generator) < 0.25
        return torch.where(flips[:, None, None, None], 1 - x, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": "Z"}, "'Z' is unknown; there is: direct, A"),
        ({"suite": [suite_attack("it", "pdg", epsilon=0.1)]}, "'pdg' is unknown"),
        ({"x": images(4, 1, 28, 28) * 255}, r"\[0, 1\]"),
        ({"y": torch.full((24,), 11)}, "11"),
    ],
)
def test_bad_input_is_named(change, message, classifier, dae, few):
    given = {"config": None, "x": few[0], "y": few[1], "suite": [suite_attack("it", "fgsm", epsilon=0.1)]} | change
    given["y"] = given["y"][: len(given["x"])]
    with pytest.raises(ValueError, match=message):
        ladder(classifier, dae, given["config"], given["x"], given["y"], given["suite"], **FACTS)
