"""Sentences: files, tokens, and what an encoder is given."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nusam.experiments.commands.main import main
from nusam.experiments.errors import Refused
from nusam.experiments.training import loop, text
from nusam.experiments.training.building import build
from nusam.experiments.training.data import load, with_wrong_labels
from nusam.experiments.training.spec import Recipe, Run

transformers = pytest.importorskip("transformers")

FOUR = "yes\tfine\nno\tdull\nyes\tgood\nno\tthin\n"
WORDS = ("a", "dull", "fine", "film", "good", "plot", "the", "thin")


@pytest.fixture
def vocabulary(tmp_path, monkeypatch):
    """An encoder's folder with nothing but a vocabulary, whose special tokens have BERT's numbers."""
    folder = tmp_path / "encoders" / "all-MiniLM-L6-v2"
    folder.mkdir(parents=True)
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    lines = [special.get(index, f"[unused{index}]") for index in range(104)] + list(WORDS)
    (folder / "vocab.txt").write_text("\n".join(lines) + "\n")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    monkeypatch.setenv("NUSAM_ENCODERS", str(tmp_path / "encoders"))
    return {word: 104 + index for index, word in enumerate(WORDS)}


def ids(vocabulary, *sentences):
    """[CLS] words [SEP], and words [SEP] for another sentence."""
    return [101] + [token for words in sentences for token in [*(vocabulary[w] for w in words.split()), 102]]


def test_movie_reviews_are_those_with_a_decided_rating(tmp_path, vocabulary):
    rows = ["1\t2.5\tA good film", "2\t-0.4\tthe plot", "3\t-3.1\tthe plot thin", "4\t0.5\tfine"]
    (tmp_path / text.MOVIE_REVIEWS).write_text("\n".join(rows) + "\n")
    tokens, labels = text.movie_reviews(tmp_path)
    assert labels.tolist() == [1, 0, 1]
    expected = [ids(vocabulary, words) for words in ("a good film", "the plot thin", "fine")]
    assert [row[row != 0].tolist() for row in tokens] == expected
    assert tokens.shape == (3, 5)


def test_a_table_of_tabs(tmp_path, vocabulary):
    (tmp_path / "train.tsv").write_text(
        "\ufeffno\tdull\tthe plot\nyes\tgood\ta film\n\nno\tthin\tplot\nyes\tfine\tfilm\n", "utf-8"
    )
    (tmp_path / "test.tsv").write_text("yes\tfine\tfilm\n")
    (tokens, labels), (test_tokens, test_labels) = text.tsv(tmp_path)
    assert labels.tolist() == [0, 1, 0, 1]
    assert test_labels.tolist() == [1]
    assert tokens[0].tolist() == ids(vocabulary, "dull", "the plot")
    assert test_tokens[0].tolist() == ids(vocabulary, "fine", "film")


@pytest.mark.parametrize(
    ("train", "test", "sentence"),
    [
        ("a good film\n", "yes\tfine\n", "line 1, has 0 tabs"),
        (FOUR, "maybe\tdull\n", "has the class maybe, which train.tsv lacks"),
        ("", FOUR, r"train\.tsv is empty; a class, a tab and a sentence are needed on each line"),
        (FOUR, "\n", r"test\.tsv is empty"),
        ("yes\tfine\n", FOUR, "needs at least two classes to train with, and has only yes"),
        ("yes\tfine\nno\tdull\nno\tthin\n", FOUR, "needs at least two training examples of each class, .* yes has one"),
        (f"{FOUR}\nyes\tfine\tfilm\n", FOUR, r"line 6, has 2 of the sentences of which the first line .* has 1"),
        (FOUR, "yes\tfine\tfilm\n", r"test\.tsv, line 1, has 2 of the sentences"),
        ("yes\tfine\n", None, "needs the files train.tsv and test.tsv"),
    ],
)
def test_what_a_table_of_tabs_must_be(tmp_path, vocabulary, train, test, sentence):
    (tmp_path / "train.tsv").write_text(train)
    if test is not None:
        (tmp_path / "test.tsv").write_text(test)
    with pytest.raises(Refused, match=sentence):
        load("tsv", tmp_path)


def test_too_few_movie_reviews_are_refused(tmp_path, vocabulary):
    (tmp_path / text.MOVIE_REVIEWS).write_text("1\t2.5\tA good film\n2\t-3.1\tthe plot thin\n")
    with pytest.raises(Refused, match="could not be read: 2 rated sentences are too few; put complete files there"):
        load("movie-reviews", tmp_path)


def test_glue_comes_from_the_hub(tmp_path, vocabulary, monkeypatch):
    part = {"question": ["the plot", "a film"], "sentence": ["dull", "good"], "label": [0, 1]}
    asked = []
    hub = SimpleNamespace(load_dataset=lambda *name: asked.append(name) or {"train": part, "validation": part})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    (tokens, labels), _ = text.glue("glue-qnli")
    assert asked == [("nyu-mll/glue", "qnli")]
    assert labels.tolist() == [0, 1]
    assert tokens[1].tolist() == ids(vocabulary, "a film", "good")


def test_the_scores_of_glue_are_learned_and_judged_as_scores(tmp_path, vocabulary, monkeypatch):
    words = ["the plot", "a film", "good", "dull"]
    part = {"sentence1": words * 20, "sentence2": words[::-1] * 20, "label": [0.0, 5.0, 2.5, 3.75] * 20}
    hub = SimpleNamespace(load_dataset=lambda *name: {"train": part, "validation": part})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    source = load("glue-stsb", tmp_path)
    assert (source.classes, source.metric, source.pool_labels.dtype) == (1, "correlations", "float32")
    assert set(source.test_labels.tolist()) == {0.0, 2.5, 3.75, 5.0}
    recipe = Recipe(40, learning_rate=3e-3, base="adam", beta2=0.98)
    run = Run("bert-tiny", "adamw", 0.0, 0)
    outcome = loop.train(run, recipe, source, torch.device("cpu"), lambda epoch: None)
    assert outcome.epochs[-1].train_loss < outcome.epochs[0].train_loss
    assert outcome.test_accuracy > 0.7
    with pytest.raises(Refused, match="draws classes anew, and glue-stsb has scores; leave it out"):
        with_wrong_labels(source, 0.1)


@pytest.mark.parametrize(
    ("action", "sentence"),
    [
        (lambda root: load("movie-reviews", root), "needs the file movieReviewSnippets_GroundTruth.txt"),
        (lambda root: build("minilm", 8, 0, 2), "MiniLM could not be loaded"),
        (lambda root: build("vit", 8, 0, 2), "vit is a model for images, and the data are sentences"),
        (lambda root: build("bert-tiny", 8, 1, 2), "bert-tiny is a model for sentences, and the data are images"),
    ],
)
def test_what_is_missing_is_said(tmp_path, monkeypatch, action, sentence):
    monkeypatch.delenv("NUSAM_ENCODERS", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(Refused, match=sentence):
        action(tmp_path)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(Refused, match=r'need transformers.*"nusam\[text\]"'):
        build("bert-tiny", 8, 0, 2)


def test_an_encoder_sees_neither_padding_nor_its_length():
    torch.manual_seed(0)
    model = build("bert-tiny", 0, 0, 3).double().eval()
    pair = torch.tensor([[101, 7, 8, 102, 9, 102, 0, 0], [101, 7, 102, 0, 0, 0, 0, 0]])
    logits = model(pair)
    torch.testing.assert_close(model(torch.nn.functional.pad(pair, (0, 5))), logits)
    alone = model.encoder(
        input_ids=pair[:1, :6],
        attention_mask=torch.ones(1, 6, dtype=torch.int64),
        token_type_ids=torch.tensor([[0, 0, 0, 0, 1, 1]]),
    ).logits
    torch.testing.assert_close(logits[:1], alone)
    torch.testing.assert_close(logits[1:], model(pair[1:, :3]))


def test_made_up_sentences_are_distinct_and_balanced():
    tokens, labels = text.tiny_sentences()
    assert len(np.unique(tokens, axis=0)) == len(labels) == 480
    assert labels.mean() == 0.5


def train(monkeypatch, out, *arguments):
    monkeypatch.setattr(
        sys, "argv", ["nusam", "train", "--data", "sentences", "--epochs", "8", "--out", str(out), *arguments]
    )
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def test_a_run_learns_from_sentences(tmp_path, monkeypatch, capsys):
    options = ("--train-size", "160", "--model", "bert-tiny", "--rho", "0.01")
    assert train(monkeypatch, tmp_path, *options) == 0
    epochs = json.loads((tmp_path / "outcome.json").read_text())["epochs"]
    assert epochs[-1]["train_loss"] < 0.9 * epochs[0]["train_loss"]


def test_images_and_sentences_are_told_apart(tmp_path, monkeypatch, capsys):
    assert train(monkeypatch, tmp_path, "--model", "mixer") == 2
    assert "mixer is a model for images" in capsys.readouterr().err
    assert train(monkeypatch, tmp_path, "--model", "bert-tiny", "--augment", "crop") == 2
    assert "--augment crop is for images, and sentences are sentences" in capsys.readouterr().err
