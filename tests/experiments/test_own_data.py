"""nusam train on what people have: folders of images and tables of sentences, with all that is odd about them."""

import io
import json
import os
import re
import shlex
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, Resize

from nusam.experiments.commands.main import main
from nusam.experiments.errors import Refused
from nusam.experiments.training import image_folders
from nusam.experiments.training.class_sizes import with_every_class
from nusam.experiments.training.data import load, shuffled
from nusam.experiments.training.splits import split

from .commands import nusam
from .test_text import FOUR, vocabulary

__all__ = ["vocabulary"]


def picture(seed, size, mode="RGB"):
    """Noise, coarse enough that where it was cut shows."""
    drawn = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(drawn).resize(size, Image.Resampling.NEAREST).convert(mode)


def write(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


@pytest.fixture
def odd(tmp_path):
    """Two classes that train, and beside them whatever a folder of one's own may have."""
    root = tmp_path / "my pictures"
    sizes = [(32, 32), (40, 30), (31, 57), (128, 64), (16, 16), (33, 33)]
    for part, each in (("train", 12), ("test", 3)):
        for label, name in enumerate(("Cats & dogs", "eel")):
            for number in range(each):
                mode = ("RGB", "L", "RGBA", "P", "1", "CMYK", "LA")[number % 7]
                suffix = (
                    ".jpg" if mode == "CMYK" else (".png", ".PNG", ".Webp", ".BMP")[number % (2 if "A" in mode else 4)]
                )
                suffix = ".TIFF" if mode == "P" else suffix
                image = picture(100 * label + number, sizes[number % 6], mode)
                write(root / part / name / f"{number}{suffix}", image)
        write(root / part / "rare" / "of 2025" / "deeper" / "a.JPEG", picture(7, (50, 20)))
        write(root / part / "rare" / "b.jpeg", picture(8, (20, 50)))
        for hidden in (
            ".DS_Store",
            "eel/._0.png",
            "eel/.thumbnails/0.png",
            ".ipynb_checkpoints/x.png",
            "eel/Thumbs.db",
        ):
            (root / part / hidden).parent.mkdir(exist_ok=True)
            (root / part / hidden).write_bytes(b"no image")
        (root / part / "eel" / "notes.txt").write_text("caught in May")
        (root / part / "README.md").write_text("mine")
    return root


def run(monkeypatch, capsys, *arguments):
    """The exit code and what was said."""
    monkeypatch.setattr(sys, "argv", ["nusam", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    return end.value.code, said.out + said.err


def test_an_odd_folder_trains_from_one_end_to_the_other(odd, tmp_path, monkeypatch, capsys):
    line = ("train", "--data", "folder", "--data-root", odd, "--epochs", 2, "--out", tmp_path / "out")
    code, said = run(monkeypatch, capsys, *line)
    assert code == 2
    assert "crop or scale them, or let --image-size 32 do it." in " ".join(said.split())
    code, said = run(monkeypatch, capsys, *line, "--image-size", 32)
    assert code == 0, said
    outcome = json.loads((tmp_path / "out" / "outcome.json").read_text())
    assert len(outcome["data"].pop("files")) == 12
    assert outcome["data"] == {"data": "folder", "title": "my pictures", "train_size": None, "image_size": 32}
    code, said = run(monkeypatch, capsys, *line, "--image-size", 16, "--resume")
    assert code == 2
    assert "image size 32 and not 16" in " ".join(said.split())


@pytest.mark.parametrize("size", [8, 32, 60])
def test_images_are_resized_and_centred_as_torchvision_does(odd, size):
    source = load("folder", odd, train_size=0, image_size=size)
    assert (source.channels, source.image_size, source.classes) == (3, size, 3)
    for part, found, labels in (
        ("train", source.pool, source.pool_labels),
        ("test", source.test, source.test_labels),
    ):
        expected = [
            (
                np.asarray(Compose([Resize(size), CenterCrop(size)])(Image.open(path).convert("RGBA").convert("RGB"))),
                label,
            )
            for label, name in enumerate(sorted(("Cats & dogs", "eel", "rare")))
            for path in sorted((odd / part / name).rglob("*"))
            if path.is_file() and not any(p.startswith(".") for p in path.relative_to(odd).parts)
            if path.suffix not in (".db", ".txt")
        ]
        assert len(found) == len(expected)
        key = sorted((pixels.transpose(2, 0, 1).tobytes(), label) for pixels, label in expected)
        assert sorted((pixels.tobytes(), label) for pixels, label in zip(found, labels, strict=True)) == key


def test_a_plain_folder_is_what_image_folder_makes_of_it(tmp_path):
    for part in ("train", "test"):
        for label, name in enumerate(("a", "b", "c")):
            for number in range(5):
                write(tmp_path / part / name / f"{number}.png", picture(10 * label + number, (8, 8)))
    source = load("folder", tmp_path, train_size=0)
    theirs = ImageFolder(tmp_path / "test")
    order = shuffled(len(theirs), 0)
    order = order[shuffled(len(order), 0)]
    assert np.array_equal(source.test, np.stack([np.asarray(theirs[i][0]).transpose(2, 0, 1) for i in order]))
    assert source.test_labels.tolist() == [theirs.targets[i] for i in order]


def damaged(kind):
    """Bytes that are no whole image."""
    file = io.BytesIO()
    picture(0, (64, 64)).save(file, "PNG" if kind.startswith("png") else "JPEG")
    whole = file.getvalue()
    return {
        "empty": b"",
        "text": b"<html>404 Not Found</html>",
        "jpeg cut": whole[: len(whole) // 2],
        "jpeg header": whole[:20],
        "png cut": whole[: len(whole) // 2],
        "png flipped": whole[:60] + bytes(40) + whole[100:],
        "png header": whole[:16],
    }[kind]


@pytest.mark.parametrize("place", ["train/eel/bad one.jpg", "test/rare/deep/bad.PNG"])
@pytest.mark.parametrize("kind", ["empty", "text", "jpeg cut", "jpeg header", "png cut", "png flipped", "png header"])
def test_a_corrupt_file_is_named(odd, kind, place):
    (odd / place).parent.mkdir(exist_ok=True)
    (odd / place).write_bytes(damaged(kind))
    with pytest.raises(Refused) as refusal:
        load("folder", odd, image_size=32)
    said = str(refusal.value)
    assert said.startswith(f"{odd / place} could not be read as an image (")
    assert said.endswith("); replace it, or remove it.")
    assert said.count(". ") == 0
    assert "\n" not in said


def test_a_link_to_nowhere_is_named(odd):
    (odd / "train" / "eel" / "gone.png").symlink_to(odd / "nowhere.png")
    with pytest.raises(Refused, match=r"eel/gone\.png could not be read as an image"):
        load("folder", odd, image_size=32)


@pytest.mark.parametrize("place", ["train", "train/fox", "test/fox", "train/eel/deeper", "test/rare/notes.txt"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_every_link_that_leads_nowhere_is_named(odd, place, target):
    """That of a class, of a folder in it or of what is no image by its name: it might have been one."""
    if place == "train":
        (odd / "train").rename(odd.parent / "gone")
    link = odd / place
    link.symlink_to(link if target == "itself" else odd / "nowhere")
    with pytest.raises(Refused) as refusal:
        load("folder", odd, image_size=32)
    said = str(refusal.value)
    assert said == f"{link} could not be read as an image or a folder (the link leads nowhere); mend or remove it."


def test_a_hidden_link_that_leads_nowhere_is_passed_over(odd):
    (odd / "train" / ".lock").symlink_to(odd / "nowhere")
    (odd / "train" / "eel" / "._link.png").symlink_to(odd / "nowhere")
    load("folder", odd, image_size=32)


def test_an_image_too_large_to_open_is_named(odd, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Refused, match=r"could not be read as an image .*limit"):
        load("folder", odd, image_size=32)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_what_would_lose_its_bits_is_named(odd, mode):
    deep = Image.fromarray(np.full((32, 32), 40_000, {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    path = odd / "train" / "eel" / "scan.tif"
    write(path, deep)
    with pytest.raises(Refused, match=r"scan\.tif has more than 8 bits for a colour, .*; save it with 8 bits"):
        load("folder", odd, image_size=32)


def deep_png(path, colours):
    """8 × 8 pixels of 16 bits for a colour, which Pillow reads and can't write."""
    raw = b"".join(b"\x00" + bytes(8 * colours * 2) for _ in range(8))
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[colours]

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 8, 8, 16, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


@pytest.mark.parametrize("colours", [1, 2, 3, 4])
def test_16_bits_for_a_colour_are_named_though_pillow_cuts_them_without_a_word(odd, colours):
    deep_png(odd / "train" / "eel" / "deep.png", colours)
    with pytest.raises(Refused, match=r"deep\.png has more than 8 bits for a colour"):
        load("folder", odd, image_size=32)


def test_a_photo_stands_as_it_was_taken(odd):
    path = odd / "train" / "eel" / "phone.jpg"
    image = picture(3, (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    write(path, image, exif=exif, quality=100, subsampling=0)
    (seen,) = image_folders.pixels("folder", odd, [path], 20)
    standing = np.asarray(image.rotate(-90, expand=True).crop((0, 10, 20, 30)))
    assert np.abs(seen.transpose(1, 2, 0).astype(int) - standing).mean() < 12


def bitmap(bits, compression=0, masks=b""):
    """4 × 4 pixels of noise, which Pillow reads and can't write."""
    data = np.random.default_rng(0).integers(0, 256, 2 * bits, np.uint8).tobytes()
    start = 54 + len(masks)
    header = struct.pack("<IHHI", start + len(data), 0, 0, start)
    header += struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, bits, compression, len(data), 0, 0, 0, 0)
    return b"BM" + header + masks + data


@pytest.mark.parametrize(
    "content",
    [bitmap(16), bitmap(16, 3, struct.pack("<III", 0xF800, 0x7E0, 0x1F)), bitmap(32), b"P6 2 2 100\n" + bytes(12)],
)
def test_bits_of_all_colours_together_are_no_bits_of_one(odd, content):
    """5, 6 and 5 bits are not 16 of a colour."""
    path = odd / "train" / "eel" / ("few.bmp" if content.startswith(b"BM") else "few.ppm")
    path.write_bytes(content)
    assert image_folders.pixels("folder", odd, [path], None).shape[:2] == (1, 3)


@pytest.mark.parametrize("largest", [256, 1023, 65535])
@pytest.mark.parametrize("kind", ["P2", "P3", "P5", "P6"])
def test_a_large_value_of_white_is_named(odd, kind, largest):
    count = 4 if kind in ("P2", "P5") else 12
    body = bytes(2 * count) if kind in ("P5", "P6") else b"1 " * count
    path = odd / "train" / "eel" / ("deep.pgm" if count == 4 else "deep.ppm")
    path.write_bytes(f"{kind} 2 2 {largest}\n".encode() + body)
    with pytest.raises(Refused, match=r"deep\.p.m has more than 8 bits for a colour"):
        load("folder", odd, image_size=32)


@pytest.mark.parametrize("suffix", [".tif", ".TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L", "1"])
def test_a_file_of_several_pages_is_named(odd, suffix, mode):
    pages = [picture(number, (8, 8), mode) for number in range(3)]
    path = odd / "train" / "eel" / f"scan{suffix}"
    write(path, pages[0], format="TIFF", save_all=True, append_images=pages[1:])
    with pytest.raises(Refused, match=r"scan\..* has 3 pages, of which one would be seen; save that alone"):
        load("folder", odd, image_size=32)
    write(path, pages[0], format="TIFF")
    load("folder", odd, image_size=32)


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_an_animation_is_named(odd, suffix):
    frames = [picture(number, (8, 8)) for number in range(3)]
    write(odd / "train" / "eel" / f"moving{suffix}", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(Refused, match=r"moving\..* has 3 frames, of which one would be seen"):
        load("folder", odd, image_size=32)


def test_an_image_beside_the_classes_is_named(odd):
    write(odd / "train" / "loose.png", picture(0, (8, 8)))
    with pytest.raises(Refused, match=r"train/loose\.png lies beside the folders of the classes; move it"):
        load("folder", odd, image_size=32)


@pytest.mark.parametrize("target", ["..", "../eel", "."])
def test_a_link_to_what_it_lies_in_is_named(odd, target):
    """Through another class too, which links back."""
    (odd / "train" / "eel" / "deeper").mkdir()
    (odd / "train" / "rare" / "loop").symlink_to(Path(target))
    if target == "../eel":
        (odd / "train" / "eel" / "deeper" / "back").symlink_to(odd / "train" / "rare")
    with pytest.raises(Refused, match="is a link to a folder that it lies in; remove it"):
        load("folder", odd, image_size=32)


def test_pipes_are_no_images(odd):
    os.mkfifo(odd / "train" / "eel" / "pipe.png")
    load("folder", odd, image_size=32)


def test_other_files_under_the_same_name_are_other_data(odd, tmp_path):
    """A run is not taken for finished, nor gone on with, once the images or their labels have changed."""
    given = ["--data", "folder", "--data-root", str(odd), "--image-size", "32", "--epochs", "1", "--method", "none"]
    given = ["train", *given, "--out", str(tmp_path / "out")]
    nusam(*given)
    nusam(*given, "--resume")
    (odd / "test" / "eel" / "0.png").rename(odd / "test" / "Cats & dogs" / "another.png")
    assert "is of a run with files" in nusam(*given, "--resume", check=False).stderr


@pytest.mark.parametrize("name", ["movie.gif", "phone.HEIC", "new.avif"])
def test_an_image_of_a_kind_that_is_not_read_is_not_passed_over(odd, name):
    (odd / "train" / "eel" / name).write_bytes(b"image")
    with pytest.raises(Refused, match=rf"eel/{name} is no image that can be read, which are \.jpg, .*; convert it, or"):
        load("folder", odd, image_size=32)


@pytest.mark.parametrize("part", ["train", "test"])
@pytest.mark.parametrize("content", [None, "notes.txt", ".hidden.png"])
def test_a_class_without_images_is_named(odd, part, content):
    for each in ("train", "test"):
        (odd / each / "unicorn").mkdir()
        write(odd / each / "unicorn" / "0.png", picture(0, (8, 8)))
        write(odd / each / "unicorn" / "1.png", picture(1, (8, 8)))
    for file in (odd / part / "unicorn").iterdir():
        file.unlink()
    if content:
        (odd / part / "unicorn" / content).write_text("")
    with pytest.raises(Refused) as refusal:
        load("folder", odd, image_size=32)
    said = str(refusal.value)
    assert "found no image (.jpg, " in said
    assert said.endswith(f"in the class {odd / part / 'unicorn'}; add some, or remove the folder.")


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_class_that_one_part_lacks_is_named(odd, part):
    other = "test" if part == "train" else "train"
    write(odd / part / "fox" / "0.png", picture(0, (8, 8)))
    with pytest.raises(Refused, match=rf"needs the same classes in .*, and .*{other} has no fox; complete them"):
        load("folder", odd, image_size=32)


def test_a_folder_above_the_right_one_is_told_the_way(odd):
    with pytest.raises(Refused, match=r"found neither; point --data-root to them, such as .*my pictures\.$"):
        load("folder", odd.parent)
    with pytest.raises(Refused, match=r"needs the folders train and test, .* and found neither; point --data-root"):
        load("folder", odd / "train")
    (odd / "test").rename(odd / "Test")
    with pytest.raises(Refused, match=r"and found only Test, train; add test, or rename what holds"):
        load("folder", odd)
    (odd / "Test").rename(odd / "test")
    (odd / "train").rename(odd.parent / "elsewhere")
    (odd / "train").mkdir()
    with pytest.raises(Refused, match=r"needs a folder of images for each class in .*train, and found none; add them"):
        load("folder", odd)


def test_a_root_without_a_name_of_its_own_has_a_title(odd, monkeypatch):
    monkeypatch.chdir(odd)
    assert load("folder", Path("."), image_size=8).title == "my pictures"


def test_a_rare_class_is_trained_with_whatever_the_seed(odd):
    source = load("folder", odd, image_size=8)
    for seed in range(20):
        assert set(split(source, seed, "cpu").train.labels.tolist()) == {0, 1, 2}


def test_a_rare_class_is_among_the_few_that_are_taken_of_many(odd, monkeypatch):
    monkeypatch.setattr("nusam.experiments.training.data.VALIDATION", 4)
    for size in (3, 4, 6):
        source = load("folder", odd, train_size=size, image_size=8)
        assert source.classes == 3
        assert (np.bincount(source.pool_labels, minlength=3) >= 2).all()
        for seed in range(5):
            assert set(split(source, seed, "cpu").train.labels.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("seed", range(20))
def test_an_order_is_changed_only_where_a_class_is_missing(seed):
    drawn = np.random.default_rng(seed)
    classes, total = int(drawn.integers(2, 6)), int(drawn.integers(8, 40))
    labels = np.concatenate([np.arange(classes), drawn.integers(0, 2, total)])
    order, count = drawn.permutation(len(labels)), int(drawn.integers(1, len(labels) + 1))
    for least in (1, 2):
        found = with_every_class(order, labels, count, least)
        assert sorted(found) == sorted(order)
        wanted = np.minimum(np.bincount(labels), least)
        if wanted.sum() > count or (np.bincount(labels[order[:count]], minlength=classes) >= wanted).all():
            assert np.array_equal(found, order)
        else:
            assert (np.bincount(labels[found[:count]], minlength=classes) >= wanted).all()


def test_files_of_other_kinds_are_counted_and_sizes_are_told(odd, tmp_path, monkeypatch, capsys):
    line = ("train", "--data", "folder", "--data-root", odd, "--image-size", 8, "--epochs", 1, "--out", tmp_path / "o")
    code, said = run(monkeypatch, capsys, *line, "--train-size", 20)
    assert code == 0
    said = " ".join(said.split())
    assert "6 files that are no images are passed over (.db, .md, .txt)." in said
    assert "my pictures: 13 images to train with, 13 for validation, 8 for the test." in said
    assert "--train-size 20 can't be met, as some are kept for validation; 13 are taken." in said
    outcome = json.loads((tmp_path / "o" / "outcome.json").read_text())
    assert outcome["sizes"] == {"train": 13, "validation": 13, "test": 8}
    assert outcome["data"]["train_size"] == 13
    for part in ("train", "test"):
        for other in (f"{part}/README.md", f"{part}/eel/notes.txt", f"{part}/eel/Thumbs.db"):
            (odd / other).unlink()
    assert load("folder", odd, 13, image_size=8).notes == ()


@pytest.mark.parametrize("data", ["digits", "sentences"])
def test_a_size_that_can_not_be_met_is_said_of_any_data(data, tmp_path):
    source = load(data, tmp_path, 5000)
    (note,) = source.notes
    assert note.startswith("--train-size 5000 can't be met")
    assert note.endswith(f"{source.train_size} are taken.")
    assert note in source.told
    assert load(data, tmp_path, 20).notes == load(data, tmp_path, 0).notes == load(data, tmp_path).notes == ()


def test_a_folder_that_was_renamed_is_gone_on_with(odd, tmp_path, monkeypatch, capsys):
    line = ("train", "--data", "folder", "--image-size", 8, "--epochs", 1, "--out", tmp_path / "o")
    assert run(monkeypatch, capsys, *line, "--data-root", odd)[0] == 0
    odd.rename(tmp_path / "other")
    code, said = run(monkeypatch, capsys, *line, "--data-root", tmp_path / "other", "--resume")
    assert code == 0, said
    assert json.loads((tmp_path / "o" / "outcome.json").read_text())["data"]["title"] == "other"


def test_image_size_is_for_images_of_ones_own(odd, tmp_path, monkeypatch, capsys):
    for command in ("train", "find-rho"):
        line = (command, "--data", "digits", "--image-size", 16, "--out", tmp_path / "out")
        code, said = run(monkeypatch, capsys, *line)
        assert code == 2
        assert "--image-size is for images of your own (--data folder), got digits; leave it out." in said
    assert run(monkeypatch, capsys, "train", "--data", "folder", "--data-root", odd, "--image-size", -1)[0] == 2
    code, said = run(monkeypatch, capsys, "train", "--data", "folder", "--data-root", odd, "--image-size", 30)
    assert code == 2
    assert "scale them to a multiple of 4" in said


def test_find_rho_takes_the_folder_too(odd, tmp_path, monkeypatch, capsys):
    line = ("find-rho", "--data", "folder", "--data-root", odd, "--image-size", 16, "--steps", 2, "--seeds", 1)
    code, said = run(monkeypatch, capsys, *line, "--rhos", 0.1, "--methods", "nusam", "--confirm", 0, "--out", tmp_path)
    assert code == 0, said


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        (FOUR.replace("fine", "caf\xe9").encode("latin-1"), r"train\.tsv, line 1, is not UTF-8; save the file in that"),
        (FOUR.encode() + b"no\tna\xefve\n", r"train\.tsv, line 5, is not UTF-8"),
        (FOUR.encode("utf-16"), r"train\.tsv, line 1, is not UTF-8"),
        (b"label\tsentence\n" + FOUR.encode(), "label has one; add more, or remove its line if that is a header"),
        (b"fine\tyes\ndull\tno\n", "dull has one; .* if that is a header .the class stands before the tab.,?"),
        (FOUR.encode() + b"yes\t \n", r"line 5, has an empty sentence; complete it, or remove the line"),
        (FOUR.encode() + b"\tfine\n", r"line 5, has an empty class; complete it, or remove the line"),
        (FOUR.encode() + b"yes,fine\n", "line 5, has 0 tabs"),
    ],
)
def test_an_odd_table_is_refused_in_one_sentence(tmp_path, vocabulary, train, sentence):
    (tmp_path / "train.tsv").write_bytes(train)
    (tmp_path / "test.tsv").write_text(FOUR)
    with pytest.raises(Refused, match=sentence) as refusal:
        load("tsv", tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
def test_line_endings_and_blanks_around_a_class_make_no_other_class(tmp_path, vocabulary, ending):
    for name in ("train.tsv", "test.tsv"):
        (tmp_path / name).write_bytes(("\ufeff" + FOUR.replace("no\t", " no \t").replace("\n", ending)).encode())
    source = load("tsv", tmp_path)
    assert source.classes == 2
    assert source.pool.shape[1] == 3


def test_a_table_trains_from_one_end_to_the_other(tmp_path, vocabulary, monkeypatch, capsys):
    torch.manual_seed(0)
    for name in ("train.tsv", "test.tsv"):
        (tmp_path / name).write_text(FOUR * 5)
    line = ("train", "--data", "tsv", "--data-root", tmp_path, "--model", "bert-tiny", "--epochs", 1)
    code, said = run(monkeypatch, capsys, *line, "--rho", 0.01, "--out", tmp_path / "out")
    assert code == 0, said


def test_the_pages_commands_run(odd, tmp_path, vocabulary, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "own-data.md").read_text()
    commands = re.findall(r"^nusam (.*)$", page, flags=re.MULTILINE)
    assert len(commands) == 4
    monkeypatch.chdir(tmp_path)
    odd.rename("pictures")
    Path("reviews").mkdir()
    example = [line.strip() for line in page.splitlines() if line.startswith("    ") and "\t" in line]
    assert len(example) == 2
    for name in ("train.tsv", "test.tsv"):
        Path("reviews", name).write_text("\n".join(4 * example))
    for command in commands:
        line = shlex.split(command, comments=True)
        line[:] = ["bert-tiny" if word == "minilm" else word for word in line]
        short = ("--steps", 2, "--seeds", 1, "--confirm", 2) if line[0] == "find-rho" else ("--epochs", 1)
        code, said = run(monkeypatch, capsys, *line, *short)
        assert code == 0, said
