import functools
import json
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import images, linear_classifier, tiny_dae

from apudae import PRESETS, PurifyConfig, attacks
from apudae.batching import in_batches
from apudae.evaluation.accuracy import Accuracy, accuracy, best_labels, captions, counted, predict, right
from apudae.evaluation.grid import purified_rows, right_of_draws, run_attack
from apudae.evaluation.results import IDENTITY, MAYBE, merge_results, read_results, record, result_row
from apudae.evaluation.tables import published
from apudae.purification import purify


@pytest.fixture(autouse=True)
def _fixed_provenance(monkeypatch):
    monkeypatch.setenv("APUDAE_COMMIT", "0123456789-dirty")
    monkeypatch.setenv("APUDAE_COMMAND", "apudae run it, with a comma")


def row(correct=50, **changes):
    facts = {"dataset": "noise", "classifier": "linear", "attack": "pgd", "attack_parameters": {"epsilon": 0.1}}
    return result_row(Accuracy(correct, 100), **facts | changes)


# --- accuracies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        (0, 10, 0, 0.2775),
        (10, 10, 0.7225, 1),
        (50, 100, 0.4038, 0.5962),
        (1, 1, 0.2065, 1),
        (951, 1000, 0.9358, 0.9627),
    ],
)
def test_wilson_interval(correct, n, low, high):
    assert Accuracy(correct, n).interval == pytest.approx((low, high), abs=6e-5)


def test_accuracy_reads_well():
    assert str(Accuracy(50, 100)) == "0.500 [0.404, 0.596]"
    assert Accuracy(1, 4).value == 0.25


def test_accuracy_counts(classifier, digits):
    x, y = digits
    wrong = (y + 1) % 10
    found = accuracy(classifier, x, y)
    assert (found.n, found.correct) == (200, int((predict(classifier, x) == y).sum()))
    assert accuracy(classifier, x, predict(classifier, x)).value == 1
    assert accuracy(classifier, x, wrong).correct <= 200 - found.correct


def test_predictions_do_not_depend_on_the_batch_size(classifier, digits):
    x = digits[0]
    expected = predict(classifier, x)
    for batch_size in (1, 7, 200, 1000):
        assert torch.equal(predict(classifier, x, batch_size), expected)


def test_predict_restores_the_mode():
    model = torch.nn.Sequential(linear_classifier(4), torch.nn.Dropout(0.9)).train()
    x = images(64, 1, 2, 2)
    assert torch.equal(predict(model, x), predict(model, x))  # no dropout takes part
    assert model.training
    assert model[1].training


def test_in_batches_joins_in_order():
    x, y = images(10, 1, 2, 2), torch.arange(10)
    seen = []

    def double(part, labels):
        seen.append(labels.tolist())
        return 2 * part

    assert torch.equal(in_batches(double, x, y, batch_size=4), 2 * x)
    assert seen == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_run_attack_goes_on_drawing_from_batch_to_batch():
    model, x, y = linear_classifier(4), torch.full((8, 1, 2, 2), 0.5), torch.zeros(8).long()
    found = run_attack("random", model, x, y, seed=3, batch_size=4, epsilon=0.1)
    assert not torch.equal(found[:4], found[4:])
    assert torch.equal(found, run_attack("random", model, x, y, seed=3, batch_size=4, epsilon=0.1))
    assert torch.equal(run_attack("clean", model, x, y), x)
    with pytest.raises(ValueError, match=r"'pdg' is unknown; there is: clean, random, fgsm"):
        run_attack("pdg", model, x, y, epsilon=0.1)


# --- many classes, large images ---------------------------------------------------------------------------------------


class Ranked(torch.nn.Module):
    """100 classes; class k has the logit −|k − the first pixel|, so that classes near it are the likeliest."""

    def forward(self, x):
        return -(torch.arange(100.0) - 100 * x[:, 0, 0, 0, None]).abs()


def shades(*classes):
    return (torch.tensor(classes) + 0.1).view(-1, 1, 1, 1) / 100


def test_of_many_classes_the_best_five_and_ten_count_too():
    y = torch.tensor([50, 50, 50, 50])
    found = accuracy(Ranked(), shades(50, 52, 54, 70), y)
    assert (found.correct, found.n) == (1, 4)
    assert {name: (other.correct, other.n) for name, other in found.others.items()} == {
        "top-5": (2, 4),
        "top-10": (3, 4),
    }


def test_of_several_draws_the_mean_probability_decides():
    y = torch.tensor([50])
    few = [shades(50), shades(60), shades(59)]
    votes = torch.stack([Ranked()(draw).softmax(1) for draw in few]).mean(0)
    found = best_labels(Ranked(), few, 10)
    assert found.tolist() == votes.topk(10).indices.tolist()
    assert found.tolist() != best_labels(Ranked(), torch.stack(few).mean(0), 10).tolist(), "not the mean image"
    assert accuracy(Ranked(), few, y).others["top-10"].correct == 1
    assert best_labels(Ranked(), few[:1], 10).equal(best_labels(Ranked(), few[0], 10))
    with pytest.raises(ValueError, match="labels"):
        accuracy(Ranked(), [shades(50), shades(50, 60)], y)
    with pytest.raises(ValueError, match="there are no draws"):
        accuracy(Ranked(), [], y)


def test_draws_of_many_images_are_those_of_all_at_once(dae, classifier, digits):
    """By the mean image and by vote; a part of the images has the same draws, whatever the parts are."""
    (x, y), config = (tensor[:7] for tensor in digits), PurifyConfig(direct=True, noise_std=0.6)
    found = right_of_draws(classifier, dae, x, y, config, [3, 1, 3], seed=5, batch_size=3)
    drawn = [purify(dae, x, config, seed=5 + i) for i in range(3)]
    wanted = {(1, "vote"): drawn[:1], (3, "mean"): torch.stack(drawn).mean(0), (3, "vote"): drawn}
    assert found.keys() == wanted.keys()
    for of, made in wanted.items():
        assert found[of]["top-1"].equal(right(classifier, made, y)["top-1"]), of
    assert not all(hits["top-1"].all() for hits in found.values()), "strong noise: some are wrong"
    many = right_of_draws(Ranked(), torch.nn.Identity(), shades(50, 52, 70), torch.tensor([50] * 3), config, [2])
    assert {metric: hits.shape for metric, hits in many[2, "vote"].items()} == dict.fromkeys(many[2, "mean"], (3,))
    assert len(many[2, "mean"]) == 3
    with pytest.raises(ValueError, match="draws 0 is 0"):
        right_of_draws(classifier, dae, x, y, config, [0])
    with pytest.raises(ValueError, match="the number of counts is 0"):
        right_of_draws(classifier, dae, x, y, config, [])


def test_one_draw_without_finite_logits_has_no_vote():
    logits = {0.1: [2.0, 0.0], 0.2: [2.0, -torch.inf], 0.3: [0.0, torch.nan]}

    class Read(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([logits[round(shade, 1)] for shade in x[:, 0, 0, 0].tolist()])

    def draw(shade):
        return torch.full((1, 1, 2, 2), shade)

    assert best_labels(Read(), [draw(0.1), draw(0.1)], 1).tolist() == [[0]]
    for strange in (0.2, 0.3):
        with pytest.warns(UserWarning, match="not finite"):
            assert best_labels(Read(), [draw(0.1), draw(strange)], 1).tolist() == [[-1]]


def test_images_that_were_wrong_at_first_can_be_left_out():
    y = torch.tensor([50, 50, 50, 50])
    found = accuracy(Ranked(), shades(50, 52, 50, 50), y, clean=shades(50, 50, 52, 70)).others
    right = {name: (other.correct, other.n) for name, other in found.items() if "right" in name}
    assert right == {"top-1 of right": (1, 2), "top-5 of right": (3, 3), "top-10 of right": (3, 3)}
    none = accuracy(Ranked(), shades(50), y[:1], clean=shades(70)).others
    assert list(none) == ["top-5", "top-10"]


def test_few_classes_have_no_figure_of_those_right_before():
    hits, before = {"top-1": torch.tensor([True, False])}, {"top-1": torch.tensor([True, True])}
    assert counted(hits, before) == Accuracy(1, 2)


@pytest.mark.parametrize(("name", "passes"), [("A", 7), ("B", 16), ("F", 16)])
def test_more_steps_without_memory_go_on_from_fewer(name, passes):
    dae, attacked, y, calls = tiny_dae(), {"clean": images(6, 1, 8, 8)}, torch.zeros(6, dtype=torch.long), []
    dae.register_forward_hook(lambda *_: calls.append(1))
    dae.recon_mu.fill_(0)  # below every error: no image rests
    dae.recon_sigma.fill_(1)
    configs = {f"{n}": replace(PRESETS[name], steps=n) for n in (4, 5, 7)}
    facts = {"dataset": "noise", "classifier": "linear", "parameters": {"clean": {}}}
    purified, rows = purified_rows(linear_classifier(64), dae, attacked, y, configs, **facts)
    assert sum(calls) == passes
    assert [json.loads(row["purifier_parameters"])["steps"] for row in rows] == [4, 5, 7]
    for label, config in configs.items():
        assert torch.equal(purified["clean", label], purify(dae, attacked["clean"], config))
    calls.clear()
    none, again = purified_rows(linear_classifier(64), dae, attacked, y, configs, **facts, images=False)
    assert sum(calls) == passes, "within an attack they still go on from fewer"
    assert none == {}
    assert [row["correct"] for row in again] == [row["correct"] for row in rows]


def test_few_classes_have_one_metric(classifier, digits):
    assert accuracy(classifier, *digits, clean=digits[0]).others == {}


def test_record_makes_a_row_of_each_metric(tmp_path):
    measured = accuracy(Ranked(), shades(50, 52, 54, 70), torch.full((4,), 50), clean=shades(50, 50, 50, 70))
    facts = {"dataset": "shades", "classifier": "ranked", "attack": "pgd", "attack_parameters": {}}
    rows = [result_row(measured, seed=seed, **facts) for seed in (1, 2)]
    table = record(tmp_path / "it.csv", rows)
    assert len(table) == 12
    assert table.tail(2).metric.tolist() == ["top-1", "top-1"], "notebooks show the last rows"
    assert table.tail(2).accuracy.tolist() == [0.25, 0.25]
    found = table[table.seed == 2].set_index("metric")
    assert (found.correct["top-10"], found.n["top-10"]) == (3, 4)
    assert (found.correct["top-10 of right"], found.n["top-10 of right"]) == (3, 3)
    assert found.accuracy["top-10 of right"] == 1
    assert "others" not in table
    assert len(record(tmp_path / "it.csv", rows)) == 12, "they replace themselves"


def test_files_of_before_are_named_and_stay_as_they_are(tmp_path):
    path = tmp_path / "old.csv"
    record(path, [row(1, seed=1)])
    pd.read_csv(path, dtype=str).drop(columns=["kind", "position"]).to_csv(path, index=False)
    before = path.read_bytes()
    for use in (lambda: read_results(path), lambda: record(path, [row(3, seed=2)])):
        with pytest.raises(ValueError, match=r"old\.csv .* lacks the columns kind, position; move it away"):
            use()
    assert path.read_bytes() == before


def test_rows_of_several_files_are_merged(tmp_path):
    record(tmp_path / "one.csv", [row(1, seed=1), row(2, seed=2)])
    record(tmp_path / "two.csv", [row(2, seed=2), row(4, seed=3)])
    merge_results([tmp_path / "one.csv", tmp_path / "two.csv"], tmp_path / "all.csv", tmp_path / "stable.csv")
    assert read_results(tmp_path / "all.csv").correct.tolist() == [1, 2, 4]


@pytest.mark.parametrize(
    ("shape", "largest"), [((1, 28, 28), 256), ((3, 32, 32), 85), ((3, 224, 224), 1), ((3, 600, 600), 1)]
)
def test_batches_of_large_images_are_small(shape, largest):
    sizes = []
    x = torch.zeros(300 if largest > 5 else 7, *shape)
    in_batches(lambda batch: sizes.append(len(batch)) or batch[:, 0, 0, 0], x)
    assert max(sizes) == largest
    assert sum(sizes) == len(x)


def test_batch_that_does_not_fit_is_halved_and_its_noise_stays():
    generator, sizes = torch.Generator(), []

    def noisy(batch, fits):
        sizes.append(len(batch))
        drawn = batch + torch.rand(batch.shape, generator=generator)
        if len(batch) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return drawn

    x = torch.zeros(8, 1, 4, 4)
    found = []
    for fits in (4, 9):
        generator.manual_seed(5)
        halved = functools.partial(noisy, fits=fits)
        if fits == 4:
            with pytest.warns(UserWarning, match="a batch of 8 images does not fit"):
                found.append(in_batches(halved, x, generator=generator))
        else:
            found.append(in_batches(halved, x[:4], generator=generator))
    assert sizes == [8, 4, 4, 4]
    assert torch.equal(found[0][:4], found[1])
    with pytest.raises(torch.OutOfMemoryError):
        in_batches(functools.partial(noisy, fits=0), x[:1], generator=generator)


def test_table_2s_budgets_are_named_with_their_epsilon():
    model, x, y = linear_classifier(12), images(2, 3, 2, 2), torch.zeros(2).long()
    for name, size in {"bim@5/255": 5, "bim@25/255": 25, "bim": 8}.items():
        settings = attacks.attack_settings("imagenet")[name]
        found = run_attack(attacks.parse_spec(name)[0], model, x, y, **settings)
        assert 0.9 * size / 255 < (found - x).abs().max() <= size / 255 + 1e-6


# --- rows -------------------------------------------------------------------------------------------------------------


def test_row_says_what_was_measured():
    found = row(purifier="A", purifier_config=PRESETS["A"], dae="mnist/dae", seed=3, seconds=1.234)
    assert set(IDENTITY) <= set(found)
    assert (found["n"], found["correct"], found["accuracy"]) == (100, 50, 0.5)
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert json.loads(found["attack_parameters"]) == {"epsilon": 0.1}
    assert json.loads(found["purifier_parameters"])["steps"] == 15
    assert (found["device"], found["seed"], found["commit"]) == ("cpu", 3, "0123456789-dirty")


def test_record_adds_and_reads_back(tmp_path):
    path = tmp_path / "deep" / "it.csv"
    record(path, [row(1, seed=1), row(2, seed=2)])
    returned = record(path, [row(3, seed=3)])
    read = pd.read_csv(path, keep_default_na=False, na_values={name: [""] for name in MAYBE})
    assert read.correct.tolist() == [1, 2, 3]
    pd.testing.assert_frame_equal(returned[read.columns], read, check_dtype=False)
    assert [file.name for file in path.parent.iterdir() if not file.name.endswith(".lock")] == ["it.csv"]


@pytest.mark.parametrize(
    "changed", [{"attack_parameters": {"epsilon": 0.2}}, {"seed": 9}, {"purifier": "A"}, {"dae": "x"}]
)
def test_record_replaces_the_same_and_keeps_the_others(tmp_path, changed):
    record(tmp_path / "it.csv", [row(10), row(20, **changed)])
    table = record(tmp_path / "it.csv", [row(30)])
    assert sorted(table.correct) == [20, 30]
    assert sorted(pd.read_csv(tmp_path / "it.csv").correct) == [20, 30]


def test_former_rows_stay_as_they_were_written(tmp_path):
    path = tmp_path / "it.csv"
    odd = row(30, seed=1) | {"accuracy": 0.1 + 0.2, "seconds": 1e-17, "ci_low": 0.2 + 0.01, "ci_high": 1 / 3}
    record(path, [odd])
    before = path.read_text().splitlines()
    record(path, [row(8, seed=2)])
    assert path.read_text().splitlines()[:2] == before


@pytest.mark.parametrize("commit", ["0012345678", "1234567890", "12345678e9", "1e99999999", "nan", "None"])
def test_text_stays_text(tmp_path, commit):
    """One commit in a hundred is written in digits alone, and some look like a number with an exponent."""
    path = tmp_path / "it.csv"
    record(path, [row(7, seed=1) | {"commit": commit}])
    before = path.read_text().splitlines()
    record(path, [row(8, seed=2) | {"commit": "7654321"}])
    assert path.read_text().splitlines()[:2] == before


def test_nothing_to_record_changes_nothing(tmp_path):
    path = tmp_path / "it.csv"
    record(path, [row(7)])
    before = path.read_bytes()
    record(path, [])
    assert path.read_bytes() == before


def test_failed_record_leaves_the_file(tmp_path):
    path = tmp_path / "it.csv"
    record(path, [row(7)])
    before = path.read_bytes()
    with pytest.raises(KeyError):
        record(tmp_path / "other.csv", [{"no": "identity"}])
    assert path.read_bytes() == before
    assert not (tmp_path / "other.csv").exists()
    assert not list(tmp_path.glob(".*partial*"))


WRITER = """
import sys
from pathlib import Path
from apudae.evaluation.accuracy import Accuracy
from apudae.evaluation.results import record, result_row
for i in range(20):
    facts = {"dataset": sys.argv[2], "classifier": "linear", "attack": "pgd", "attack_parameters": {}}
    record(Path(sys.argv[1]), [result_row(Accuracy(i, 100), seed=i, **facts)])
"""


@pytest.mark.slow
def test_two_writers_lose_nothing(tmp_path):
    path = tmp_path / "it.csv"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name]) for name in ("one", "two")]
    assert [writer.wait(600) for writer in writers] == [0, 0]
    table = pd.read_csv(path)
    assert sorted(zip(table.dataset, table.seed, strict=True)) == [(d, i) for d in ("one", "two") for i in range(20)]


def test_kept_attack_is_reused_batch_by_batch_and_equals_an_undisturbed_run(tmp_path, classifier, digits, monkeypatch):
    x, y = (tensor[:30] for tensor in digits)
    parameters = {"epsilon": 0.1, "seed": 3, "batch_size": 10}
    expected = run_attack("pgd", classifier, x, y, **parameters)
    assert torch.equal(run_attack("pgd", classifier, x, y, keep=tmp_path, **parameters), expected)
    files = sorted(tmp_path.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 3
    files[-1].unlink()  # as a kill in the last batch leaves it
    calls, attack = [], attacks.pgd
    spy = functools.wraps(attack)(lambda *a, **k: calls.append(1) or attack(*a, **k))
    monkeypatch.setitem(attacks.ATTACKS, "pgd", spy)
    assert torch.equal(run_attack("pgd", classifier, x, y, keep=tmp_path, **parameters), expected)
    assert len(calls) == 1
    run_attack("pgd", classifier, x, y, keep=tmp_path, **parameters | {"epsilon": 0.05})
    assert len(calls) == 4


# --- words and figures beside the rows --------------------------------------------------------------------------------


def test_captions_say_what_the_model_reads():
    brightest, x = torch.nn.Flatten(), torch.eye(3).view(3, 1, 1, 3)
    assert captions(brightest, x, ["ant", "bee"]) == ["reads ant", "reads bee", "reads 2"]  # no third name


def test_what_the_paper_reports():
    mnist, cifar = published("mnist5k"), published("cifar10-jpeg")
    assert (mnist.loc["pgd", "A"], mnist.loc["counter_attack_a", "direct"]) == (0.951, 0.799)
    assert list(mnist.columns) == ["none", "adversarial", "defense_gan", "magnet", "direct", "A"]  # as in Table 1
    assert cifar.drop(columns=["none", "adversarial", "direct"]).max(axis=1)["clean"] == 0.908
    assert cifar.loc[["fgsm", "r_fgsm", "bim", "cw"], ["E", "F"]].max(axis=1).tolist() == [0.834, 0.817, 0.729, 0.708]
    assert published("folder:photographs").empty


def test_bfloat16_is_for_the_purifiers_alone_and_named_in_their_rows(dae, digits):
    x, y = digits[0][:6], digits[1][:6]
    seen = []

    class Classifier(torch.nn.Module):
        def forward(self, images):
            seen.append((images.dtype, torch.is_autocast_enabled("cpu")))
            return images.flatten(1)[:, :10]

    configs = {"none": None, "A": replace(PRESETS["A"], steps=2)}
    about = {"dataset": "mnist5k", "classifier": "none", "parameters": {"clean": {}}}
    whole, _ = purified_rows(Classifier(), dae, {"clean": x}, y, configs, **about)
    short, rows = purified_rows(Classifier(), dae, {"clean": x}, y, configs, bfloat16=True, **about)
    assert [row["device"] for row in rows] == ["cpu", "cpu, bfloat16"]
    assert set(seen) == {(torch.float32, False)}
    difference = (whole["clean", "A"] - short["clean", "A"]).abs()
    assert 0 < difference.max() <= 0.04 + 1e-6, "a few signs differ"
    assert difference.gt(1e-3).float().mean() < 0.2
