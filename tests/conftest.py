"""Shared by the tests: held-out digits, the shipped networks, and small models whose gradients are known."""

import gc

import pytest
import torch
from torch import Tensor, nn

import apudae
from apudae.datasets import take
from apudae.models import DAE, margin


def pytest_collection_finish():
    """What the imports made stays: walking through it again and again took a twentieth of the quick tests' time."""
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _runs_of_its_own():
    """What a test starts writes where it would for a user; the replayed notebooks have APUDAE_RUNS (Makefile)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("APUDAE_RUNS", raising=False)
        yield


@pytest.fixture(scope="session")
def digits():
    """200 held-out digits, 20 of each class, and their labels."""
    return take(apudae.load_dataset("mnist5k", "test"), 200)


@pytest.fixture(scope="module")
def classifier():
    return apudae.load_model("mnist/classifier")


@pytest.fixture(scope="module")
def cnn():
    return apudae.load_model("mnist/cnn")


@pytest.fixture(scope="module")
def dae():
    return apudae.load_model("mnist/dae")


@torch.no_grad()
def margins(model, x, y):
    """How far each image (n,) is from being misread by `model`: negative where it is."""
    return margin(model(x), y)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(*shape, low=0.0, high=1.0, dtype=torch.float32, seed=0):
    """Uniform noise in [low, high] as images."""
    return low + (high - low) * torch.rand(shape, generator=seeded(seed), dtype=dtype)


def linear_classifier(pixels, classes=2, dtype=torch.float32):
    """Logits linear in the image: a sign step is the best step, whatever its size."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes, dtype=dtype))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(classes, pixels, generator=seeded(7), dtype=dtype) / pixels)
        model[1].bias.zero_()
    return model


def tiny_dae(channels=1, depth=4, width=6, dtype=torch.float32):
    """A Fig. 1 autoencoder that changes its input: output layer and batch statistics are not those of a fresh one."""
    model = DAE(channels, depth, width)
    with torch.no_grad():
        model.output.weight.copy_(0.2 * torch.randn(model.output.weight.shape, generator=seeded(1)))
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.fill_(0.1)
                part.running_var.fill_(0.5)
    return model.to(dtype).eval()


class LinearDAE(nn.Module):
    """DAE(x) = x·M on flattened images, so dist(x) = |x(I − M)|² has the gradient 2x(I − M)(I − M)ᵀ."""

    def __init__(self, pixels, dtype=torch.float64):
        super().__init__()
        noise = torch.randn(pixels, pixels, generator=seeded(3), dtype=dtype)
        self.matrix = nn.Parameter(0.5 * torch.eye(pixels, dtype=dtype) + noise / (4 * pixels))
        self.register_buffer("recon_mu", torch.zeros((), dtype=dtype))
        self.register_buffer("recon_sigma", torch.ones((), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) @ self.matrix).view_as(x)

    @property
    def curvature(self) -> Tensor:
        """B with gradient(x) = x·B."""
        rest = torch.eye(len(self.matrix), dtype=self.matrix.dtype) - self.matrix.detach()
        return 2 * rest @ rest.T


def set_gradients(model):
    """Give every weight a gradient, and return what must still be there later: weights, buffers, gradients, modes."""
    for index, weight in enumerate(model.parameters()):
        weight.grad = torch.full_like(weight, index + 0.5)
    return snapshot(model)


def snapshot(model):
    """Everything about `model` that attacks and purifiers must leave alone, as comparable bytes."""
    weights = [(w.requires_grad, w.detach().numpy().tobytes()) for w in model.parameters()]
    gradients = [None if w.grad is None else w.grad.numpy().tobytes() for w in model.parameters()]
    buffers = [buffer.numpy().tobytes() for buffer in model.buffers()]
    return weights, gradients, buffers, [part.training for part in model.modules()]
