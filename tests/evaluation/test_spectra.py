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


def test_the_mean_is_frequency_zero():
    assert share_above(torch.ones(1, 1, 4, 4), 0).item() == pytest.approx(0, abs=1e-12)
    assert spectrum(torch.ones(2, 1, 4, 4), 3).energy.tolist() == pytest.approx([16, 0, 0])
