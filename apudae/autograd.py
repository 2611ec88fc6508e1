"""Functions whose backward pass is not that of their forward pass: straight-through, recomputed, clipped, sign."""

from collections.abc import Callable

import torch
from torch import Tensor


class StraightThrough(torch.autograd.Function):
    """The value of `purified`, the gradient of `seen` (BPDA)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, seen: Tensor, purified: Tensor) -> Tensor:
        return purified.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, above: Tensor) -> tuple[Tensor, None]:
        return above, None


class Recomputed(torch.autograd.Function):
    """`function(x)`, a tuple, of which the graph keeps only `x`: the backward pass runs it again (checkpointing)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, function: Callable, x: Tensor) -> tuple[Tensor, ...]:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x.detach(), graph=False)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *above: Tensor) -> tuple[None, Tensor]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            outputs = ctx.function(x, graph=True)
        return None, torch.autograd.grad(outputs, x, above)[0]


def clipped(x: Tensor) -> Tensor:
    """`x` in [0, 1]; on the way back as if it were not clipped."""
    return StraightThrough.apply(x, x.detach().clamp(0, 1))


def smooth_sign(gradients: Tensor) -> Tensor:
    """sign(g); on the way back tanh(g / 8s), s the mean of |g| over an image."""
    scale = 8 * gradients.detach().abs().mean((1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradients.dtype).tiny)
    return StraightThrough.apply(torch.tanh(gradients / scale), gradients.detach().sign())
