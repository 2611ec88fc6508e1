"""What a notebook works with: images, labels, networks, attacked images that are made where they are missing, rows."""

import math
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from ..attacks import attack_settings, name_among, parse_spec, project
from ..checkpoints import load_model
from ..contracts import check_at_least, check_device
from ..datasets import load_dataset, look_up, stack, take
from ..files import ROOT, fingerprint, load_tensors, locked, run_folder, save_tensors
from ..models import calibrate
from ..models.autoencoders import with_calibration
from ..purification import PurifyConfig, Step, trajectory
from .accuracy import Accuracy, captions, predict
from .grid import purified_rows, run_attack
from .results import Stopwatch, record, result_row


@dataclass
class Study:
    """Made by `open_study`. `names` are of data set, split, classifier, dae: the facts of every row."""

    x: Tensor
    y: Tensor
    classes: list[str]
    noun: str
    classifier: nn.Module
    dae: nn.Module | None
    names: dict[str, Any]
    settings: dict[str, dict[str, Any]]
    epsilon: float
    step_size: float
    attacked: dict[str, Tensor]
    seconds: dict[str, float]
    folder: Path
    path: Path

    def __str__(self) -> str:
        return f"{len(self.y):,} {self.names['split']} {self.noun} of {self.names['dataset']}"

    def run(self, attack: str, model: nn.Module, n: int | None = None, **more: Any) -> Tensor:
        """`attack` on `model`, such as another classifier, on the first `n` images, with the settings of that name."""
        name, options = parse_spec(attack)[0], self.setting(attack) | {"keep": self.folder / "adversarial"} | more
        return run_attack(name, model, self.x[:n], self.y[:n], **{"seed": self.names["seed"]} | options)

    def setting(self, attack: str) -> dict[str, Any]:
        """The parameters of an attack, such as "bim" or "bim@5/255", on this data set."""
        if attack not in self.settings:
            self.settings |= attack_settings(self.names["dataset"], [attack], self.epsilon)
        return self.settings[attack]

    def purified(
        self,
        configs: dict[str, PurifyConfig | nn.Module | None],
        attacked: dict[str, Tensor] | None = None,
        parameters: dict[str, dict] | None = None,
        **options: Any,
    ) -> tuple[dict[tuple[str, str], Tensor], list[dict]]:
        """`grid.purified_rows` of these images (by default all attacked ones) before this classifier."""
        attacked = self.attacked if attacked is None else attacked
        settings = dict(parameters or {})
        settings |= {name: self.setting(name) for name in attacked if name not in settings}
        options = {"parameters": settings, **self.names, **options}
        return purified_rows(self.classifier, self.dae, attacked, self.y, configs, **options)

    def row(self, measured: Accuracy, attack: str, **facts: Any) -> dict:
        """`results.result_row` of this study."""
        if "attack_parameters" not in facts:
            facts["attack_parameters"] = self.setting(attack)
        about = {"device": self.x.device, "attack": parse_spec(attack)[0]}
        return result_row(measured, **{**self.names, **about, **facts})

    def follow(self, config: PurifyConfig, attacks: Sequence[str], n: int) -> dict[str, list[Step]]:
        """Every step of `config` on the first `n` images under each attack, with the noise of `purified`."""
        seed = self.names["seed"]
        return {attack: trajectory(self.dae, self.attacked[attack][:n], config, seed) for attack in attacks}

    def strip(self, attack: str, purified: Tensor, purifier: str, **between: Tensor) -> tuple[dict, dict]:
        """For `plots.image_strip`: five images that the attack changed, those first that `purified` did not save.

        Below each stands the true label and what the classifier reads; the last column is what is left, × 10. Images
        `between` attacked and purified ones are columns of that name.
        """
        clean, before, y = self.x[: len(purified)], self.attacked[attack][: len(purified)], self.y[: len(purified)]
        fooled, failed = (predict(self.classifier, images) != y for images in (before, purified))
        chosen = (fooled.int() + failed.int()).argsort(descending=True, stable=True)[:5].cpu()
        columns = {"clean": clean, attack.upper(): before, **between, purifier: purified}
        shown = {name: images[chosen] for name, images in columns.items()}
        read = {name: captions(self.classifier, images, self.classes) for name, images in shown.items()}
        read["clean"] = [f"is {self.classes[label]}" for label in y[chosen].tolist()]
        return shown | {"left × 10": 0.5 + 10 * (shown[purifier] - shown["clean"])}, read

    @property
    def iterated(self) -> str:
        """The strongest iterated attack that there is, for figures: PGD, BIM, else the last. ValueError for none."""
        attacks = [name for name in self.attacked if name != "clean"]
        if not attacks:
            raise ValueError("there are clean images alone; needed: an attack, such as attacks = ['pgd']")
        return next(name for name in ["pgd", "bim", *reversed(attacks)] if name in attacks)

    @property
    def recon_mu(self) -> float:
        """μ, the mean reconstruction error of clean held-out training images."""
        return self.dae.recon_mu.item()

    @property
    def standard(self) -> bool:
        """Whether this is the setting whose outcome is known: 50 digits or more, the data set's own networks and ε."""
        entry = look_up(self.names["dataset"])
        own = self.names["classifier"] == entry.classifier and self.names["dae"] in ("", entry.dae)
        return own and entry.noun == "digits" and len(self.y) >= 50 and self.epsilon == entry.budget.epsilon

    def expect(self, holds: bool, sentence: str) -> None:
        """AssertionError, saying `sentence`, unless it `holds`; in another than the standard setting a warning."""
        if self.standard:
            assert holds, sentence
        elif not holds:
            warnings.warn(f"not so in this setting: {sentence}", stacklevel=2)

    def record(self, rows: Iterable[dict]) -> pd.DataFrame:
        """Write `rows` to this study's CSV file; they come back as a table."""
        rows = list(rows)
        return record(self.path, rows).tail(len(rows))


def open_study(
    notebook: str,
    *,
    dataset: str,
    n: int,
    split: str = "test",
    classifier: str = "",
    dae: str | None = "",
    attacks: Sequence[str] = (),
    epsilon: float = 0.0,
    step_size: float = 0.0,
    parameters: dict[str, dict[str, Any]] | None = None,
    seed: int = 0,
    device: str = "cpu",
    run: str = "default",
    results: str = "",
    table: str = "purified.csv",
) -> Study:
    """`n` images of a data set, the networks, and the images under `attacks`, on `device`.

    Empty names, ε and α (`step_size`) of 0 are the data set's own; with `dae` None there is no autoencoder, and without
    `attacks` a set that has no ε needs none.
    "clean" comes first, asked for or not; an attack that names the study's own ε, as "bim@0.1" may, is "bim".
    `parameters` change those of the attacks that they name. Attacked images are made where they are missing, kept in
    data/runs/<run>/attacked/, and reused by every notebook of the run that asks for them, or for fewer. Rows go to
    `results`, relative to the repository, or to `table` in data/runs/<run>/. ValueError where something is missing.
    """
    entry, folder = look_up(dataset), run_folder(run)
    names = {"dataset": dataset, "split": split, "classifier": classifier or entry.classifier}
    names["dae"] = entry.dae if dae == "" else dae
    for kind in ("classifier", "dae"):
        if names[kind] == "":
            raise ValueError(f"{dataset} has no {kind} of its own; give {kind}, a checkpoint's name")
    check_at_least(0, step_size=step_size, epsilon=epsilon)
    check_device(device)
    source = load_dataset(dataset, split)
    x, y = (tensor.to(device) for tensor in take(source, n, seed))
    if not attacks and entry.budget is None:
        epsilon = epsilon or math.nan  # nothing is attacked here
    settings = attack_settings(dataset, ["bim", *attacks], epsilon)
    usual, sizes = settings["bim"]["epsilon"], {spec: settings[spec].get("epsilon", math.nan) for spec in attacks}
    attacks = dict.fromkeys(["clean", *(name_among(parse_spec(spec)[0], sizes[spec], usual) for spec in attacks)])
    settings = attack_settings(dataset, ["bim", *attacks], epsilon)
    for attack in settings:
        for name in {attack, parse_spec(attack)[0]} & (parameters or {}).keys():
            settings[attack] = settings[attack] | parameters[name]
    study = Study(
        x,
        y,
        list(source.classes),
        entry.noun,
        load_model(names["classifier"], device),
        None if dae is None else _calibrated(load_model(names["dae"], device), dataset),
        names | {"dae": names["dae"] or "", "seed": seed, "notebook": notebook},
        settings,
        usual,
        step_size or (entry.budget.step_size if entry.budget else settings["bim"]["step_size"]),
        {},
        {},
        folder,
        ROOT / results if results else folder / table,
    )
    for attack in attacks:
        study.attacked[attack], study.seconds[attack] = _attacked(study, attack)
    return study


def _calibrated(dae: nn.Module, dataset: str) -> nn.Module:
    """The autoencoder; one without μ and σ, of a package or your own, with those of images that no weight has seen.

    Held-out images of the entry's `calibrated_on`, or of the set itself. Where there are none it stays without: a
    variant that needs μ and σ says so.
    """
    dae, entry = with_calibration(dae), look_up(dataset)
    source = entry.calibrated_on or (dataset if "train" in entry.splits else "")
    if source and dae.recon_mu.isnan():
        with suppress(ValueError):  # photographs that are not on this machine, a folder of too few images
            calibrate(dae, stack(load_dataset(source, "held_out"))[0])
    return dae


def _attacked(study: Study, attack: str) -> tuple[Tensor, float]:
    """The study's images under an attack of its classifier, and the seconds an image that it once took."""
    name = parse_spec(attack)[0]
    if name == "clean":
        return study.x, 0.0
    if name in ("cw", "deepfool") and study.settings[attack]["epsilon"] != float("inf"):  # these clip at the end
        study.settings.setdefault(f"{name}@inf", study.settings[attack] | {"epsilon": float("inf")})
        free, seconds = _attacked(study, f"{name}@inf")
        return project(free, study.x, study.settings[attack]["epsilon"]), seconds
    setting, n = study.settings[attack], len(study.y)
    about = {key: study.names[key] for key in ("dataset", "split", "seed")} | {"attack": name, "parameters": setting}
    mark = fingerprint(about, study.classifier)
    path = study.folder / "attacked" / f"{attack.replace('/', '_')}-{mark}.safetensors"
    with locked(path):  # notebooks of one run may ask side by side
        if path.is_file():
            tensors, facts = load_tensors(path, advice="delete it, and it is made again")
            if len(tensors["images"]) >= n:
                found = tensors["images"][:n].to(study.x)
                if found.shape != study.x.shape or not (found - study.x).abs().max() <= setting["epsilon"] + 1e-6:
                    raise ValueError(f"{path} is of other images; delete it, and it is made again")
                return found, facts["seconds"]
        with Stopwatch() as watch:
            made = study.run(attack, study.classifier)
        facts = {"seconds": watch.seconds / n} | {"about": {key: str(value) for key, value in about.items()}}
        save_tensors(path, {"images": made.cpu().contiguous()}, facts)
    return made, facts["seconds"]
