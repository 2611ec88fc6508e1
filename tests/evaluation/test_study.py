import pytest

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
