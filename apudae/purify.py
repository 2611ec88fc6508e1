"""Purification (section 2.3): a few gradient steps on the *image* that lower its reconstruction error (Eq. 2)."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from .contracts import as_generator, check_at_least, check_images, check_known, check_whole, frozen
from .dae import squared_distance
from .parts import (
    Draws,
    Moments,
    Recomputed,
    StraightThrough,
    affine_matrices,
    clipped,
    in_halves,
    per_image,
    resampled,
    smooth_sign,
)

Loss = Literal["dist", "two_sided", "hinge"]
StepRule = Literal["sign", "adam", "gradient", "l2"]
Schedule = Literal["constant", "error"]
NoiseRule = Literal["normal", "adaptive"]
Backward = Literal["none", "identity", "dae", "exact"]
AT_A_TIME = {"cpu": 2**16, "cuda": 2**24}  # numbers in a part: what CPU caches like, 83 digits, 21 images of 32×32
CHOICES = {"loss": Loss, "step_rule": StepRule, "schedule": Schedule, "noise_rule": NoiseRule}


@dataclass(frozen=True)
class PurifyConfig:
    """How to purify: the parts of Eq. 2 and of the variants of section 2.3. ValueError for parts that contradict.

    - `steps`, `step_size`: n and α, in [0, 1] pixels. `direct`: the autoencoder's output instead of any step.
    - `loss`: "dist" the error itself, "two_sided" |dist − μ|/σ, "hinge" max(dist − μ, 0)/σ.
    - `step_rule`: "sign" moves each pixel by α against the gradient's sign; "adam" by Adam's rule with `betas`;
      "gradient" is Eq. 2 to the letter; "l2" moves by α a pixel in the mean square, along the gradient.
    - `schedule`: "constant" α, or "error": α(1 − exp(−((dist − μ)/σ)²)).
    - `noise_std`: γ, noise before each step: "normal" N(0, 1), or "adaptive" as in the authors' script. With `direct`,
      noise before the one pass, as in Denoised Smoothing (Salman et al. 2020); not in the paper.
    - `resize`, `rotation`: factor and degrees of the transform before the first step; `random_transform` draws both
      uniformly between no change and so much either way; `transform_back` undoes it after the last step.
    """

    steps: int = 15
    step_size: float = 0.01
    loss: Loss = "dist"
    step_rule: StepRule = "sign"
    schedule: Schedule = "constant"
    betas: tuple[float, float] = (0.9, 0.999)
    noise_std: float = 0.0
    noise_rule: NoiseRule = "normal"
    resize: float = 1.0
    rotation: float = 0.0
    random_transform: bool = False
    transform_back: bool = False
    direct: bool = False

    def __post_init__(self) -> None:
        check_whole(0, steps=self.steps)
        check_at_least(0, step_size=self.step_size, noise_std=self.noise_std)
        check_at_least(0.01, resize=self.resize)
        check_at_least(-360, rotation=self.rotation)
        for name, choices in CHOICES.items():
            check_known(name, getattr(self, name), get_args(choices))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas!r}; needed: two numbers of at least 0 and below 1")
        if self.direct and (self.transforms or self.noise_rule == "adaptive"):
            raise ValueError("direct takes no steps, yet resize, rotation or adaptive noise is given; leave one out")
        if (self.random_transform or self.transform_back) and not self.transforms:
            raise ValueError("random_transform or transform_back is set, but resize is 1 and rotation 0: nothing to do")

    @property
    def transforms(self) -> bool:
        """Whether the image is resized or rotated before the first step."""
        return (self.resize, self.rotation) != (1.0, 0.0)

    @property
    def calibrated(self) -> bool:
        """Whether μ and σ of the autoencoder are needed."""
        return not self.direct and (self.loss, self.schedule, self.noise_rule) != ("dist", "constant", "normal")

    @property
    def has_memory(self) -> bool:
        """Whether n steps differ from some of them and then, from where these end, the rest."""
        return self.direct or self.is_random or self.transforms or self.step_rule == "adam"

    @property
    def is_random(self) -> bool:
        """Whether two runs with different seeds differ."""
        return self.noise_std > 0 or self.random_transform


# Section 2.3, with the paper's n and α for MNIST (section 3.1); `dataclasses.replace` for others.
PRESETS: dict[str, PurifyConfig] = {
    # section 2.2: X_pur = DAE(X_adv)
    "direct": PurifyConfig(direct=True),
    # α_i = α, n fixed, β = 0
    # paper: a raw gradient step; here: its sign, because only so a step moves a pixel by about α (Appendix C)
    "A": PurifyConfig(),
    # A with Adam
    "B": PurifyConfig(step_rule="adam"),
    # B with α_i = α(1 − exp(−((dist − μ)/σ)²))
    # paper: X in place of dist; here: dist(x_i), because μ and σ are those of the error
    "C": PurifyConfig(step_rule="adam", schedule="error"),
    # B on L = |dist − μ|/σ
    # paper: prints E's formula; here: two-sided, because the text of E says that D raises small errors
    "D": PurifyConfig(step_rule="adam", loss="two_sided"),
    # B on L = max(dist − μ, 0)/σ: an image at or under μ stays untouched
    "E": PurifyConfig(step_rule="adam", loss="hinge"),
    # E with γ·N(0, I) added before each step; γ here, f and θ below: chosen on held-out digits (notebooks 14, 15)
    "F": PurifyConfig(step_rule="adam", loss="hinge", noise_std=0.02),
    # E from a resized and rotated start
    "G": PurifyConfig(step_rule="adam", loss="hinge", resize=1.06, rotation=15.0, random_transform=True),
}


def resolve_config(config: str | PurifyConfig) -> PurifyConfig:
    """The preset of that name, or the configuration itself. ValueError for an unknown name."""
    if isinstance(config, PurifyConfig):
        return config
    check_known("purification preset", config, PRESETS)
    return PRESETS[config]


def preset(name: str, steps: int, step_size: float, noise_std: float = 0.0) -> PurifyConfig | None:
    """The preset `name` with these n and α ("direct" has neither) and, above 0, γ; None for "none", no purifier."""
    if name == "none":
        return None
    config = resolve_config(name)
    config = config if config.direct else replace(config, steps=steps, step_size=step_size)
    return replace(config, noise_std=noise_std) if noise_std else config


def purify(dae: nn.Module, x: Tensor, config: str | PurifyConfig = "A", seed: int | torch.Generator = 0) -> Tensor:
    """Purified images, in [0, 1], of the shape of `x` (n, C, H, W); each image's result depends on itself alone.

    `config` is a name in `PRESETS` or a `PurifyConfig`; `steps=0` returns `x` unchanged. Memory does not grow with the
    number of steps. Works under `torch.no_grad`. Raises ValueError for input that breaks the contracts of `apudae`, and
    for a configuration that needs μ and σ with an autoencoder that was never calibrated.
    """
    return Purifier(dae, config, seed=seed)(x)


class Step(NamedTuple):
    """One line of a trajectory: images before the step, their errors (n,), and the α of the step (n,), 0 at rest."""

    images: Tensor
    errors: Tensor
    step_sizes: Tensor


def trajectory(
    dae: nn.Module, x: Tensor, config: str | PurifyConfig = "A", seed: int | torch.Generator = 0
) -> list[Step]:
    """Every step of `purify`, and the end with step sizes 0: `steps` + 1 lines, however early all images rest."""
    check_images(x)
    purifier = Purifier(dae, config, seed=seed)
    paths = [_path(purifier, part) for part in purifier.parts(x)]  # as `purify` does, bit for bit
    return [Step(*map(torch.cat, zip(*steps, strict=True))) for steps in zip(*paths, strict=True)]


def _path(purifier: "Purifier", x: Tensor) -> list[Step]:
    purifier.record = lines = []
    purified = purifier(x)
    with torch.no_grad(), frozen(purifier.dae):
        errors = squared_distance(purified, purifier.dae(purified))
    end = Step(purified, errors, torch.zeros_like(errors))
    return lines + [end] * (1 if purifier.config.direct else purifier.config.steps + 1 - len(lines))


class Purifier(nn.Module):
    """`purify` as a layer: `nn.Sequential(Purifier(dae, "A"), classifier)` is a classifier that can be attacked.

    `backward` says what an attacker's gradient sees: "none" nothing (the output is detached), "identity" no purifier
    (BPDA, Athalye et al. 2018), "dae" one pass through the autoencoder, "exact" all unrolled steps, with smooth
    stand-ins for sign, Adam's rule and clip on the way back (`LOG.md`: the plain ones mask the gradient). Randomness
    (F, G) goes on from call to call.
    """

    def __init__(
        self,
        dae: nn.Module,
        config: str | PurifyConfig = "A",
        backward: Backward = "none",
        seed: int | torch.Generator = 0,
    ) -> None:
        super().__init__()
        check_known("backward", backward, get_args(Backward))
        self.dae, self.config, self.backward = dae, resolve_config(config), backward
        self.generator, self.record = as_generator(seed), None
        if self.config.calibrated and not math.isfinite(getattr(dae, "recon_mu", math.nan)):
            raise ValueError(
                f"{self.config} needs μ and σ of the reconstruction error, and this autoencoder has none; "
                "measure them with apudae.dae.calibrate on held-out training images"
            )

    def extra_repr(self) -> str:
        return f"{self.config}, backward={self.backward!r}"  # `evaluate.run_attack` knows kept images by it

    def forward(self, x: Tensor) -> Tensor:
        check_images(x)
        with frozen(self.dae), torch.inference_mode(False):  # gradients of the image are needed in any case
            x = x.clone() if x.is_inference() else x
            if self.backward == "exact" and x.requires_grad and torch.is_grad_enabled():
                return self._purified(x, exact=True)
            purified = self._fitting(x.detach()).detach()
            if self.backward in ("none", "exact"):
                return purified
            return StraightThrough.apply(x if self.backward == "identity" else self.dae(x), purified)

    def _fitting(self, x: Tensor) -> Tensor:
        """`_purified` without gradients, in parts; one that is too large for the memory is halved and tried again."""
        purified = partial(self._purified, exact=False)
        if self.record is not None:
            return purified(x)
        return torch.cat([in_halves(purified, part, generator=self.generator) for part in self.parts(x)])

    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """`x` in the parts that are purified at a time."""
        return x.split(max(1, AT_A_TIME.get(x.device.type, 2**24) // max(1, x.shape[1:].numel())))

    def _purified(self, x: Tensor, *, exact: bool) -> Tensor:
        """X_pur,0 … X_pur,n of Eq. 2."""
        config = self.config
        if config.steps == 0 and not config.direct:
            return x
        draws = Draws(len(x), self.generator) if config.is_random else None
        if config.direct:
            return self.dae(x if draws is None else x + config.noise_std * draws.normal(x)).clamp(0, 1)
        if config.transforms:  # G: X_pur,0 = t(X_adv, f, θ)
            chance = draws if config.random_transform else None
            x = resampled(x, matrix := affine_matrices(x, config.resize, config.rotation, chance))
        at_rest_for_good = config.loss == "hinge" and config.noise_std == 0
        active = torch.arange(len(x), device=x.device)  # the images that can still move; the others leave the work
        if at_rest_for_good:
            active = active[self._errors(x) > self.dae.recon_mu]
        moments = Moments(x, config.betas) if config.step_rule == "adam" else None
        for _ in range(config.steps):
            if config.noise_std > 0:  # F: X_pur,i + γ r
                x = self._noisy(x, draws)
            if len(active) == 0:
                break
            errors, gradients = self._errors_and_gradients(x[active], exact=exact)
            slopes, sizes = self._slopes(errors), self._step_sizes(errors)
            if self.record is not None:
                self._remember(x, active, errors, sizes * (slopes != 0))
            moves = slopes != 0
            moving = active[moves]
            gradients = per_image(slopes[moves]) * gradients[moves]
            step = per_image(sizes[moves]) * self._direction(gradients, moving, moments, exact=exact)
            x = x.index_put((moving,), clipped(x[moving] - step))  # paper: never clips; here: images stay images
            if at_rest_for_good:
                active = moving
        return resampled(x, torch.linalg.inv(matrix)) if config.transform_back else x

    @torch.no_grad()
    def _errors(self, x: Tensor) -> Tensor:
        return squared_distance(x, self.dae(x))

    def _errors_and_gradients(self, x: Tensor, *, exact: bool) -> tuple[Tensor, Tensor]:
        """dist of each image and its gradient, from one pass: (n,) and (n, C, H, W).

        For `exact`, the graph keeps the images of the step and not the autoencoder's activations, so that memory grows
        far slower than the number of steps; the backward pass repeats this pass.
        """
        return Recomputed.apply(self._pass, x) if exact and x.requires_grad else self._pass(x.detach(), graph=False)

    def _pass(self, x: Tensor, *, graph: bool) -> tuple[Tensor, Tensor]:
        with torch.enable_grad(), frozen(self.dae):  # the backward pass of an attacker comes after `forward`
            x = x if graph else x.requires_grad_()
            errors = squared_distance(x, self.dae(x))
            (gradients,) = torch.autograd.grad(errors.sum(), x, create_graph=graph)  # of a sum: each image its own
        return (errors if graph else errors.detach()), gradients

    def _slopes(self, errors: Tensor) -> Tensor:
        """dL/d dist for each image: 0 where it is to stay."""
        if self.config.loss == "dist":
            return torch.ones_like(errors)
        above = (errors - self.dae.recon_mu).detach()
        signs = above.sign() if self.config.loss == "two_sided" else (above > 0).to(errors)
        return signs / self.dae.recon_sigma

    def _step_sizes(self, errors: Tensor) -> Tensor:
        """α_i for each image."""
        if self.config.schedule == "constant":
            return torch.full_like(errors, self.config.step_size)
        deviations = (errors - self.dae.recon_mu) / self.dae.recon_sigma
        return self.config.step_size * (1 - torch.exp(-deviations.square()))

    def _direction(self, gradients: Tensor, moving: Tensor, moments: Moments | None, *, exact: bool) -> Tensor:
        """w_i, scaled so that a step moves a pixel by about α (but for the "gradient" of Eq. 2 itself)."""
        if self.config.step_rule == "gradient":
            return gradients
        if self.config.step_rule == "sign":
            return smooth_sign(gradients) if exact else gradients.sign()
        if self.config.step_rule == "l2":
            norm = per_image(gradients.flatten(1).norm(dim=1)).clamp_min(torch.finfo(gradients.dtype).tiny)
            return gradients / norm * math.sqrt(gradients[0].numel()) if len(gradients) else gradients
        return moments.updated(gradients, moving)

    def _noisy(self, x: Tensor, draws: Draws) -> Tensor:
        if self.config.noise_rule == "normal":
            return clipped(x + self.config.noise_std * draws.normal(x))
        above = (self._errors(x.detach()) - self.dae.recon_mu) / self.dae.recon_sigma
        scale = self.config.noise_std * per_image(above.clamp(0, 1))
        return clipped(x + scale * (2 * draws.uniform(x) - 1))

    def _remember(self, x: Tensor, active: Tensor, errors: Tensor, sizes: Tensor) -> None:
        kept = self.record[-1].errors if self.record else self._errors(x)
        filled = kept.index_put((active,), errors.detach())
        self.record.append(Step(x.detach(), filled, torch.zeros_like(filled).index_put((active,), sizes.detach())))
