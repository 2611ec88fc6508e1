"""The ladder keeps each image's worst case, drops what has fallen, goes on after a kill, and breaks what is broken."""

import functools
import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import images, linear_classifier, margins
from torch import nn

import apudae
from apudae import PRESETS, Purifier, PurifyConfig, attacks
from apudae.baselines import DefenseGAN, ProjectionConfig
from apudae.evaluation.accuracy import accuracy, predict
from apudae.evaluation.ladder import BUDGETS, Budget, SuiteAttack, attack_suite, ladder, margin_paths
from apudae.evaluation.sanity import Quantised
from apudae.evaluation.surrogates import surrogates
from apudae.models import margin

sys.path.insert(0, str(Path(__file__).parents[1] / "attacks"))
import peers

SETTINGS = attacks.attack_settings("mnist")
FACTS = {"dataset": "mnist5k", "classifier": "mnist/classifier", "purifier": "it"}
TINY = Budget(
    "tiny",
    apgd=4,
    targets=1,
    joint=(4, 1),
    bpda=(4, 1),
    exact=(4, 1),
    queries=5,
    fab=1,
    samples=2,
    choices=3,
    verdicts=5,
)
GRAY = ("fgsm", "pgd")
RANDOM = PurifyConfig(direct=True, noise_std=0.1)


@pytest.fixture
def few(digits, classifier):
    """24 digits that are read right."""
    right = predict(classifier, digits[0]) == digits[1]
    return digits[0][right][:24], digits[1][right][:24]


@pytest.mark.slow
@pytest.mark.parametrize("broken", [Quantised(8), Quantised(256)], ids=["8 levels", "masked gradient"])
def test_a_broken_defense_falls(broken, classifier, digits):
    x, y = digits[0][:40], digits[1][:40]
    defended = nn.Sequential(broken, classifier)
    masked = attacks.pgd(defended, x, y, **SETTINGS["pgd"])
    assert accuracy(defended, masked, y).value > 0.6, "its own gradients say that it is strong"
    suite = attack_suite(SETTINGS, TINY._replace(bpda=(10, 1)), gray=("fgsm",))
    found = ladder(classifier, None, broken, x, y, suite, **FACTS)
    assert found.rows[-1]["accuracy"] < 0.3
    alone = ladder(classifier, None, None, x, y, attack_suite(SETTINGS, TINY, gray=("pgd",)), **FACTS)
    assert found.rows[-1]["correct"] <= alone.rows[-1]["correct"] + 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["direct", "A", "F"])
def test_rows_and_record_agree_with_the_images(name, classifier, cnn, dae, digits):
    config, x, y = replace(PRESETS[name], steps=2, step_size=0.05), digits[0][:6], digits[1][:6]
    suite = attack_suite(SETTINGS, TINY, GRAY)
    found = ladder(classifier, dae, config, x, y, suite, other=cnn, budget=TINY, **FACTS)
    left = [row["correct"] for row in found.rows]
    assert name == "F" or left == sorted(left, reverse=True)
    assert left[-1] == left[-2] == (found.record.broken_by == "").sum()
    assert found.rows[-1]["attack"] == "worst_case"
    assert {row["runs"] for row in found.rows} == {5 if name == "F" else 1}
    assert {json.loads(row["attack_parameters"])["budget"] for row in found.rows} == {"tiny"}
    assert found.gains.attack.tolist() == [row["attack"] for row in found.rows[:-1]]
    assert {json.loads(row["attack_parameters"])["eot_samples"] for row in found.rows} == {2 if name == "F" else 1}
    assert (found.images - x).abs().max() <= 0.1 + 1e-6
    assert not found.images.requires_grad
    if name != "F":
        assert (
            found.record.runs_right.tolist()
            == (predict(nn.Sequential(Purifier(dae, config), classifier), found.images) == y).int().tolist()
        )
    names = [row["attack"] for row in found.rows]
    assert {"exact_fixed_noise", "counter_attack_a_eot"} & {*names} == (
        {"exact_fixed_noise", "counter_attack_a_eot"} if name == "F" else set()
    )
    assert set(found.record.broken_by) <= {*names, ""}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["direct", *"ABCDEFG"])
def test_white_box_is_never_weaker(name, classifier, cnn, dae, digits):
    """Each ladder on its own, 100 digits; three larger steps for fifteen, so that it takes seconds."""
    config, (x, y) = replace(PRESETS[name], steps=3, step_size=0.05), (tensor[:100] for tensor in digits)
    every = attack_suite(SETTINGS, TINY, GRAY)
    blind = [each for each in every if each.surrogate in ("classifier", "other", "black_box")]
    knowing = [each for each in every if each.name in ("counter_attack_a", "joint_below_mu", "bpda_identity")]
    left = {
        kind: ladder(classifier, dae, config, x, y, chosen, other=cnn, budget=TINY, **FACTS).rows[-1]["correct"]
        for kind, chosen in {"blind": blind, "knowing": knowing}.items()
    }
    assert left["knowing"] <= left["blind"]


def test_who_knows_the_noise_sees_it_in_his_one_pass(classifier, dae, few):
    x, seed = few[0][:2], 3
    found = {
        name: surrogates(classifier, Purifier(dae, config, seed=seed), dae, None, 2, x[:1])
        for name, config in {"direct": RANDOM, "A": replace(PRESETS["A"], steps=2, noise_std=0.1)}.items()
    }
    for of in found.values():
        twice = Purifier(dae, RANDOM, seed=Purifier(dae, RANDOM, seed=seed).seed)  # draws of his own
        logits = torch.stack([classifier(twice(x)) for _ in range(2)])
        torch.testing.assert_close(of["noisy_dae"](x), logits.mean(0))
    assert "noisy_dae" not in surrogates(classifier, Purifier(dae, "A"), dae, None, 1, x[:1])


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


def test_a_baseline_meets_the_attacks_that_it_has_a_surrogate_for(classifier, few):
    """MagNet has a gradient of its own; Defense-GAN's search lets none through; neither has an autoencoder's error."""
    reformer = apudae.load_model("mnist/magnet")
    search = DefenseGAN(apudae.load_model("mnist/generator"), ProjectionConfig(restarts=1, steps=2))
    suite, tried = attack_suite(SETTINGS, TINY, gray=["fgsm"]), {}
    for name, defense in {"magnet": reformer, "defense_gan": search}.items():
        found = ladder(classifier, None, defense, *few, suite, budget=TINY, **FACTS | {"purifier": name})
        tried[name] = {row["attack"] for row in found.rows}
        assert (found.images - few[0]).abs().max() <= 0.1 + 1e-6
    assert {"gray_fgsm", "bpda_identity", "exact_warm", "square", "fab"} < tried["magnet"]
    assert {"gray_fgsm", "bpda_identity", "square"} < tried["defense_gan"]
    assert not any(name.startswith(("joint", "direct", "counter", "bpda_dae")) for name in tried["magnet"])
    assert not any(name.startswith("exact") for name in tried["defense_gan"])


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


def test_majority_mean_and_worst_of_draws(few):
    """A coin in the place of a purifier: the draws differ, and the row says by how much."""
    x, y = few
    model = linear_classifier(784, 10)
    y = model(x).argmax(1)
    row = ladder(model, None, Coin(), x, y, [], random=True, budget=TINY, **FACTS).rows[-1]
    assert 0 < row["worst_of_runs"] < row["mean"] < 1
    assert row["mean_low"] < row["mean"] < row["mean_high"]
    assert row["std"] > 0
    assert row["worst_of_runs"] < row["accuracy"]
    assert row["accuracy"] <= row["voted"]


NOTHING = [SuiteAttack(f"nothing {number}", "classifier", "random", {"epsilon": 0.0}) for number in range(20)]


@pytest.mark.parametrize("draws", [pytest.param(0, marks=pytest.mark.slow), 0.1])
def test_twenty_attacks_that_change_nothing_take_nothing(draws, classifier, dae, digits):
    """Draws that judge are not those that choose: no image is wrong because its noise was once unlucky."""
    x, y = digits[0][:60], digits[1][:60]
    defense = PurifyConfig(direct=True, noise_std=0.6) if draws == 0 else Coin(share=0.45)
    options = {"random": True, "budget": TINY._replace(verdicts=20)}
    clean, *_, last = ladder(classifier, dae, defense, x, y, NOTHING, **options, **FACTS).rows
    assert 0.3 < clean["mean"] < 0.97
    assert last["mean"] >= clean["mean"] - draws
    assert last["correct"] >= clean["correct"] - 60 * draws


def test_the_dearest_attacks_try_the_smallest_margins(classifier, few, monkeypatch):
    x, y = few
    seen, attack = [], attacks.bim
    monkeypatch.setitem(
        attacks.ATTACKS, "bim", functools.wraps(attack)(lambda m, x, y, **k: seen.append(x) or attack(m, x, y, **k))
    )
    chosen = SuiteAttack("few", "classifier", "bim", {"epsilon": 0.001}, share=0.2)
    ladder(classifier, None, None, x, y, [chosen], **FACTS)
    smallest = margins(classifier, x, y).argsort()[: len(seen[0])].sort().values
    assert len(seen[0]) == math.ceil(0.2 * len(x))
    assert torch.equal(seen[0], x[smallest])


def test_a_target_is_the_likeliest_wrong_class_of_its_rank(classifier, few, monkeypatch):
    x, y = few
    seen, attack = {}, attacks.apgd

    def noted(model, x, y, *, target, **more):
        seen[len(seen) + 1] = target
        return attack(model, x, y, target=target, **more)

    monkeypatch.setitem(attacks.ATTACKS, "apgd", functools.wraps(attack)(noted))
    small = {"epsilon": 1e-4, "steps": 2, "loss": "dlr"}
    suite = [SuiteAttack(f"t{rank}", "classifier", "apgd", small, target=rank) for rank in (1, 2)]
    ladder(classifier, None, None, x, y, suite, **FACTS)
    order = classifier(x).argsort(1, descending=True)
    assert torch.equal(seen[1], order[:, 1])
    assert torch.equal(seen[2], order[:, 2])


def test_an_attack_that_raises_the_margin_is_flagged(classifier, few, monkeypatch):
    """Down the loss in place of up."""
    monkeypatch.setitem(
        attacks.ATTACKS,
        "fgsm",
        lambda m, x, y, *, epsilon: (2 * x - attacks.fgsm(m, x, y, epsilon=epsilon)).clamp(0, 1),
    )
    suite = [suite_attack("wrong way", "fgsm", epsilon=0.05), suite_attack("right way", "bim", epsilon=0.05)]
    gains = ladder(classifier, None, None, *few, suite, **FACTS).gains.set_index("attack")
    assert gains.warning.to_dict() == {"clean": False, "wrong way": True, "right way": False}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["D", "E"])
def test_the_exact_gradient_is_not_masked_near_mu(name, classifier, dae, digits):
    """From images at μ, where the sign of D and the rest of E hid the way: the margin falls."""
    x, y = digits[0][:10], digits[1][:10]
    scene = attacks.ClassifierWithReconstructionError(classifier, dae)
    at_mu = attacks.joint(scene, x, y, epsilon=0.1, low=-0.25, high=0.25, steps=10, restarts=1)
    config = replace(PRESETS[name], steps=5)
    paths = margin_paths(classifier, dae, config, at_mu, y, epsilon=0.1, steps=8).set_index(["surrogate", "step"])
    assert paths.margin["exact", 8] < paths.margin["exact", 0]


@pytest.mark.slow
@pytest.mark.parametrize("library", ["foolbox", "torchattacks"])
@pytest.mark.parametrize("name", ["direct", "A", "D", "E"])
def test_what_stands_stands_before_other_libraries_too(name, library, classifier, dae, digits):
    """An independent replay: their PGD through the purifier's exact gradient on ten digits that our suite left."""
    pytest.importorskip(library)
    x, y = digits[0][:16], digits[1][:16]
    config = replace(PRESETS[name], **({} if name == "direct" else {"steps": 3, "step_size": 0.05}))
    found = ladder(classifier, dae, config, x, y, attack_suite(SETTINGS, "quick", GRAY), **FACTS)
    stands = torch.tensor((found.record.broken_by == "").to_numpy())
    x, y = x[stands][:10], y[stands][:10]
    defended = nn.Sequential(Purifier(dae, config, "exact"), classifier).eval()  # else torchattacks leaves all training
    torch.manual_seed(0)
    theirs = getattr(peers, library)()["pgd"](defended, x, y).detach()
    assert (theirs - x).abs().max() <= 0.1 + 1e-6
    assert len(x) >= 6
    assert (predict(defended, theirs) == y).sum() >= len(x) - 1


@pytest.mark.parametrize(("classes", "dlr", "targets"), [(2, False, 0), (3, True, 0), (4, True, 3)])
def test_few_classes_leave_out_what_needs_more(classes, dlr, targets):
    model, x = linear_classifier(16, classes), images(8, 1, 4, 4)
    y = model(x).argmax(1)
    suite = [
        SuiteAttack("dlr", "classifier", "apgd", {"epsilon": 0.01, "steps": 2, "loss": "dlr"}),
        *(
            SuiteAttack(f"t{rank}", "classifier", "apgd", {"epsilon": 0.01, "steps": 2, "loss": "dlr"}, target=rank)
            for rank in (1, 2, 3, 4)
        ),
    ]
    names = [row["attack"] for row in ladder(model, None, None, x, y, suite, **FACTS).rows[1:-1]]
    assert names == ["dlr"] * dlr + [f"t{rank}" for rank in range(1, targets + 1)]


def test_each_budget_is_as_large_as_the_one_before():
    suites = [attack_suite(SETTINGS, name) for name in BUDGETS]
    for smaller, larger in itertools.pairwise(suites):
        assert {each.name for each in smaller} <= {each.name for each in larger}
        for key in ("steps", "restarts", "queries"):
            size = {each.name: each.parameters.get(key) or 0 for each in larger}
            assert all(size[each.name] >= (each.parameters.get(key) or 0) for each in smaller)
    with pytest.raises(ValueError, match="'huge' is unknown; there is: quick, full, double"):
        attack_suite(SETTINGS, "huge")


def test_double_has_twice_the_steps_and_restarts_of_full():
    full, double = (
        {each.name: each.parameters for each in attack_suite(SETTINGS, name)} for name in ("full", "double")
    )
    assert full.keys() == double.keys()
    for name in ("joint_at_mu", "bpda_identity", "exact_margin"):
        sizes = [(sizes["steps"], sizes["restarts"]) for sizes in (full[name], double[name])]
        assert sizes[1] == (2 * sizes[0][0], 2 * sizes[0][1]), name


class Coin(nn.Module):
    """Turns a `share` of the images into their negatives, by its own generator."""

    def __init__(self, share=0.25):
        super().__init__()
        self.share, self.generator = share, torch.Generator().manual_seed(0)

    def forward(self, x):
        flips = torch.rand(len(x), generator=self.generator) < self.share
        return torch.where(flips[:, None, None, None], 1 - x, x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": "Z"}, "'Z' is unknown; there is: direct, A"),
        ({"config": Purifier(nn.Identity(), RANDOM)}, "a random Purifier has one seed for all its draws"),
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
