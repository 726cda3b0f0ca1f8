"""A share of a batch is cut out of whatever holds it, and the batch itself is never written."""

import copy
import dataclasses
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence

from nusam.batch import first_samples

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass(frozen=True)
class Example:
    x: torch.Tensor
    name: str


def samples(count):
    return torch.arange(3.0 * count).view(count, 3), torch.arange(count)


@given(count=st.integers(1, 300), denominator=st.integers(1, 40))
def test_as_many_as_the_share_says_rounded_up(count, denominator):
    x, _ = samples(count)
    assert torch.equal(first_samples(x, 1 / denominator), x[: -(-count // denominator)])


@pytest.mark.parametrize("share", [1e-9, 0.25, 0.3, 1.0])
def test_every_kind_of_container(share):
    x, y = samples(8)
    k = {1e-9: 1, 0.25: 2, 0.3: 3, 1.0: 8}[share]
    assert all(torch.equal(a, b) for a, b in zip(first_samples((x, y), share), (x[:k], y[:k]), strict=True))
    assert isinstance(first_samples([x, y], share), list)
    pair = first_samples(Pair(x, y), share)
    assert isinstance(pair, Pair)
    assert torch.equal(pair.y, y[:k])
    example = first_samples(Example(x, "a"), share)
    assert torch.equal(example.x, x[:k])
    assert example.name == "a"
    ordered = first_samples(OrderedDict(x=x, deep={"y": (y, [y])}), share)
    assert isinstance(ordered, OrderedDict)
    assert torch.equal(ordered["deep"]["y"][1][0], y[:k])
    assert torch.equal(first_samples((x.to_sparse(), y), share)[0].to_dense(), x[:k])


def test_rows_that_are_not_tensors_are_cut_as_tensors_are():
    x, _y = samples(8)
    batch = {
        "x": x,
        "names": list("abcdefgh"),
        "where": tuple(range(8)),
        "old": np.arange(8),
        "boxes": [x[:i] for i in range(8)],
    }
    cut = first_samples(batch, 0.25)
    assert cut["names"] == ["a", "b"]
    assert cut["where"] == (0, 1)
    assert cut["old"].tolist() == [0, 1]
    assert [len(boxes) for boxes in cut["boxes"]] == [0, 1]


def test_what_has_another_length_is_handed_on_whole():
    x, _y = samples(8)
    weights, scale = torch.ones(5), torch.tensor(2.0)
    cut = first_samples({"x": x, "weights": weights, "scale": scale, "names": ["a"] * 3, "none": None}, 0.5)
    assert cut["weights"] is weights
    assert cut["scale"] is scale
    assert cut["names"] == ["a"] * 3
    assert cut["none"] is None


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_container_as_long_as_the_batch_is_not_a_list_of_samples(count):
    x, y = samples(count)
    batch = (x,) * count if count != 2 else (x, y)
    cut = first_samples(batch, 1e-9)
    assert len(cut) == len(batch)
    assert all(len(part) == 1 for part in cut)
    inner = first_samples(((x,) * count, y), 1e-9)
    assert len(inner[0]) == count
    assert len(inner[0][0]) == 1


def test_lists_of_samples_as_detectors_take_them():
    images = [torch.ones(3, 4 + i, 5) for i in range(8)]
    for objects in (lambda i: i, lambda i: 3):  # as many of them as an image has channels, too
        targets = [{"boxes": torch.ones(objects(i), 4)} for i in range(8)]
        cut = first_samples((images, targets), 0.25)
        assert [len(part) for part in cut] == [2, 2]
        assert cut[0][0].shape == (3, 4, 5)
    assert [len(part) for part in first_samples((images, torch.arange(8)), 0.25)] == [2, 2]
    assert [len(part) for part in first_samples((images, list(range(8))), 0.25)] == [2, 2]


def test_the_batch_is_not_changed():
    x, y = samples(8)
    batch = {"x": x, "y": [y, {"z": y}], "names": list("abcdefgh")}
    before = copy.deepcopy(batch)
    first_samples(batch, 0.25)
    assert batch["x"] is x
    assert batch["y"][0] is y
    assert batch["names"] == before["names"]
    assert len(batch["y"]) == 2


def test_what_tokenizers_return():
    transformers = pytest.importorskip("transformers")
    x, y = samples(8)
    batch = transformers.BatchEncoding({"input_ids": x.long(), "labels": y})
    cut = first_samples(batch, 0.25)
    assert type(cut) is transformers.BatchEncoding
    assert cut["input_ids"].shape == (2, 3)
    assert batch["input_ids"].shape == (8, 3)


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        ((1, "a"), "first dimension to cut, got a tuple"),
        (torch.tensor(1.0), r"first dimension to cut, got a tensor of shape \(\)"),
        ({"a": None}, "first dimension to cut, got a dict of a"),
        (pack_sequence([torch.ones(3), torch.ones(2)]), "PackedSequence, whose samples are packed"),
        ({"input_ids": torch.ones(1, 9), "cu_seq_lens_q": torch.ones(3)}, "whose samples are packed"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "nested tensor"),
    ],
)
def test_what_can_not_be_cut_is_refused(batch, sentence):
    with pytest.raises(ValueError, match=sentence):
        first_samples(batch, 0.5)
