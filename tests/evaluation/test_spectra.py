import math

import pytest
import torch
from conftest import images

from apudae.evaluation.spectra import share_above, spectrum


def test_rings_add_up_to_the_energy():
    x = images(3, 3, 9, 8)
    assert spectrum(x, 7).energy.sum() == pytest.approx(x.square().flatten(1).sum(1).mean().item())


def test_a_wave_lies_in_its_ring():
    """A wave of a quarter cycle a pixel, and a chequerboard, the highest frequency that there is."""
    wave = torch.sin(2 * math.pi * torch.arange(16) / 4).expand(1, 1, 16, 16)
    found = spectrum(wave, 12).set_index("frequency").energy
    assert found[abs(found.index - 0.25) < 0.03].sum() == pytest.approx(wave.square().sum().item())
    board = (torch.arange(16) % 2 * 2.0 - 1).expand(16, 16)
    board = (board * board.T)[None, None]
    assert spectrum(board, 12).energy.iloc[-1] == pytest.approx(256)
    torch.testing.assert_close(share_above(torch.cat([wave, board]), 0.3), torch.tensor([0.0, 1.0]).double())


@pytest.mark.parametrize("x", [images(0, 1, 4, 4), images(1, 4, 4), images(1, 1, 4, 4) * math.nan, [[0.5]], None])
def test_what_are_no_images_is_named(x):
    for use in (lambda: spectrum(x), lambda: share_above(x, 0.1)):
        with pytest.raises(ValueError, match=r"images (hold|have|are)"):
            use()


@pytest.mark.parametrize("frequency", [math.nan, -0.1, "high", None])
def test_a_frequency_that_is_none_is_named(frequency):
    with pytest.raises(ValueError, match="frequency is"):
        share_above(images(1, 1, 4, 4), frequency)


def test_images_with_a_gradient_have_the_same_spectrum():
    x = images(2, 1, 4, 4)
    followed = x.clone().requires_grad_()
    assert spectrum(followed).equals(spectrum(x))
    assert share_above(followed, 0.1).equal(share_above(x, 0.1))


def test_the_mean_is_frequency_zero():
    assert share_above(torch.ones(1, 1, 4, 4), 0).item() == pytest.approx(0, abs=1e-12)
    assert spectrum(torch.ones(2, 1, 4, 4), 3).energy.tolist() == pytest.approx([16, 0, 0])
