import math
from dataclasses import replace

import pandas as pd
import pytest
from PIL import Image

import apudae
from apudae import PRESETS, files, recon_error
from apudae.datasets import DATASETS, load_dataset, stack
from apudae.evaluation.study import open_study
from apudae.evaluation.tables import labelled


@pytest.mark.parametrize("variant", ["F", "G"])
def test_paths_have_the_noise_of_the_rows(tmp_path, monkeypatch, variant):
    """Figures of a random variant follow the very images that its rows count, whatever the seed."""
    monkeypatch.setattr(files, "RUNS", tmp_path)
    study = open_study("10_purify_f", dataset="mnist5k", n=4, attacks=["clean"], seed=3)
    purified, _ = study.purified({variant: PRESETS[variant]})
    path = study.follow(PRESETS[variant], ["clean"], 4)["clean"]
    assert purified["clean", variant].equal(path[-1].images)


def test_an_autoencoder_of_ones_own_is_calibrated_on_held_out_images(monkeypatch, tmp_path):
    (tmp_path / "mine_dae.py").write_text("import torch\nbuild = lambda: torch.nn.Conv2d(1, 1, 3, padding=1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    study = open_study("05_purify_a", dataset="mnist5k", n=10, dae="python:mine_dae:build")
    assert study.recon_mu > 0
    assert apudae.purify(study.dae, study.x, "E").shape == study.x.shape


def test_photographs_calibrate_a_denoiser_on_other_photographs_where_these_are(monkeypatch, tmp_path):
    """`photographs` has no training images: BSDS500's held-out ones take their place, or C to G say what they need."""
    monkeypatch.setenv("APUDAE_DATA", str(tmp_path))
    monkeypatch.setattr(files, "RUNS", tmp_path)
    monkeypatch.setitem(
        DATASETS, "photographs", replace(DATASETS["photographs"], classifier="python:of_photographs:classifier")
    )
    (tmp_path / "of_photographs.py").write_text(
        "import torch\ndae = lambda: torch.nn.Conv2d(3, 3, 3, padding=1)\n"
        "classifier = lambda: torch.nn.Conv2d(3, 9, 224)  # not called\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = {"dataset": "photographs", "n": 2, "dae": "python:of_photographs:dae"}
    study = open_study("05_purify_a", **given)
    assert math.isnan(study.recon_mu)
    with pytest.raises(ValueError, match="needs μ and σ of the reconstruction error, and this autoencoder has none"):
        study.purified({"E": PRESETS["E"]})
    (tmp_path / "bsds500" / "val").mkdir(parents=True)
    for number in (1, 2):
        Image.effect_noise((300, 240), 40 * number).convert("RGB").save(tmp_path / f"bsds500/val/{number}.png")
    study = open_study("05_purify_a", **given)
    expected = recon_error(study.dae, stack(load_dataset("bsds500", "held_out"))[0])
    assert study.recon_mu == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("given", "made", "iterated"),
    [
        (["clean", "pgd", "bim"], ["clean", "pgd", "bim"], "pgd"),
        (["bim"], ["clean", "bim"], "bim"),
        (["fgsm", "clean"], ["clean", "fgsm"], "fgsm"),
        (["bim@0.1", "bim@25.5/255", "bim@5/255"], ["clean", "bim", "bim@5/255"], "bim"),
        (["bim@0.02"], ["clean", "bim@0.02"], "bim@0.02"),
    ],
)
def test_clean_images_are_always_there_and_an_attack_has_one_name(tmp_path, monkeypatch, given, made, iterated):
    """So that a notebook finds what it asks for, and the name of an attack is that of its row."""
    monkeypatch.setattr(files, "RUNS", tmp_path)
    study = open_study("05_purify_a", dataset="mnist5k", n=4, attacks=given)
    assert list(study.attacked) == made
    assert study.iterated == iterated
    _, rows = study.purified({"none": None})
    assert labelled(pd.DataFrame(rows), study.epsilon).attack.tolist() == made


def test_without_an_attack_there_is_no_iterated_one():
    study = open_study("05_purify_a", dataset="mnist5k", n=4, attacks=["clean"])
    with pytest.raises(ValueError, match="clean images alone; needed: an attack"):
        study.iterated  # noqa: B018
    with pytest.raises(ValueError, match=r"3 is no text; needed: such as bim@5/255"):
        open_study("05_purify_a", dataset="mnist5k", n=4, attacks=["clean", 3])


@pytest.mark.parametrize("epsilon", [-1.0, math.nan, "x"])
def test_an_epsilon_that_is_none_is_told_before_anything_is_made(epsilon):
    with pytest.raises(ValueError, match=r"epsilon is .*; needed: a finite number of at least 0"):
        open_study("05_purify_a", dataset="mnist5k", n=4, epsilon=epsilon)


def test_where_nothing_is_attacked_no_epsilon_is_asked_for(monkeypatch, tmp_path):
    for label, name in enumerate(("ant", "bee")):
        for number in range(5):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("L", (28, 28), 50 * label + number).save(tmp_path / name / f"{number}.png")
    given = {"dataset": f"folder:{tmp_path}", "n": 2, "classifier": "mnist/classifier", "dae": "mnist/dae"}
    assert math.isnan(open_study("28_certified_radius", **given).epsilon)
    with pytest.raises(ValueError, match="has no ε of its own; give epsilon"):
        open_study("05_purify_a", attacks=["clean"], **given)


def test_more_images_than_there_are_is_told_with_what_to_give():
    with pytest.raises(ValueError, match="1001 images asked for; there are 1000: give n = 1000, or less"):
        open_study("05_purify_a", dataset="mnist5k", n=1001)
