import copy
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from conftest import LinearDAE, images, linear_classifier, set_gradients, snapshot, tiny_dae
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apudae import PRESETS, Purifier, PurifyConfig, attacks, purify, recon_error
from apudae.evaluation.accuracy import accuracy
from apudae.models import calibrate
from apudae.purification import MeanOfDraws

GRADIENT = PurifyConfig(steps=3, step_size=0.02, step_rule="gradient")
SIGN = PurifyConfig(steps=3, step_size=0.01)
every_preset = pytest.mark.parametrize("config", PRESETS)
every_backward = pytest.mark.parametrize("backward", ["none", "identity", "dae", "exact"])


def calibrated_dae(**options):
    """A tiny autoencoder with μ and σ in the middle of what these tests purify."""
    dae = tiny_dae(**options)
    dtype = next(dae.parameters()).dtype
    calibrate(dae, images(20, dae.channels, 8, 8, dtype=dtype, seed=9))
    return dae


def doubles(*shape, low=0.3, high=0.7, seed=0):
    return images(*shape, low=low, high=high, dtype=torch.float64, seed=seed)


def gradient_of(function, x, above):
    """The gradient that an attacker gets at `x`, for the gradient `above` of the output."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x, above)[0]


# --- presets and steps ------------------------------------------------------------------------------------------------


def test_presets():
    assert PRESETS["direct"].direct
    assert PRESETS["A"] == PurifyConfig(steps=15, step_size=0.01, step_rule="sign", direct=False)


@every_backward
def test_no_steps_change_no_bit(backward):
    x = images(3, 1, 7, 8)
    assert torch.equal(purify(calibrated_dae(), x, PurifyConfig(steps=0)), x)
    assert torch.equal(Purifier(calibrated_dae(), PurifyConfig(steps=0), backward)(x), x)


def test_direct_is_the_autoencoders_output_in_range():
    dae, x = calibrated_dae(), images(3, 1, 7, 8)
    with torch.no_grad():
        assert dae(x).max() > 1  # else clipping would not show
        assert torch.equal(purify(dae, x, "direct"), dae(x).clamp(0, 1))


@pytest.mark.parametrize("rule", ["sign", "gradient"])
def test_two_steps_by_hand(rule):
    dae, x = LinearDAE(12), doubles(4, 1, 3, 4, low=0, high=1)
    expected = x.flatten(1)
    for _ in range(2):
        gradient = expected @ dae.curvature
        expected = (expected - 0.2 * (gradient.sign() if rule == "sign" else gradient)).clamp(0, 1)
    assert (expected == 0).any()  # the clip between steps takes part
    found = purify(dae, x, PurifyConfig(steps=2, step_size=0.2, step_rule=rule))
    torch.testing.assert_close(found.flatten(1), expected, rtol=0, atol=1e-12)


def test_first_steps_of_a_by_hand():
    dae, x = LinearDAE(12), doubles(2, 1, 3, 4)
    one = x.flatten(1) - 0.01 * (x.flatten(1) @ dae.curvature).sign()
    two = one - 0.01 * (one @ dae.curvature).sign()
    found = purify(dae, x, PurifyConfig(steps=2))  # the defaults are A's
    torch.testing.assert_close(found.flatten(1), two, rtol=0, atol=1e-12)


@every_preset
@settings(max_examples=25, deadline=None)
@given(st.tuples(st.integers(1, 3), st.just(2), st.integers(1, 8), st.integers(1, 8)), st.booleans())
def test_contract(config, shape, training):
    dae, x = calibrated_dae(channels=2, depth=3).train(training), images(*shape)
    before, given_x = set_gradients(dae), x.clone()
    purified = purify(dae, x, config)
    assert purified.min() >= 0
    assert purified.max() <= 1
    assert (purified.shape, purified.dtype, purified.device) == (x.shape, x.dtype, x.device)
    assert not purified.requires_grad
    assert torch.equal(x, given_x)
    assert snapshot(dae) == before


@pytest.mark.parametrize("config", [*PRESETS, GRADIENT])
def test_an_image_alone_fares_as_in_its_batch(config):
    dae, x = calibrated_dae(dtype=torch.float64).train(), doubles(6, 1, 9, 9, low=0, high=1)
    alone = torch.cat([purify(dae, image[None], config, ids=torch.tensor([i])) for i, image in enumerate(x)])
    torch.testing.assert_close(purify(dae, x, config), alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", ["direct", "A"])
def test_shipped_autoencoder_treats_each_image_alone(config, dae, digits):
    dae, x = copy.deepcopy(dae).double(), digits[0][:3].double()
    alone = torch.cat([purify(dae, image[None], config) for image in x])
    torch.testing.assert_close(purify(dae, x, config), alone, rtol=0, atol=1e-12)


@every_preset
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_works_where_gradients_are_off(config, mode):
    dae, x = calibrated_dae(), images(3, 1, 7, 8)
    expected = purify(dae, x, config)
    with mode():
        assert torch.equal(purify(dae, x, config), expected)
        assert torch.equal(purify(dae, x.clone(), config), expected)  # in inference mode: a tensor born there


@pytest.mark.parametrize("config", [PurifyConfig(direct=True, noise_std=0.1), "F"])
def test_the_mean_of_draws_is_that_of_purifiers_with_the_next_seeds(config):
    dae, x = calibrated_dae(), images(3, 1, 8, 8, low=0.3, high=0.7)
    mean = MeanOfDraws(dae, config, 3, seed=0)
    ids = torch.tensor([5, 0, 7])
    alone = [mean._next(x, ids)[0] + number for number in range(3)]
    expected = sum(Purifier(dae, config)._purified(x, ids, seed, exact=False) for seed in alone) / 3
    torch.testing.assert_close(mean(x, ids), expected.detach())
    torch.testing.assert_close(mean(x[1:], ids[1:]), expected[1:].detach())
    assert torch.equal(MeanOfDraws(dae, config, 1)(x, ids), Purifier(dae, config)(x, ids))
    assert not torch.equal(mean(x, ids), Purifier(dae, config)(x, ids))
    exact = MeanOfDraws(dae, config, 3, "exact")(x.requires_grad_(), ids)
    assert torch.autograd.grad(exact.sum(), x)[0].abs().sum() > 0
    with pytest.raises(ValueError, match="draws is 0; needed: a whole number of at least 1"):
        MeanOfDraws(dae, config, 0)
    seeds, calls = [], MeanOfDraws(dae, config, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Purifier, "_purified", lambda self, x, ids, seed, **_: seeds.append(seed) or x.detach())
        for _ in range(4):
            calls(x.detach())
    assert len(set(seeds)) == len(seeds) == 12, "without ids each call draws anew, and shares no draw with another"
    with pytest.raises(ValueError, match="nothing is drawn"):
        MeanOfDraws(dae, "A", 2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["direct", "A", "E"])
def test_in_autocast_the_autoencoder_sees_channels_last(name, channels):
    """The layout that bfloat16's convolutions are made for; with one channel too, where both layouts look alike."""
    dae, x, seen = calibrated_dae(channels=channels), images(3, channels, 8, 8), []
    dae.register_forward_pre_hook(lambda _, given: seen.append(given[0].stride()))
    usual = purify(dae, x, name)
    assert set(seen) == {x.stride()}, "float32 stays as it is, bit for bit"
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found = purify(dae, x, name)
    assert set(seen) == {(64 * channels, 1, 8 * channels, channels)}
    assert found.dtype == torch.float32
    assert recon_error(dae, found).mean() < 1.1 * recon_error(dae, usual).mean()


@every_preset
def test_works_on_images_that_track_gradients(config):
    dae, x = calibrated_dae(), images(3, 1, 7, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = purify(dae, x.clone().requires_grad_(), config)
    assert torch.equal(found, purify(dae, x, config))
    assert not found.requires_grad


def test_purifying_lowers_the_error_of_noisy_digits(dae, digits):
    x = digits[0][:10]
    noisy = (x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    with torch.no_grad():
        before, after = recon_error(dae, noisy), recon_error(dae, purify(dae, noisy, "A"))
    assert (after < before).all()
    assert after.mean() < before.mean() / 2


def test_purifying_restores_attacked_digits(classifier, dae, digits):
    """After FGSM both ways of purifying win back most digits, and they harm few clean ones."""
    x, y = digits[0][:20], digits[1][:20]
    attacked = attacks.fgsm(classifier, x, y, epsilon=0.1)
    for config in ("direct", "A"):
        defended = nn.Sequential(Purifier(dae, config), classifier)
        assert accuracy(defended, attacked, y).correct >= accuracy(classifier, attacked, y).correct + 8
        assert accuracy(defended, x, y).correct >= 18


# --- what an attacker's gradient sees ---------------------------------------------------------------------------------


@every_backward
@pytest.mark.parametrize("config", [*PRESETS, SIGN, GRADIENT])
def test_backward_changes_no_value(config, backward):
    dae, x = calibrated_dae(), images(3, 1, 7, 8)
    for images_ in (x, x.clone().requires_grad_()):
        torch.testing.assert_close(Purifier(dae, config, backward)(images_), purify(dae, x, config), rtol=0, atol=1e-6)


@every_preset
def test_none_gives_no_gradient(config):
    output = Purifier(calibrated_dae(), config, "none")(images(2, 1, 8, 8).requires_grad_())
    assert not output.requires_grad
    assert output.grad_fn is None


@every_preset
def test_identity_gives_the_classifiers_gradient_at_the_purified_image(config):
    dae, classifier = LinearDAE(12), linear_classifier(12, classes=3, dtype=torch.float64)
    x, y = doubles(4, 1, 3, 4), torch.tensor([0, 1, 2, 0])
    defended = nn.Sequential(Purifier(dae, config, "identity"), classifier)
    found = gradient_of(lambda at: F.cross_entropy(defended(at), y, reduction="sum")[None], x, torch.ones(1).double())
    purified = purify(dae, x, config)
    expected = gradient_of(
        lambda at: F.cross_entropy(classifier(at), y, reduction="sum")[None], purified, torch.ones(1).double()
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@every_preset
def test_dae_gives_one_pass_through_the_autoencoder(config):
    dae, x, above = LinearDAE(12), doubles(4, 1, 3, 4), doubles(4, 1, 3, 4, low=-1, high=1, seed=5)
    found = gradient_of(Purifier(dae, config, "dae"), x, above)
    torch.testing.assert_close(found.flatten(1), above.flatten(1) @ dae.matrix.detach().T, rtol=1e-9, atol=0)


class SmoothDAE(nn.Module):
    """A small autoencoder with every derivative, for comparison with finite differences."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Conv2d(1, 1, 3, padding=1).double()

    def forward(self, x):
        return x + 0.3 * torch.tanh(2 * self.inner(x))


@pytest.mark.parametrize(
    "config", [GRADIENT, PurifyConfig(steps=1, step_size=0.1, step_rule="gradient"), PRESETS["direct"]]
)
def test_exact_agrees_with_finite_differences(config):
    purifier, x = Purifier(SmoothDAE(), config, "exact"), doubles(2, 1, 3, 4).requires_grad_()
    moved = purifier(x) - x
    assert moved.abs().max() > 1e-3
    assert torch.autograd.gradcheck(purifier, (x,))


def test_exact_of_a_linear_autoencoder():
    dae, x, above = LinearDAE(12), doubles(4, 1, 3, 4), doubles(4, 1, 3, 4, low=-1, high=1, seed=5)
    found = gradient_of(Purifier(dae, GRADIENT, "exact"), x, above)
    one = torch.eye(12, dtype=torch.float64) - GRADIENT.step_size * dae.curvature
    expected = above.flatten(1) @ torch.linalg.matrix_power(one, GRADIENT.steps)
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-9, atol=1e-12)


def test_exact_stands_in_a_tanh_for_the_sign():
    dae, x, above = LinearDAE(12), doubles(4, 1, 3, 4), doubles(4, 1, 3, 4, low=-1, high=1, seed=5)
    found = gradient_of(Purifier(dae, PurifyConfig(steps=1, step_size=0.05), "exact"), x, above)
    gradient = x.flatten(1) @ dae.curvature
    scale = 8 * gradient.abs().mean(1, keepdim=True)
    slope = (1 - torch.tanh(gradient / scale) ** 2) / scale
    expected = above.flatten(1) - 0.05 * (above.flatten(1) * slope) @ dae.curvature
    torch.testing.assert_close(found.flatten(1), expected, rtol=1e-9, atol=1e-12)


@every_backward
def test_backward_pass_leaves_the_autoencoder_alone(backward):
    dae, classifier = calibrated_dae().train(), linear_classifier(56)
    before = set_gradients(dae)
    x = images(2, 1, 7, 8).requires_grad_()
    nn.Sequential(Purifier(dae, SIGN, backward), classifier)(x).sum().backward()
    assert snapshot(dae) == before
    assert (x.grad is None) == (backward == "none")
    assert classifier[1].weight.grad is not None


class Held:
    """A tensor kept for a backward pass."""

    def __init__(self, tensor):
        self.tensor = tensor


def held_at_each_pass(backward, steps):
    """How many tensors the graph holds whenever the autoencoder is called."""
    alive, counts, dae = weakref.WeakSet(), [], calibrated_dae()
    dae.register_forward_pre_hook(lambda *_: counts.append(len(alive)))

    def pack(tensor):
        held = Held(tensor)
        alive.add(held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        output = Purifier(dae, PurifyConfig(steps=steps), backward)(images(2, 1, 8, 8).requires_grad_())
    return counts, len(alive), output


@pytest.mark.parametrize("backward", ["none", "identity"])
def test_memory_does_not_grow_with_the_steps(backward):
    counts, left, _ = held_at_each_pass(backward, 6)
    assert counts == [0] * 6
    assert left == 0


def test_exact_keeps_the_graph_it_needs():
    counts, left, _ = held_at_each_pass("exact", 6)
    assert counts == sorted(set(counts))
    assert left > counts[-1] > 0


def test_exact_keeps_no_graph_where_nobody_asks():
    output = Purifier(calibrated_dae(), SIGN, "exact")(images(2, 1, 8, 8))
    assert not output.requires_grad


def test_purifier_is_a_module_of_its_autoencoder():
    defended = nn.Sequential(Purifier(calibrated_dae(), "A"), linear_classifier(64))
    assert len([name for name in defended.state_dict() if name.startswith("0.dae.")]) == len(
        calibrated_dae().state_dict()
    )
    assert defended(images(3, 1, 8, 8)).shape == (3, 2)


# --- bad input --------------------------------------------------------------------------------------------------------

GOOD = images(2, 1, 8, 8)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (GOOD.clone().index_fill_(3, torch.tensor(2), torch.nan), "NaN"),
        (GOOD * 255, r"\[0, 1\]"),
        (GOOD - 0.5, r"\[0, 1\]"),
        ((GOOD * 255).byte(), "uint8"),
        ((GOOD * 255).long(), "int64"),
        (GOOD.double(), "float64"),
        (GOOD[0], r"\(1, 8, 8\)"),
        (GOOD[:0], r"\(0, 1, 8, 8\)"),
        (images(2, 3, 8, 8), r"\(2, 3, 8, 8\).*\(n, 1, height, width\)"),
        (GOOD.numpy(), "ndarray"),
    ],
)
@every_preset
def test_bad_images_are_named(config, x, message):
    with pytest.raises(ValueError, match=message):
        purify(calibrated_dae(), x, config)


def test_no_steps_still_refuse_bad_images():
    with pytest.raises(ValueError, match="NaN"):
        purify(calibrated_dae(), GOOD * torch.nan, PurifyConfig(steps=0))


@pytest.mark.parametrize("name", ["Z", "", "a"])
def test_unknown_preset_lists_what_there_is(name):
    with pytest.raises(ValueError, match=f"{name!r} is unknown; there is: {', '.join(PRESETS)}"):
        purify(calibrated_dae(), GOOD, name)


@pytest.mark.parametrize(
    "bad",
    [
        *({"steps": value} for value in (-1, 1.5, "3", True)),
        *({"step_size": value} for value in (-0.1, float("nan"))),
        *({"direct": "no"}, {"transform_back": float("nan")}, {"random_transform": 1}),
    ],
)
def test_bad_configuration_is_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        PurifyConfig(**bad)


def test_unknown_step_rule_and_backward_list_what_there_is():
    with pytest.raises(ValueError, match=r"'adamw' is unknown; there is: sign"):
        PurifyConfig(step_rule="adamw")
    with pytest.raises(ValueError, match="'full' is unknown; there is: none, identity, dae, exact"):
        Purifier(calibrated_dae(), "A", backward="full")


def test_autoencoder_is_restored_after_an_error():
    dae = calibrated_dae().train()
    before = set_gradients(dae)
    with pytest.raises(ValueError, match="autoencoder needs"):
        purify(dae, images(2, 3, 8, 8), "A")
    assert snapshot(dae) == before
