"""Purification (section 2.3): a few gradient steps on the *image* that lower its reconstruction error (Eq. 2)."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .contracts import check_at_least, check_images, check_known, frozen
from .dae import squared_distance

StepRule = Literal["sign", "gradient"]
Backward = Literal["none", "identity", "dae", "exact"]


@dataclass(frozen=True)
class PurifyConfig:
    """How to purify. `steps` moves of about `step_size` a pixel; `direct` takes the autoencoder's output instead.

    `step_rule`: "sign" moves every pixel by `step_size` against the gradient's sign; "gradient" is Eq. 2 to the letter.
    """

    steps: int = 15
    step_size: float = 0.01
    step_rule: StepRule = "sign"
    direct: bool = False

    def __post_init__(self) -> None:
        check_at_least(0, steps=self.steps, step_size=self.step_size)
        check_known("step rule", self.step_rule, get_args(StepRule))


PRESETS: dict[str, PurifyConfig] = {
    "direct": PurifyConfig(direct=True),  # X_pur = DAE(X_adv), section 2.2
    # paper: a raw gradient step; here: its sign, because only so a step moves a pixel by about α (Appendix C)
    "A": PurifyConfig(),  # α_i = α, n fixed, β = 0; n = 15 and α = 0.01 are the paper's for MNIST
}


def resolve_config(config: str | PurifyConfig) -> PurifyConfig:
    """The preset of that name, or the configuration itself. ValueError for an unknown name."""
    if isinstance(config, PurifyConfig):
        return config
    check_known("purification preset", config, PRESETS)
    return PRESETS[config]


def purify(dae: nn.Module, x: Tensor, config: str | PurifyConfig = "A") -> Tensor:
    """Purified images, in [0, 1], of the shape of `x` (n, C, H, W); each image's result depends on itself alone.

    `config` is a name in `PRESETS` or a `PurifyConfig`; `steps=0` returns `x` unchanged. Memory does not grow with the
    number of steps. Works under `torch.no_grad`. Raises ValueError for input that breaks the contracts of `apudae`.
    """
    return Purifier(dae, config)(x)


class Purifier(nn.Module):
    """`purify` as a layer: `nn.Sequential(Purifier(dae, "A"), classifier)` is a classifier that can be attacked.

    `backward` says what an attacker's gradient sees: "none" nothing (the output is detached), "identity" no purifier
    (BPDA, Athalye et al. 2018), "dae" one pass through the autoencoder, "exact" all unrolled steps, with
    tanh(g / mean|g|) in place of sign(g) on the way back.
    """

    def __init__(self, dae: nn.Module, config: str | PurifyConfig = "A", backward: Backward = "none") -> None:
        super().__init__()
        check_known("backward", backward, get_args(Backward))
        self.dae, self.config, self.backward = dae, resolve_config(config), backward

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        with frozen(self.dae):
            if self.backward == "exact":
                return self._purified(x, exact=True)
            purified = self._purified(x.detach(), exact=False).detach()
            if self.backward == "none":
                return purified
            return _StraightThrough.apply(x if self.backward == "identity" else self.dae(x), purified)

    def _purified(self, x: Tensor, *, exact: bool) -> Tensor:
        if self.config.direct:
            return self.dae(x).clamp(0, 1)
        for _ in range(self.config.steps):  # Eq. 2 with β = 0
            x = (x - self.config.step_size * self._direction(x, exact=exact)).clamp(0, 1)
        return x

    def _direction(self, x: Tensor, *, exact: bool) -> Tensor:
        with torch.enable_grad():
            x = x if exact and x.requires_grad else x.detach().requires_grad_()
            error = squared_distance(x, self.dae(x)).sum()  # a sum over images: each one's gradient is its own
            (gradient,) = torch.autograd.grad(error, x, create_graph=exact)
        if self.config.step_rule == "gradient":
            return gradient
        return _SmoothSign.apply(gradient) if exact else gradient.sign()


class _StraightThrough(torch.autograd.Function):
    """The value of `purified`, the gradient of `seen` (BPDA)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, seen: Tensor, purified: Tensor) -> Tensor:
        return purified.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, above: Tensor) -> tuple[Tensor, None]:
        return above, None


class _SmoothSign(torch.autograd.Function):
    """sign(g) forward; the derivative of tanh(g / s), s the mean of |g| over an image, backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return gradient.sign()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, above: Tensor) -> Tensor:
        (gradient,) = ctx.saved_tensors
        scale = gradient.abs().mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
        return above * (1 - torch.tanh(gradient / scale).square()) / scale
