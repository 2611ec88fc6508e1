import pytest

import apudae
from apudae import PRESETS, files
from apudae.evaluation.study import open_study


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
