import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset

from apudae import load_dataset
from apudae.datasets import stack, take, training_parts
from apudae.datasets.imagenet import imagenet_classes, readers
from apudae.models import DAE
from apudae.training.loop import Recipe
from apudae.training.objectives import _patches, train_dae

IDS = ["n01440764", "n01443537", "n15075141"]  # tench, goldfish and the last of all, toilet tissue
SAMPLE = os.path.join(os.environ.get("APUDAE_DATA", ""), "imagenet-sample")
needs_sample = pytest.mark.skipif(not os.path.isdir(SAMPLE), reason="APUDAE_DATA has no imagenet-sample")


def gradient(height, width):
    """Colours that differ from place to place, smoothly, so that JPEG keeps them."""
    rows, columns = np.linspace(0, 255, height)[:, None], np.linspace(0, 255, width)[None]
    planes = [rows + 0 * columns, columns + 0 * rows, (rows + columns) / 2]
    return Image.fromarray(np.stack(planes, 2).astype(np.uint8))


def save(file, image, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, **options)
    return file


@pytest.fixture
def root(tmp_path, monkeypatch):
    """APUDAE_DATA with two photographs for each of three classes as ImageNet's validation part, one each to train."""
    monkeypatch.setenv("APUDAE_DATA", str(tmp_path))
    for number, name in enumerate(IDS):
        for i in range(2):
            save(tmp_path / "imagenet" / "val" / name / f"{i}.JPEG", gradient(60 + i, 90 + number), quality=95)
        save(tmp_path / "imagenet" / "train" / name / "only.JPEG", gradient(90, 60), quality=95)
    return tmp_path


# --- ImageNet ---------------------------------------------------------------------------------------------------------


def test_labels_are_those_of_all_thousand_classes(root):
    dataset = load_dataset("imagenet", "test")
    assert dataset.labels.tolist() == [0, 0, 1, 1, 999, 999]
    assert (len(dataset.classes), dataset.classes[1], dataset.classes[999]) == (1000, "goldfish", "toilet tissue")
    assert load_dataset("imagenet", "train").labels.tolist() == [0, 1, 999]


def test_an_image_is_what_pillow_makes_of_it(root):
    image, label = load_dataset("imagenet", "test")[5]
    with Image.open(root / "imagenet" / "val" / IDS[2] / "1.JPEG") as file:
        whole = np.asarray(file.resize((int(256 * 92 / 61), 256), Image.Resampling.BICUBIC))
    left = round((whole.shape[1] - 224) / 2)
    expected = torch.tensor(whole[16:240, left : left + 224]).movedim(2, 0) / 255
    assert (image.shape, image.dtype, type(image), label) == ((3, 224, 224), torch.float32, torch.Tensor, 999)
    assert (image - expected).abs().max() < 0.02


def test_photographs_are_read_when_they_are_asked_for(root):
    dataset = load_dataset("imagenet", "test", image_size=32)
    before, _ = dataset[0]
    save(dataset.files[0][0], Image.new("RGB", (70, 70), (255, 0, 0)))
    after, _ = dataset[0]
    assert before.shape == after.shape == (3, 32, 32)
    assert after[0].min() > 0.95
    assert before[0].min() < 0.5


MODES = {
    "grey": Image.new("L", (40, 40), 128),
    "CMYK": Image.new("CMYK", (40, 40), (127, 127, 127, 0)),
    "transparent": Image.new("RGBA", (40, 40), (128, 128, 128, 255)),
    "16 bits": Image.fromarray(np.full((40, 40), 0x8000, np.uint16)),
}


@pytest.mark.parametrize("kind", MODES)
def test_every_kind_of_pixels_becomes_the_same_colour(root, kind):
    name = "0.jpg" if kind == "CMYK" else "0.png"
    save(root / "imagenet" / "val" / IDS[0] / name, MODES[kind])
    dataset = load_dataset("imagenet", "test", image_size=16)
    (index,) = [i for i, (file, _) in enumerate(dataset.files) if file.suffix in (".png", ".jpg")]
    torch.testing.assert_close(dataset[index][0], torch.full((3, 16, 16), 0.5), atol=0.02, rtol=0)


def truncated(file):
    file.write_bytes(file.read_bytes()[:400])


def garbage(file):
    file.write_bytes(b"no picture at all")


def single(file):
    save(file, Image.new("RGB", (1, 1)))


@pytest.mark.parametrize("spoil", [truncated, garbage, single])
def test_bad_photograph_is_named_and_left_out_only_if_asked(root, spoil):
    spoil(root / "imagenet" / "val" / IDS[1] / "0.JPEG")
    dataset = load_dataset("imagenet", "test", image_size=16)
    assert dataset[3][1] == 1, "the others can be read"
    with pytest.raises(ValueError, match=rf"{IDS[1]}/0\.JPEG") as refused:
        stack(dataset)
    assert "\n" not in str(refused.value)
    with pytest.warns(UserWarning, match=r"1 of 6 photographs are left out.*0\.JPEG"):
        dataset = load_dataset("imagenet", "test", image_size=16, skip_broken=True)
    x, y = stack(dataset)
    assert (len(x), y.tolist(), dataset.labels.tolist()) == (5, [0, 0, 1, 999, 999], [0, 0, 1, 999, 999])


def test_nothing_is_left_out_where_all_is_whole(root, recwarn):
    assert len(load_dataset("imagenet", "test", image_size=16, skip_broken=True)) == 6
    assert not [warning for warning in recwarn if "left out" in str(warning.message)]


def test_other_data_sets_have_nothing_to_skip():
    with pytest.raises(ValueError, match="skip_broken is for ImageNet's folders alone; mnist5k"):
        load_dataset("mnist5k", "test", skip_broken=True)


def test_folders_that_are_no_classes_are_named(root):
    save(root / "imagenet" / "val" / "tench" / "0.JPEG", gradient(40, 40))
    with pytest.raises(ValueError, match=r"1 folders of no ImageNet class \(tench.*WordNet id") as refused:
        load_dataset("imagenet", "test")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "split", "named"),
    [
        ("imagenet", "test", r"imagenet/val is no folder; .*APUDAE_DATA"),
        ("imagenet-sample", "test", r"imagenet-sample is no folder"),
        ("imagenet-sample", "train", r"imagenet-sample has no split 'train'; there is: test"),
        ("imagenet-sample", "held_out", r"imagenet-sample has no split 'held_out'; there is: test"),
        ("bsds500", "train", r"bsds500/train has no photographs.*APUDAE_DATA"),
        ("bsds500", "held_out", r"bsds500/val has no photographs"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, monkeypatch, name, split, named):
    monkeypatch.setenv("APUDAE_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=named):
        load_dataset(name, split)


def test_folder_without_photographs_is_named(root):
    (root / "imagenet-sample" / IDS[0]).mkdir(parents=True)
    with pytest.raises(ValueError, match="imagenet-sample has no photographs in class folders"):
        load_dataset("imagenet-sample", "test")


def test_missing_package_is_named_with_its_remedy(root, monkeypatch):
    imagenet_classes.cache_clear()
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(ValueError, match=r"ImageNet needs the package timm .*\[imagenet\]") as refused:
        load_dataset("imagenet", "test")
    assert "\n" not in str(refused.value)


@needs_sample
def test_sample_has_one_photograph_of_each_class():
    dataset = load_dataset("imagenet-sample", "test")
    assert dataset.labels.tolist() == list(range(1000))
    x, y = take(dataset, 3, seed=1)
    assert x.shape == (3, 3, 224, 224)
    assert torch.equal(dataset[int(y[0])][0], x[0])


def test_four_photographs_come_with_the_packages(monkeypatch):
    dataset = load_dataset("photographs", "test")
    x, y = stack(dataset)
    assert (x.shape, y.tolist()) == ((4, 3, 224, 224), [698, 282, 967, 872])
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ValueError, match="the data set photographs needs the package skimage"):
        load_dataset("photographs", "test")


# --- BSDS500 ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bsds(tmp_path, monkeypatch):
    monkeypatch.setenv("APUDAE_DATA", str(tmp_path))
    for part, count in {"train": 3, "val": 2, "test": 1}.items():
        for i in range(count):
            upright = gradient(48, 32) if i == 1 else gradient(32, 48)
            save(tmp_path / "bsds500" / part / f"{i}.png", upright)
    return tmp_path / "bsds500"


def test_upright_photographs_are_turned(bsds):
    x, _ = stack(load_dataset("bsds500", "train"))
    assert (x.shape, x.dtype) == ((3, 3, 32, 48), torch.float32)
    upright = torch.from_numpy(np.asarray(gradient(48, 32)).copy()).movedim(2, 0) / 255
    assert torch.equal(x[1], upright.rot90(1, (1, 2)))


def test_held_out_photographs_are_cut_as_imagenets_are(bsds):
    fit, held_out = training_parts("bsds500")
    assert (len(fit), len(held_out), len(load_dataset("bsds500", "test"))) == (3, 2, 1)
    assert held_out[0][0].shape == (3, 224, 224)


def test_photographs_of_two_sizes_are_refused(bsds):
    save(bsds / "train" / "9.png", gradient(30, 48))
    with pytest.raises(ValueError, match=r"bsds500/train has photographs of 2 sizes"):
        load_dataset("bsds500", "train")


# --- training on photographs ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_worker_processes_give_what_one_process_gives(root):
    streamed = load_dataset("imagenet", "test", image_size=16)
    assert readers(Subset(streamed, [0, 1])) >= 1
    assert readers(load_dataset("mnist5k", "test")) == 0
    x, y = stack(streamed)
    held = torch.utils.data.TensorDataset(x, y)
    weights = []
    for dataset in (streamed, held):
        torch.manual_seed(0)
        dae = DAE(3, 2, 4)
        curve = train_dae(dae, dataset, Recipe(3, 2), noise_std_max=0.3)
        weights.append((dae.output.weight, curve))
    assert torch.equal(weights[0][0], weights[1][0])
    assert weights[0][1] == weights[1][1]


def test_patches_are_parts_of_their_images_in_every_orientation():
    x = torch.arange(40 * 3 * 8 * 9.0).view(40, 3, 8, 9)
    patches = _patches(x, 4, 1, torch.Generator().manual_seed(0))
    assert patches.shape == (40, 3, 4, 4)
    turns = set()
    for image, patch in zip(x, patches, strict=True):
        found = [
            (quarter, down, right)
            for quarter in range(4)
            for down in range(5)
            for right in range(6)
            if torch.equal(image[:, down : down + 4, right : right + 4].rot90(quarter, (1, 2)), patch)
        ]
        assert len(found) == 1
        turns |= {(found[0][0], found[0][1])}
    assert {quarter for quarter, _ in turns} == {0, 1, 2, 3}
    assert {down for _, down in turns} == {0, 1, 2, 3, 4}


def test_patches_of_smaller_images_are_means_of_squares():
    """Of a ramp of 1 a pixel the mean of k×k pixels is one of k a pixel, whichever way it is turned."""
    x, slopes = torch.arange(12.0).expand(5, 3, 12, 12), set()
    for seed in range(20):
        patches = _patches(x, 3, 4, torch.Generator().manual_seed(seed))
        assert patches.shape == (5, 3, 3, 3)
        steps = torch.stack([patches.diff(dim=dim).abs().amax((1, 2, 3)) for dim in (2, 3)]).amax(0)
        assert len(steps.unique()) == 1, "one factor a batch"
        slopes.add(steps[0].item())
    assert slopes == {2, 3, 4}


def test_patch_must_fit_into_the_images(bsds):
    data = load_dataset("bsds500", "train")
    with pytest.raises(ValueError, match=r"patch · shrink is 34; needed: at most the images' sides, \(32, 48\)"):
        train_dae(DAE(3, 2, 4), data, Recipe(1, 2), noise_std_max=0.3, patch=17, shrink=2)
    with pytest.raises(ValueError, match="shrink is 2, without a patch; give one"):
        train_dae(DAE(3, 2, 4), data, Recipe(1, 2), noise_std_max=0.3, shrink=2)
    with pytest.raises(ValueError, match=r"patch is 33; needed: at most the images' sides, \(32, 48\)"):
        train_dae(DAE(3, 2, 4), load_dataset("bsds500", "train"), Recipe(1, 2), noise_std_max=0.3, patch=33)


PURIFY_MANY = """
import sys, torch, apudae
from apudae.models import DAE
torch.manual_seed(0)
x = torch.rand(int(sys.argv[1]), 3, 224, 224)
dae = apudae.load_model(sys.argv[2]) if sys.argv[2:] else DAE(3, 2, 4)
apudae.purify(dae, x, apudae.PurifyConfig(steps=1))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's; ru_maxrss counts what the parent had")
def test_memory_of_many_photographs_is_theirs_and_a_constant():
    """What 100 more photographs add stays below four copies of them, so 1,000 of them stay below 4 GB.

    A small autoencoder shows it: what a large one holds of a part of them hides some copies, more or fewer each time.
    """
    few, many, large = (
        int(subprocess.run([sys.executable, "-c", PURIFY_MANY, *call], capture_output=True, check=True).stdout) * 1024
        for call in (["20"], ["120"], ["4", "imagenet/unet"])
    )
    copy = 3 * 224**2 * 4
    assert many - few < 4 * 100 * copy
    assert large + 4 * 996 * copy < 4e9
