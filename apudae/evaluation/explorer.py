"""The explorer: controls beside the one image that they attack and purify, live in JupyterLab."""

from html import escape
from time import perf_counter

from ipywidgets import HTML, Dropdown, FileUpload, FloatSlider, HBox, IntSlider, IntText, VBox
from torch import Tensor
from traitlets import Bunch

from ..attacks import PARAMETERS
from ..contracts import check_at_least, check_known, check_whole
from ..datasets import DATASETS, load_dataset, look_up
from ..plots import PALETTE, encoded
from ..purification import PRESETS
from .accuracy import predict
from .scene import Scene, attacked, scene, uploaded, variant
from .study import Study, open_study

READY = [name for name, entry in DATASETS.items() if entry.classifier and entry.dae]  # need no further word


class Explorer(VBox):
    """Controls and view of one image of `study`, or of one's own; the study's ε and α to begin with.

    What a change does not touch is kept: another variant attacks nothing again, another step purifies nothing again.
    Bad input is one sentence. A data set that is chosen here comes with its own networks, ε and α.
    `steps`, `noise_std` of 0: the data set's n, the variant's γ. ValueError for a beginning that cannot be.
    """

    def __init__(
        self,
        study: Study,
        *,
        image: int = 0,
        attack: str = "pgd",
        variant: str = "A",
        steps: int = 0,
        noise_std: float = 0.0,
    ) -> None:
        check_known("attack", attack, ["clean", *PARAMETERS])
        check_known("variant", variant, PRESETS)
        check_whole(0, image=image)
        check_at_least(0, noise_std=noise_std)
        if image >= len(study.y):
            raise ValueError(f"image is {image}; there are {len(study.y)}, counted from 0")
        self.study, self.studies = study, {study.names["dataset"]: study}
        self.scene: Scene | None = None
        self.attacked: dict[tuple, Tensor] = {}
        self.own: tuple[str, Tensor] | None = None  # an uploaded image and its name
        self.setting = False  # while code and not the user sets a control
        at_rest = {"continuous_update": False}  # a slider counts when it is let go
        names = list(dict.fromkeys([*self.studies, *READY]))
        self.dataset = Dropdown(options=names, value=study.names["dataset"], description="data set")
        self.image = IntSlider(image, 0, len(study.y) - 1, description="image", **at_rest)
        self.upload = FileUpload(accept="image/*", description="or your own image", layout={"width": "300px"})
        self.attack = Dropdown(options=["clean", *PARAMETERS], value=attack, description="attack")
        self.epsilon = FloatSlider(description="ε", readout_format=".3f", **at_rest)
        self.variant = Dropdown(options=list(PRESETS), value=variant, description="variant")
        self.steps = IntText(description="n")
        self.step_size = FloatSlider(description="α", readout_format=".4f", **at_rest)
        gamma = noise_std or PRESETS[variant].noise_std
        noise = {"min": 0, "max": max(0.2, gamma), "step": 0.005, "readout_format": ".3f"} | at_rest  # it would clip γ
        self.noise_std = FloatSlider(gamma, description="γ", **noise)
        self.step = IntSlider(description="step i", layout={"width": "600px"})
        self.message, self.view = HTML(), HTML(layout={"min_height": "420px"})
        columns = [
            [self.dataset, self.image, self.upload],
            [self.attack, self.epsilon],
            [self.variant, self.steps, self.step_size, self.noise_std],
        ]
        super().__init__([HBox([VBox(column) for column in columns]), self.step, self.message, self.view])
        self._budget(steps)
        self._make()
        self.message.value = self._shown
        for column in columns:
            for control in column:
                control.observe(self._changed, "value")
        self.step.observe(lambda _: self._draw(), "value")

    def __repr__(self) -> str:  # what stands for it where no kernel runs
        return "The explorer is live in JupyterLab: Run All, then change a control."

    @property
    def _shown(self) -> str:
        return escape(self.own[0] if self.own else f"image {self.image.value} of {self.study.names['dataset']}")

    def _changed(self, change: Bunch) -> None:
        """Make the scene anew, as far as this control needs it; tell how long it took, or why nothing is shown."""
        if self.setting:
            return
        control, self.setting, started = change.owner, True, perf_counter()
        self.message.value = "working …"
        try:
            if control is self.dataset:
                self._open(self.dataset.value)
            if control in (self.dataset, self.variant):
                self.noise_std.value = PRESETS[self.variant.value].noise_std
            if control in (self.dataset, self.image):
                self.own = None
            if control is self.upload:
                (file,) = self.upload.value
                self.upload.value = ()
                self.own = file.name, uploaded(file.name, bytes(file.content), self.study.x)
            self._make()
            self.message.value = f"{self._shown}, after {1000 * (perf_counter() - started):.0f} ms"
        except (ValueError, OSError) as error:
            self.dataset.value = self.study.names["dataset"]
            if self.scene is None:
                self.view.value = ""
            self.message.value = f"<b>{escape(str(error))}</b>"
        finally:
            self.setting = False

    def _open(self, dataset: str) -> None:
        """Go over to another data set."""
        if dataset not in self.studies:
            names = {key: self.study.names[key] for key in ("split", "notebook", "seed")}
            n = min(len(self.study.y), len(load_dataset(dataset, names["split"])))
            self.studies[dataset] = open_study(**names, dataset=dataset, n=n, device=str(self.study.x.device))
        self.study = self.studies[dataset]
        self.image.value, self.image.max = 0, len(self.study.y) - 1
        self._budget()

    def _budget(self, steps: int = 0) -> None:
        """The study's own ε and α, and n."""
        budget = look_up(self.study.names["dataset"]).budget
        self.steps.value = steps or (budget.steps if budget else 15)
        for slider, value in ((self.epsilon, self.study.epsilon), (self.step_size, self.study.step_size)):
            slider.step, slider.max, slider.value = value / 10, 4 * value, value

    def _make(self) -> None:
        study, image, before, self.scene = self.study, self.image.value, self.scene, None
        if self.own is None:
            x, y, self.truth = study.x[image : image + 1], study.y[image : image + 1], "is {}"
        else:
            x, self.truth = self.own[1], "reads {}"  # nobody said what it is: the attack leads away from that
            y = predict(study.classifier, x)
        self.truth = self.truth.format(dict(enumerate(study.classes)).get(y.item(), y.item()))
        key = study.names["dataset"], self.own or image, self.attack.value, self.epsilon.value
        config = variant(self.variant.value, self.steps.value, self.step_size.value, self.noise_std.value)
        if key not in self.attacked:
            self.attacked[key] = attacked(study, x, y, self.attack.value, self.epsilon.value)
        last = before is None or self.step.value == before.steps
        self.scene = scene(study, x, self.attacked[key], config, image)
        self.step.max = self.scene.steps
        if last:
            self.step.value = self.scene.steps
        self._draw()

    def _draw(self) -> None:
        if self.scene is not None:
            self.view.value = drawn(self.scene, self.step.value, self.study, self.epsilon.value, self.truth)


STYLE = """<style>.apudae {display: flex; gap: 12px; margin: 8px 0; line-height: 1.4}
.apudae figure {margin: 0; width: 152px} .apudae img {width: 150px; border: 1px solid #999; image-rendering: pixelated}
.apudae table {width: 180px; font-variant-numeric: tabular-nums} .apudae td {padding: 0 4px; white-space: nowrap}
.apudae td:first-child {max-width: 120px; overflow: hidden; text-overflow: ellipsis}</style>"""


def drawn(scene: Scene, step: int, study: Study, epsilon: float, truth: str) -> str:
    """HTML of a scene at one step: pictures, the path of the errors, the five best labels."""
    positions = {"clean": 0, "attacked": 1, f"step {step}": 2 + step}
    x, x_adv, now = (scene.images[i] for i in positions.values())
    best = {name: scene.best(i, study.classes) for name, i in positions.items()}
    reads = {name: f"reads {next(iter(labels))}" for name, labels in best.items()}
    scale = 2 * max(epsilon, 1 / 255)
    pictures = {
        "clean": (x, truth),
        "attacked": (x_adv, reads["attacked"]),
        "perturbation": (0.5 + (x_adv - x) / scale, "black to white: −ε to ε"),
        f"step {step}": (now, reads[f"step {step}"]),
        "what is left": (0.5 + (now - x) / scale, "black to white: −ε to ε"),
    }
    figures = "".join(
        f'<figure><b>{name}</b><img src="{encoded(image)}" alt="{name}">{escape(text)}</figure>'
        for name, (image, text) in pictures.items()
    )
    labels = "".join(_labels(name, shares) for name, shares in best.items())
    return f'{STYLE}<div class="apudae">{figures}</div><div class="apudae">{_path(scene, step, study)}{labels}</div>'


def _labels(name: str, best: dict[str, float]) -> str:
    rows = "".join(
        f"<tr><td>{escape(label)}<td><meter value={share:.3f}></meter><td>{share:.3f}" for label, share in best.items()
    )
    return f"<div><b>{name}</b><table>{rows}</table></div>"


def _path(scene: Scene, step: int, study: Study) -> str:
    """The reconstruction error from step to step beside μ, a mark at `step`."""
    errors, mu = scene.errors[2:].tolist(), study.recon_mu
    width, height, top = 250, 130, 1.05 * max(*errors, mu)
    places = [(10 + width * i / max(1, scene.steps), height * (1 - error / top)) for i, error in enumerate(errors)]
    points, line = " ".join(f"{a:.1f},{b:.1f}" for a, b in places), height * (1 - mu / top)
    x, y = places[step]
    return f"""<div><b>reconstruction error</b><br>{errors[step]:.3f} at step {step} (clean: {scene.errors[0]:.3f})<br>
<svg width="320" height="{height + 26}" fill="none" stroke="currentColor" font-size="12">
<path d="M10 0 V{height} H{width + 10}"/><path d="M10 {line:.1f} H{width + 10}" stroke-dasharray="2 3"/>
<polyline points="{points}" stroke="{PALETTE[0]}" stroke-width="2"/>
<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{PALETTE[5]}" stroke="none"/><g fill="currentColor" stroke="none">
<text x="{width + 18}" y="{line + 4:.1f}">μ {mu:.3g}</text>
<text x="6" y="{height + 18}">0</text><text x="{width}" y="{height + 18}">{scene.steps}</text></g></svg></div>"""
