"""Data sets, from the folders that people have."""

import errno
import gzip
import math
import os
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import cifar, mnist

from nusam.experiments.errors import Refused
from nusam.experiments.training import data
from nusam.experiments.training.building import build
from nusam.experiments.training.splits import split

CPU = torch.device("cpu")


def idx(array: np.ndarray) -> bytes:
    """The format of MNIST's files."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_fashion_mnist(folder: Path, compress: bool) -> None:
    """Forty training and twenty test images whose every pixel is ten times the class."""
    folder.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        labels = np.arange(count) % 10
        for name, array in (
            (f"{part}-images-idx3-ubyte", np.broadcast_to(10 * labels[:, None, None], (count, 28, 28))),
            (f"{part}-labels-idx1-ubyte", labels),
        ):
            if compress:
                (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / name).write_bytes(idx(array))


def write_image_folders(root: Path, classes=("cat", "dog", "eel"), test_classes=None, size=(32, 32), each=10) -> None:
    """Ten training and four test images of each class; red is twenty times the class."""
    for part, names, count in (("train", classes, each), ("test", test_classes or classes, 4)):
        for label, name in enumerate(names):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", size, (20 * label, 128, 255)).save(folder / f"{index:04}.jpg", quality=95)


def assert_pixels_follow_labels(source: data.Source, factor: int) -> None:
    """No image has lost its label on the way."""
    for pixels, labels in ((source.pool, source.pool_labels), (source.test, source.test_labels)):
        assert np.abs(pixels[:, 0].mean((1, 2)) - factor * labels).max() < 3
        assert pixels.dtype == np.uint8
        assert labels.dtype == np.int64


@pytest.fixture
def no_debian_files(monkeypatch, tmp_path):
    """As if the Debian package were not installed."""
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "absent")


def test_digits_splits_are_disjoint_and_the_test_split_is_fixed(tmp_path):
    source = data.load("digits", tmp_path)
    assert (source.channels, source.image_size, source.classes) == (1, 8, 10)
    assert sum(source.sizes.values()) == 1797
    splits = [split(source, seed, CPU) for seed in (0, 0, 1)]
    assert torch.equal(splits[0].train.pixels, splits[1].train.pixels)
    assert not torch.equal(splits[0].train.pixels, splits[2].train.pixels)
    assert torch.equal(splits[0].test.pixels, splits[2].test.pixels)
    for images, size in ((splits[0].train, 300), (splits[0].validation, 700), (splits[0].test, 797)):
        assert images.pixels.shape == (size, 1, 8, 8)
        assert images.pixels.min() >= -1
        assert images.pixels.max() <= 1
    parts = (splits[0].train, splits[0].validation)
    train, validation = ({row.numpy().tobytes() for row in images.pixels} for images in parts)
    assert not train & validation


@pytest.mark.parametrize("layout", ["torchvision", "debian"])
def test_fashion_mnist_is_read_from_either_layout(layout, tmp_path, monkeypatch, no_debian_files):
    if layout == "debian":
        monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "share")
        write_fashion_mnist(tmp_path / "share", compress=True)
    else:
        write_fashion_mnist(tmp_path / "FashionMNIST" / "raw", compress=False)
    source = data.load("fashion-mnist", tmp_path)
    assert source.title == "Fashion-MNIST"
    assert (source.channels, source.image_size, source.classes) == (1, 28, 10)
    assert source.sizes == {"train": 20, "validation": 20, "test": 20}
    assert_pixels_follow_labels(source, factor=10)


def test_cifar10_is_read_from_folders_of_images(tmp_path):
    write_image_folders(tmp_path)
    source = data.load("cifar10", tmp_path)
    assert source.title == "CIFAR-10 (JPEG re-encoded)"
    assert (source.channels, source.image_size, source.classes) == (3, 32, 3)
    assert source.sizes == {"train": 15, "validation": 15, "test": 12}
    assert_pixels_follow_labels(source, factor=20)


def test_large_data_sets_are_cut_to_a_fixed_subset(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "TRAIN", 5)
    monkeypatch.setattr(data, "VALIDATION", 5)
    monkeypatch.setattr(data, "TEST", 5)
    write_image_folders(tmp_path)
    sources = [data.load("cifar10", tmp_path) for _ in range(2)]
    assert sources[0].sizes == {"train": 5, "validation": 5, "test": 5}
    assert np.array_equal(sources[0].pool_labels, sources[1].pool_labels)


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_broken_files_are_refused_in_one_sentence(name, tmp_path, no_debian_files):
    (tmp_path / "FashionMNIST" / "raw").mkdir(parents=True)
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps({}))
    with pytest.raises(Refused, match=f"--data {name} was found but could not be read"):
        data.load(name, tmp_path)


def test_a_truncated_archive_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "DEBIAN_FASHION_MNIST", tmp_path / "share")
    write_fashion_mnist(tmp_path / "share", compress=True)
    images = tmp_path / "share" / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:100])
    with pytest.raises(Refused, match="could not be read"):
        data.load("fashion-mnist", tmp_path)


def test_folders_with_other_classes_are_refused(tmp_path):
    write_image_folders(tmp_path, test_classes=("cat", "dog", "fox"))
    with pytest.raises(Refused, match="the same classes"):
        data.load("cifar10", tmp_path)


def test_images_must_be_square_and_of_one_size(tmp_path):
    write_image_folders(tmp_path / "wide", size=(40, 32))
    with pytest.raises(Refused, match=r"needs square images, all of one size, and .*wide has some of 40 × 32 pixels"):
        data.load("folder", tmp_path / "wide")
    write_image_folders(tmp_path / "mixed")
    Image.new("RGB", (16, 16)).save(tmp_path / "mixed" / "test" / "cat" / "small.png")
    with pytest.raises(Refused, match=r"16 × 16 and 32 × 32 pixels; crop or scale them"):
        data.load("folder", tmp_path / "mixed")


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"each": 1}, "needs at least two training examples of each class, .* and cat has one; add more"),
        ({"classes": ("cat",)}, "needs at least two classes to train with, and has only cat; add another"),
    ],
)
def test_a_class_needs_images_for_training_and_for_validation(given, sentence, tmp_path):
    write_image_folders(tmp_path, **given)
    with pytest.raises(Refused, match=sentence):
        data.load("folder", tmp_path)


@pytest.mark.parametrize(
    ("model", "size", "sentence"),
    [
        ("vit-s/4", 30, r"vit-s/4 cuts images into patches of 4 × 4 pixels, and these have 30 × 30 pixels"),
        ("vit-s/4", 2, "scale them to a multiple of 4, or choose another model"),
        ("mixer", 2, r"mixer cuts images into 4 × 4 patches, and these have 2 × 2 pixels"),
        ("vit", 30, "scale them to a multiple of 4"),
    ],
)
def test_images_that_a_model_cant_cut_are_refused(model, size, sentence):
    with pytest.raises(Refused, match=sentence):
        build(model, size, 3, 10)


@pytest.mark.parametrize("error", [URLError("unreachable"), ConnectionResetError("reset"), TimeoutError("timed out")])
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_a_download_without_a_network_has_its_own_sentence(name, error, tmp_path, monkeypatch, capsys, no_debian_files):
    def unreachable(*_, **__):
        print("Failed download. Trying https -> http instead.")
        raise error

    for module in (cifar, mnist):
        monkeypatch.setattr(module, "download_and_extract_archive", unreachable)
    with pytest.raises(Refused) as refusal:
        data.load(name, tmp_path, download=True)
    assert f"--data {name} could not be downloaded (" in str(refusal.value)
    assert str(refusal.value).endswith(f"put its files into --data-root, which is {tmp_path}.")
    assert "\n" not in str(refusal.value)
    assert capsys.readouterr().out == ""


def test_a_download_that_does_not_fit_is_no_fault_of_the_files(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cifar, "download_and_extract_archive", full)
    with pytest.raises(Refused, match=r"--data-root .* can't be written to \(No space left on device\)"):
        data.load("cifar10", tmp_path, download=True)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist", "folder"])
def test_download_is_offered_where_there_is_such_an_option_and_a_place_to_fetch_from(name, tmp_path, no_debian_files):
    for option, offered in ((None, False), (False, name != "folder")):
        with pytest.raises(Refused) as refusal:
            data.load(name, tmp_path, download=option)
        assert ("let --download fetch them" in str(refusal.value)) == offered
    (tmp_path / "cifar-100-python").mkdir()
    with pytest.raises(Refused, match="Dataset not found or corrupted; put complete files there, or let --download"):
        data.load("cifar100", tmp_path, download=False)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 1.0])
def test_as_many_labels_are_wrong_for_training_as_for_validation_whatever_the_seed(share, tmp_path):
    clean = data.load("digits", tmp_path)
    wrong = data.with_wrong_labels(clean, share)
    assert (wrong.test_labels == clean.test_labels).all()
    expected = share * 0.9  # a tenth of those drawn anew are what they were
    for seed in range(20):
        pairs = [split(source, seed, "cpu") for source in (clean, wrong)]
        for part in ("train", "validation"):
            a, b = (getattr(dataset, part).labels for dataset in pairs)
            assert float((a != b).float().mean()) == pytest.approx(expected, abs=4 * math.sqrt(0.25 / len(a)))


def test_a_share_of_wrong_labels_is_the_same_in_every_process(tmp_path):
    first, again = (data.with_wrong_labels(data.load("digits", tmp_path), 0.4) for _ in range(2))
    assert (first.pool_labels == again.pool_labels).all()
