"""The tables of notebook 17: which rows they show, how they are marked; shipped weights give their figures again."""

import json
import math
import os
from dataclasses import replace

import pandas as pd
import pytest
from torch import nn

import apudae
from apudae import files
from apudae.datasets import take
from apudae.evaluation.accuracy import Accuracy, accuracy
from apudae.evaluation.grid import run_attack
from apudae.evaluation.pages import suite_table
from apudae.evaluation.results import read_results, result_row
from apudae.evaluation.tables import folded, knowing_table, labelled, main_table, of_study, side_by_side, with_interval

STUDY = {"classifier": "mnist/classifier", "dae": "mnist/dae", "steps": [15, 12], "step_size": 0.01}


def row(purifier, attack, correct, n=1000, config=None, parameters=(), **facts):
    facts = {"dataset": "mnist", "classifier": "mnist/classifier", "dae": "mnist/dae"} | facts
    about = {"purifier": purifier, "purifier_config": config, "attack_parameters": dict(parameters)}
    return result_row(Accuracy(correct, n), attack=attack, **about, **facts)


A, A12 = apudae.PRESETS["A"], replace(apudae.PRESETS["A"], steps=12)


@pytest.fixture
def rows():
    return pd.DataFrame(
        [
            row("none", "clean", 975, dae=""),
            row("none", "pgd", 130, dae=""),
            row("A", "pgd", 300, n=1000, config=A),
            row("A", "pgd", 1890, n=2000, config=A),
            row("A", "fgsm", 700, config=A),
            row("A", "clean", 980, config=A),
            row("A", "clean", 970, config=A12),
            row("A", "clean", 1, config=replace(A, step_size=0.03)),
            row("A", "clean", 1, config=A, split="held_out"),
            row("A", "clean", 1, config=A, classifier="mnist/cnn"),
            row("A", "clean", 1, config=A, dae="another"),
        ]
    )


def test_a_study_is_its_own_rows_and_other_n_are_named(rows):
    own = of_study(rows, **STUDY)
    assert len(own) == 7
    assert set(own.purifier) == {"none", "A", "A (n = 12)"}
    assert set(of_study(rows, **STUDY | {"steps": [15]}).purifier) == {"none", "A"}


def test_main_table_has_the_most_images_and_marks_what_is_below_the_paper(rows):
    drawn, table = main_table(of_study(rows, **STUDY))
    assert table.index.tolist() == ["clean", "fgsm", "pgd"]
    assert table.columns[:4].tolist() == ["none", "A", "A (n = 12)", "images"]
    assert table.loc["pgd", "A"] == f"{Accuracy(1890, 2000)} ≈"  # the paper's .951 is inside
    assert table.loc["fgsm", "A"].endswith("✗")
    assert table.loc["clean", "A"] == str(Accuracy(980, 1000))
    assert table.loc["pgd", "none"] == str(Accuracy(130, 1000)), "the undefended have no goal"
    assert table.loc["pgd", "images"] == "1000–2000"
    assert table.loc["pgd", "A (paper)"] == 0.951
    assert drawn.attack.tolist() == ["clean", "clean", "clean", "fgsm", "pgd", "pgd"]


def test_a_classifier_trained_on_attacks_is_a_column_without_a_goal(rows):
    trained = pd.DataFrame([row("adversarial", "pgd", 100, dae="")])
    table = main_table(pd.concat([of_study(rows, **STUDY), trained]))[1]
    assert table.columns[:3].tolist() == ["none", "adversarial", "A"]
    assert table.loc["pgd", "adversarial"] == str(Accuracy(100, 1000))


def test_an_attack_of_another_size_is_no_cell_of_the_table(rows):
    sizes = [row("adversarial", "pgd", right, dae="", parameters={"epsilon": e}) for e, right in [(0.1, 90), (0.2, 10)]]
    table = main_table(pd.concat([of_study(rows, **STUDY), pd.DataFrame(sizes)]))[1]
    assert table.loc["pgd", "adversarial"] == str(Accuracy(90, 1000))


def test_the_suite_stands_in_the_table_of_attackers_who_know(rows):
    knowing = [
        row("A", "clean", 99, n=100, config=A, kind="ladder", position=0),
        row("A", "bpda_identity", 40, n=100, config=A, kind="ladder", position=7),
        row("A", "gray_pgd", 80, n=100, config=A, kind="ladder", position=1),
        row("A", "worst_case", 40, n=100, config=A, kind="worst_case"),
        row("A", "counter_attack_b", 70, n=100, config=A, parameters={"beta": 0.1}),
        row("A", "counter_attack_b", 60, n=100, config=A, parameters={"beta": 1}),
        row("A", "counter_attack_a", 75, n=100, config=A),
    ]
    every = of_study(pd.concat([rows, pd.DataFrame(knowing)], ignore_index=True), **STUDY)
    table = knowing_table(every)
    ladder = ["clean", "gray_pgd", "bpda_identity", "worst_case"]
    assert table.index.tolist() == ["A alone", "A (paper)", "B alone", "B (paper)", *ladder, "images"]
    assert table.loc["B alone", "A"] == str(Accuracy(60, 100)), "the strongest β"
    assert table.loc["A (paper)", "A"] == 0.891
    main = main_table(every)[1]
    assert main.loc["clean", "A"] == str(Accuracy(980, 1000)), "what the suite leaves is no gray-box figure"
    assert "worst_case" not in main.index


def test_counter_attacks_alone_make_no_columns_of_a_ladder(rows):
    alone = [row("A", "counter_attack_a", 75, n=100, config=A)]
    table = knowing_table(of_study(pd.concat([rows, pd.DataFrame(alone)], ignore_index=True), **STUDY))
    assert table.index.tolist() == ["A alone", "A (paper)", "B alone", "B (paper)", "worst_case", "images"]


def test_gray_box_and_worst_case_stand_side_by_side(rows):
    further = [
        row("A", "cw", 5, config=A, parameters={"epsilon": math.inf}),
        row("A", "counter_attack_a", 5, config=A),
        row("A", "worst_case", 60, n=100, config=A, kind="worst_case"),
        row("A", "worst_case", 99, n=200, config=A, kind="worst_case", parameters={"queries": 10}),
        row("A", "worst_case", 90, n=200, config=A, kind="worst_case", parameters={"queries": 20}),
        row("D", "worst_case", 80, n=100, config=apudae.PRESETS["D"], kind="worst_case"),
    ]
    own = of_study(pd.concat([rows, pd.DataFrame(further)], ignore_index=True), **STUDY)
    table = side_by_side(main_table(own)[0], own)
    cells = [str(Accuracy(980, 1000)), "fgsm", str(Accuracy(700, 1000)), str(Accuracy(90, 200)), 200]
    assert table.loc["A"].tolist() == cells, "inside the ball, of the gray box; of the most images the lower one"
    assert table.loc["none", "gray box"] == str(Accuracy(130, 1000))
    assert table.loc["none", "worst case"] == "–", "not measured"
    assert table.loc["A (n = 12)", "gray box"] == "–"
    assert table.loc["D"].tolist() == ["–", "–", "–", str(Accuracy(80, 100)), 100], "the ladder alone is shown, too"


def test_first_table_is_of_the_same_images_in_every_column(rows):
    """The gray box is the last attack on the classifier alone, not the lowest row of other images."""
    budget, random = {"budget": "full"}, {"runs": 20, "mean": 0.55, "mean_low": 0.5, "mean_high": 0.6}
    suite = [("clean", 98), ("gray_bim", 90), ("gray_apgd_ce", 80), ("joint_at_mu", 70)]
    further = [
        row("E", name, count, n=100, config=apudae.PRESETS["E"], kind="ladder", parameters=budget) | {"position": place}
        for place, (name, count) in enumerate(suite)
    ]
    further += [row("E", "worst_case", 60, n=100, config=apudae.PRESETS["E"], kind="worst_case", parameters=budget)]
    further += [row("F", "worst_case", 10, n=100, config=apudae.PRESETS["F"], kind="worst_case") | random]
    every = pd.concat([rows.assign(runs=1), pd.DataFrame(further)], ignore_index=True)
    table = suite_table(every).set_index("purifier")
    assert table.loc["E", ["clean", "gray box", "worst case"]].str[:7].tolist() == ["0.980 [", "0.800 [", "0.600 ["]
    assert table.loc["E", ["images", "budget"]].tolist() == [100, "full"]
    assert table.loc["F", "worst case"] == "0.550 [0.500, 0.600]", "the mean over the draws"
    assert table.loc["F", ["clean", "budget"]].tolist() == ["–", ""]


def test_tables_without_rows_are_empty(rows):
    none = of_study(rows, **STUDY | {"classifier": "mnist/unknown"})
    assert main_table(none)[1].empty
    assert side_by_side(main_table(none)[0], none).empty
    assert knowing_table(none).drop(index="images").empty or knowing_table(none).columns.empty


CELLS = {  # a cell of each table
    "table 1, MNIST": ("mnist.csv", {"attack": "r_fgsm", "purifier": "B"}),
    "table 1, CIFAR-10": (
        "cifar10-jpeg.csv",
        {"attack": "fgsm", "classifier": "cifar10/resnet18", "purifier": "A", "n": 100},
    ),
    "noise first, CIFAR-10": (
        "cifar10-jpeg.csv",
        {"attack": "fgsm", "classifier": "cifar10/resnet18", "purifier": "direct + noise"},
    ),
    "the other target, CIFAR-10": (
        "cifar10.csv",
        {"attack": "fgsm", "classifier": "cifar10-jpeg/resnet8", "purifier": "direct"},
    ),
    "adversarial training, CIFAR-10": (
        "cifar10-jpeg.csv",
        {"attack": "fgsm", "purifier": "none", "classifier": "cifar10-jpeg/adversarial", "n": 1000},
    ),
    "table 2, photographs": ("imagenet.csv", {"attack": "clean", "purifier": "direct + noise", "metric": "top-1"}),
    "table 3, MNIST": ("mnist-adaptive.csv", {"attack": "counter_attack_a", "purifier": "direct", "dae": "mnist/dae"}),
    "baselines, MNIST": ("mnist-baselines.csv", {"attack": "bim", "classifier": "mnist/adversarial_03", "n": 1000}),
}


@pytest.mark.slow
@pytest.mark.skipif("APUDAE_DATA" not in os.environ, reason="APUDAE_DATA is not set")
@pytest.mark.parametrize("cell", CELLS)
def test_shipped_weights_give_a_cell_of_each_table_again(cell):
    """The first 100 images of a row (of one that is cheap, all), attacked and purified anew, within its interval."""
    name, wanted = CELLS[cell]
    found = read_results(files.RESULTS / name).query("split == 'test'")
    found = found[found.kind == "attack"]  # a row of the suite is of the images left by then
    for column, value in wanted.items():
        found = found[found[column] == value]
    kept = found.sort_values("n").iloc[-1]
    count = int(kept.n) if kept.dataset == "cifar10-jpeg" and kept.purifier != "A" else 100  # cheap ones: all
    x, y = (part[:count] for part in take(apudae.load_dataset(kept.dataset, "test"), int(kept.n), int(kept.seed)))
    model, dae = apudae.load_model(kept.classifier), kept.dae and apudae.load_model(kept.dae)
    purifier = (
        apudae.Purifier(dae, apudae.PurifyConfig(**json.loads(kept.purifier_parameters))) if dae else nn.Identity()
    )
    parameters, knows = json.loads(kept.attack_parameters), kept.attack == "counter_attack_a"
    target = nn.Sequential(apudae.Purifier(dae, "direct", "exact"), model) if knows else model
    attacked = run_attack("bim" if knows else kept.attack, target, x, y, seed=int(kept.seed), **parameters)
    again = accuracy(nn.Sequential(purifier, model), attacked, y)
    assert kept.ci_low <= again.value <= kept.ci_high, f"{again}, the row: {kept.accuracy}"


def test_attacks_of_another_size_are_called_by_it():
    sizes = pd.DataFrame({"dataset": "mnist", "attack": ["clean", "bim", "bim"], "epsilon": [None, 0.1, 5 / 255]})
    assert labelled(sizes).attack.tolist() == ["clean", "bim", "bim@5/255"]
    assert labelled(sizes, 5 / 255).attack.tolist() == ["clean", "bim@0.1", "bim"]
    own = sizes.assign(dataset="folder:mine")
    assert labelled(own, 0.1).attack.tolist() == ["clean", "bim", "bim@5/255"]


def test_a_folded_table_is_escaped_and_an_empty_one_is_nothing():
    table = pd.DataFrame({"a <b>": [None, "0.925 [0.880, 0.954]"]})
    text = folded("<attack>", table)
    assert text.startswith("<details><summary>&lt;attack&gt;</summary>")
    assert "a &lt;b&gt;" in text
    assert text.count("white-space: nowrap") == 2
    assert "NaN" not in text
    assert folded("nothing", table.iloc[:0]) == ""


def test_figures_are_told_from_their_count_but_for_means_over_draws():
    counted = row("A", "pgd", 98, n=100)
    assert counted["ci_high"] == 0.9945, "whose third digit would be 5; it is 0.994497"
    mean = row("F", "pgd", 48, n=50) | {"runs": 20, "mean": 0.954, "mean_low": 0.907, "mean_high": 1.0}
    assert with_interval(pd.DataFrame([counted, mean])).tolist() == ["0.980 [0.930, 0.994]", "0.954 [0.907, 1.000]"]
