"""Attacks of Appendix B: pure functions `attack(model, x, y, *, epsilon, …) -> x_adv`.

Every attack keeps |x_adv − x| ≤ `epsilon` per pixel and x_adv in [0, 1] (up to one rounding of the images' dtype),
leaves the model's weights, gradients and mode alone, keeps device and dtype, and raises ValueError for input that
breaks the contracts of `apudae`. Only gradients of the input are computed. `seed` is an integer or a CPU
`torch.Generator`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .classifiers import margin
from .contracts import as_generator, check_at_least, check_batch, check_whole, frozen

NAMES = ("random", "fgsm", "r_fgsm", "bim", "pgd", "cw", "deepfool")
UNCLIPPED = "_unclipped"  # ending of the names under which CW and DeepFool without the ε-ball are recorded


def _paper(epsilon: float, step_size: float) -> dict[str, dict[str, float | str]]:
    iterated = {"epsilon": epsilon, "step_size": step_size}
    # paper: parameters not said; here: DeepRobust's, which the paper used, but for the learning rate (see `cw`)
    cw = {"confidence": 1e-4, "steps": 1000, "initial_c": 1e-2, "search_steps": 5, "learning_rate": 5e-3}
    deepfool = {"steps": 50, "overshoot": 0.02, "classes": 10}
    ball = {"epsilon": epsilon}
    return {
        "random": ball,
        "fgsm": ball,
        "r_fgsm": ball,
        "bim": iterated,
        "pgd": iterated,
        "cw": ball | cw,
        "deepfool": ball | deepfool,
        "cw" + UNCLIPPED: {"epsilon": math.inf} | cw,
        "deepfool" + UNCLIPPED: {"epsilon": math.inf} | deepfool,
        "autoattack": ball | {"version": "standard"},
        "square": ball | {"queries": 5000},
    }


# The paper's parameters for each data set (sections 3.1 to 3.3, Appendix B), so that one word names an attack;
# AutoAttack and Square, of `apudae.adaptive`, are not in the paper and have their authors' own.
PAPER = {"mnist": _paper(0.1, 0.01), "cifar10": _paper(8 / 255, 1 / 255), "imagenet": _paper(8 / 255, 1 / 255)}
# paper: ε = 8/255 in section 3.3, 5/255 and 25/255 in Table 2; here: all three, the latter by names of their own
PAPER["imagenet"] |= {f"bim_{size}": {"epsilon": size / 255, "step_size": 1 / 255} for size in (5, 25)}


def family(dataset: str) -> str:
    """Whose parameters in `PAPER` attacks on a data set have: by the start of its name; "mnist" for any other."""
    return next((name for name in PAPER if dataset.startswith(name)), "mnist")


def random(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, seed: int | torch.Generator = 0) -> Tensor:
    """Uniform noise in [−epsilon, epsilon] (Eq. 5), clipped to [0, 1]."""
    x = check_attack(model, x, y, epsilon=epsilon)
    return (x + _uniform(x, epsilon, seed)).clamp(0, 1)


def fgsm(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float) -> Tensor:
    """Fast gradient sign method (Eq. 6): one step of `epsilon` along the sign of the loss gradient."""
    x = check_attack(model, x, y, epsilon=epsilon)
    with frozen(model):
        return _ascend(model, x, y, x, epsilon, epsilon)


def r_fgsm(model: nn.Module, x: Tensor, y: Tensor, *, epsilon: float, seed: int | torch.Generator = 0) -> Tensor:
    """FGSM after a random step: x + ε/2·sign(noise), then FGSM of the other half (Tramèr et al. 2018)."""
    x = check_attack(model, x, y, epsilon=epsilon)
    # paper: not defined; here: Tramèr et al. with α = ε/2, total ε, because the authors' script leaves the ball
    start = (x + epsilon / 2 * _normal_sign(x, seed)).clamp(0, 1)
    with frozen(model):
        return _ascend(model, x, y, start, epsilon / 2, epsilon)


def bim(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    start: Tensor | None = None,
    *,
    epsilon: float,
    step_size: float = 0.01,
    steps: int | None = None,
) -> Tensor:
    """Basic iterative method (Eq. 7): sign steps of `step_size`, projected each time; ⌊2ε/α + 2⌋ `steps` by default.

    From `x`, or from the images `start`, which another attack has found.
    """
    x = check_attack(model, x, y, epsilon=epsilon, step_size=step_size, steps=steps)
    start = x if start is None else project(start, x, epsilon)
    with frozen(model):
        return iterate(model, x, y, start, epsilon, step_size, default_steps(epsilon, step_size, steps))


bim_5 = bim_25 = bim  # Table 2's two budgets, in 1/255


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    step_size: float = 0.01,
    steps: int | None = None,
    restarts: int = 1,
    seed: int | torch.Generator = 0,
) -> Tensor:
    """BIM from a uniform random start (Madry et al. 2018); of `restarts` runs, each image keeps its highest loss."""
    x = check_attack(model, x, y, epsilon=epsilon, step_size=step_size, steps=steps)
    check_whole(1, restarts=restarts)
    generator = as_generator(seed)
    steps = default_steps(epsilon, step_size, steps)
    best, highest = x, torch.full_like(y, -torch.inf, dtype=x.dtype)
    with frozen(model):
        for _ in range(restarts):
            start = (x + _uniform(x, epsilon, generator)).clamp(0, 1)
            reached = iterate(model, x, y, start, epsilon, step_size, steps)
            with torch.no_grad():
                loss = F.cross_entropy(model(reached), y, reduction="none")
            better = loss > highest
            highest = torch.where(better, loss, highest)
            best = torch.where(better[:, None, None, None], reached, best)
    return best


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
) -> Tensor:
    """Carlini and Wagner's L2 attack (2017), clipped to the ε-ball at the end (Eq. 8); unclipped at `epsilon=math.inf`.

    Minimises ‖δ‖² + c·max(z_y − max z_other + confidence, 0) with Adam over w, x_adv = (tanh w + 1) / 2, and finds the
    smallest c for each image by `search_steps` of bisection. An image leaves the work when its loss has not fallen for
    a tenth of `steps`. Images that are already misclassified, or that it cannot fool, come back unchanged.
    """
    # paper: DeepRobust's parameters; here: its MNIST learning rate 5e-3, because its general 1e-5 does not move
    sizes = {"learning_rate": learning_rate, "initial_c": initial_c}
    x = check_attack(model, x, y, epsilon=epsilon, steps=steps, unclipped=True, **sizes)
    check_whole(1, search_steps=search_steps)
    check_at_least(0, confidence=confidence)
    low, high = torch.zeros_like(x[:, 0, 0, 0]), torch.full_like(x[:, 0, 0, 0], torch.inf)
    c, best, shortest = torch.full_like(low, initial_c), x.clone(), torch.full_like(low, torch.inf)
    with frozen(model):
        todo = torch.nonzero(model(x).argmax(1) == y).flatten()
        for _ in range(search_steps):
            if epsilon == 0 or len(todo) == 0:
                break
            found, length = _cw_descend(model, x[todo], y[todo], c[todo], confidence, steps, learning_rate)
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
) -> Tensor:
    """DeepFool in L2 (Moosavi-Dezfooli et al. 2016), clipped to the ε-ball at the end; unclipped at `epsilon=math.inf`.

    Each step goes to the nearest of the linearised borders to the `classes` likeliest labels, and `overshoot` times
    further in the end. An image leaves the work as soon as its label changes.
    """
    x = check_attack(model, x, y, epsilon=epsilon, steps=steps, unclipped=True)
    check_at_least(0, overshoot=overshoot)
    check_whole(2, classes=classes)
    reached, total = x.clone(), torch.zeros_like(x)
    with frozen(model):
        logits = model(x)
        todo = torch.nonzero(logits.argmax(1) == y).flatten()
        rivals = logits.argsort(1, descending=True)[:, 1:classes]
        for _ in tqdm(range(steps), desc="deepfool", delay=2, leave=False):
            if epsilon == 0 or len(todo) == 0:
                break
            total[todo] += _to_nearest_border(model, reached[todo], y[todo], rivals[todo])
            reached[todo] = (x[todo] + (1 + overshoot) * total[todo]).clamp(0, 1)
            todo = todo[model(reached[todo]).argmax(1) == y[todo]]
    return project(reached, x, epsilon)


def project(moved: Tensor, x: Tensor, epsilon: float) -> Tensor:
    """`moved` clipped to the ε-ball around `x` and to [0, 1]: Π of Eq. 7, clip of Eq. 8."""
    return torch.clamp(moved, x - epsilon, x + epsilon).clamp(0, 1)


def check_attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    epsilon: float,
    steps: int | None = None,
    unclipped: bool = False,
    **positive: float,
) -> Tensor:
    """The images, detached, once all arguments of an attack are found sound."""
    if not (unclipped and epsilon == math.inf):
        check_at_least(0, epsilon=epsilon)
    check_batch(model, x, y)
    if steps is not None:
        check_whole(1, steps=steps)
    for name, value in positive.items():
        check_at_least(0, **{name: value})
        if value == 0:
            raise ValueError(f"{name} is 0; needed: a positive number")
    return x.detach()


def default_steps(epsilon: float, step_size: float, steps: int | None) -> int:
    """`steps`, or BIM's ⌊2ε/α + 2⌋ for None."""
    return int(2 * epsilon / step_size + 2 + 1e-9) if steps is None else steps


def _uniform(x: Tensor, epsilon: float, seed: int | torch.Generator) -> Tensor:
    return ((2 * torch.rand(x.shape, generator=as_generator(seed)) - 1) * epsilon).to(x)


def _normal_sign(x: Tensor, seed: int | torch.Generator) -> Tensor:
    return (torch.rand(x.shape, generator=as_generator(seed)) - 0.5).sign().to(x)  # the sign of N(0, 1) noise


def iterate(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, epsilon: float, step_size: float, steps: int
) -> Tensor:
    """The loop of BIM and PGD alone, from `start` within the ε-ball around `x`: nothing checked, `model` not frozen."""
    for _ in range(steps):
        start = _ascend(model, x, y, start, step_size, epsilon)
    return start


def _ascend(model: nn.Module, x: Tensor, y: Tensor, at: Tensor, step_size: float, epsilon: float) -> Tensor:
    """One sign step up the cross-entropy from `at`, projected to the ball around `x` and to [0, 1]."""
    at = at.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(model(at), y, reduction="sum")
    gradient = _gradient(loss, at)
    return project(at.detach() + step_size * gradient.sign(), x, epsilon)


def _gradient(loss: Tensor, of: Tensor, *, retain_graph: bool = False) -> Tensor:
    _require_gradient(loss)
    return torch.autograd.grad(loss, of, retain_graph=retain_graph)[0]


def _require_gradient(output: Tensor) -> None:
    if not output.requires_grad:
        raise ValueError(
            "the model gives no gradient with respect to its input; needed for this attack: a differentiable model "
            '(a Purifier hides its gradient unless backward is "identity", "dae" or "exact")'
        )


def _cw_descend(
    model: nn.Module, x: Tensor, y: Tensor, c: Tensor, confidence: float, steps: int, learning_rate: float
) -> tuple[Tensor, Tensor]:
    """One run of CW's inner optimisation: the nearest images found that fool, and their L2² (inf where none does)."""
    best, shortest = x.clone(), torch.full_like(c, torch.inf)
    active = torch.arange(len(x), device=x.device)
    w = torch.atanh((2 * x - 1) * (1 - 1e-6))
    first, second = torch.zeros_like(w), torch.zeros_like(w)
    lowest, since = torch.full_like(c, torch.inf), torch.zeros_like(y)
    for step in tqdm(range(1, steps + 1), desc="cw", delay=2, leave=False):
        with torch.enable_grad():
            w = w.detach().requires_grad_()
            image = (torch.tanh(w) + 1) / 2
            length = (image - x[active]).square().flatten(1).sum(1)
            above = margin(model(image), y[active])
            loss = length + c[active] * (above + confidence).clamp_min(0)
            total = loss.sum()
        _require_gradient(above)
        (gradient,) = torch.autograd.grad(total, w)
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
        gradients = [_gradient(above[:, k].sum(), x, retain_graph=True) for k in range(rivals.shape[1])]
    slopes = torch.stack(gradients, 1).flatten(2)
    distances = above.detach().abs() / slopes.norm(dim=2).clamp_min(1e-12)
    nearest = distances.argmin(1)
    slope = slopes[torch.arange(len(x), device=x.device), nearest]
    push = distances.gather(1, nearest[:, None]) + 1e-4  # just over the border, as in the original
    return (push * slope / slope.norm(dim=1, keepdim=True).clamp_min(1e-12)).view_as(x)
