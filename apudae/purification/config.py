"""How to purify: `PurifyConfig`, and the variants A to G of section 2.3 as presets."""

from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal, get_args

from ..contracts import check_at_least, check_known, check_whole

Loss = Literal["dist", "two_sided", "hinge"]
StepRule = Literal["sign", "adam", "gradient", "l2"]
Schedule = Literal["constant", "error"]
NoiseRule = Literal["normal", "adaptive", "once"]
Backward = Literal["none", "identity", "dae", "exact"]
CHOICES = {"loss": Loss, "step_rule": StepRule, "schedule": Schedule, "noise_rule": NoiseRule}


@dataclass(frozen=True)
class PurifyConfig:
    """How to purify: the parts of Eq. 2 and of the variants of section 2.3. ValueError for parts that contradict.

    - `steps`, `step_size`: n and α, in [0, 1] pixels. `direct`: the autoencoder's output instead of any step.
    - `loss`: "dist" the error itself, "two_sided" |dist − μ|/σ, "hinge" max(dist − μ, 0)/σ.
    - `step_rule`: "sign" moves each pixel by α against the gradient's sign; "adam" by Adam's rule with `betas`;
      "gradient" is Eq. 2 to the letter; "l2" moves by α a pixel in the mean square, along the gradient.
    - `schedule`: "constant" α, or "error": α(1 − exp(−((dist − μ)/σ)²)).
    - `noise_std`: γ, noise before each step; `noise_rule`: "normal" N(0, 1), "adaptive" as in the authors' script, or
      "once" N(0, 1) before the first step alone (not in the paper). With `direct`, which has no rule but "normal", it
      is noise before the one pass, as in Denoised Smoothing (Salman et al. 2020); not in the paper.
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
        if self.rotation > 360 or self.resize > 10:
            raise ValueError(
                f"rotation is {self.rotation:g}, resize {self.resize:g}; needed: up to 360 degrees, tenfold"
            )
        for name, choices in CHOICES.items():
            check_known(name, getattr(self, name), get_args(choices))
        for name in ("random_transform", "transform_back", "direct"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; needed: True or False")
        pair = isinstance(self.betas, tuple | list) and len(self.betas) == 2
        if not pair or not all(isinstance(beta, Real) and 0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas!r}; needed: two numbers of at least 0 and below 1")
        if self.direct and (self.transforms or self.noise_rule != "normal"):
            raise ValueError("direct takes no steps, yet resize, rotation or a noise_rule is given; leave one out")
        if (self.random_transform or self.transform_back) and not self.transforms:
            raise ValueError("random_transform or transform_back is set, but resize is 1 and rotation 0: nothing to do")

    @property
    def transforms(self) -> bool:
        """Whether the image is resized or rotated before the first step."""
        return (self.resize, self.rotation) != (1.0, 0.0)

    @property
    def calibrated(self) -> bool:
        """Whether μ and σ of the autoencoder are needed."""
        plain = (self.loss, self.schedule) == ("dist", "constant") and self.noise_rule != "adaptive"
        return not (self.direct or plain)

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
