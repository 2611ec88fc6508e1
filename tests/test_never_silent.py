"""Nothing is silently wrong: what users of such libraries reported, and generated bad calls, each with its sentence.

A call ends in the right value, or in one ValueError; images and models are as before.
"""

import json
import math
import os
import random
import subprocess
import sys
import time
import warnings
from dataclasses import replace

import hypothesis.strategies as st
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import LinearDAE, images, linear_classifier, set_gradients, snapshot, tiny_dae
from hypothesis import given, settings
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image
from torch import nn

import apudae
from apudae import PRESETS, Purifier, PurifyConfig, attacks, files
from apudae.batch import notebooks, parameters
from apudae.batch.sweep import read_sweep
from apudae.batching import in_batches
from apudae.checkpoints import save_model
from apudae.datasets import hold_out
from apudae.evaluation.accuracy import Accuracy, accuracy, predict
from apudae.evaluation.grid import run_attack
from apudae.evaluation.ladder import WorstCase, ladder
from apudae.evaluation.results import read_results, record, result_row
from apudae.models import calibrate
from apudae.training.loop import Recipe, fit

X, Y = images(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
FACTS = {"dataset": "mnist5k", "classifier": "it", "purifier": "it"}


class Root(nn.Module):
    """Logits with a gradient that is infinite at 0 and, through `where`, NaN: a fault that passes for a defense."""

    def __init__(self):
        super().__init__()
        self.model = linear_classifier(16, 3)

    def forward(self, x):
        return self.model(torch.where(x > 0, x.sqrt(), 0.0))


class Constant(nn.Module):
    """Whatever the image, `value` for all of three classes."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return torch.full((len(x), 3), self.value) + 0 * x.flatten(1).sum(1, keepdim=True)


OURS = [name for name, function in attacks.ATTACKS.items() if function.__module__.endswith(("_sign", "_norm"))]
SHORT = {"cw": {"steps": 10, "search_steps": 1}, "deepfool": {"steps": 5}}


# --- NaN is no success ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_a_gradient_that_is_no_number_makes_no_image_that_is_none(name):
    x = X.clone()
    x[:, :, :2] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = getattr(attacks, name)(Root(), x, Y, epsilon=0.1, **SHORT.get(name, {}))
    assert found.isfinite().all()
    assert (found - x).abs().max() <= 0.1 + 1e-6


@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["pgd", "apgd"])
def test_a_gradient_that_is_no_number_makes_no_image(name, norm, loss):
    x = X * (X > 0.3)  # pixels at 0, where the gradient is NaN
    found = getattr(attacks, name)(Root(), x, Y, epsilon=0.1, loss=loss, norm=norm, steps=5)
    assert found.isfinite().all()
    assert (found - x).abs().max() <= 0.1 + 1e-6
    assert not torch.equal(found, x)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_never_right_and_are_named(value):
    with pytest.warns(UserWarning, match="6 of 6 images have logits that are not finite: counted as wrong"):
        assert accuracy(Constant(value), X, torch.zeros(6).long()).correct == 0


def test_a_worst_case_refuses_images_and_margins_that_are_no_numbers():
    worst, todo = WorstCase(X, 1, 1), torch.arange(6)
    with pytest.raises(ValueError, match="logits are not finite"):
        worst.update(todo, X, torch.full((6, 1), math.nan), 0.1)
    with pytest.raises(ValueError, match="an attack moved a pixel by nan"):
        worst.update(todo, X * math.nan, torch.zeros(6, 1), 0.1)
    with pytest.raises(ValueError, match="logits are not finite"):
        ladder(Constant(math.nan), None, None, X, Y, [], **FACTS)


def test_calibration_needs_images_that_differ():
    dae = tiny_dae()
    with pytest.raises(ValueError, match="deviation 0; needed: a deviation that is finite and above 0"):
        calibrate(dae, X[:1].repeat(2, 1, 1, 1))
    assert dae.recon_mu.isnan()


@pytest.mark.parametrize("sigma", [0.0, math.nan, math.inf, -1.0])
def test_a_deviation_that_cannot_be_is_refused(sigma):
    dae = LinearDAE(16)
    dae.recon_sigma = torch.tensor(sigma)
    with pytest.raises(ValueError, match="needs μ and σ"):
        Purifier(dae, "E")


@pytest.mark.parametrize("change", [{"rotation": 1e300}, {"resize": 1e300}, {"rotation": math.nan}, {"resize": 0}])
def test_a_transform_that_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(PRESETS["G"], **change)


@pytest.mark.parametrize("start", [X * math.nan, X[:3], X[..., :2], X + 2])
def test_bim_refuses_a_start_that_is_no_such_images(start):
    with pytest.raises(ValueError, match="needed"):
        attacks.bim(linear_classifier(16, 3), X, Y, start, epsilon=0.1)


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    from apudae.checkpoints import load_model, save_model

    dae = tiny_dae()
    dae.output.weight.data[0, 0, 0, 0] = math.nan
    save_model(tmp_path / "it", dae)
    with pytest.raises(ValueError, match=r"weights that are no finite numbers \(output.weight\)"):
        load_model(tmp_path / "it")


# --- masked gradients, wrong outputs, wrong numbers -------------------------------------------------------------------


def test_a_gradient_of_exactly_zero_is_named_with_its_share(classifier, digits):
    class Sure(nn.Module):
        def forward(self, x):
            return 1000 * classifier(x)

    x, y = digits[0][:20], digits[1][:20]
    for name in ("fgsm", "bim", "pgd"):
        with pytest.warns(UserWarning, match=r"\d+% of the images have a gradient of exactly zero"):
            getattr(attacks, name)(Sure(), x, y, epsilon=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attacks.bim(classifier, x, y, epsilon=0.1, steps=2)
        ratio = attacks.apgd(Sure(), x, y, epsilon=0.1, loss="dlr", steps=20)  # which does not vanish
    assert accuracy(Sure(), ratio, y).value < 0.5


def test_probabilities_are_named():
    with pytest.warns(UserWarning, match="seems to return probabilities; needed: logits"):
        attacks.fgsm(nn.Sequential(linear_classifier(16, 3), nn.Softmax(1)), X, Y, epsilon=0.1)


class Strange(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: x.flatten(1), "of type function; needed: a torch.nn.Module"),
        (Strange(lambda x: (x.flatten(1),)), "of type tuple; needed: logits"),
        (Strange(lambda x: {"logits": x.flatten(1)}), "of type dict; needed: logits"),
        (Strange(lambda x: x.flatten(1).sum(1)), r"of shape \(1,\); needed: logits"),
        (Strange(lambda x: x), r"of shape \(1, 1, 4, 4\); needed: logits"),
        (linear_classifier(15, 3), r"cannot take images of shape \(1, 1, 4, 4\)"),
    ],
)
def test_what_is_no_classifier_is_named(model, message):
    for use in (lambda: attacks.bim(model, X, Y, epsilon=0.1), lambda: accuracy(model, X, Y)):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.parametrize(
    "y",
    [torch.eye(3).long()[Y], Y[:, None], Y - 1, Y + 1, Y.float(), Y[:5], Y.tolist(), Y.int()],
    ids=["one-hot", "column", "-1", "too high", "float", "fewer", "list", "int32"],
)
def test_labels_are_checked_at_every_door(y):
    model = linear_classifier(16, 3)
    for use in (lambda: accuracy(model, X, y), lambda: attacks.pgd(model, X, y, epsilon=0.1)):
        with pytest.raises(ValueError, match="labels"):
            use()


def test_an_autoencoder_that_returns_another_shape_is_named():
    class Mean(LinearDAE):
        def forward(self, x):
            return x.mean((2, 3), keepdim=True)  # broadcasting would hide it

    for config in ("direct", "A"):
        with pytest.raises(ValueError, match=r"the autoencoder's output has shape .* needed: that of the images"):
            apudae.purify(Mean(16, torch.float32), X, config)
    with pytest.raises(ValueError, match=r"the autoencoder's output has shape \(6, 3\)"):
        apudae.purify(linear_classifier(16, 3), X, "direct")


@pytest.mark.parametrize("count", [np.int64(3), torch.tensor(3), True, 3.0, -1])
def test_counts_are_any_whole_numbers_and_no_others(count):
    model = linear_classifier(16, 3)
    if isinstance(count, np.int64):
        expected = attacks.bim(model, X, Y, epsilon=np.float32(0.1), steps=count)
        assert torch.equal(expected, attacks.bim(model, X, Y, epsilon=float(np.float32(0.1)), steps=3))
    elif isinstance(count, torch.Tensor):
        assert torch.equal(
            attacks.bim(model, X, Y, epsilon=torch.tensor(0.1), steps=count),
            attacks.bim(model, X, Y, epsilon=torch.tensor(0.1).item(), steps=3),
        )
    else:
        with pytest.raises(ValueError, match=r"steps is .*; needed: a whole number of at least 1"):
            attacks.bim(model, X, Y, epsilon=0.1, steps=count)


@pytest.mark.parametrize("epsilon", [8, 1.5])
def test_an_epsilon_beyond_all_pixels_is_named(epsilon):
    with pytest.raises(ValueError, match=r"epsilon is .*; needed: at most 1, in \[0, 1\] pixels \(8/255 = 0.0314\)"):
        attacks.pgd(linear_classifier(16, 3), X, Y, epsilon=epsilon)


def test_steps_without_number_are_refused():
    with pytest.raises(ValueError, match=r"step_size is 1e-300, which makes .* steps"):
        attacks.bim(linear_classifier(16, 3), X, Y, epsilon=0.1, step_size=1e-300)


@pytest.mark.parametrize("name", "ABCDEF")
def test_bfloat16_moves_images_like_float32(name, dae, digits):
    """Adam's rule too, whose 1 − β₂ᵗ is 0 in bfloat16."""
    x = digits[0][:4]
    short = apudae.purify(torch.nn.Module.bfloat16(apudae.load_model("mnist/dae")), x.bfloat16(), name)
    assert short.dtype == torch.bfloat16
    assert short.isfinite().all()
    exact = apudae.purify(dae, x, name)
    moved = ((short.float() - x).abs() > 0.015).flatten(1).float().mean(1)
    expected = ((exact - x).abs() > 0.015).flatten(1).float().mean(1)
    assert (moved - expected).abs().max() < 0.25


# --- kept files -------------------------------------------------------------------------------------------------------


def seeded_dae():
    torch.manual_seed(0)
    return tiny_dae()


def test_fingerprints_know_what_decides_a_result():
    dae = seeded_dae()
    marks = {"as it is": files.fingerprint(dae)}
    changed = seeded_dae()
    changed.output.bias.data += 1e-3
    marks["weights"] = files.fingerprint(changed)
    changed = seeded_dae()
    changed.recon_mu.fill_(1.0)
    marks["buffers"] = files.fingerprint(changed)
    marks["mode"] = files.fingerprint(seeded_dae().train())
    changed = seeded_dae()
    changed.threshold = 3
    marks["an attribute"] = files.fingerprint(changed)
    marks["class"] = files.fingerprint(nn.Sequential(seeded_dae()))
    marks |= {
        f"seed {seed}": files.fingerprint(Purifier(seeded_dae(), PurifyConfig(noise_std=0.1), seed=seed))
        for seed in (1, 2)
    }
    assert len(set(marks.values())) == len(marks)
    assert files.fingerprint(seeded_dae()) == marks["as it is"]


def test_a_kept_file_that_was_changed_is_named(tmp_path):
    path = tmp_path / "it.safetensors"
    files.save_tensors(path, {"images": X}, {"n": 6})
    whole = path.read_bytes()
    tensors, told = files.load_tensors(path, "make it again")
    assert torch.equal(tensors["images"], X)
    assert told == {"n": 6}
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for broken in (bytes(flipped), whole[:-40], whole[:20], b"", b"{}"):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"it\.safetensors is broken .*; make it again"):
            files.load_tensors(path, "make it again")


def test_links_are_followed_for_writing_and_never_for_temporary_files(tmp_path):
    (tmp_path / "real.txt").write_text("before")
    (tmp_path / "real.txt").chmod(0o640)
    (tmp_path / "link.txt").symlink_to("real.txt")
    (tmp_path / "victim").write_text("all of it")
    (tmp_path / ".link.txt.lock").symlink_to("victim")
    with pytest.raises(OSError), files.locked(tmp_path / "link.txt"):  # noqa: PT011  the system's own words
        pass
    assert (tmp_path / "victim").read_text() == "all of it"
    with files.written_aside(tmp_path / "link.txt") as aside:
        aside.write_text("after")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "after"
    assert (tmp_path / "real.txt").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("run", ["../../x", "/tmp/x", "report", "report/it", ".hidden", "a/.b", ""])
def test_a_run_stays_in_its_folder(run):
    with pytest.raises(ValueError, match="needed: a folder's name below data/runs/"):
        files.run_folder(run)


def row(correct, **more):
    return result_row(Accuracy(correct, 10), attack="pgd", attack_parameters={"epsilon": 0.1}, **FACTS | more)


BROKEN = {
    "a spreadsheet's semicolons": lambda text: text.replace(",", ";"),
    "conflict markers": lambda text: text + "<<<<<<< HEAD\n" + text.splitlines()[1] + "\n=======\n>>>>>>> other\n",
    "a comment": lambda text: "# rows\n" + text,
    "no header": lambda text: text.split("\n", 1)[1],
    "another file": lambda text: "torch==2.13.0\nnumpy==2.4.6\n",
    "empty": lambda text: "",
    "a row cut": lambda text: text.rstrip("\n").rsplit(",", 3)[0] + "\n",
    "a count above n": lambda text: text.replace(",3,0.3,", ",30,0.3,"),
    "a figure that is not its count's": lambda text: text.replace(",3,0.3,", ",3,0.9,"),
    "an unknown kind": lambda text: text.replace(",attack,pgd", ",guess,pgd"),
    "broken JSON": lambda text: text.replace('"{""epsilon"": 0.1}"', "{"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_rows_are_checked_before_anything_is_written(kind, tmp_path):
    path = tmp_path / "it.csv"
    record(path, [row(3), row(4, seed=1)])
    path.write_text(BROKEN[kind](path.read_text()))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"it\.csv.* is no (file|row) of results"):
        record(path, [row(5, seed=2)])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir() if "partial" in file.name] == []


CONFIG = "steps:\n  it: {notebook: 00_quickstart, parameters: {n: 50, steps: 3}}\n"


def kept_files(folder):
    """One of each kind that is read again: the files, and how."""
    dae, model = seeded_dae(), linear_classifier(16, 3)
    save_model(folder / "dae", dae, metrics={"loss": 0.5})
    record(folder / "it.csv", [row(3), row(4, seed=1)])
    (folder / "it.yaml").write_text(CONFIG)
    files.save_tensors(folder / "it.safetensors", {"images": X}, {"seconds": 1.5})

    def trained():
        torch.manual_seed(0)
        network, digits = tiny_dae(), [(image, 0) for image in images(8, 1, 4, 4)]
        fit(network, lambda net, x, y, _: net(x).square().mean(), digits, Recipe(2, 4), run_dir=folder / "train")
        return network

    def attacked():
        return run_attack("pgd", model, X, Y, epsilon=0.1, steps=2, keep=folder / "kept")

    trained()
    attacked()
    (batch,) = (folder / "kept").glob("*.safetensors")
    return {
        folder / "dae.safetensors": lambda: apudae.load_model(folder / "dae"),
        folder / "dae.json": lambda: apudae.load_model(folder / "dae"),
        folder / "it.safetensors": lambda: files.load_tensors(folder / "it.safetensors", "make it again"),
        batch: attacked,
        folder / "train" / "state.safetensors": trained,
        folder / "it.csv": lambda: read_results(folder / "it.csv"),
        folder / "it.yaml": lambda: read_sweep(folder / "it.yaml"),
    }


def broken(whole, others, draw):
    """`whole` with bits flipped, an end or a middle missing, a part of zeros, or what another file holds."""
    kind, place = draw.randrange(7), draw.randrange(len(whole))
    if kind < 3:
        changed = bytearray(whole)
        for _ in range(1 + kind):
            changed[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if kind == 3:
        return whole[:place]
    if kind == 4:
        return whole[:place] + whole[place + draw.randrange(1, 100) :]
    if kind == 5:
        return whole[:place] + bytes(min(64, len(whole) - place)) + whole[place + 64 :]
    return draw.choice(others)


def test_broken_files_end_in_the_right_value_or_in_one_sentence(tmp_path):
    """Text that is read as figures has no checksum: there, another figure may be read; everywhere else it may not."""
    readers, draw, said = kept_files(tmp_path), random.Random(0), []
    whole = {file: file.read_bytes() for file in readers}
    right = {file: files.fingerprint(read()) for file, read in readers.items() if file.suffix == ".safetensors"}
    for number in range(350):
        file, read = [*readers.items()][number % len(readers)]
        others = [b"", b"[" * 100_000, b"\0" * 300, *(content for other, content in whole.items() if other != file)]
        file.write_bytes(content := broken(whole[file], others, draw))
        start = time.monotonic()
        try:
            found = read()
        except ValueError as error:
            said.append(str(error))
        else:
            assert file not in right or files.fingerprint(found) == right[file], content
        assert time.monotonic() - start < 10, content
        assert file.read_bytes() == content, "what is broken stays as it is"
        file.write_bytes(whole[file])
    assert len(said) > 250
    assert not [sentence for sentence in said if not sentence or "\n" in sentence]


def test_a_writer_that_was_killed_leaves_nothing_after_the_next_start(tmp_path):
    path, code = tmp_path / "it.txt", "from apudae import files; import os, pathlib, sys\n"
    code += "with files.written_aside(pathlib.Path(sys.argv[1])) as aside:\n"
    code += "    aside.write_text('half'); os.kill(os.getpid(), 9)"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, path], cwd=files.ROOT)
    assert len(list(tmp_path.iterdir())) == 1, "the second start removed what the first had left"
    with files.written_aside(path) as mine:
        assert list(tmp_path.iterdir()) == [mine]
        with files.written_aside(path) as other:
            other.write_text("of another writer, who lives as well")
        mine.write_text("whole")
    assert [file.name for file in tmp_path.iterdir()] == ["it.txt"]
    assert path.read_text() == "whole"


# --- images -----------------------------------------------------------------------------------------------------------


def folder_of(tmp_path, save):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for number in range(6):
            save(tmp_path / name / f"{number}", number)
    return f"folder:{tmp_path}"


def test_sixteen_bits_keep_their_brightness_and_32_are_refused(tmp_path):
    deep = np.full((6, 6), 257 * 128, np.uint16)

    def save(path, number):
        header = b"P5 6 6 65535\n"
        path.with_suffix(".pgm").write_bytes(header + deep.astype(">u2").tobytes())

    x, _ = apudae.load_dataset(folder_of(tmp_path, save), "train")[0]
    assert torch.allclose(x, torch.tensor(128 / 255), atol=1e-3)
    Image.fromarray(np.full((6, 6), 1e6, np.float32)).save(tmp_path / "ant" / "6.tiff")
    parts = [apudae.load_dataset(f"folder:{tmp_path}", split) for split in ("train", "test")]
    with pytest.raises(ValueError, match="has 32 bits a pixel"):
        [part[i] for part in parts for i in range(len(part))]


def test_orientation_is_as_the_camera_was_held_and_hidden_folders_are_no_classes(tmp_path):
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, :4] = 255

    def save(path, number):
        exif = Image.Exif()
        exif[274] = 6
        Image.fromarray(wide).save(path.with_suffix(".jpg"), exif=exif, quality=95)

    name = folder_of(tmp_path, save)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    dataset = apudae.load_dataset(name, "train")
    assert dataset.classes == ["ant", "bee"]
    x, _ = dataset[0]
    assert x.shape == (3, 8, 4)
    assert x[:, :4].mean() > 0.9 > 0.1 > x[:, 4:].mean()


def test_a_pipe_in_a_folder_is_named(tmp_path):
    name = folder_of(tmp_path, lambda path, number: Image.new("L", (4, 4)).save(path.with_suffix(".png")))
    os.mkfifo(tmp_path / "ant" / "9.png")
    with pytest.raises(ValueError, match=r"9\.png is no file"):
        apudae.load_dataset(name, "train")


# --- generated bad calls ----------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.floats(),
    st.integers(-3, 3),
    st.none(),
    st.booleans(),
    st.text(max_size=3),
    st.just(1e-300),
    st.just(1e300),
    st.just([]),
)
tensors = st.sampled_from(
    [
        X,
        X * 255,
        X - 1,
        X * math.nan,
        X.double(),
        X.byte(),
        X[0],
        X[:0],
        X.numpy(),
        None,
        X.tolist(),
        X[..., :0],
        X.to("meta"),
    ]
)
labels = st.sampled_from([Y, Y[:3], Y.float(), Y * 9, -Y, Y[:, None], None, Y.tolist()])
NUMERIC = ["steps", "step_size", "noise_std", "resize", "rotation", "betas"]
MODEL, DAE = linear_classifier(16, 3), tiny_dae()


def ends_well(call):
    """The call's images, all finite and in [0, 1], or one sentence."""
    before = snapshot(MODEL), snapshot(DAE), X.clone()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = call()
    except ValueError as error:
        said = str(error)
    else:
        said = "an image"
        assert found.isfinite().all()
        assert found.min() >= 0
        assert found.max() <= 1
    assert said
    assert "\n" not in said
    assert (snapshot(MODEL), snapshot(DAE)) == before[:2]
    assert torch.equal(X, before[2])


@settings(max_examples=600, deadline=10_000)
@given(name=st.sampled_from(OURS), x=tensors, y=labels, epsilon=numbers, steps=numbers, step_size=numbers)
def test_attacks_end_in_images_or_one_sentence(name, x, y, epsilon, steps, step_size):
    options = {"steps": steps} if name in ("bim", "pgd", "cw", "deepfool") else {}
    options |= {"step_size": step_size} if name in ("bim", "pgd") else {}
    if (isinstance(steps, int) and steps is not True and steps > 3) or (steps is None and name not in ("bim", "pgd")):
        options.pop("steps", None)
    options |= {"search_steps": 1, "steps": options.get("steps", 3)} if name == "cw" else {}
    ends_well(lambda: getattr(attacks, name)(MODEL, x, y, epsilon=epsilon, **options))


@settings(max_examples=500, deadline=10_000)
@given(
    x=tensors,
    change=st.dictionaries(st.sampled_from(NUMERIC), numbers, max_size=2),
    loss=st.sampled_from(["dist", "hinge", "it"]),
    step_rule=st.sampled_from(["sign", "adam", 3]),
    seed=st.one_of(st.integers(-2, 2), numbers),
)
def test_purifiers_end_in_images_or_one_sentence(x, change, loss, step_rule, seed):
    rules = {"steps": 2, "loss": loss, "step_rule": step_rule}
    ends_well(lambda: apudae.purify(DAE, x, PurifyConfig(**rules | change), seed=seed))


@pytest.mark.slow
def test_a_thousand_bad_words_end_in_one_sentence(tmp_path):
    """Parameters as text, in one process: what the command line does before anything starts."""
    from apudae.batch.parameters import check_parameters, declared_parameters

    words = [
        "",
        "010",
        "-5",
        "nan",
        "1e999",
        "8/255",
        "8/0",
        "[",
        "[fgms]",
        "{a: 1}",
        "*a",
        "!!python/object:os.system",
        "~",
        "a\n",
    ]
    words += [
        "true",
        "on",
        "1_000",
        "0x1f",
        "2026-11-28",
        "'",
        '"',
        "\0",
        "🙂",
        "-1.5",
        ".inf",
        "<<: 1",
        "&a [*a]",
        "1:30",
        "[1, [2]]",
    ]
    for key, (default, _) in declared_parameters("05_purify_a").items():
        for word in words:
            try:
                found = check_parameters("05_purify_a", {key: word})[key]
            except ValueError as error:
                found, said = default, str(error)
                assert f"parameter {key} of 05_purify_a" in said
            assert type(found) is type(default)
            assert not (isinstance(found, float) and not math.isfinite(found))
            assert not (isinstance(found, int) and found < 0)


BAD_YAML = {
    "a key twice": "n: 1\nn: 2\n",
    "a number as a key": "1: 2\n",
    "nothing as a key": "~: 2\n",
    "a line as a key": '"a\\n": 2\n',
    "a list": "[1, 2]\n",
    "a bomb": "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 70)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "an object": "a: !!python/object/apply:os.system [ls]\n",
    "no YAML": "a: [\n",
    "bytes": "\xff\xfe",
}


@pytest.mark.parametrize("kind", BAD_YAML)
def test_bad_files_of_parameters_are_one_sentence(kind, tmp_path):
    from apudae.batch.parameters import read_mapping

    (tmp_path / "it.yaml").write_text(BAD_YAML[kind], encoding="latin-1")
    with pytest.raises(ValueError, match=r"it\.yaml (is no YAML file|holds)"):
        read_mapping(tmp_path / "it.yaml")


@pytest.mark.slow
def test_the_command_line_says_one_sentence():
    commands = [
        ["run", "05_purify_a", "-p", "n", "-5"],
        ["run", "05_purify_a", "-p", "n", "0"],
        ["run", "05_purify_a", "-p", "run", "../../x"],
        ["run", "05_purify_a", "-p", "run", "report"],
        ["run", "05_purify_a", "-p", "epsilon", "nan"],
        ["run", "99_nothing"],
        ["report", "--results", "constraints.txt"],
        ["sweep", "README.md"],
    ]
    if not torch.cuda.is_available():
        commands.append(["run", "05_purify_a", "-p", "device", "cuda"])
    for words in commands:
        command = [sys.executable, "-c", "from apudae.batch.cli import main; main()", *words]
        done = subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True, timeout=60)
        said = done.stderr.strip().splitlines()
        assert done.returncode in (1, 2), words
        assert "Traceback" not in done.stderr, done.stderr
        assert said[-1].startswith("apudae: "), words


def test_models_with_gradients_of_their_own_keep_them():
    before = set_gradients(MODEL)
    run_attack("bim", MODEL, X, Y, epsilon=0.1, steps=2)
    assert snapshot(MODEL) == before
    MODEL.zero_grad()
    assert predict(MODEL, X).shape == (6,)
    assert json.loads(row(3)["attack_parameters"]) == {"epsilon": 0.1}
    assert isinstance(read_results, type(record))
    assert pd.DataFrame([row(3)]).epsilon.tolist() == [0.1]


# --- where it runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["direct", "F", "G"])
def test_the_default_device_of_torch_changes_nothing(name):
    """Random numbers are the CPU's, wherever torch puts new tensors ("meta" holds none, as no GPU is here)."""
    dae, x = tiny_dae(), images(3, 1, 8, 8)
    config = replace(PRESETS[name], steps=2, noise_std=0.1)
    model, y = linear_classifier(64, 3), torch.tensor([0, 1, 2])
    dae.recon_mu, dae.recon_sigma = torch.tensor(0.1), torch.tensor(0.1)

    def made():
        attacked = [attacks.pgd(model, x, y, epsilon=0.1, norm=norm, step_size=0.05) for norm in ("linf", "l2")]
        return [apudae.purify(dae, x, config, seed=3), *attacked, attacks.r_fgsm(model, x, y, epsilon=0.1)]

    expected = made()
    torch.set_default_device("meta")
    try:
        found = made()
    finally:
        torch.set_default_device(None)
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory",
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "MPS backend out of memory (MPS allocated: 9 GB)",
    ],
)
def test_every_text_of_too_little_memory_halves_the_batch(text):
    def cramped(x):
        if len(x) > 1:
            raise RuntimeError(text)
        return x

    with pytest.warns(UserWarning, match="does not fit into memory"):
        assert torch.equal(in_batches(cramped, X), X)


@pytest.mark.slow
def test_a_foreign_kernel_does_not_take_the_place_of_this_interpreter(tmp_path, monkeypatch):
    """A kernelspec "python3" elsewhere, as another user's JUPYTER_PATH has it, would run anything."""
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    notebook = new_notebook(
        cells=[new_code_cell("import sys; sys.executable"), new_code_cell('n: int = 1\nrun: str = "it"')]
    )
    notebook.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, tmp_path / "01_it.ipynb")
    for module in (parameters, notebooks):
        monkeypatch.setattr(module, "NOTEBOOKS", tmp_path)
    executed = notebooks.run_notebook("01_it", {}, tmp_path / "out" / "01_it.ipynb")
    outputs = nbformat.read(executed, as_version=4).cells[0].outputs
    assert outputs[0].data["text/plain"].strip("'") == sys.executable


@pytest.mark.slow
def test_a_browser_that_is_only_a_stub_leaves_figures_interactive(tmp_path):
    stub = tmp_path / "chromium"
    stub.write_text("#!/bin/sh\nexit 1\n")
    stub.chmod(0o755)
    code = "import plotly.io as pio; from apudae import plots; plots.setup(); print(pio.renderers.default)"
    given = {key: value for key, value in os.environ.items() if key != "PLOTLY_RENDERER"}
    given |= {"BROWSER_PATH": str(stub), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    ended = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, timeout=120)
    assert ended.stdout.split() == ["plotly_mimetype"], ended.stderr
    assert "figures are interactive only" in ended.stderr


@pytest.mark.parametrize("n", [5, 40, 119, 120, 300])
def test_a_few_images_are_enough_to_calibrate_on(n):
    fit, held_out = hold_out(range(n))
    assert len(held_out) == max(4, n // 30)
    assert len(fit) + len(held_out) == n
