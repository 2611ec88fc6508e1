"""What holds a network still while it is attacked, and lets it go as it was."""

from contextlib import suppress

import torch
from torch import nn

from apudae.contracts import frozen


def test_a_frozen_network_is_let_go_as_it_was_whatever_comes_between():
    """Libraries switch modes themselves: torchattacks leaves a model training that it was called with in that mode."""
    held, shared = nn.BatchNorm2d(1).eval(), nn.Conv2d(1, 1, 1)
    shared.weight.requires_grad_(False)
    model = nn.Sequential(held, shared, nn.Dropout(), shared)
    with suppress(KeyError), frozen(model, shared):
        assert not any(part.training for part in model.modules())
        assert not any(weight.requires_grad for weight in model.parameters())
        with frozen(model):
            pass
        assert not any(weight.requires_grad for weight in model.parameters())
        model.train()
        raise KeyError
    assert [part.training for part in model.modules()] == [True, False, True, True]
    assert {name for name, weight in model.named_parameters() if not weight.requires_grad} == {"1.weight"}
    assert torch.equal(held.running_mean, torch.zeros(1))
