import hashlib
import io
import os
import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from apudae import load_dataset
from apudae.datasets import CIFAR10_CLASSES, hold_out, stack, take
from apudae.datasets.small import TensorImages
from apudae.names import check_known

needs_mnist = pytest.mark.skipif("APUDAE_DATA" not in os.environ, reason="APUDAE_DATA is not set")


def contents(dataset):
    return [digit.tobytes() for digit in dataset.pixels.numpy()]


def save_image(file, value, mode="L", size=(6, 6)):
    """A file of one colour: grey `value`, or a colour whose red is `value`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, {"L": value, "RGB": (value, 50, 60)}[mode]).save(file)
    return file


def save_folder(root, counts=(10, 7), mode="L", ending="png"):
    """Folders "ant" and "bee"; image i of class c has the grey value 100c + i."""
    for label, (name, count) in enumerate(zip(("ant", "bee"), counts, strict=True)):
        for i in range(count):
            save_image(root / name / f"{i:02}.{ending}", 100 * label + i, mode)
    return root


def load_all(root, split="train", **options):
    return stack(load_dataset(f"folder:{root}", split, **options))


# --- digits -----------------------------------------------------------------------------------------------------------


def test_mnist5k_is_split_evenly():
    train, test = load_dataset("mnist5k", "train"), load_dataset("mnist5k", "test")
    assert train.labels.bincount().tolist() == [400] * 10
    assert test.labels.bincount().tolist() == [100] * 10
    assert test.classes == [str(digit) for digit in range(10)]
    assert not set(contents(train)) & set(contents(test))


def test_digits_are_float32_in_unit_range():
    dataset = load_dataset("mnist5k", "test")
    x, y = stack(dataset)
    assert x.shape == (1000, 1, 28, 28)
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert (x.min(), x.max()) == (0, 1)
    one, label = dataset[517]
    assert torch.equal(one, x[517])
    assert label == y[517]


@needs_mnist
def test_mnist_train_never_shows_the_demo_digits():
    train, shown = load_dataset("mnist", "train"), load_dataset("mnist5k", "test")
    assert len(train) == 59_000
    assert not set(contents(train)) & set(contents(shown))
    assert set(contents(load_dataset("mnist5k", "train"))) <= set(contents(train))


@needs_mnist
def test_mnist_test_is_whole():
    test = load_dataset("mnist", "test")
    assert len(test) == 10_000
    assert test.labels.bincount()[:3].tolist() == [980, 1135, 1032]  # as published


@pytest.mark.parametrize(("name", "unpacked"), [("mnist", "MNIST/raw"), ("cifar10", "cifar-10-batches-py")])
def test_data_that_cannot_be_downloaded_say_what_to_do(tmp_path, monkeypatch, name, unpacked):
    monkeypatch.setenv("APUDAE_DATA", str(tmp_path))
    (tmp_path / name / unpacked).mkdir(parents=True)  # there, but empty: no download is tried
    with pytest.raises(ValueError, match=f"APUDAE_DATA to a folder with {name}/{unpacked} inside"):
        load_dataset(name, "test")


@pytest.mark.parametrize("name", ["mnist6k", "", "MNIST", "folder"])
def test_unknown_data_set_lists_what_there_is(name):
    with pytest.raises(
        ValueError, match=r"mnist5k, .*, cifar10-jpeg, cifar10-jpeg-moved, cifar10-20, imagenet, .*, folder:PATH"
    ):
        load_dataset(name, "test")


@pytest.mark.parametrize("name", ["mnist5k", "folder:nowhere"])
def test_unknown_split_lists_what_there_is(name):
    with pytest.raises(ValueError, match="'validation' is unknown; there is: train, test"):
        load_dataset(name, "validation")


# --- CIFAR-10 ---------------------------------------------------------------------------------------------------------


def jpeg(value, size=(8, 8)):
    """A JPEG file of one colour, as bytes."""
    file = io.BytesIO()
    Image.new("RGB", size, (value, 255 - value, 60)).save(file, "JPEG", quality=95)
    return file.getvalue()


def save_zip(folder, counts=(3, 2), drop="nothing", method=zipfile.ZIP_STORED, **more):
    """cifar10-jpeg.zip with so many train and test images a class, but for `drop`; image i of class c: 20c + i red."""
    entries = {
        f"{part}/{name}/{i:04}.jpg": jpeg(20 * label + i)
        for part, count in zip(("train", "test"), counts, strict=True)
        for label, name in enumerate(CIFAR10_CLASSES)
        for i in range(count)
    }
    with zipfile.ZipFile(folder / "cifar10-jpeg.zip", "w", method) as archive:
        archive.writestr("train/airplane/", "")
        archive.writestr("README.md", "not an image")
        for name, content in (entries | more).items():
            if not name.startswith(drop):
                archive.writestr(name, content)
    return folder / "cifar10-jpeg.zip"


@pytest.fixture
def cifar_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("APUDAE_DATA", str(tmp_path))
    return tmp_path


def test_zip_is_read_without_being_unpacked(cifar_folder):
    save_zip(cifar_folder)
    train, test = (load_dataset("cifar10-jpeg", split) for split in ("train", "test"))
    assert train.classes == CIFAR10_CLASSES
    assert train.labels.tolist() == [label for label in range(10) for _ in range(3)]
    x, _ = stack(test)
    assert (x.shape, x.dtype) == ((20, 3, 8, 8), torch.float32)
    red = torch.tensor([20.0 * label + i for label in range(10) for i in range(2)])
    assert ((x[:, 0] * 255).mean((1, 2)) - red).abs().max() < 3  # JPEG
    assert (x[:, 1] + x[:, 0] - 1).abs().max() < 0.03
    assert [file.name for file in cifar_folder.iterdir()] == ["cifar10-jpeg.zip"]


def test_moved_images_are_the_copy_s_off_its_grid(cifar_folder):
    save_zip(cifar_folder)
    (x, y), (moved, labels) = (stack(load_dataset(name, "test")) for name in ("cifar10-jpeg", "cifar10-jpeg-moved"))
    assert torch.equal(y, labels)
    assert torch.equal(moved[..., 4:, 4:], x[..., :4, :4])
    assert torch.equal(moved[..., 4:, :4], x[..., :4, 1:5].flip(3)), "the border is a mirror's"
    with pytest.raises(ValueError, match="cifar10-jpeg-moved has no split 'held_out'; there is: test"):
        load_dataset("cifar10-jpeg-moved", "held_out")


def test_held_out_part_of_a_zip_is_evenly_spread(cifar_folder):
    save_zip(cifar_folder, (12, 1))
    held_out = load_dataset("cifar10-jpeg", "held_out")
    assert held_out.classes == CIFAR10_CLASSES
    assert held_out.labels.tolist() == [0, 3, 6, 9]  # a thirtieth of 120
    assert torch.equal(stack(held_out)[0][1], load_dataset("cifar10-jpeg", "train")[39][0])


BAD_ZIPS = {
    "class missing in both": ({"drop": ("train/ship/", "test/ship/")}, r"in train/; needed: .*'ship'"),
    "class missing in test": ({"drop": "test/ship/"}, r"in test/; needed: .*'ship'"),
    "other class in test": ({"test/zebra/0000.jpg": jpeg(1)}, r"'zebra'\] in test/; needed"),
    "part missing": ({"drop": "test/"}, r"classes \[\] in test/; needed"),
    "two sizes": ({"train/ship/9.jpg": jpeg(1, (8, 9))}, r"2 sizes \(\(8, 8\) to \(9, 8\)\)"),
    "no image": ({"train/ship/9.jpg": b"no picture"}, r"train/ship/9\.jpg in .*is broken"),
    "half an image": ({"train/ship/9.jpg": jpeg(1)[:400]}, r"train/ship/9\.jpg in .*is broken"),
}


@pytest.mark.parametrize("case", BAD_ZIPS)
def test_bad_zip_is_refused_in_one_sentence(cifar_folder, case):
    options, named = BAD_ZIPS[case]
    save_zip(cifar_folder, **options)
    with pytest.raises(ValueError, match=named) as refused:
        load_dataset("cifar10-jpeg", "train")
    assert "cifar10-jpeg.zip" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert [file.name for file in cifar_folder.iterdir()] == ["cifar10-jpeg.zip"]


def test_cifar10_comes_as_torchvision_keeps_it(cifar_folder, monkeypatch):
    from torchvision.datasets import CIFAR10

    def keep(name, content):
        file = cifar_folder / "cifar10" / "cifar-10-batches-py" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(pickle.dumps(content))
        return [name, hashlib.md5(file.read_bytes()).hexdigest()]

    pixels = np.arange(4 * 3072, dtype=np.uint32).astype(np.uint8).reshape(4, 3072)  # rows of red, then green, blue
    meta = keep("meta", {"label_names": CIFAR10_CLASSES})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    monkeypatch.setattr(CIFAR10, "train_list", [keep("batch", {"data": pixels, "labels": [3, 1, 9, 0]})])
    monkeypatch.setattr(CIFAR10, "test_list", [keep("test", {"data": pixels[:1], "labels": [7]})])
    train = load_dataset("cifar10", "train")
    assert torch.equal(train.pixels, torch.from_numpy(pixels).view(4, 3, 32, 32))
    assert (train.labels.tolist(), train.classes) == ([3, 1, 9, 0], CIFAR10_CLASSES)
    assert load_dataset("cifar10", "test").labels.tolist() == [7]
    (cifar_folder / "cifar10" / "cifar-10-batches-py" / "batch").write_bytes(b"changed")
    with pytest.raises(ValueError, match="CIFAR10 is not complete"):
        load_dataset("cifar10", "train")


def test_missing_zip_says_where_it_belongs(cifar_folder):
    with pytest.raises(ValueError, match=r"cifar10-jpeg\.zip is missing.*APUDAE_DATA"):
        load_dataset("cifar10-jpeg", "test")


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_truncated_zip_is_named(cifar_folder, kept):
    path = save_zip(cifar_folder)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"cifar10-jpeg\.zip is no whole ZIP file"):
        load_dataset("cifar10-jpeg", "test")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damage_inside_a_zip_is_named(cifar_folder, method):
    path = save_zip(cifar_folder, method=method)
    content = bytearray(path.read_bytes())
    content[3000:3400] = bytes(400)  # the directory, at the end, stays whole
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"\.jpg in .*cifar10-jpeg\.zip is broken"):
        load_dataset("cifar10-jpeg", "train")


@pytest.mark.slow
@pytest.mark.skipif(
    not os.path.isfile(os.path.join(os.environ.get("APUDAE_DATA", ""), "cifar10-jpeg.zip")),
    reason="APUDAE_DATA has no cifar10-jpeg.zip",
)
def test_cifar10_jpeg_is_whole():
    test = load_dataset("cifar10-jpeg", "test")
    assert test.pixels.shape == (10_000, 3, 32, 32)
    assert test.labels.bincount().tolist() == [1000] * 10


# --- folders of images ------------------------------------------------------------------------------------------------


def test_folder_with_train_and_test(tmp_path):
    save_folder(tmp_path / "train", (3, 4))
    save_folder(tmp_path / "test", (2, 1))
    dataset = load_dataset(f"folder:{tmp_path}", "train")
    assert dataset.classes == ["ant", "bee"]
    assert dataset.labels.tolist() == [0] * 3 + [1] * 4
    x, y = load_all(tmp_path, "test")
    assert y.tolist() == [0, 0, 1]
    assert torch.equal((x[:, 0, 0, 0] * 255).round(), torch.tensor([0.0, 1.0, 100.0]))


def test_single_folder_gives_every_fifth_of_a_class_to_test(tmp_path):
    save_folder(tmp_path, (10, 7))
    train, test = (load_all(tmp_path, split) for split in ("train", "test"))
    grey = [(x[:, 0, 0, 0] * 255).round().int().tolist() for x, _ in (train, test)]
    assert grey[1] == [0, 5, 100, 105]
    assert sorted(grey[0] + grey[1]) == [*range(10), *range(100, 107)]
    assert test[1].tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_channels_of_a_folder(tmp_path, mode, channels, ending):
    save_folder(tmp_path, (4, 4), mode, ending)
    x, _ = load_all(tmp_path)
    assert x.shape == (6, channels, 6, 6)
    assert x.dtype == torch.float32
    assert x.min() >= 0
    assert x.max() <= 1


def test_one_colour_image_makes_all_three_channels(tmp_path):
    save_folder(tmp_path, (4, 4), "L")
    save_image(tmp_path / "bee" / "colour.png", 200, "RGB")
    x, _ = load_all(tmp_path)
    assert x.shape[1] == 3
    assert torch.equal(x[0, 0], x[0, 2])  # a grey image stays grey
    assert torch.equal((x[-1, :, 0, 0] * 255).round(), torch.tensor([200.0, 50.0, 60.0]))


def test_channels_agree_between_splits(tmp_path):
    save_folder(tmp_path, (5, 5), "L")
    save_image(tmp_path / "ant" / "00.png", 200, "RGB")  # the only colour image is a test image
    assert load_all(tmp_path, "train")[0].shape[1] == load_all(tmp_path, "test")[0].shape[1] == 3


def test_grey_of_16_bits_keeps_its_brightness(tmp_path):
    save_folder(tmp_path, (4, 4))
    for file in (tmp_path / "ant").iterdir():
        Image.fromarray(np.full((6, 6), 0x8000, np.uint16)).save(file)
    x, y = load_all(tmp_path)
    torch.testing.assert_close(x[y == 0], torch.full_like(x[y == 0], 0.5), atol=0.01, rtol=0)


def test_mixed_sizes_need_image_size(tmp_path):
    save_folder(tmp_path, (4, 4))
    save_image(tmp_path / "ant" / "wide.png", 30, size=(20, 9))
    with pytest.raises(ValueError, match=r"2 sizes.*needed: one, or such as folder:PATH@64"):
        load_dataset(f"folder:{tmp_path}", "train")
    assert load_all(tmp_path, image_size=8)[0].shape == (7, 1, 8, 8)
    assert load_all(f"{tmp_path}@8")[0].equal(load_all(tmp_path, image_size=8)[0])
    for ending in ("@0", "@-3", "@99999", "@"):
        with pytest.raises(ValueError, match=f"{tmp_path}{ending} is no folder"):
            load_dataset(f"folder:{tmp_path}{ending}", "train")


def test_a_folder_whose_name_ends_like_a_size_is_itself(tmp_path):
    save_folder(tmp_path / "photos@64", (4, 4))
    assert load_all(tmp_path / "photos@64")[0].shape == (6, 1, 6, 6)
    assert load_all(f"{tmp_path / 'photos@64'}@9")[0].shape == (6, 1, 9, 9)


def test_a_home_with_a_size_is_no_other_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_folder(tmp_path, (4, 4))
    assert load_all("~@9")[0].shape == (6, 1, 9, 9)


@pytest.mark.parametrize("size", [0, -3])
def test_image_size_must_be_positive(tmp_path, size):
    save_folder(tmp_path, (4, 4))
    with pytest.raises(ValueError, match="image_size"):
        load_dataset(f"folder:{tmp_path}", "train", image_size=size)


@pytest.mark.parametrize("folders", [[], ["ant"], ["ant", "bee"], ["train", "test"], ["train/ant", "test/ant"]])
def test_empty_folder_is_named(tmp_path, folders):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_dataset(f"folder:{tmp_path}", "train")


def test_missing_folder_and_a_file_are_named(tmp_path):
    for path in (tmp_path / "nowhere", save_image(tmp_path / "one.png", 3)):
        with pytest.raises(ValueError, match=path.name):
            load_dataset(f"folder:{path}", "train")


@pytest.mark.parametrize("split", ["train", "test"])
def test_train_without_test_is_refused(tmp_path, split):
    save_folder(tmp_path / "train", (4, 4))
    with pytest.raises(ValueError, match=rf"{tmp_path} has train/ alone"):
        load_dataset(f"folder:{tmp_path}", split)


@pytest.mark.parametrize("split", ["train", "test"])
def test_other_classes_in_test_are_refused(tmp_path, split):
    save_folder(tmp_path / "train", (4, 4))
    save_image(tmp_path / "test" / "bee" / "0.png", 1)
    save_image(tmp_path / "test" / "cat" / "0.png", 1)
    with pytest.raises(ValueError, match="cat"):
        load_dataset(f"folder:{tmp_path}", split)


def test_garbage_for_an_image_is_named(tmp_path):
    save_folder(tmp_path, (6, 6), ending="jpg")
    (tmp_path / "bee" / "03.jpg").write_bytes(b"no picture at all")
    for split in ("train", "test"):
        with pytest.raises(ValueError, match=r"03\.jpg"):
            load_all(tmp_path, split)


@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.8])
def test_truncated_image_is_named(tmp_path, ending, kept):
    save_folder(tmp_path, (6, 6), ending=ending)
    broken = tmp_path / "bee" / f"03.{ending}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6), np.uint8)).save(broken)
    whole = broken.read_bytes()
    broken.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match=broken.name):
        load_all(tmp_path)


def test_header_that_claims_a_giant_image_is_named(tmp_path):
    save_folder(tmp_path, (6, 6), ending="bmp")
    broken = tmp_path / "bee" / "03.bmp"
    broken.write_bytes(broken.read_bytes()[:18] + b"\x00\x00\x01\x00\x00\x00\x01\x00" + broken.read_bytes()[26:])
    with pytest.raises(ValueError, match=broken.name):
        load_all(tmp_path)


# --- choosing ---------------------------------------------------------------------------------------------------------


def test_take_is_stratified_and_fixed():
    dataset = load_dataset("mnist5k", "test")
    x, y = take(dataset, 203)
    assert set(y.bincount().tolist()) == {20, 21}
    assert torch.equal(x, take(dataset, 203)[0])
    assert not torch.equal(x, take(dataset, 203, seed=1)[0])
    assert len({image.numpy().tobytes() for image in x}) == 203


def test_take_evens_out_what_it_can():
    labels = np.array([0] + [1] * 9)
    dataset = TensorImages(np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1), labels, ["a", "b"])
    assert take(dataset, 4)[1].bincount().tolist() == [1, 3]
    assert torch.equal(take(dataset, 10)[0].sort(0).values, stack(dataset)[0])


def test_any_first_part_of_take_is_stratified_too():
    _, y = take(load_dataset("mnist5k", "test"), 200)
    assert y[:100].bincount().tolist() == [10] * 10


def test_take_from_a_folder(tmp_path):
    x, y = take(load_dataset(f"folder:{save_folder(tmp_path, (10, 10))}", "train"), 6)
    assert x.shape == (6, 1, 6, 6)
    assert y.bincount().tolist() == [3, 3]


@pytest.mark.parametrize("n", [0, -1, 1001])
def test_take_of_too_few_or_too_many(n):
    with pytest.raises(ValueError, match=str(n)):
        take(load_dataset("mnist5k", "test"), n)


@settings(deadline=None)
@given(st.data())
def test_hold_out_parts_the_set(choose):
    size = choose.draw(st.integers(2, 60_000))
    n = choose.draw(st.integers(1, size - 1) | st.integers(max(1, size - 3), size - 1))
    fit, held_out = hold_out(range(size), n)
    assert len(held_out) == n
    assert torch.equal(torch.cat([fit, held_out]).sort().values, torch.arange(size))


@pytest.mark.parametrize("n", [0, 10, 11])
def test_hold_out_needs_something_to_fit(n):
    with pytest.raises(ValueError, match=str(n)):
        hold_out(range(10), n)


def test_the_20_original_images_of_cifar10_are_test_images_alone(monkeypatch):
    dataset = load_dataset("cifar10-20", "test")
    assert [len(dataset), dataset[0][0].shape, dataset.classes[dataset[0][1]]] == [20, (3, 32, 32), "cat"]
    with pytest.raises(ValueError, match="cifar10-20 has no split 'train'; there is: test"):
        load_dataset("cifar10-20", "train")
    monkeypatch.setitem(sys.modules, "foolbox", None)
    with pytest.raises(ValueError, match="cifar10-20 needs the package foolbox; pip install"):
        load_dataset("cifar10-20", "test")


@pytest.mark.parametrize("name", [None, 3, "", "mnist6k", ["mnist"], "x" * 5000])
def test_what_names_no_data_set_is_told(name):
    with pytest.raises(ValueError, match=r"data set .* is unknown; there is: mnist5k, "):
        load_dataset(name, "test")


@pytest.mark.parametrize("path", ["", "x" * 5000, "a\0b", "~nobody-of-that-name/x"])
def test_what_names_no_folder_is_told(path):
    with pytest.raises(ValueError, match="is no folder"):
        load_dataset(f"folder:{path}", "test")


def test_a_folder_without_a_path_is_not_the_working_folder(tmp_path, monkeypatch):
    save_folder(tmp_path, (4, 4))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'folder:' is no folder; needed: folder:PATH"):
        load_dataset("folder:", "test")


def test_a_split_that_a_data_set_lacks_is_called_by_its_name():
    for split in ("train", "held_out"):
        with pytest.raises(ValueError, match=f"cifar10-20 has no split '{split}'; there is: test"):
            load_dataset("cifar10-20", split)


@pytest.mark.parametrize("n", [2.5, "3", None, True, 0, -1])
def test_a_number_of_images_is_whole(n):
    dataset = load_dataset("mnist5k", "test")
    with pytest.raises(ValueError, match=r"n is .*; needed: a whole number of at least 1"):
        take(dataset, n)
    if n is not None:
        with pytest.raises(ValueError, match=r"n is .*; needed: a whole number of at least 1"):
            hold_out(dataset, n)


def test_of_very_many_names_the_nearest_are_listed():
    with pytest.raises(ValueError, match=r"'n5000x' is unknown; there is: n5000, .*, and 9,995 others") as said:
        check_known("network", "n5000x", [f"n{number}" for number in range(10_000)])
    assert len(str(said.value)) < 200
