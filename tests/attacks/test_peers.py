"""Each attack is at least as strong as foolbox's and torchattacks' of the same name and parameters."""

import peers
import pytest
import torch

import apudae
from apudae.datasets import take
from apudae.evaluation.accuracy import accuracy, predict

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scene():
    x, y = take(apudae.load_dataset("mnist5k", "test"), 500)
    return apudae.load_model("mnist/classifier"), x, y


@pytest.fixture(scope="module")
def reached(scene):
    return {name: attack(*scene) for name, attack in peers.ours().items()}


@pytest.mark.parametrize(
    ("library", "name"),
    [("foolbox", name) for name in ("fgsm", "bim", "pgd", "cw", "deepfool")]
    + [("torchattacks", name) for name in ("fgsm", "r_fgsm", "bim", "pgd", "cw, fixed c", "deepfool")],
)
def test_not_weaker_than(library, name, scene, reached):
    pytest.importorskip(library)
    model, x, y = scene
    if (library, name) == ("torchattacks", "deepfool"):
        x, y = x[:50], y[:50]  # one image at a time: 0.2 s each
    torch.manual_seed(0)
    theirs = getattr(peers, library)()[name](model, x, y).detach()
    mine = reached[name][: len(x)]
    our_accuracy = accuracy(model, mine, y).value
    assert our_accuracy <= accuracy(model, theirs, y).value + 0.01
    if name in peers.UNCLIPPED:
        both = (predict(model, mine) != y) & (predict(model, theirs) != y)
        length = [(images[both] - x[both]).flatten(1).norm(dim=1).mean() for images in (mine, theirs)]
        assert length[0] <= 1.05 * length[1], f"mean L2 {length[0]:.3f}, {library} {length[1]:.3f}"


@pytest.mark.parametrize(("library", "name"), [("foolbox", "bim"), ("foolbox", "l2"), ("torchattacks", "bim")])
def test_targeted_attacks_reach_as_many_as(library, name, scene):
    """Towards the class after the label, in the same steps: as many images arrive."""
    pytest.importorskip(library)
    model, x, y = scene
    x, y = x[:100], y[:100]
    target = (y + 1) % 10
    theirs = peers.targeted(library, name)(model, x, y, target).detach()
    size = {"bim": {"epsilon": 0.2}, "l2": {"epsilon": 2.0, "step_size": 0.2, "steps": 22, "norm": "l2"}}[name]
    attack = apudae.attacks.bim if name == "bim" else apudae.attacks.pgd
    mine = attack(model, x, y, target=target, **size)
    arrived = [(predict(model, images) == target).double().mean() for images in (mine, theirs)]
    assert arrived[1] > 0.2
    assert arrived[0] >= arrived[1] - 0.02
