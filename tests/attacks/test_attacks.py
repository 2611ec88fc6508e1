import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import images, linear_classifier, seeded, set_gradients, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apudae import Purifier, attacks
from apudae.attacks.losses import LOSSES
from apudae.datasets import DATASETS
from apudae.evaluation.accuracy import accuracy
from apudae.evaluation.grid import run_attack

OURS = [name for name, function in attacks.ATTACKS.items() if function.__module__.endswith(("_sign", "_norm"))]
SIGN_ATTACKS = ["random", "fgsm", "r_fgsm", "bim", "pgd"]
RANDOM = ["random", "r_fgsm", "pgd"]
SHORT = {
    "cw": {"steps": 30, "search_steps": 2, "learning_rate": 0.2, "initial_c": 10.0}
}  # 1,000 steps are for the strength, not the contract


def attacks_named(*names):
    """The attacks as test parameters, with short settings where the defaults are slow."""
    chosen = [partial(getattr(attacks, name), **SHORT.get(name, {})) for name in names]
    return pytest.mark.parametrize("attack", chosen, ids=names)


every_attack = attacks_named(*OURS)
gradient_attack = attacks_named(*(name for name in OURS if name != "random"))
random_attack = attacks_named(*RANDOM)
sign_attack = attacks_named("fgsm", "bim", "pgd")
dtypes = st.sampled_from([torch.float32, torch.float64])
shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6))


def bumpy(shape, dtype=torch.float32):
    """A classifier with batch statistics: in train mode it would see the batch, and one image would be an error."""
    torch.manual_seed(0)
    pixels = shape[1] * shape[2] * shape[3]
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


@every_attack
@settings(max_examples=25, deadline=None)
@given(shape=shapes, epsilon=st.floats(0, 0.5), dtype=dtypes, training=st.booleans(), graded=st.booleans())
def test_contract(attack, shape, epsilon, dtype, training, graded):
    model, x = bumpy(shape, dtype).train(training), images(*shape, dtype=dtype)
    before, given_x = set_gradients(model) if graded else snapshot(model), x.clone()
    adversarial = attack(model, x, torch.arange(len(x)) % 3, epsilon=epsilon)
    assert (adversarial.double() - x.double()).abs().max() <= epsilon + torch.finfo(dtype).eps
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert (adversarial.shape, adversarial.dtype, adversarial.device) == (x.shape, x.dtype, x.device)
    assert not adversarial.requires_grad
    assert torch.equal(x, given_x)
    assert snapshot(model) == before


@every_attack
@settings(max_examples=10, deadline=None)
@given(shape=shapes, dtype=dtypes)
def test_epsilon_zero_returns_the_input(attack, shape, dtype):
    x = images(*shape, dtype=dtype)
    assert torch.equal(attack(bumpy(shape, dtype), x, torch.zeros(len(x)).long(), epsilon=0), x)


@every_attack
def test_works_under_no_grad(attack):
    model, x = bumpy((4, 1, 4, 4)).eval(), images(4, 1, 4, 4)
    y = model(x).argmax(1)
    expected = attack(model, x, y, epsilon=0.1)
    with torch.no_grad():
        assert torch.equal(attack(model, x, y, epsilon=0.1), expected)
    assert not torch.equal(expected, x)


@gradient_attack
def test_inference_mode_is_named_and_not_the_model(attack):
    model, x = bumpy((4, 1, 4, 4)).eval(), images(4, 1, 4, 4)
    y = model(x).argmax(1)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode is on"):
        attack(model, x, y, epsilon=0.1)


class Breaks(nn.Module):
    """Answers until somebody asks for gradients."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Dropout())

    def forward(self, x):
        if x.requires_grad:
            raise ArithmeticError("out of order")
        return self.inner(x)


@gradient_attack
def test_model_is_restored_after_its_error(attack):
    model, x = Breaks().eval(), images(2, 1, 2, 2)
    y = model(x).argmax(1)  # CW and DeepFool leave misclassified images alone
    model.train()
    model.inner[2].eval()  # modes may differ within a model
    before = set_gradients(model)
    with pytest.raises(ArithmeticError):
        attack(model, x, y, epsilon=0.1)
    assert snapshot(model) == before


# --- the best perturbation of a linear model is known -----------------------------------------------------------------


def linear_case(dtype, low=0.2, high=0.8):
    model, y = linear_classifier(20, dtype=dtype), torch.tensor([0, 1, 0])
    weight = model[1].weight.detach()
    uphill = (weight[1 - y] - weight[y]).sign().view(3, 1, 4, 5)
    return model, images(3, 1, 4, 5, low=low, high=high, dtype=dtype), y, uphill


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@sign_attack
def test_optimum_of_a_linear_model(attack, dtype):
    model, x, y, uphill = linear_case(dtype)
    found = attack(model, x, y, epsilon=0.15)
    torch.testing.assert_close(found, x + 0.15 * uphill, rtol=0, atol=2 * torch.finfo(dtype).eps)
    margin = torch.autograd.functional.jvp(model, x, 0.15 * uphill)[1]  # what the best perturbation adds to the logits
    torch.testing.assert_close(model(found) - model(x), margin, rtol=1e-3, atol=1e-6)


@sign_attack
def test_optimum_of_a_linear_model_at_the_edge_of_the_range(attack):
    model, x, y, uphill = linear_case(torch.float64, low=0, high=1)
    best = (x + 0.3 * uphill).clamp(0, 1)
    assert (best % 1 == 0).any()
    torch.testing.assert_close(attack(model, x, y, epsilon=0.3), best, rtol=0, atol=1e-15)


# --- losses, targets, the L2 ball -------------------------------------------------------------------------------------

LOGITS = torch.tensor([[4.0, 1.0, 3.0, 0.0], [0.0, 2.0, 1.0, 5.0]])


def test_losses_by_hand():
    y, target = torch.tensor([0, 1]), torch.tensor([1, 3])
    expected = {  # margin: z_other − z_y; dlr: that over z1 − z3, or over z1 − (z3 + z4)/2
        ("margin", None): [-1, 3],
        ("margin", target): [-3, 3],
        ("dlr", None): [-1 / 3, 3 / 4],
        ("dlr", target): [-3 / (4 - 0.5), 3 / (5 - 0.5)],
    }
    for (name, goal), values in expected.items():
        torch.testing.assert_close(LOSSES[name](LOGITS, y, goal), torch.tensor(values, dtype=torch.float32))
    p = LOGITS.softmax(1)
    torch.testing.assert_close(LOSSES["ce"](LOGITS, y, None), -p[[0, 1], y].log())
    torch.testing.assert_close(LOSSES["ce"](LOGITS, y, target), p[[0, 1], target].log())


def test_dlr_does_not_see_the_scale_of_the_logits():
    y = torch.tensor([0, 1])
    torch.testing.assert_close(LOSSES["dlr"](100 * LOGITS, y, None), LOSSES["dlr"](LOGITS, y, None))


def many_classes(dtype=torch.float64):
    model = linear_classifier(20, classes=5, dtype=dtype)
    x = images(6, 1, 4, 5, low=0.3, high=0.7, dtype=dtype)
    y = model(x).argmax(1)
    return model, x, y, (y + 1 + torch.arange(6) % 4) % 5


@pytest.mark.parametrize("loss", ["margin", "dlr"])
@pytest.mark.parametrize("name", ["fgsm", "bim", "pgd"])
def test_targeted_optimum_of_a_linear_model(name, loss):
    """Along the difference of the two classes' weights; "dlr", whose divisor moves too, rises."""
    model, x, y, target = many_classes()
    weight = model[1].weight.detach()
    best = x + 0.1 * (weight[target] - weight[y]).sign().view(x.shape)
    found = getattr(attacks, name)(model, x, y, epsilon=0.1, loss=loss, target=target)
    if loss == "margin":
        torch.testing.assert_close(found, best, rtol=0, atol=1e-12)
    raised = LOSSES[loss](model(found), y, target) - LOSSES[loss](model(x), y, target)
    assert (raised > 0).all()


def test_l2_optimum_of_a_linear_model():
    """ε along the unit vector of the difference of the weights, for PGD and for Auto-PGD, which comes close."""
    model, x, y, target = many_classes()
    slope = (model[1].weight[target] - model[1].weight[y]).detach()
    best = x + 0.2 * (slope / slope.norm(dim=1, keepdim=True)).view(x.shape)
    options = {"epsilon": 0.2, "loss": "margin", "target": target, "norm": "l2"}
    found = attacks.pgd(model, x, y, step_size=0.1, steps=60, **options)
    torch.testing.assert_close(found, best, rtol=0, atol=1e-9)
    assert ((attacks.apgd(model, x, y, **options) - x).flatten(1).norm(dim=1) <= 0.2 + 1e-9).all()
    still = model(x).gather(1, target[:, None]) < model(best).gather(1, target[:, None])
    assert still.all()
    large = attacks.pgd(model, x, y, epsilon=3.0, step_size=1.0, steps=10, norm="l2")
    assert large.min() >= 0
    assert large.max() <= 1
    assert ((large - x).flatten(1).norm(dim=1) <= 3 + 1e-9).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cw", "deepfool"])
def test_shortest_targeted_perturbation_of_a_linear_model(name):
    """Never shorter than the distance to the target's border, and taken for the target."""
    model, x, y, target = many_classes()
    options = {"cw": {"steps": 300, "learning_rate": 0.02, "initial_c": 1.0}, "deepfool": {"steps": 200}}[name]
    found = getattr(attacks, name)(model, x, y, epsilon=math.inf, target=target, **options)
    reached = model(found).argmax(1) == target
    assert reached.double().mean() > 0.6
    slope = (model[1].weight[target] - model[1].weight[y]).detach()
    rows = torch.arange(len(x))
    distance = (model(x)[rows, y] - model(x)[rows, target]) / slope.norm(dim=1)
    length = (found - x).flatten(1).norm(dim=1)
    assert (length[reached] >= distance[reached] - 1e-6).all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"target": torch.zeros(3)}, "target is torch.float32"),
        ({"target": torch.tensor([1, 2])}, r"needed: int64 of shape \(3,\)"),
        ({"target": torch.tensor([1, 2, 9])}, "target holds"),
        ({"target": torch.tensor([0, 1, 2])}, "target is the label itself"),
        ({"loss": "hinge"}, "loss 'hinge' is unknown; there is: ce, margin, dlr"),
        ({"norm": "l1"}, "norm 'l1' is unknown; there is: linf, l2"),
    ],
)
def test_bad_losses_targets_and_norms_are_named(bad, message):
    model, x = linear_classifier(16, 3), images(3, 1, 4, 4)
    with pytest.raises(ValueError, match=message):
        attacks.pgd(model, x, torch.tensor([0, 1, 2]), epsilon=0.1, **bad)


def test_r_fgsm_of_a_linear_model_moves_by_all_or_nothing():
    model, x, y, uphill = linear_case(torch.float64)
    moved = ((attacks.r_fgsm(model, x, y, epsilon=0.2) - x) * uphill).flatten()
    near_nothing, near_all = (torch.isclose(moved, torch.tensor(v).double(), atol=1e-12) for v in (0.0, 0.2))
    assert (near_nothing | near_all).all()
    assert near_nothing.any()
    assert near_all.any()


def test_one_bim_step_is_fgsm():
    model, x, y, _ = linear_case(torch.float64)
    assert torch.equal(
        attacks.bim(model, x, y, epsilon=0.1, step_size=0.1, steps=1), attacks.fgsm(model, x, y, epsilon=0.1)
    )


# --- strength on the shipped classifiers ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classifier", "cnn"])
def test_iterating_beats_one_step_beats_noise(name, digits, request):
    model, (x, y) = request.getfixturevalue(name), digits
    clean = accuracy(model, x, y).value
    reached = {
        attack: accuracy(model, getattr(attacks, attack)(model, x, y, epsilon=0.1), y).value for attack in SIGN_ATTACKS
    }
    assert reached["bim"] <= reached["fgsm"] < reached["random"] <= clean + 0.02
    assert reached["pgd"] <= reached["fgsm"]
    assert reached["r_fgsm"] < reached["random"]


def test_a_larger_ball_never_helps_the_classifier(classifier, digits):
    x, y = digits
    reached = [
        accuracy(classifier, attacks.bim(classifier, x, y, epsilon=e), y).value for e in (0, 0.02, 0.05, 0.1, 0.3)
    ]
    assert reached == sorted(reached, reverse=True)
    assert reached[-1] < 0.02


def test_shipped_target_is_as_easy_as_the_papers(classifier, cnn, digits):
    x, y = digits
    assert accuracy(classifier, x, y).value >= 0.96
    assert accuracy(cnn, x, y).value >= 0.97
    assert accuracy(classifier, attacks.fgsm(classifier, x, y, epsilon=0.1), y).value < 0.40
    assert accuracy(classifier, attacks.pgd(classifier, x, y, epsilon=0.1), y).value < 0.25


def test_restarts_never_weaken_any_image(classifier, digits):
    x, y = digits[0][:20], digits[1][:20]

    def losses(restarts):
        found = attacks.pgd(classifier, x, y, epsilon=0.05, steps=3, restarts=restarts, seed=4)
        with torch.no_grad():
            return F.cross_entropy(classifier(found), y, reduction="none")

    one, many = losses(1), losses(4)
    assert (many >= one - 1e-6).all()
    assert (many > one).any()


# --- one image at a time ----------------------------------------------------------------------------------------------


@every_attack
def test_an_image_alone_fares_as_in_its_batch(attack, classifier, digits):
    """Of random attacks only the first image can be compared: the others get their noise after it."""
    model, x, y = copy.deepcopy(classifier).double(), digits[0][:10].double(), digits[1][:10]
    together = attack(model, x, y, epsilon=0.1)
    for i in range(1 if attack.func.__name__ in RANDOM else len(x)):
        alone = attack(model, x[i : i + 1], y[i : i + 1], epsilon=0.1)
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-9)


@every_attack
def test_other_batch_mates_change_nothing(attack, classifier, digits):
    model, x, y = copy.deepcopy(classifier).double(), digits[0][:10].double(), digits[1][:10]
    others = [9, 8, 7, 3, 4, 2, 1, 0, 6, 5]  # images 3 and 4 stay where they are
    before, after = attack(model, x, y, epsilon=0.1), attack(model, x[others], y[others], epsilon=0.1)
    torch.testing.assert_close(before[3:5], after[3:5], rtol=0, atol=1e-9)
    assert not torch.equal(before[:3], after[:3])


# --- randomness and steps ---------------------------------------------------------------------------------------------


@random_attack
def test_seeds_repeat_and_generators_advance(attack):
    if attack.func is attacks.pgd:
        attack = partial(attack, steps=2)  # more steps end in the same corner from every start
    model, x, y = bumpy((3, 1, 5, 5)), images(3, 1, 5, 5), torch.tensor([0, 1, 2])
    state = torch.get_rng_state()
    first = attack(model, x, y, epsilon=0.1, seed=5)
    assert torch.equal(torch.get_rng_state(), state)  # the global generator plays no part
    assert torch.equal(first, attack(model, x, y, epsilon=0.1, seed=5))
    assert not torch.equal(first, attack(model, x, y, epsilon=0.1, seed=6))
    generator = seeded(5)
    assert torch.equal(first, attack(model, x, y, epsilon=0.1, seed=generator))
    assert not torch.equal(first, attack(model, x, y, epsilon=0.1, seed=generator))


class Counting(nn.Sequential):
    """A linear classifier that counts the gradients asked of it."""

    gradients = 0

    def forward(self, x):
        self.gradients += x.requires_grad
        return super().forward(x)


@pytest.mark.parametrize(
    ("epsilon", "step_size", "steps"),
    [(0.1, 0.01, 22), (0.3, 0.01, 62), (8 / 255, 2 / 255, 10), (8 / 255, 1 / 255, 18), (0, 0.01, 2), (0.05, 0.03, 5)],
)
@pytest.mark.parametrize("attack", [attacks.bim, attacks.pgd])
def test_default_step_count_is_the_papers(attack, epsilon, step_size, steps):
    model = Counting(*linear_classifier(4))
    attack(model, images(2, 1, 2, 2), torch.tensor([0, 1]), epsilon=epsilon, step_size=step_size)
    assert model.gradients == steps


def test_given_step_count_and_restarts_are_taken():
    model = Counting(*linear_classifier(4))
    attacks.pgd(model, images(2, 1, 2, 2), torch.tensor([0, 1]), epsilon=0.1, steps=5, restarts=3)
    assert model.gradients == 15


# --- bad input --------------------------------------------------------------------------------------------------------

GOOD = images(2, 1, 2, 2)
BAD = {
    "label 10": ({"y": torch.tensor([0, 10])}, "10"),
    "label -1": ({"y": torch.tensor([-1, 0])}, "-1"),
    "float labels": ({"y": torch.tensor([0.0, 1.0])}, "float32"),
    "one label for two images": ({"y": torch.tensor([0])}, r"\(1,\)"),
    "labels that are a list": ({"y": [0, 1]}, "list"),
    "negative epsilon": ({"epsilon": -0.1}, r"-0\.1"),
    "epsilon NaN": ({"epsilon": float("nan")}, "nan"),
    "epsilon infinite": ({"epsilon": float("inf")}, "inf"),
    "image above 1": ({"x": GOOD * 255}, r"\[0, 1\]"),
    "image below 0": ({"x": GOOD - 0.5}, r"\[0, 1\]"),
    "image with NaN": ({"x": GOOD.clone().fill_(torch.nan)}, "NaN"),
    "image with one infinite pixel": ({"x": GOOD.clone().index_fill_(3, torch.tensor(1), torch.inf)}, "infinite"),
    "image of bytes": ({"x": torch.zeros(2, 1, 2, 2, dtype=torch.uint8)}, "uint8"),
    "image of another dtype than the model": ({"x": GOOD.double()}, "float64"),
    "one image without a batch": ({"x": GOOD[0]}, r"\(1, 2, 2\)"),
    "no image": ({"x": GOOD[:0], "y": torch.zeros(0).long()}, r"\(0, 1, 2, 2\)"),
    "image as an array": ({"x": GOOD.numpy()}, "ndarray"),
}


@every_attack
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(attack, name):
    if name == "epsilon infinite" and attack.func in (attacks.cw, attacks.deepfool):
        pytest.skip("unclipped by design")
    change, message = BAD[name]
    arguments = {"x": GOOD, "y": torch.tensor([0, 1]), "epsilon": 0.1} | change
    with pytest.raises(ValueError, match=message):
        attack(linear_classifier(4), arguments["x"], arguments["y"], epsilon=arguments["epsilon"])


BAD_OPTIONS = {
    "bim": [{"steps": 0}, {"steps": 1.5}, {"step_size": 0}, {"step_size": -0.01}],
    "pgd": [{"steps": -1}, {"steps": 1.5}, {"step_size": 0}, {"restarts": 0}, {"restarts": 1.5}],
    "cw": [
        {"steps": 0},
        {"steps": 1.5},
        {"search_steps": 0},
        {"learning_rate": 0},
        {"initial_c": 0},
        {"confidence": -1},
    ],
    "deepfool": [{"steps": 0}, {"steps": 1.5}, {"overshoot": -0.1}, {"classes": 1}, {"classes": 2.5}],
}


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, options in BAD_OPTIONS.items() for bad in options])
def test_bad_options_are_named(name, bad):
    attack = getattr(attacks, name)
    with pytest.raises(ValueError, match=next(iter(bad))):
        attack(linear_classifier(4), GOOD, torch.tensor([0, 1]), epsilon=0.1, **bad)


@gradient_attack
def test_model_without_gradients_is_named(attack):
    """`Purifier` hides its gradient unless told otherwise: the error must say so, not speak of autograd's elements."""
    model = nn.Sequential(Purifier(nn.Identity()), *linear_classifier(4))
    with pytest.raises(ValueError, match="gradient"):
        attack(model, GOOD, model(GOOD).argmax(1), epsilon=0.1)


# --- more effort, images that are fooled already, other precisions ----------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "allowed"), [("cw", 1.25), ("deepfool", 1.05)])
def test_length_of_the_shortest_perturbation_of_a_linear_model(name, allowed, dtype):
    """|z_y − z_k| / ‖w_y − w_k‖₂ is the distance to the border of a linear model."""
    model = linear_classifier(20, dtype=dtype)
    x = images(10, 1, 4, 5, low=0.4, high=0.6, dtype=dtype)
    y = model(x).argmax(1)
    weight = model[1].weight.detach()
    distance = (model(x)[:, 0] - model(x)[:, 1]).abs() / (weight[0] - weight[1]).norm()
    found = getattr(attacks, name)(model, x, y, epsilon=math.inf)
    ratio = (found - x).flatten(1).norm(dim=1) / distance
    assert (model(found).argmax(1) != y).all()
    assert ratio.min() >= 1 - 1e-4, "nothing shorter fools a linear model"
    assert ratio.max() <= allowed


def test_deepfool_finds_the_nearest_of_many_borders():
    model = linear_classifier(20, classes=6, dtype=torch.float64)
    x = images(40, 1, 4, 5, low=0.4, high=0.6, dtype=torch.float64)
    logits, weight = model(x).detach(), model[1].weight.detach()
    y = logits.argmax(1)
    gaps = logits.gather(1, y[:, None]) - logits
    distances = gaps / (weight[y][:, None] - weight).norm(dim=2)
    nearest = distances.masked_fill(F.one_hot(y, 6).bool(), torch.inf).amin(1)
    found = attacks.deepfool(model, x, y, epsilon=math.inf)
    assert ((found - x).flatten(1).norm(dim=1) / nearest).max() <= 1.05


@pytest.mark.parametrize(("name", "few", "many"), [("bim", 5, 40), ("pgd", 5, 40), ("deepfool", 1, 50)])
def test_more_steps_are_never_weaker(name, few, many, classifier, digits):
    x, y = digits
    epsilon = math.inf if name == "deepfool" else 0.1
    reached = [
        accuracy(classifier, getattr(attacks, name)(classifier, x, y, epsilon=epsilon, steps=n), y).correct
        for n in (few, many)
    ]
    assert reached[1] <= reached[0]


@pytest.mark.slow
def test_more_search_never_lengthens_what_cw_found(classifier, digits):
    x, y = digits[0][:20], digits[1][:20]

    def lengths(search_steps):
        found = attacks.cw(classifier, x, y, epsilon=math.inf, steps=100, learning_rate=0.05, search_steps=search_steps)
        length = (found - x).flatten(1).norm(dim=1)
        return torch.where(length > 0, length, torch.inf)  # unchanged: not fooled yet

    few, many = lengths(3), lengths(7)
    assert (many <= few + 1e-6).all()
    assert (many < few - 1e-3).any()


@pytest.mark.parametrize("name", ["cw", "deepfool"])
def test_clipping_is_a_projection_of_the_unclipped_result(name, classifier, digits):
    x, y = digits[0][:20], digits[1][:20]
    attack = partial(getattr(attacks, name), classifier, x, y, **SHORT.get(name, {}))
    assert torch.equal(attack(epsilon=0.05), attacks.project(attack(epsilon=math.inf), x, 0.05))


@every_attack
def test_a_batch_that_is_misclassified_already(attack, classifier, digits):
    x, y = digits[0][:10], (digits[1][:10] + 1) % 10
    assert (classifier(x).argmax(1) != y).all()
    found = attack(classifier, x, y, epsilon=0.1)
    assert (found - x).abs().max() <= 0.1 + 1e-6
    assert (classifier(found).argmax(1) != y).all()
    if attack.func in (attacks.cw, attacks.deepfool):
        assert torch.equal(found, x)


@every_attack
def test_a_model_of_half_precision_is_named(attack):
    with pytest.raises(ValueError, match=r"float32.*bfloat16"):
        attack(linear_classifier(4).bfloat16(), GOOD, torch.tensor([0, 1]), epsilon=0.1)


@every_attack
def test_a_model_on_another_device_is_named(attack):
    with pytest.raises(ValueError, match="meta"):
        attack(linear_classifier(4).to("meta"), GOOD, torch.tensor([0, 1]), epsilon=0.1)


@pytest.mark.slow
def test_every_name_has_the_papers_parameters():
    model, y = linear_classifier(4, classes=5), torch.tensor([0, 1])
    for dataset in {entry.budget: name for name, entry in DATASETS.items() if entry.budget}.values():
        for name, parameters in attacks.attack_settings(dataset).items():
            short = parameters | ({"queries": 10} if name == "square" else {})
            run_attack(attacks.parse_spec(name)[0], model, GOOD, y, **short)
    assert attacks.attack_settings("mnist")["cw"]["steps"] == 1000
    assert attacks.attack_settings("cifar10-jpeg")["pgd"] == {"epsilon": 8 / 255, "step_size": 1 / 255}
    assert attacks.attack_settings("imagenet")["bim@25/255"]["epsilon"] == 25 / 255


def test_an_attack_is_named_with_its_epsilon():
    assert attacks.parse_spec("bim") == ("bim", None)
    assert attacks.parse_spec("bim@5/255") == ("bim", 5 / 255)
    assert attacks.parse_spec("cw@inf") == ("cw", math.inf)
    assert [attacks.spec_of("bim", size) for size in (25 / 255, 0.2, 0.1, math.inf)] == [
        "bim@25/255",
        "bim@0.2",
        "bim@0.1",
        "bim@inf",
    ]
    with pytest.raises(ValueError, match=r"'bim@0\.1/' names no ε; needed: such as bim@5/255"):
        attacks.parse_spec("bim@0.1/")
    with pytest.raises(ValueError, match="'bim@x' names no ε; needed: such as bim@5/255"):
        attacks.parse_spec("bim@x")


def test_a_data_set_without_an_epsilon_asks_for_one(tmp_path):
    with pytest.raises(ValueError, match="has no ε of its own; give epsilon"):
        attacks.attack_settings(f"folder:{tmp_path}", ["pgd"])
    assert attacks.attack_settings(f"folder:{tmp_path}", ["pgd"], 0.08)["pgd"] == {"epsilon": 0.08, "step_size": 0.01}
    with pytest.raises(ValueError, match="attack 'pdg' is unknown; there is: clean, random, fgsm"):
        attacks.attack_settings("mnist", ["pdg"])
