"""Variants B to G: their first two steps by hand on a linear autoencoder, and what each must keep."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import LinearDAE, images, tiny_dae
from torch import nn

import apudae
from apudae.batching import CACHE, parts
from apudae.models import DAE, calibrate, recon_error
from apudae.purification import PRESETS, Purifier, PurifyConfig, preset, purify, trajectory
from apudae.purification.steps import affine_matrices, resampled

ALPHA = 0.01


def scene(mu=None, sigma=0.7):
    """Four images, one of them the image's own reconstruction (error 0), a linear autoencoder, μ between the errors."""
    x = images(4, 1, 4, 4, low=0.3, high=0.7, dtype=torch.float64)
    dae = LinearDAE(16)
    x[0] *= 0.45 / x[0].max()
    errors = recon_error(dae, x).detach()
    dae.recon_mu = errors.sort().values[:2].mean() if mu is None else torch.tensor(mu, dtype=torch.float64)
    dae.recon_sigma = torch.tensor(sigma, dtype=torch.float64)
    return dae, x, errors


def by_hand(dae, x, slope, size, steps=2):
    """Adam on L with dL/d dist = slope(dist) and α_i = size(dist); an image of slope 0 rests."""
    first, second, counts = torch.zeros_like(x), torch.zeros_like(x), torch.zeros(len(x), 1, 1, 1, dtype=x.dtype)
    for _ in range(steps):
        errors = recon_error(dae, x).detach()
        gradient = slope(errors).view(-1, 1, 1, 1) * (x.flatten(1) @ dae.curvature).view_as(x)
        moves = slope(errors).view(-1, 1, 1, 1) != 0
        counts = counts + moves
        first = torch.where(moves, 0.9 * first + 0.1 * gradient, first)
        second = torch.where(moves, 0.999 * second + 0.001 * gradient**2, second)
        step = first / (1 - 0.9**counts) / (second / (1 - 0.999**counts)).sqrt()
        x = torch.where(moves, x - size(errors).view(-1, 1, 1, 1) * step, x).clamp(0, 1)
    return x


@pytest.mark.parametrize("name", ["B", "C", "D", "E"])
def test_two_steps_by_hand(name):
    dae, x, _ = scene()
    mu, sigma = dae.recon_mu, dae.recon_sigma
    slope = {
        "B": lambda e: torch.ones_like(e),
        "C": lambda e: torch.ones_like(e),
        "D": lambda e: (e - mu).sign() / sigma,
        "E": lambda e: (e > mu).double() / sigma,
    }[name]
    constant = lambda e: torch.full_like(e, ALPHA)  # noqa: E731
    size = (lambda e: ALPHA * (1 - torch.exp(-(((e - mu) / sigma) ** 2)))) if name == "C" else constant
    torch.testing.assert_close(purify(dae, x, replace(PRESETS[name], steps=2)), by_hand(dae, x, slope, size))


def test_e_leaves_images_at_or_under_mu_bit_identical_and_d_raises_them():
    dae, x, errors = scene()
    under = errors <= dae.recon_mu
    assert 0 < under.sum() < len(x)
    unchanged = (purify(dae, x, "E") == x).flatten(1).all(1)
    assert torch.equal(unchanged, under)
    one_step = replace(PRESETS["D"], steps=1)
    assert (recon_error(dae, purify(dae, x, one_step))[under] > errors[under]).all()


def test_e_of_the_shipped_autoencoder_leaves_clean_digits_alone(dae, digits):
    x = digits[0][:40]
    under = recon_error(dae, x) <= dae.recon_mu
    assert under.any()
    assert torch.equal((purify(dae, x, "E") == x).flatten(1).all(1), under)


def test_f_and_g_without_noise_and_transform_are_e():
    dae, x, _ = scene()
    expected = purify(dae, x, "E")
    assert torch.equal(purify(dae, x, replace(PRESETS["F"], noise_std=0.0)), expected)
    still = replace(PRESETS["G"], resize=1.0, rotation=0.0, random_transform=False)
    assert torch.equal(purify(dae, x, still), expected)


@pytest.mark.parametrize("name", ["F", "G"])
def test_random_variants_repeat_under_a_seed_whatever_the_batch(name):
    dae, x, _ = scene()
    whole = purify(dae, x, name, seed=5)
    assert torch.equal(purify(dae, x, name, seed=5), whole)
    assert not torch.equal(purify(dae, x, name, seed=6), whole)
    ids = torch.arange(len(x))
    parts_of_it = [purify(dae, part, name, seed=5, ids=own) for part, own in zip(x.split(2), ids.split(2), strict=True)]
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)  # a matrix product rounds by the batch's size
    close(torch.cat(parts_of_it), whole)
    some = torch.tensor([3, 0])
    close(purify(dae, x[some], name, seed=5, ids=some), whole[some])  # without the others, in any order
    assert not torch.equal(purify(dae, x[some], name, seed=5), whole[some]), "an image's id is its place by default"
    layer = Purifier(dae, name, seed=5)
    assert torch.equal(layer(x), whole), "the first call"
    assert not torch.equal(layer(x), whole), "each call without ids draws anew"
    assert torch.equal(layer(x, ids), whole)
    with pytest.raises(ValueError, match=r"ids are torch.int64 of shape \(2,\); needed: whole numbers"):
        purify(dae, x, name, ids=some)


def test_adaptive_noise_spares_images_under_mu():
    dae, x, errors = scene()
    config = replace(PRESETS["F"], noise_rule="adaptive", noise_std=0.05, steps=1)
    unchanged = (purify(dae, x, config) == x).flatten(1).all(1)
    assert torch.equal(unchanged, errors <= dae.recon_mu)


def test_noise_once_is_a_noisy_start():
    dae, x, _ = scene()
    once = replace(PRESETS["A"], noise_std=0.05, noise_rule="once")
    start = purify(dae, x, replace(once, steps=1, step_size=0.0), seed=3)
    assert (start - x).std() > 0.03
    assert torch.equal(purify(dae, x, once, seed=3), purify(dae, start, "A"))
    apudae.purify(tiny_dae(), images(2, 1, 8, 8), once)  # which needs no μ


def test_a_is_adam_with_both_betas_zero():
    dae, x, _ = scene()
    torch.testing.assert_close(purify(dae, x, PurifyConfig(step_rule="adam", betas=(0.0, 0.0))), purify(dae, x, "A"))


def test_l2_step_moves_alpha_a_pixel_in_the_mean_square():
    dae, x, _ = scene()
    moved = purify(dae, x, PurifyConfig(step_rule="l2", steps=1)) - x
    torch.testing.assert_close(moved.square().mean((1, 2, 3)).sqrt(), torch.full((4,), ALPHA, dtype=torch.float64))


def test_transforms():
    x = images(3, 2, 6, 6)
    quarter = resampled(x, affine_matrices(x, 1.0, 90.0, None))
    torch.testing.assert_close(quarter, torch.rot90(x, 1, (2, 3)), atol=1e-5, rtol=0)
    matrix = affine_matrices(x, 1.5, 30.0, None)
    torch.testing.assert_close(matrix @ torch.linalg.inv(matrix), torch.eye(2).expand(3, 2, 2))
    blob = torch.zeros(1, 1, 17, 17)
    blob[..., 6:11, 6:11] = 1
    assert resampled(blob, affine_matrices(blob, 1.4, 0.0, None)).sum() == pytest.approx(25 * 1.4**2, rel=0.05)


def test_trajectory_holds_every_step():
    dae, x, errors = scene()
    steps = trajectory(dae, x, "B")
    assert len(steps) == PRESETS["B"].steps + 1
    torch.testing.assert_close(steps[0].images, x)
    torch.testing.assert_close(steps[0].errors, errors)
    torch.testing.assert_close(steps[-1].images, purify(dae, x, "B"))
    assert (steps[3].step_sizes == ALPHA).all()
    assert (steps[-1].step_sizes == 0).all()
    resting = trajectory(dae, x, "E")[0]
    assert torch.equal(resting.step_sizes > 0, errors > dae.recon_mu)


@pytest.mark.parametrize("name", ["C", "D", "E", "F", "G"])
def test_variants_that_need_mu_refuse_an_uncalibrated_autoencoder(name):
    with pytest.raises(ValueError, match=r"^a purifier with .* needs μ and σ .*calibrate") as said:
        purify(tiny_dae(), images(2, 1, 8, 8), name)
    assert str(said.value).index("needs") < 100


@pytest.mark.parametrize("name", ["B", "C", "D", "E", "F", "G"])
def test_each_variant_keeps_the_contract(name):
    dae, x = tiny_dae(), images(6, 1, 9, 8)
    calibrate(dae, images(20, 1, 9, 8, seed=1))
    purified = apudae.purify(dae, x, name)
    assert purified.shape == x.shape
    assert purified.dtype == x.dtype
    assert purified.min() >= 0
    assert purified.max() <= 1


@pytest.mark.parametrize(
    "parts",
    [
        {"direct": True, "resize": 1.1},
        {"direct": True, "noise_std": 0.1, "noise_rule": "adaptive"},
        {"direct": True, "noise_std": 0.1, "noise_rule": "once"},
        {"random_transform": True},
        {"transform_back": True},
        {"betas": (0.9, 1.0)},
        {"steps": 1.5},
        {"step_size": -0.1},
        {"resize": 0.0},
        {"loss": "recon"},
        {"schedule": "cosine"},
        {"noise_std": float("nan")},
    ],
)
def test_contradicting_parts_are_refused(parts):
    with pytest.raises(ValueError):  # noqa: PT011  each message is another one
        PurifyConfig(**parts)


class Cramped(torch.nn.Module):
    """Runs out of memory for more than `room` images at once."""

    def __init__(self, dae, room, error):
        super().__init__()
        self.dae, self.room, self.error, self.sizes = dae, room, error, []
        self.recon_mu, self.recon_sigma = dae.recon_mu, dae.recon_sigma

    def forward(self, x):
        if len(x) > self.room:
            raise self.error
        self.sizes.append(len(x))
        return self.dae(x)


ON_CPU = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried …")


@pytest.mark.parametrize("error", [ON_CPU, torch.OutOfMemoryError("CUDA out of memory")], ids=["cpu", "cuda"])
@pytest.mark.parametrize("name", ["A", "E", "F", "G"])
def test_a_batch_too_large_for_memory_is_halved_and_nothing_changes(name, error):
    dae, x, _ = scene()
    cramped = Cramped(dae, 1, error)
    with pytest.warns(UserWarning, match="4 images does not fit"):
        found = purify(cramped, x, name, seed=3)
    torch.testing.assert_close(found, purify(dae, x, name, seed=3))
    assert set(cramped.sizes) <= {0, 1}


def test_other_errors_and_an_image_too_large_alone_are_not_hidden():
    dae, x, _ = scene()
    with pytest.raises(RuntimeError, match="broken"):
        purify(Cramped(dae, 1, RuntimeError("broken")), x)
    with pytest.warns(UserWarning, match="halves"), pytest.raises(torch.OutOfMemoryError):
        purify(Cramped(dae, 0, torch.OutOfMemoryError("CUDA out of memory")), x[:2])


def test_trajectory_is_whole_where_every_image_rests():
    dae, x, errors = scene()
    dae.recon_mu = errors.max() + 1
    lines = trajectory(dae, x, "E")
    assert len(lines) == PRESETS["E"].steps + 1
    assert all(torch.equal(line.images, x) for line in lines)
    assert len(trajectory(dae, x, "direct")) == 1


def test_presets_with_other_steps():
    assert preset("B", 7, 0.02) == replace(PRESETS["B"], steps=7, step_size=0.02)
    assert preset("direct", 7, 0.02) == PRESETS["direct"], "it has neither n nor α"
    assert preset("none", 7, 0.02, 0.1) is None
    assert preset("A", 7, 0.02, 0.1) == PurifyConfig(steps=7, step_size=0.02, noise_std=0.1)
    with pytest.raises(ValueError, match="'Z' is unknown; there is: direct, A"):
        preset("Z", 7, 0.02)


def test_direct_with_noise_is_the_autoencoder_of_a_noisy_image():
    x, pure = images(500, 1, 9, 8), PurifyConfig(direct=True, noise_std=0.3)
    noisy = purify(nn.Identity(), x, pure, seed=3)
    inside = (x > 0.1) & (x < 0.9)  # elsewhere the clip of the output shows
    assert (noisy - x)[inside].std() > 0.2
    assert torch.equal(noisy, purify(nn.Identity(), x, pure, seed=3)), "the seed decides"
    assert not torch.equal(noisy, purify(nn.Identity(), x, pure, seed=4))
    dae = tiny_dae()
    quiet = purify(dae, x, replace(pure, noise_std=1e-6))
    assert torch.allclose(quiet, purify(dae, x, "direct"), atol=1e-4)


@pytest.mark.parametrize("name", ["A", "F", "G"])
def test_trajectory_of_many_images_ends_where_purify_does(name):
    """More than are purified at a time: both split them alike, so that they agree bit for bit."""
    torch.manual_seed(0)
    dae, x = DAE(1, 3, 4).eval(), torch.rand(12, 1, 150, 150)
    torch.nn.init.normal_(dae.output.weight, std=0.05)
    dae.recon_mu.fill_(0.0)
    dae.recon_sigma.fill_(1.0)
    config = replace(PRESETS[name], steps=2)
    assert len(parts(x, CACHE)) > 1
    path = apudae.trajectory(dae, x, config)
    assert [len(step.images) for step in path] == [12, 12, 12]
    assert path[-1].images.equal(purify(dae, x, config))


def test_trajectory_refuses_what_is_no_tensor():
    with pytest.raises(ValueError, match="needed"):
        apudae.trajectory(DAE(1, 3, 4), [[0.5]], "A")
