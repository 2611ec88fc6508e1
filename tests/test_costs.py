"""What things cost on paper: operations are counted right, and an estimate grows with what it is an estimate of."""

import sys

import pytest
from torch import nn

from apudae.files import ROOT

sys.path.append(str(ROOT / "workflow"))

import costs
from costs import RATE, forward_operations, suite_operations


def test_operations_of_a_forward_pass():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 10))
    assert forward_operations(model, (3, 4, 4)) == 2 * (3 * 8 * 9 * 16) + 2 * (8 * 16 * 10)


def test_the_suite_costs_what_its_attacks_cost():
    facts = {"steps": 15, "classifier": 1.0, "dae": 2.0}
    of = {name: suite_operations("cifar10", name, **facts)[0] for name in ("none", "direct", "A", "F")}
    assert of["none"] < of["direct"] < of["A"] < of["F"] / 10, "a random purifier's gradient is a mean of 16 draws"
    assert suite_operations("cifar10", "A", 30, 1.0, 2.0)[0] > 1.5 * of["A"]
    assert suite_operations("cifar10", "A", **facts, until="counter_attack_a")[0] < of["A"] / 5
    assert suite_operations("cifar10", "A", **facts, other=1.0)[0] > of["A"]
    alone = suite_operations("cifar10", "none", 15, 1.0, 0.0, until="gray_fgsm")
    assert alone == (2 + 1, 1 + 1), "a gradient of the classifier, and reading what it made"


def test_a_step_of_the_lane_takes_its_operations_or_its_passes():
    large = {"n": 10_000, "steps": 24, "attacks": ["clean", "pgd"]}
    operations, seconds = costs._step_costs("08_purify_d", large, 1e9, 1e9, 1e9)
    assert operations == 2e9 * 48 * 10_000
    assert seconds == pytest.approx(operations / RATE)
    small = costs._step_costs("08_purify_d", large, 1.0, 1.0, 1.0)[1]
    assert small == pytest.approx(48 * 40 * 0.005), "forty batches whose kernels must be launched"
    training = {"n": 1, "steps": 100, "batch_size": 50, "attack_steps": 7}
    assert costs._step_costs("22_baseline", training, 1.0, 1.0, 2.0)[0] == (3 + 2 * 7) * 2 * 5000


def test_more_gpus_than_steps_are_of_no_use():
    days = [1.0, 1.0, 4.0, 2.0]
    assert [costs._makespan(days, gpus) for gpus in (1, 2, 3, 64)] == [8, 4, 4, 4]


def test_the_page_says_what_is_counted():
    page = costs.PAGE.read_text(encoding="utf-8")
    assert all(f"<!-- costs: {part} -->" in page for part in costs.PARTS)
    assert costs.with_costs(page) == page, "make readme"
