"""Sentences to classify, as token ids, and the encoders that there are for them.

A machine without a network keeps encoders in the folder that the environment variable ``NUSAM_ENCODERS`` names, each in
a folder of its own: ``all-MiniLM-L6-v2``, ``bert-base-uncased``.
"""

import importlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nusam.experiments.errors import Refused
from nusam.experiments.training.class_sizes import require_two_of_each

__all__ = [
    "ENCODERS",
    "END",
    "GLUE",
    "SENTENCES",
    "glue",
    "metric_of",
    "movie_reviews",
    "needed",
    "of_hub",
    "tiny_sentences",
    "tsv",
]

# (N, L) token ids, 0 behind a sentence's end, and (N,) int64 classes or float32 scores
Labelled = tuple[NDArray[np.int64], NDArray[Any]]

LENGTH = 128  # tokens of a sentence at most
REVIEW_LENGTH = 40  # which eight of ten reviews do not exceed
END = 102  # the token behind a sentence
ENCODERS = {  # by the command line's name: title, folder, and who keeps it where there is a network
    "bert-base": ("BERT-base", "bert-base-uncased", "google-bert"),
    "minilm": ("MiniLM", "all-MiniLM-L6-v2", "sentence-transformers"),
    "bert-tiny": ("BERT, tiny and untrained", "", ""),
}


class Task(NamedTuple):
    """One of GLUE's: the columns with the sentences, the split with known labels, and what it is judged by."""

    columns: tuple[str, ...]
    split: str = "validation"
    metric: str = "accuracy"


GLUE = {
    "glue-cola": Task(("sentence",), metric="matthews"),
    "glue-sst2": Task(("sentence",)),
    "glue-mrpc": Task(("sentence1", "sentence2")),
    "glue-qqp": Task(("question1", "question2")),
    "glue-stsb": Task(("sentence1", "sentence2"), metric="correlations"),  # scores of 0 to 5
    "glue-mnli": Task(("premise", "hypothesis"), "validation_matched"),
    "glue-qnli": Task(("question", "sentence")),
    "glue-rte": Task(("sentence1", "sentence2")),
}
SENTENCES = ("sentences", "movie-reviews", "tsv", *GLUE)  # data that are no images
MOVIE_REVIEWS = "movieReviewSnippets_GroundTruth.txt"


def tiny_sentences() -> Labelled:
    """A few hundred made-up verdicts, letter by letter: they test a pipeline and mean nothing."""
    verdicts = {"good": 1, "fine": 1, "great": 1, "strong": 1, "bad": 0, "dull": 0, "weak": 0, "poor": 0}
    sentences, labels = [], []
    for subject in ("plot", "cast", "music", "end", "start", "script", "pace", "joke", "scene", "film"):
        for adverb in ("", "very ", "rather ", "really ", "truly ", "just "):
            for verdict, label in verdicts.items():
                sentences.append([1000 + byte for byte in f"the {subject} is {adverb}{verdict}".encode()] + [END])
                labels.append(label)
    return _padded(sentences), np.array(labels, np.int64)


def movie_reviews(root: Path) -> Labelled:
    """10,605 sentences with mean ratings of −4 to 4 (Hutto & Gilbert, 2014); those of at least ½ either way count."""
    path = root / MOVIE_REVIEWS
    if not path.is_file():
        raise Refused(
            f"--data movie-reviews needs the file {MOVIE_REVIEWS} in --data-root, which is {root}; it is in "
            "hutto_ICWSM_2014.tar.gz of the source distribution of vaderSentiment 0.5."
        )
    rows = [line.split("\t") for line in path.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    decided = [(text, float(rating) > 0) for _, rating, text in rows if abs(float(rating)) >= 0.5]
    tokens = _tokenized([(text,) for text, _ in decided], REVIEW_LENGTH)
    return tokens, np.array([positive for _, positive in decided], np.int64)


def tsv(root: Path) -> tuple[Labelled, Labelled]:
    """train.tsv and test.tsv: on each line a class, a tab and a sentence, or two sentences with another tab."""
    parts = []
    classes: dict[str, int] = {}
    columns = 0  # of every line, as the first has them
    names = ("train.tsv", "test.tsv")
    if not all((root / name).is_file() for name in names):
        raise Refused(f"--data tsv needs the files train.tsv and test.tsv in --data-root, which is {root}.")
    for name in names:
        path = root / name
        lines = _read(path).split("\n")
        split = ((number, line.split("\t")) for number, line in enumerate(lines, 1) if line.strip())
        rows = [(number, [part.strip() for part in parts]) for number, parts in split]
        if not rows:
            raise Refused(f"{path} is empty; a class, a tab and a sentence are needed on each line.")
        for number, row in rows:
            if len(row) not in (2, 3):
                raise Refused(
                    f"{path}, line {number}, has {len(row) - 1} tabs; a class, a tab and a sentence are needed, or "
                    "two sentences with a tab between."
                )
            if not all(row):
                what = "class" if not row[0] else "sentence"
                raise Refused(f"{path}, line {number}, has an empty {what}; complete it, or remove the line.")
            columns = columns or len(row)
            if len(row) != columns:
                raise Refused(
                    f"{path}, line {number}, has {len(row) - 1} of the sentences of which the first line of train.tsv "
                    f"has {columns - 1}; every line needs as many."
                )
        labels = [row[0] for _, row in rows]
        if name == "train.tsv":
            classes = {label: index for index, label in enumerate(sorted(set(labels)))}
            require_two_of_each(
                "tsv", labels, ", or remove its line if that is a header (the class stands before the tab)"
            )
        elif unknown := set(labels) - classes.keys():
            raise Refused(f"{path} has the class {min(unknown)}, which train.tsv lacks; complete one of them.")
        numbers = np.array([classes[label] for label in labels], np.int64)
        parts.append((_tokenized([tuple(row[1:]) for _, row in rows]), numbers))
    return parts[0], parts[1]


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise Refused(f"{path}, line {line}, is not UTF-8; save the file in that encoding.") from error


def glue(name: str) -> tuple[Labelled, Labelled]:
    """A task's training sentences and those of its split with known labels, through Hugging Face ``datasets``."""
    columns, split, metric = GLUE[name]
    kind = np.float32 if metric == "correlations" else np.int64
    datasets = needed("datasets")
    try:
        task = datasets.load_dataset("nyu-mll/glue", name.removeprefix("glue-"))
    except Exception as error:  # whatever the hub raises without a network
        raise Refused(
            f"--data {name} could not be downloaded ({type(error).__name__}); connect to the network once, or use "
            "--data tsv."
        ) from error
    train, test = (
        (_tokenized(list(zip(*(task[part][c] for c in columns), strict=True))), np.array(task[part]["label"], kind))
        for part in ("train", split)
    )
    return train, test


def metric_of(data: str) -> str:
    """What a data set is judged by: one of :data:`nusam.experiments.training.spec.METRICS`."""
    return GLUE[data].metric if data in GLUE else "accuracy"


def _tokenized(sentences: list[tuple[str, ...]], length: int = LENGTH) -> NDArray[np.int64]:
    """With the uncased vocabulary that all of :data:`ENCODERS` share."""
    transformers = needed("transformers")
    tokenizer = of_hub(transformers.AutoTokenizer, "minilm" if _folder("minilm") else "bert-base")
    columns = [list(column) for column in zip(*sentences, strict=True)]
    return _padded(tokenizer(*columns, truncation=True, max_length=length)["input_ids"])


def _padded(sentences: Iterable[list[int]]) -> NDArray[np.int64]:
    rows = list(sentences)
    table = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for place, row in zip(table, rows, strict=True):
        place[: len(row)] = row
    return table


def _folder(name: str) -> Path | None:
    """Where the encoder lies on this machine, if it does."""
    folder = Path(os.environ.get("NUSAM_ENCODERS", "")) / ENCODERS[name][1]
    return folder if "NUSAM_ENCODERS" in os.environ and folder.is_dir() else None


def of_hub(kind: Any, name: str, **options: Any) -> Any:
    """An encoder or its tokenizer, from a folder of this machine or from where it is kept.

    Raises:
        Refused: if it can't be had.
    """
    title, folder, keeper = ENCODERS[name]
    logging = needed("transformers").utils.logging
    logging.set_verbosity_error()  # a report of the new head, for every run
    logging.disable_progress_bar()
    try:
        return kind.from_pretrained(_folder(name) or f"{keeper}/{folder}", **options)
    except Exception as error:  # whatever the hub raises without a network
        raise Refused(
            f"{title} could not be loaded ({type(error).__name__}); connect to the network once, or let "
            f"NUSAM_ENCODERS name a folder that holds {folder}."
        ) from error


def needed(package: str) -> Any:
    """A package of the extra ``text``.

    Raises:
        Refused: if it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Refused(f'Sentences need {package}, which is not installed; pip install "nusam[text]".') from error
