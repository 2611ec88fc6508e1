import io
from datetime import datetime

import numpy as np
import pytest
import torch
from PIL import Image
from traitlets import Bunch

import apudae
from apudae.evaluation.explorer import Explorer
from apudae.evaluation.scene import attacked, scene, uploaded, variant
from apudae.evaluation.study import open_study


@pytest.fixture(scope="module")
def study():
    return open_study("31_explorer", dataset="mnist5k", n=10)


@pytest.fixture
def explorer(study):
    return Explorer(study, image=3, steps=4)


def files_of(name, content):
    about = {"type": "image/png", "size": len(content), "last_modified": datetime(2022, 12, 9)}
    return (Bunch(name=name, content=content, **about),)


def file_of(pixels, kind="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["A", "D", "F", "G", "direct"])
def test_a_scene_is_what_the_library_says(study, name):
    """Attack, purifier, errors and labels of one image are those that the other notebooks count."""
    x, y = study.x[3:4], study.y[3:4]
    x_adv = attacked(study, x, y, "bim", 0.08)
    assert x_adv.equal(apudae.attacks.bim(study.classifier, x, y, epsilon=0.08, step_size=study.step_size))
    config = variant(name, 4, 0.02, 0.03 if name == "F" else 0.0)
    found = scene(study, x, x_adv, config, image=3)
    assert found.steps == (1 if name == "direct" else 4)
    assert found.images[:2].equal(torch.cat([x, x_adv]))
    assert found.images[-1:].equal(apudae.purify(study.dae, x_adv, config, ids=torch.tensor([3])))
    if name in ("A", "D", "direct"):  # F begins with noise, G with a turn
        assert found.images[2:3].equal(x_adv)
    assert torch.allclose(found.errors, apudae.recon_error(study.dae, found.images), rtol=1e-4)
    assert torch.allclose(found.probabilities, study.classifier(found.images).softmax(1), atol=1e-5)
    best = found.best(1, study.classes)
    assert len(best) == 5
    assert list(best.values()) == sorted(found.probabilities[1].tolist(), reverse=True)[:5]
    assert next(iter(best)) == study.classes[study.classifier(x_adv).argmax()]


@pytest.mark.parametrize(("attack", "epsilon"), [("clean", 0.1), ("pgd", 0)])
def test_no_attack_leaves_the_image(study, attack, epsilon):
    assert attacked(study, study.x[:1], study.y[:1], attack, epsilon).equal(study.x[:1])


def test_a_variant_has_just_the_noise_that_is_given():
    assert variant("F", 15, 0.01, 0.0).noise_std == 0
    assert variant("A", 15, 0.01, 0.1).noise_std == 0.1
    with pytest.raises(ValueError, match="n is 0; needed: a whole number of at least 1"):
        variant("A", 0, 0.01, 0.0)


def test_no_slider_clips_what_the_notebook_gives(study):
    assert Explorer(study, variant="F", noise_std=0.5).noise_std.value == 0.5
    with pytest.raises(ValueError, match="noise_std is -1; needed: a finite number of at least 0"):
        Explorer(study, noise_std=-1)
    with pytest.raises(ValueError, match="step_size is -1; needed: a finite number of at least 0"):
        open_study("31_explorer", dataset="mnist5k", n=10, step_size=-1)


def test_a_notebook_names_a_device_that_is_not_there():
    """Run All in JupyterLab meets no check of the command line."""
    with pytest.raises(ValueError, match="device 'gpu' is unknown"):
        open_study("31_explorer", dataset="mnist5k", n=10, device="gpu")


def test_an_uploaded_image_is_its_pixels(study):
    pixels = np.arange(28 * 28).reshape(28, 28).astype(np.uint8)
    found = uploaded("mine.png", file_of(pixels), study.x)
    assert found.shape == (1, 1, 28, 28)
    assert found.mul(255).round().byte()[0, 0].numpy().tolist() == pixels.tolist()
    colours = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    found = uploaded("mine.png", file_of(colours), torch.zeros(1, 3, 6, 5))
    assert found[0].mul(255).round().byte().movedim(0, 2).numpy().tolist() == colours.tolist()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (file_of(np.zeros((28, 28, 3), np.uint8)), r"mine has 3 channel\(s\) of 28×28 .*needed here: 1 channel\(s\)"),
        (file_of(np.zeros((30, 28), np.uint8)), r"mine has 1 channel\(s\) of 30×28 .*needed here: .* of 28×28"),
        (b"no image", "^mine is no image that can be read"),
        (file_of(np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8))[:400], "^mine is a broken image"),
    ],
    ids=["channels", "size", "text", "cut"],
)
def test_an_upload_that_does_not_fit_is_one_sentence(study, content, said):
    with pytest.raises(ValueError, match=said):
        uploaded("mine", content, study.x)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        ({"image": 10}, "image is 10; there are 10"),
        ({"attack": "pdg"}, "attack 'pdg' is unknown; there is: clean, random"),
        ({"variant": "H"}, "variant 'H' is unknown"),
        ({"steps": -1}, "n is -1"),
    ],
)
def test_a_beginning_that_cannot_be_is_refused(study, start, said):
    with pytest.raises(ValueError, match=said):
        Explorer(study, **start)


def test_what_does_not_change_is_kept(explorer):
    first = explorer.scene
    assert explorer.step.value == explorer.step.max == 4
    before = explorer.view.value
    explorer.step.value = 2
    assert explorer.scene is first, "another step purifies nothing again"
    assert explorer.view.value != before
    (kept,) = explorer.attacked.values()
    explorer.variant.value = "D"
    assert explorer.scene is not first
    assert explorer.step.value == 2
    assert list(explorer.attacked.values()) == [kept], "another variant attacks nothing again"
    explorer.epsilon.value = 0.05
    assert len(explorer.attacked) == 2


def test_a_variant_brings_its_own_noise(explorer):
    explorer.variant.value = "F"
    assert explorer.noise_std.value == apudae.PRESETS["F"].noise_std
    explorer.variant.value = "A"
    assert explorer.noise_std.value == 0


def test_bad_input_is_one_sentence(explorer):
    explorer.steps.value = 0
    assert "n is 0; needed" in explorer.message.value
    assert explorer.view.value == "", "nothing is shown that is not so"
    explorer.steps.value = 3
    assert "image 3 of mnist5k" in explorer.message.value
    assert "step 3" in explorer.view.value


def test_an_upload_is_shown_or_refused(explorer):
    content = file_of(np.zeros((8, 8, 3), np.uint8))
    before = explorer.view.value
    explorer.upload.value = files_of("<my>.png", content)
    assert "&lt;my&gt;.png has 3 channel(s) of 8×8" in explorer.message.value
    assert explorer.view.value == before
    content = file_of(np.eye(28, dtype=np.uint8) * 255)
    explorer.upload.value = files_of("mine.png", content)
    assert "mine.png" in explorer.message.value
    assert explorer.scene.images[0, 0].equal(torch.eye(28))
    assert explorer.truth.startswith("reads "), "nobody said what it is"
    explorer.image.value = 1
    assert explorer.scene.images[:1].equal(explorer.study.x[1:2])


@pytest.mark.slow
def test_another_data_set_comes_with_its_own(explorer, tmp_path, monkeypatch):
    explorer.dataset.value = "cifar10-20"
    assert explorer.scene.images.shape == (15 + 3, 3, 32, 32)
    assert explorer.epsilon.value == pytest.approx(8 / 255)
    assert explorer.image.max == 9
    monkeypatch.setenv("APUDAE_DATA", str(tmp_path))
    before = explorer.view.value
    explorer.dataset.value = "imagenet"
    assert "is no folder" in explorer.message.value
    assert explorer.dataset.value == "cifar10-20", "what is shown is what is chosen"
    assert explorer.view.value == before
