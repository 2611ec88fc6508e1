"""Purification (section 2.3): gradient steps on the *image* that lower its reconstruction error (Eq. 2)."""

import math
import warnings
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

from ..autograd import Recomputed, StraightThrough, clipped, smooth_sign
from ..batching import CACHE, in_batches
from ..contracts import check_images, check_known, check_modules, check_whole, drawn_seed, frozen
from ..models.autoencoders import check_output, squared_distance
from .config import Backward, PurifyConfig, resolve_config
from .steps import Draws, Moments, Step, affine_matrices, per_image, resampled


def purify(
    dae: nn.Module,
    x: Tensor,
    config: str | PurifyConfig = "A",
    seed: int | torch.Generator = 0,
    ids: Tensor | None = None,
) -> Tensor:
    """Purified images, in [0, 1], of the shape of `x` (n, C, H, W); each image's result depends on itself alone.

    Random variants draw an image's noise from `seed` and from its entry in `ids` (n,), by default its place in `x`: a
    part of the images with its ids has the same noise, bit for bit, whatever is purified beside it.

    `config` is a name in `PRESETS` or a `PurifyConfig`; `steps=0` returns `x` unchanged. Memory does not grow with the
    number of steps. Works under `torch.no_grad`; no gradient comes back (for an attacker's: `Purifier`). Raises
    ValueError for input that breaks the contracts of `apudae`, and for a configuration that needs μ and σ with an
    autoencoder that was never calibrated.
    """
    check_images(x)
    return Purifier(dae, config, seed=seed)(x.detach(), ids)


class Purifier(nn.Module):
    """`purify` as a layer: `nn.Sequential(Purifier(dae, "A"), classifier)` is a classifier that can be attacked.

    `backward` says what an attacker's gradient sees: "none" nothing (the output is detached), "identity" no purifier
    (BPDA, Athalye et al. 2018), "dae" one pass through the autoencoder, "exact" all unrolled steps, with smooth
    stand-ins for sign, Adam's rule and clip on the way back (`LOG.md`: the plain ones mask the gradient). Randomness
    (F, G) is that of `purify` in a call with `ids`; without, each call draws anew, the first as if ids were 0, 1, ….
    Pixels outside [0, 1], where attack libraries may look, are clipped on the way in.
    """

    def __init__(
        self,
        dae: nn.Module,
        config: str | PurifyConfig = "A",
        backward: Backward = "none",
        seed: int | torch.Generator = 0,
    ) -> None:
        super().__init__()
        check_modules(dae)
        check_known("backward", backward, get_args(Backward))
        self.dae, self.config, self.backward = dae, resolve_config(config), backward
        self.seed, self.calls = drawn_seed(seed), 0
        mu, sigma = (getattr(dae, name, math.nan) for name in ("recon_mu", "recon_sigma"))
        if self.config.calibrated and not (math.isfinite(mu) and 0 < sigma < math.inf):
            raise ValueError(
                f"a purifier with {self.config.loss!r}, {self.config.schedule!r} and {self.config.noise_rule!r} (loss, "
                "schedule, noise_rule) needs μ and σ of the reconstruction error, and this autoencoder has none; "
                "measure them with apudae.models.calibrate on held-out training images"
            )

    def extra_repr(self) -> str:
        return f"{self.config}, backward={self.backward!r}"

    def forward(self, x: Tensor, ids: Tensor | None = None) -> Tensor:
        if not check_images(x, bounded=False):
            x = clipped(x)  # attack libraries look there; straight through, so that their way back is not blocked
        if self.backward == "none" and x.requires_grad and torch.is_grad_enabled():
            warnings.warn('this Purifier hides its gradient; for an attack, give backward="exact"', stacklevel=2)
        seed, ids = self._next(x, ids)
        with frozen(self.dae), torch.inference_mode(False):  # gradients of the image are needed in any case
            x = x.clone() if x.is_inference() else x
            if self.backward == "exact" and x.requires_grad and torch.is_grad_enabled():
                return self._purified(x, ids, seed, exact=True)
            once = partial(self._purified, seed=seed, exact=False)
            purified = in_batches(once, x.detach(), ids, batch_size=None, numbers=CACHE).detach()
            if self.backward in ("none", "exact"):
                return purified
            return StraightThrough.apply(x if self.backward == "identity" else self._reconstructed(x), purified)

    def recorded(self, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, list[Step]]:
        """The purified images, all at once and without gradients, and a line for each step that was taken."""
        check_images(x)
        seed, ids = self._next(x, ids)
        lines: list[Step] = []
        with frozen(self.dae), torch.inference_mode(False):
            return self._purified(x.detach().clone(), ids, seed, exact=False, lines=lines).detach(), lines

    def _next(self, x: Tensor, ids: Tensor | None) -> tuple[int, Tensor]:
        """The seed of this call, and the ids of its images."""
        if ids is not None:
            if ids.shape != x.shape[:1] or ids.is_floating_point():
                raise ValueError(f"ids are {ids.dtype} of shape {tuple(ids.shape)}; needed: whole numbers ({len(x)},)")
            return self.seed, ids
        self.calls += self.config.is_random
        return self.seed + max(0, self.calls - 1), torch.arange(len(x), device="cpu")

    def _purified(self, x: Tensor, ids: Tensor, seed: int, *, exact: bool, lines: list[Step] | None = None) -> Tensor:
        """X_pur,0 … X_pur,n of Eq. 2; `lines`, if given, grows by one a step."""
        config = self.config
        if config.steps == 0 and not config.direct:
            return x
        draws = Draws(seed, ids) if config.is_random else None
        if config.direct:
            seen = x if draws is None else x + config.noise_std * draws.drawn(torch.randn, *x.shape[1:]).to(x)
            return check_output(x, self._reconstructed(seen)).clamp(0, 1)
        if config.transforms:  # G: X_pur,0 = t(X_adv, f, θ)
            chance = draws if config.random_transform else None
            x = resampled(x, matrix := affine_matrices(x, config.resize, config.rotation, chance))
        at_rest_for_good = config.loss == "hinge" and config.noise_std == 0
        active = torch.arange(len(x), device=x.device)  # the images that can still move; the others leave the work
        if at_rest_for_good:
            active = active[self._errors(x) > self.dae.recon_mu]
        moments = Moments(x, config.betas) if config.step_rule == "adam" else None
        for step in range(config.steps):
            if config.noise_std > 0 and draws and (step == 0 or config.noise_rule != "once"):  # F: X_pur,i + γ r
                x = self._noisy(x, draws)
            if len(active) == 0:
                break
            errors, gradients = self._errors_and_gradients(x[active], exact=exact)
            slopes, sizes = self._slopes(errors), self._step_sizes(errors)
            if lines is not None:
                lines.append(self._line(x, active, errors, sizes * (slopes != 0), lines))
            moves = slopes != 0
            moving = active[moves]
            if exact and config.loss != "dist":
                sizes = sizes * self._gates(errors)
            gradients = per_image(slopes[moves]) * gradients[moves]
            move = per_image(sizes[moves]) * self._direction(gradients, moving, moments, exact=exact)
            # paper: never clips; here: images stay images
            x = x.index_put((moving,), clipped((x[moving] - move).to(x.dtype)))
            if at_rest_for_good:
                active = moving
        return resampled(x, torch.linalg.inv(matrix)) if config.transform_back else x

    def _reconstructed(self, x: Tensor) -> Tensor:
        """The autoencoder's output. In autocast the layout is channels-last: bfloat16's convolutions are made for it.

        In float32 the layout stays as given: it would change the last bits, and with them signs.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.clone(memory_format=torch.channels_last)  # `contiguous` would leave a single channel as it is
        return self.dae(x)

    @torch.no_grad()
    def _errors(self, x: Tensor) -> Tensor:
        return squared_distance(x, self._reconstructed(x))

    def _errors_and_gradients(self, x: Tensor, *, exact: bool) -> tuple[Tensor, Tensor]:
        """dist of each image and its gradient, from one pass: (n,) and (n, C, H, W).

        For `exact`, the graph keeps the images of the step and not the autoencoder's activations, so that memory grows
        far slower than the number of steps; the backward pass repeats this pass.
        """
        return Recomputed.apply(self._pass, x) if exact and x.requires_grad else self._pass(x.detach(), graph=False)

    def _pass(self, x: Tensor, *, graph: bool) -> tuple[Tensor, Tensor]:
        with torch.enable_grad(), frozen(self.dae):  # the backward pass of an attacker comes after `forward`
            x = x if graph else x.requires_grad_()
            errors = squared_distance(x, self._reconstructed(x))
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

    def _gates(self, errors: Tensor) -> Tensor:
        """1 for each image; on the way back |tanh((dist − μ)/σ)|: an attacker sees that an image near μ soon rests."""
        deviations = (errors - self.dae.recon_mu) / self.dae.recon_sigma
        return StraightThrough.apply(deviations.tanh().abs(), torch.ones_like(errors))

    def _direction(self, gradients: Tensor, moving: Tensor, moments: Moments | None, *, exact: bool) -> Tensor:
        """w_i, scaled so that a step moves a pixel by about α (but for the "gradient" of Eq. 2 itself)."""
        if self.config.step_rule == "gradient":
            return gradients
        if self.config.step_rule == "sign":
            return smooth_sign(gradients) if exact else gradients.sign()
        if self.config.step_rule == "l2":
            norm = per_image(gradients.flatten(1).norm(dim=1)).clamp_min(torch.finfo(gradients.dtype).tiny)
            return gradients / norm * math.sqrt(gradients.shape[1:].numel())
        return moments.updated(gradients, moving)

    def _noisy(self, x: Tensor, draws: Draws) -> Tensor:
        if self.config.noise_rule != "adaptive":
            return clipped(x + self.config.noise_std * draws.drawn(torch.randn, *x.shape[1:]).to(x))
        above = (self._errors(x.detach()) - self.dae.recon_mu) / self.dae.recon_sigma
        scale = self.config.noise_std * per_image(above.clamp(0, 1))
        return clipped(x + scale * (2 * draws.drawn(torch.rand, *x.shape[1:]).to(x) - 1))

    def _line(self, x: Tensor, active: Tensor, errors: Tensor, sizes: Tensor, before: list[Step]) -> Step:
        resting = before[-1].errors if before else self._errors(x)  # of images that have left the work
        filled = resting.index_put((active,), errors.detach())
        return Step(x.detach(), filled, torch.zeros_like(filled).index_put((active,), sizes.detach()))


class MeanOfDraws(Purifier):
    """A random `Purifier` whose image is the mean over `draws` of its noise; not in the paper (cf. Salman et al. 2020).

    The first draw is that of `Purifier` with this seed. ValueError for several draws of what draws nothing.
    """

    def __init__(
        self,
        dae: nn.Module,
        config: str | PurifyConfig,
        draws: int,
        backward: Backward = "none",
        seed: int | torch.Generator = 0,
    ) -> None:
        super().__init__(dae, config, backward, seed)
        check_whole(1, draws=draws)
        if draws > 1 and not self.config.is_random:
            raise ValueError(
                f"draws is {draws}, and nothing is drawn in {self.config}; needed: noise, or a random transform"
            )
        self.draws = draws

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, draws={self.draws}"

    def _next(self, x: Tensor, ids: Tensor | None) -> tuple[int, Tensor]:
        seed, ids = super()._next(x, ids)
        return self.seed + self.draws * (seed - self.seed), ids  # a call takes as many seeds as it has draws

    def _purified(self, x: Tensor, ids: Tensor, seed: int, *, exact: bool, lines: list[Step] | None = None) -> Tensor:
        drawn = super()._purified(x, ids, seed, exact=exact, lines=lines)  # the lines of the first draw
        for number in range(1, self.draws):
            drawn = drawn + super()._purified(x, ids, seed + number, exact=exact)
        return drawn / self.draws
