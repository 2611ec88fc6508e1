"""The benchmarks: the table that each run prints and the pages show, and that of the GPU at toy size on a CPU."""

import sys

import pandas as pd
import pytest
import torch

from apudae.evaluation.pages import benchmark_table
from apudae.files import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import gpu
import rows as shared


def row(name, milliseconds, library="ours", dataset="mnist", n=10):
    times = [milliseconds * n / 1000 * share for share in (0.9, 1.0, 1.2)]
    return shared.time_row("purify", name, times, n, dataset=dataset, library=library)


def test_the_table_sets_others_beside_ours():
    rows = [row("A", 50), row("all variants", 30, "authors' loop"), row("all variants", 5, "floor"), row("A", 20)]
    rows += [row("pgd", 2, dataset="cifar10", n=7), row("pgd", 500, "foolbox", "cifar10")]
    assert rows[0]["spread"] == pytest.approx(0.3), "of the median"
    lines = benchmark_table(pd.DataFrame(rows)).splitlines()
    assert lines[0] == "| | n | ours, ms an image | authors' loop | foolbox | floor |"
    assert lines[2:] == [
        "| **mnist**, cpu | | | | | |",
        "| A | 10 | 20 | 30 (1.5 ×) | – | 5 (0.25 ×) |",
        "| **cifar10**, cpu | | | | | |",
        "| pgd | 7 | 2 | – | 500 (2.5e+02 ×) | – |",
    ]


def test_the_table_tells_which_labels_are_kept():
    lines = benchmark_table(pd.DataFrame([row("A", 20), row("A, bfloat16", 5) | {"labels_agree": 0.99}])).splitlines()
    assert lines[0] == "| | n | ours, ms an image | labels kept |"
    assert lines[2:] == ["| **mnist**, cpu | | | |", "| A | 10 | 20 | – |", "| A, bfloat16 | 10 | 5 | 0.990 |"]


def test_a_row_replaces_that_of_the_same_measurement(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shared.files, "RESULTS", tmp_path)
    shared.keep([row("A", 50), row("B", 10)])
    shared.keep([row("A", 20)])
    kept = pd.read_csv(tmp_path / "benchmarks.csv")
    assert kept.set_index("name").ms_per_image.to_dict() == {"B": 10, "A": 20}
    assert "| A | 10 | 20 |" in capsys.readouterr().out


@pytest.mark.slow
def test_the_benchmark_of_the_gpu_runs_on_a_cpu(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "COMPILED", {"": None})  # compiling takes minutes
    monkeypatch.setattr(gpu, "STEPS", 2)
    assert gpu.matrix_rate("cpu", torch.float32) > 1e8, "a tenth of a billion operations a second at least"
    monkeypatch.setattr(gpu, "matrix_rate", lambda *_: 1e9)  # a measured one would make this a test of the machine
    found = []
    gpu.main("cpu", "cifar10-20", 3, 0, 1, found.extend)
    table = pd.DataFrame(found)
    ours = table[table.library == "ours"]
    names = ["A, float32", "noise, then direct, float32", "A, bfloat16", "noise, then direct, bfloat16"]
    assert sorted(ours.name) == sorted(names)
    assert set(table.device) == {"cpu"}
    assert set(table.n) == {3}
    assert table.labels_agree.dropna().tolist() == [1.0, 1.0], "float32 with itself; three images in bfloat16"
    floor = table[table.library == "floor"].set_index("name").ms_per_image
    # two steps, forward and back, of the residual U-Net's 401,342,464 operations
    assert floor["A, float32"] == pytest.approx(2 * 2 * 401.342464, rel=1e-4)
    assert "10,000 images of CIFAR-10, A, n = 2: " in capsys.readouterr().out
