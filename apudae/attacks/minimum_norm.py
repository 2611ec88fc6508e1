"""Attacks that look for the shortest perturbation (Appendix B): Carlini and Wagner's, DeepFool."""

import torch
from torch import Tensor, nn

from ..batching import progress
from ..contracts import check_at_least, check_whole, frozen
from ..models.classifiers import margin
from .common import check_attack, check_positive, gradient_of, project, require_gradient


def cw(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    confidence: float = 1e-4,
    steps: int = 1000,
    initial_c: float = 1e-2,
    search_steps: int = 5,
    learning_rate: float = 5e-3,
    target: Tensor | None = None,
) -> Tensor:
    """Carlini and Wagner's L2 attack (2017), clipped to the ε-ball at the end (Eq. 8); unclipped at `epsilon=math.inf`.

    Minimises ‖δ‖² + c·max(z_y − max z_other + confidence, 0) with Adam over w, x_adv = (tanh w + 1) / 2, and finds the
    smallest c for each image by `search_steps` of bisection. An image leaves the work when its loss has not fallen for
    a tenth of `steps`. Images that are already misclassified, or that it cannot fool, come back unchanged. With
    `target` (n,), to fool is to be taken for that class.
    """
    # paper: DeepRobust's parameters; here: its MNIST learning rate 5e-3, because its general 1e-5 does not move
    x = check_attack(model, x, y, epsilon=epsilon, steps=steps, unclipped=True, target=target)
    check_positive(learning_rate=learning_rate, initial_c=initial_c)
    check_whole(1, search_steps=search_steps)
    check_at_least(0, confidence=confidence)
    low, high = torch.zeros_like(x[:, 0, 0, 0]), torch.full_like(x[:, 0, 0, 0], torch.inf)
    c, best, shortest = torch.full_like(low, initial_c), x.clone(), torch.full_like(low, torch.inf)
    with frozen(model):
        todo = torch.nonzero(_above(model(x), y, target) >= 0).flatten()
        for _ in range(search_steps):
            if epsilon == 0 or len(todo) == 0:
                break
            goal = None if target is None else target[todo]
            found, length = _cw_descend(model, x[todo], y[todo], goal, c[todo], confidence, steps, learning_rate)
            shorter = length < shortest[todo]
            best[todo[shorter]], shortest[todo[shorter]] = found[shorter], length[shorter]
            fooled = length.isfinite()
            high[todo[fooled]], low[todo[~fooled]] = c[todo[fooled]], c[todo[~fooled]]
            c = torch.where(high.isfinite(), (low + high) / 2, c * 10)
    return project(best, x, epsilon)


def deepfool(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int = 50,
    overshoot: float = 0.02,
    classes: int = 10,
    target: Tensor | None = None,
) -> Tensor:
    """DeepFool in L2 (Moosavi-Dezfooli et al. 2016), clipped to the ε-ball at the end; unclipped at `epsilon=math.inf`.

    Each step goes to the nearest of the linearised borders to the `classes` likeliest labels, and `overshoot` times
    further in the end. An image leaves the work as soon as its label changes; with `target` (n,), whose border is then
    the only one, as soon as that is its label.
    """
    x = check_attack(model, x, y, epsilon=epsilon, steps=steps, unclipped=True, target=target)
    check_at_least(0, overshoot=overshoot)
    check_whole(2, classes=classes)
    reached, total = x.clone(), torch.zeros_like(x)
    with frozen(model):
        logits = model(x)
        todo = torch.nonzero(_above(logits, y, target) >= 0).flatten()
        rivals = logits.argsort(1, descending=True)[:, 1:classes] if target is None else target[:, None]
        for _ in progress(range(steps), desc="deepfool"):
            if epsilon == 0 or len(todo) == 0:
                break
            total[todo] += _to_nearest_border(model, reached[todo], y[todo], rivals[todo])
            reached[todo] = (x[todo] + (1 + overshoot) * total[todo]).clamp(0, 1)
            goal = None if target is None else target[todo]
            todo = todo[_above(model(reached[todo]), y[todo], goal) >= 0]
    return project(reached, x, epsilon)


def _above(logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    """How far each image (n,) is from being fooled: negative where it is."""
    return margin(logits, y) if target is None else -margin(logits, target)


def _cw_descend(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    target: Tensor | None,
    c: Tensor,
    confidence: float,
    steps: int,
    learning_rate: float,
) -> tuple[Tensor, Tensor]:
    """One run of CW's inner optimisation: the nearest images found that fool, and their L2² (inf where none does)."""
    best, shortest = x.clone(), torch.full_like(c, torch.inf)
    active = torch.arange(len(x), device=x.device)
    w = torch.atanh((2 * x - 1) * (1 - 1e-6))
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    lowest, since = torch.full_like(c, torch.inf), torch.zeros_like(y)
    for step in progress(range(1, steps + 1), desc="cw"):
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            image = (torch.tanh(w) + 1) / 2
            length = (image - x[active]).square().flatten(1).sum(1)
            above = _above(model(image), y[active], None if target is None else target[active])
            loss = length + c[active] * (above + confidence).clamp_min(0)
            total = loss.sum()
        require_gradient(above)
        gradient = gradient_of(total, w)
        with torch.no_grad():
            better = (above < 0) & (length < shortest[active])
            best[active[better]], shortest[active[better]] = image[better], length[better]
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
            unbiased = (second / (1 - 0.999**step)).sqrt() + 1e-8
            w = w - learning_rate * first / (1 - 0.9**step) / unbiased
            fallen = loss < lowest * 0.9999
            lowest, since = torch.where(fallen, loss, lowest), torch.where(fallen, 0, since + 1)
        going = since < max(steps // 10, 10)
        if not going.all():
            active, w, first, second, lowest, since = (t[going] for t in (active, w, first, second, lowest, since))
            if len(active) == 0:
                break
    return best, shortest


def _to_nearest_border(model: nn.Module, x: Tensor, y: Tensor, rivals: Tensor) -> Tensor:
    """DeepFool's step: the smallest L2 move that levels one rival's linearised logit with the label's."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = model(x)
        above = logits.gather(1, rivals) - logits.gather(1, y[:, None])
        gradients = [gradient_of(above[:, k].sum(), x, retain_graph=True) for k in range(rivals.shape[1])]
    slopes = torch.stack(gradients, 1).flatten(2)
    distances = above.detach().abs() / slopes.norm(dim=2).clamp_min(1e-12)
    nearest = distances.argmin(1)
    slope = slopes[torch.arange(len(x), device=x.device), nearest]
    push = distances.gather(1, nearest[:, None]) + 1e-4  # just over the border, as in the original
    return (push * slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-12)).view_as(x)
