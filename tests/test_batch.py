"""A share of a batch is cut out of whatever holds it, and the batch itself is never written."""

import copy
import dataclasses
import functools
import types
from collections import OrderedDict, UserDict, deque, namedtuple
from collections.abc import MutableMapping

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


class Sharing(MutableMapping):
    """Its copy writes to the same entries."""

    def __init__(self, **entries):
        self.entries = entries

    def __getitem__(self, name):
        return self.entries[name]

    def __setitem__(self, name, value):
        self.entries[name] = value

    def __delitem__(self, name):
        del self.entries[name]

    def __iter__(self):
        return iter(self.entries)

    def __len__(self):
        return len(self.entries)


class Within(Sharing):
    """Has them in another such one."""

    def __init__(self, **entries):
        self.entries = Sharing(**entries)


class SlottedSharing(Sharing):
    __slots__ = ("own",)


class Hidden(Sharing):
    """Has them where nobody looks."""

    def __init__(self, **entries):
        self.entries = types.SimpleNamespace(**entries)

    def __getitem__(self, name):
        return vars(self.entries)[name]

    def __setitem__(self, name, value):
        vars(self.entries)[name] = value

    def __iter__(self):
        return iter(vars(self.entries))


class Picky(Hidden):
    """Takes no other number of rows."""

    def __setitem__(self, name, value):
        if name == "y" and len(value) != len(self[name]):
            raise RuntimeError
        super().__setitem__(name, value)


class OwnCopy(Sharing):
    def __copy__(self):
        return self


class Anew(Sharing):
    """Makes its entries whenever they are asked for."""

    def __getitem__(self, name):
        return self.entries[name] * 1


@dataclasses.dataclass(init=False)
class Stored:
    """Its fields are kept in one dictionary, which its copy has too."""

    x: torch.Tensor
    y: torch.Tensor

    def __init__(self, x, y):
        self.store = {"x": x, "y": y}


Stored.x = property(lambda self: self.store["x"], lambda self, value: self.store.update(x=value))
Stored.y = property(lambda self: self.store["y"], lambda self, value: self.store.update(y=value))


@pytest.mark.parametrize(
    ("kind", "is_cut"),
    [
        (Sharing, True),
        (Within, True),
        (SlottedSharing, True),
        (UserDict, True),
        (Hidden, False),
        (Picky, False),
        (OwnCopy, False),
        (Anew, False),
        (Stored, False),
    ],
)
def test_a_batch_that_shares_its_entries_with_its_copy_is_not_changed(kind, is_cut):
    x, y = samples(8)
    batch = kind(x=x, y=y)
    get = getattr if kind is Stored else dict.__getitem__
    if is_cut:
        cut = first_samples(batch, 0.25)
        assert type(cut) is kind
        assert [len(cut[name]) for name in ("x", "y")] == [2, 2]
    else:
        with pytest.raises(ValueError, match=f"A {kind.__name__} can't be filled with a share of itself; hand over"):
            first_samples(batch, 0.25)
    for name, value in (("x", x), ("y", y)):
        assert torch.equal(get(batch if kind is Stored else dict(batch), name), value)


@dataclasses.dataclass
class Masked:
    x: torch.Tensor

    def __post_init__(self):
        self.mask = self.x > 4

    @functools.cached_property
    def mean(self):
        return self.x.mean()


class MaskedDict(dict):
    def __init__(self, x):
        super().__init__(x=x)
        self.mask = x > 4


class MaskedSharing(Sharing):
    def __init__(self, x):
        super().__init__(x=x)
        self.more = {"mask": x > 4}

    @property
    def mask(self):
        return self.more["mask"]


@pytest.mark.parametrize("kind", [Masked, MaskedDict, MaskedSharing])
def test_tensors_beside_the_entries_are_cut_with_them(kind):
    x, _ = samples(8)
    batch = kind(x)
    if kind is Masked:
        assert batch.mean == x.mean()
    cut = first_samples(batch, 0.25)
    assert type(cut) is kind
    assert torch.equal(cut.mask, x[:2] > 4)
    assert torch.equal(batch.mask, x > 4)
    if kind is Masked:
        assert cut.mean == x[:2].mean()
        assert batch.mean == x.mean()


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


def items(count, *shape):
    return [torch.zeros(*shape) for _ in range(count)]


def dicts(count, rows, **others):
    return [{"x": torch.zeros(rows, 6), "y": torch.zeros(rows).long(), **others} for _ in range(count)]


class Nested:
    """As DETR has its images."""

    def __init__(self, tensors):
        self.tensors = tensors


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner


class Immutable(dict):
    def __setitem__(self, name, value):
        raise RuntimeError


class Sizes(list):
    """As a list of images that knows their sizes."""

    def __init__(self, images):
        super().__init__(images)
        self.sizes = torch.tensor([image.shape[1:] for image in images])


def turns(count):
    return [{"role": "user", "content": str(number)} for number in range(count)]


X, Y = torch.zeros(8, 3), torch.zeros(8).long()
LENGTHS = torch.tensor([3, 5, 2, 7, 4, 6, 3, 5])
UNCLEAR = {
    # objects whose inside nobody knows
    "an object": (Nested(X), Y),
    "an object in a list beside targets": (Y, [Nested(X)] * 3),
    "a namespace": (types.SimpleNamespace(x=X), Y),
    "an object in an object": {"x": X, "more": Slotted(Nested(X))},
    "a deque": (X, deque([Y])),
    "a range": (X, range(8)),
    "a mapping that is read alone": (types.MappingProxyType({"x": X}), Y),
    "a mapping that can't be filled": Immutable(x=X, y=Y),
    # lists of samples or of tensors side by side
    "dictionaries alone": dicts(8, 12),
    "dictionaries, as long as there are of them": dicts(8, 8),
    "images alone": items(8, 3, 9, 9),
    "three images alone": items(3, 3, 9, 9),
    "images of several sizes": [torch.zeros(3, 5 + i, 9) for i in range(8)],
    "sequences alone": items(8, 12, 6),
    "ids alone": {"input_ids": [[1, 2, 3, 4]] * 8},
    "bucketed lists": (items(8, 12, 6), items(8, 12)),
    "bucketed tuples": (tuple(items(8, 12, 6)), tuple(items(8, 12))),
    "as many masks as images": {"x": torch.zeros(2, 3, 8, 8), "masks": items(2, 2, 8, 8), "y": items(2, 2)},
    "images as many as channels": (tuple(items(3, 3, 9, 9)), torch.zeros(3).long()),
    # more or fewer rows than samples
    "bags": (Y, torch.zeros(35).long(), LENGTHS.cumsum(0) - LENGTHS),
    "bags, text first": (torch.zeros(35).long(), LENGTHS.cumsum(0) - LENGTHS, Y),
    "patches": {"ids": torch.zeros(8, 9).long(), "pixels": torch.zeros(8 * 16, 11), "grid": torch.zeros(8, 3).long()},
    "patches first": {"pixels": torch.zeros(8 * 16, 11), "ids": torch.zeros(8, 9).long()},
    "a graph": {"x": torch.zeros(20, 3), "edges": torch.zeros(2, 40).long(), "y": torch.zeros(8)},
    "clouds": {"x": torch.zeros(35, 3), "of": torch.arange(8).repeat_interleave(LENGTHS), "y": torch.zeros(8)},
    "clouds, shuffled": {"x": torch.zeros(35, 3), "of": torch.arange(35) % 8, "y": torch.zeros(8)},
    "clouds, in a column": {"x": torch.zeros(35, 3), "of": torch.arange(35)[:, None] % 8, "y": torch.zeros(8)},
    "clouds, some empty": {"x": torch.zeros(35, 3), "of": torch.arange(35) // 9, "y": torch.zeros(8)},
    "clouds, of numpy": {"x": np.zeros((35, 3)), "of": np.arange(35) % 8, "y": np.zeros(8)},
    "clouds, in a list": {"x": torch.zeros(35, 3), "of": [i % 8 for i in range(35)], "y": torch.zeros(8)},
    "voxels": {
        "x": torch.zeros(35, 3),
        "at": torch.arange(35)[:, None] % 8 + torch.tensor([[0, 9, 8]]),
        "y": torch.zeros(8),
    },
    "clouds, labels in a list": {"x": torch.zeros(35, 3), "of": torch.arange(35) % 8, "y": [0.5] * 8},
    "clouds, names in a list": {"x": torch.zeros(35, 3), "of": [i % 8 for i in range(35)], "y": list("abcdefgh")},
    "lengths": {"x": torch.zeros(35, 3), "lengths": LENGTHS.tolist(), "y": torch.zeros(8)},
    "lengths, labels in a list": (torch.zeros(35).long(), LENGTHS.tolist(), [1.0] * 8),
    "lengths, of numpy": (torch.zeros(35).long(), list(LENGTHS.numpy()), [1.0] * 8),
    "lengths, as tensors": (torch.zeros(35).long(), list(LENGTHS), [1.0] * 8),
    "lengths, padded": (torch.zeros(40).long(), LENGTHS.tolist(), [1.0] * 8),
    "offsets": (torch.zeros(35).long(), (LENGTHS.cumsum(0) - LENGTHS).tolist(), [1.0] * 8),
    "ends": (torch.zeros(35).long(), [0, *LENGTHS.cumsum(0).tolist()], [1.0] * 8),
    "rows of several kinds": {"x": X, "y": [torch.zeros(3), 1.0] * 4},
    "one length": (torch.zeros(35).long(), [35], [1.0]),
    # samples in another dimension
    "a state": (torch.zeros(8, 5, 6), torch.zeros(1, 8, 6)),
    "two states": (torch.zeros(8, 5, 6), (torch.zeros(1, 8, 6), torch.zeros(1, 8, 6))),
    "states of layers": (torch.zeros(8, 5, 6), torch.zeros(4, 8, 6)),
    # conversations
    "conversations of one length": [turns(2)] * 8,
    "conversations of one length, as many": [turns(8)] * 8,
    "conversations in a tuple": tuple(turns(count) for count in (3, 2, 4, 3, 2)),
    "conversations of one length in a tuple": (turns(2),) * 8,
    # what would get lost
    "images with sizes beside": (Sizes(items(8, 3, 9, 9)), Y),
    "two views": (torch.zeros(16, 3), Y),
    "time first": (torch.zeros(12, 8, 3), Y),
    "one row for all": {"ids": torch.zeros(1, 35).long(), "y": Y},
    # as many positions as samples
    "positions": (torch.zeros(8, 8).long(), torch.arange(8)),
    "positions, of numpy": {"x": np.zeros((8, 8, 3)), "at": np.arange(8), "y": np.zeros(8)},
    "a causal mask": (torch.zeros(8, 8).long(), torch.ones(8, 8).tril().bool()),
    "a causal mask, of what is hidden": {"x": torch.zeros(8, 8, 3), "mask": torch.ones(8, 8).triu(1).bool()},
    "a causal mask that is added": (torch.zeros(8, 8, 3), torch.full((8, 8), -torch.inf).triu(1)),
    "a mask of a window": (torch.zeros(8, 8).long(), torch.ones(8, 8).tril(2).triu(-2).bool()),
    "a bias by distance": (torch.zeros(8, 8, 3), -(torch.arange(8.0)[:, None] - torch.arange(8.0)).abs()),
    # a row alone
    "one row": {"input_ids": torch.zeros(1, 5), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])},
}


SQUARE = {
    "tokens": torch.randint(9, (8, 8)),
    "a padding mask": torch.arange(8) < torch.tensor([3, 8, 1, 5, 8, 2, 7, 4])[:, None],
    "a full mask": torch.ones(8, 8).long(),
    "an even mask": (torch.arange(64) % 2).view(8, 8),
    "labels": torch.tensor([3, 1, 2, 0, 4, 5, 6, 7]),
    "targets": torch.linspace(0, 1, 8),
    "one-hot targets": torch.eye(8),
}


@pytest.mark.parametrize("name", SQUARE)
def test_samples_are_cut_where_there_are_as_many_positions(name):
    tokens, part = first_samples((SQUARE["tokens"], SQUARE[name]), 1 / 4)
    assert torch.equal(tokens, SQUARE["tokens"][:2])
    assert torch.equal(part, SQUARE[name][:2])


@pytest.mark.parametrize("part", [torch.arange(8), torch.ones(8, 8).tril()])
def test_what_could_be_positions_is_of_samples_where_no_other_tensor_has_as_many(part):
    x, cut = first_samples((torch.zeros(8, 5), part), 1 / 4)
    assert len(x) == len(cut) == 2


@pytest.mark.parametrize("name", UNCLEAR)
def test_a_batch_in_which_a_sample_is_not_certain_is_refused(name):
    with pytest.raises(ValueError, match=r"(?s)^(?!.*\. [A-Z]).*use (opt|ascent_share=1)"):  # one sentence
        first_samples(UNCLEAR[name], 0.25)


RAGGED = [torch.zeros(5 + i, 6) for i in range(8)]
CLEAR = {
    "sequences": (RAGGED, lambda cut: cut == RAGGED[:2]),
    "ids": ({"input_ids": [[1] * (i + 1) for i in range(8)]}, lambda cut: cut == {"input_ids": [[1], [1, 1]]}),
    "ids beside labels": ({"ids": [[1, 2, 3, 4]] * 8, "y": Y}, lambda cut: len(cut["ids"]) == 2 == len(cut["y"])),
    "dictionaries": ([{"x": x} for x in RAGGED], lambda cut: [one["x"] for one in cut] == RAGGED[:2]),
    "dictionaries with objects": ([{"x": x, "of": Nested(x)} for x in items(8, 3, 9, 9)], lambda cut: len(cut) == 2),
    "pairs": ([(x, torch.tensor(1)) for x in items(8, 12, 6)], lambda cut: [len(one) for one in cut] == [2, 2]),
    "pairs with numbers": ([(x, 1) for x in items(8, 3, 9, 9)], lambda cut: [len(one) for one in cut] == [2, 2]),
    "detection, tuples": (
        (tuple(items(8, 8, 9, 9)), tuple(dicts(8, 8))),
        lambda cut: [len(part) for part in (*cut, *cut[0])] == [2, 2, 8, 8],
    ),
    "detection, as annotated": ({"x": X, "y": dicts(8, 8, id=torch.zeros(1))}, lambda cut: len(cut["y"]) == 2),
    "pictures": ({"x": [object()] * 8, "y": [1] * 8}, lambda cut: [len(part) for part in cut.values()] == [2, 2]),
    "conversations": ([turns(i + 1) for i in range(8)], lambda cut: cut == [turns(1), turns(2)]),
    "conversations, a few of one length": ([turns(i) for i in (3, 2, 3, 1)], lambda cut: cut == [turns(3)]),
    "conversations beside labels": (([turns(2)] * 8, Y), lambda cut: [len(p) for p in (*cut, cut[0][0])] == [2, 2, 2]),
    "pairs of conversations": (
        ([turns(2)] * 8, [turns(1)] * 8),
        lambda cut: [len(part) for part in (*cut, cut[0][0], cut[1][0])] == [2, 2, 2, 1],
    ),
    "boxes of each image": (
        [[{"box": torch.zeros(4), "label": 1}] * i for i in (3, 2, 4, 3, 5, 2, 3, 1)],
        lambda cut: [len(one) for one in cut] == [3, 2],
    ),
    "augmented twice": ((dicts(8, 8), dicts(8, 8)), lambda cut: [len(p) for p in (*cut, cut[0][0]["x"])] == [2, 2, 8]),
    "boxes of which some are missing": (
        {"x": X, "y": [torch.zeros(2, 4), None] * 4},
        lambda cut: len(cut["y"]) == 2 and cut["y"][1] is None,
    ),
    "names for all, and labels": (
        {"x": X, "y": torch.arange(8) % 3, "names": list("abcd")},
        lambda cut: len(cut["names"]) == 4 and len(cut["y"]) == 2,
    ),
    "sizes for all": ({"x": X, "size": [224, 224]}, lambda cut: cut["size"] == [224, 224] and len(cut["x"]) == 2),
    "views": ({"views": dicts(2, 8), "y": Y}, lambda cut: [len(one["x"]) for one in cut["views"]] == [2, 2]),
    "a default collator's list": ([X, Y], lambda cut: [len(part) for part in cut] == [2, 2]),
    "a default collator's pair of one shape": ([X, X + 1], lambda cut: [len(part) for part in cut] == [2, 2]),
    "tokens and labels": ([Y[:, None].repeat(1, 9)] * 2, lambda cut: [part.shape for part in cut] == [(2, 9)] * 2),
    "a triplet of images": (items(3, 8, 3, 9, 9), lambda cut: [len(part) for part in cut] == [2, 2, 2]),
    "past and future": (items(2, 8, 24, 3), lambda cut: [part.shape for part in cut] == [(2, 24, 3)] * 2),
    "two numbers of each": (items(2, 8), lambda cut: [len(part) for part in cut] == [2, 2]),
    "an input and its target": ([X, X[:, :1]], lambda cut: [len(part) for part in cut] == [2, 2]),
    "equal fields in a tuple": ((X, X, X), lambda cut: [len(part) for part in cut] == [2, 2, 2]),
    "inputs and targets": (({"x": X}, {"y": Y}), lambda cut: len(cut[0]["x"]) == 2 == len(cut[1]["y"])),
    "positions first": ({"position_ids": torch.arange(3)[None], "x": X}, lambda cut: len(cut["x"]) == 2),
    "weights of classes": (
        {"x": X, "y": torch.arange(8) % 5, "class_weights": torch.rand(5)},
        lambda cut: [len(p) for p in cut.values()] == [2, 2, 5],
    ),
    "weights of more classes than samples": (
        {"x": X, "y": torch.arange(8), "pos_weight": torch.rand(20)},
        lambda cut: [len(p) for p in cut.values()] == [2, 2, 20],
    ),
    "weights first": ({"weights": torch.ones(5), "x": X}, lambda cut: [len(p) for p in cut.values()] == [5, 2]),
    "a mask first": ({"mask": torch.ones(3, 3).tril(), "x": X}, lambda cut: [len(p) for p in cut.values()] == [3, 2]),
    "an epoch first": ({"epoch": torch.tensor([3]), "x": X}, lambda cut: len(cut["x"]) == 2),
    "one row": ({"input_ids": torch.zeros(1, 5), "position_ids": torch.arange(5)[None]}, lambda cut: len(cut) == 2),
}


@pytest.mark.parametrize("name", CLEAR)
def test_a_batch_that_can_be_read_in_one_way_alone_is_cut(name):
    batch, holds = CLEAR[name]
    assert holds(first_samples(batch, 0.25))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_a_sparse_tensor_keeps_its_layout(layout):
    cut = first_samples(torch.eye(8).to_sparse(layout=layout), 0.25)
    assert cut.layout == layout
    assert torch.equal(cut.to_dense(), torch.eye(8)[:2])
