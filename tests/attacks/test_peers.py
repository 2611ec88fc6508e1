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
    + [("torchattacks", name) for name in ("fgsm", "r_fgsm", "bim", "pgd", "cw", "deepfool")],
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
