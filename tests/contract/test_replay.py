"""Both passes of a training step begin with one batch and one state, and what is kept is what the first pass left."""

import random
import threading
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from nusam.integrations.replay import Replay


class Meter:
    """Of the kind that everybody has written once."""

    def __init__(self):
        self.sum, self.count, self.values = 0.0, 0, []
        self.average = torch.zeros(())

    def update(self, value):
        self.sum += value
        self.count += 1
        self.values.append(value)
        self.average.mul_(0.9).add_(0.1 * value)


class Worker(Meter):
    """One whose attributes another thread changes meanwhile, which must not be undone."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class Keeper:
    """What a training step may keep in the object whose method it is."""

    def __init__(self):
        self.calls = 0
        self.losses = []
        self.tallies = {"train": defaultdict(list), "eval": {}}
        self.queue = deque([1, 2, 3], maxlen=3)
        self.words = Counter()
        self.ordered = OrderedDict(a=1)
        self.seen = {0}
        self.average = torch.zeros(())
        self.running = {"loss": torch.zeros(2)}
        self.table = np.zeros(2)
        self.rng = np.random.default_rng(0)
        self.old_rng = np.random.RandomState(0)
        self.random = random.Random(0)
        self.generator = torch.Generator().manual_seed(0)
        self.unlabelled = iter(torch.arange(100.0).split(5))
        self.shared = self.losses
        self.meter = Meter()
        self.meters = {"loss": Meter(), "both": [Meter(), self.meter]}

    def step(self, batch) -> tuple:
        """Everything that it finds and draws."""
        found = (
            self.calls,
            list(self.losses),
            len(self.tallies["train"]["loss"]),
            tuple(self.queue),
            dict(self.words),
            dict(self.ordered),
            set(self.seen),
            self.average.item(),
            self.running["loss"].tolist(),
            self.table.tolist(),
            self.rng.random(),
            self.old_rng.rand(),
            self.random.random(),
            torch.rand((), generator=self.generator).item(),
            next(self.unlabelled).tolist(),
            getattr(self, "made", None),
            *[(m.sum, m.count, list(m.values), m.average.item()) for m in (self.meter, self.meters["both"][0])],
        )
        for meter in (self.meter, self.meters["loss"], *self.meters["both"]):
            meter.update(self.calls + 0.5)
        self.calls += 1
        self.losses.append(float(self.calls))
        self.tallies["train"]["loss"].append(self.calls)
        self.queue.append(self.calls)
        self.words["word"] += 1
        self.ordered["b"] = self.ordered.pop("a", 0)
        self.seen.add(self.calls)
        self.average.add_(1)  # in place
        self.average = self.average * 0.5
        self.running["loss"] += 1
        self.table[self.calls % 2] += 1
        self.made = self.calls
        return found


def run(steps, passes, owner=None, batch=None, step=None):
    """What every pass found, step by step."""
    owner = owner or Keeper()
    replay = Replay("training_step")
    step = step or owner.step
    found = []
    for _ in range(steps):
        found.append([step(given) for _, given in replay.passes(iter(passes), [owner], batch() if batch else None)])
    return owner, found


ONE, TWO, THREE = ("descent",), ("ascent", "descent"), ("ascent", "ascent", "descent")


@pytest.mark.parametrize("passes", [TWO, THREE], ids=["two", "repeated ascent"])
def test_every_pass_finds_and_draws_what_a_single_one_would(passes):
    once, expected = run(4, ONE)
    several, found = run(4, passes)
    assert found == [[first] * len(passes) for (first,) in expected]
    assert once.step(None) == several.step(None)  # and so goes on
    assert several.shared is several.losses  # the objects themselves, which others may hold
    assert type(several.unlabelled) is type(once.unlabelled)


def test_what_a_thread_may_change_is_left_alone():
    class Working(Keeper):
        def step(self, batch):
            self.worker.update(1)
            self.meter.update(1)

    owner = Working()
    owner.worker = Worker()
    run(3, TWO, owner)
    assert (owner.worker.count, owner.meter.count) == (6, 3)


@pytest.mark.parametrize("size", [lambda: 2, (3, 4), None, property(lambda self: 1 / 0)])
def test_what_others_call_a_size_is_not_read(size):
    class Keeping(Keeper):
        pass

    owner = Keeping()
    owner.group = type("Group", (), {"__module__": "torch.distributed", "size": size})()
    assert run(3, TWO, owner)[0].calls == 3


def test_an_error_in_either_pass_leaves_the_iterators_themselves():
    for fatal in (0, 1):
        owner, replay = Keeper(), Replay("training_step")
        before = owner.unlabelled
        with pytest.raises(OverflowError):
            for number, _ in enumerate(replay.passes(iter(TWO), [owner], None)):
                owner.step(None)
                if number == fatal:
                    raise OverflowError
        assert owner.unlabelled is before
        assert owner.calls == 1
        assert not replay.later


def test_an_iterator_that_ends_ends_in_both_passes():
    class Starting(Keeper):
        def step(self, batch):
            try:
                return next(self.short)
            except StopIteration:
                self.short = iter([10, 20])
                return next(self.short)

    owner = Starting()
    owner.short = iter([1])
    _, found = run(4, TWO, owner)
    assert found == [[1, 1], [10, 10], [20, 20], [10, 10]]


def test_what_is_drawn_may_be_changed_in_place():
    class Scaling(Keeper):
        def step(self, batch):
            return next(self.unlabelled).add_(1).tolist()

    _, found = run(2, TWO, Scaling())
    assert found == [[[1.0, 2.0, 3.0, 4.0, 5.0]] * 2, [[6.0, 7.0, 8.0, 9.0, 10.0]] * 2]


def test_a_module_keeps_its_attributes_and_its_buffers_are_left_to_the_optimizer():
    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.steps = 0
            self.layer = nn.Linear(2, 2)

        def step(self, batch):
            self.count += 1
            self.steps += 1
            return self.steps

    module, found = run(3, TWO, Module())
    assert found == [[1, 1], [2, 2], [3, 3]]
    assert module.count == 6
    assert module.steps == 3


def test_large_things_that_a_step_leaves_alone_are_no_matter():
    owner = Keeper()
    owner.dataset, owner.bank = list(range(20_000)), torch.zeros(2**20 + 1)
    owner.many = [torch.zeros(1) for _ in range(50)]
    assert run(3, TWO, owner)[0].calls == 3


@pytest.mark.parametrize("what", ["dataset", "bank", "many"])
def test_what_could_not_be_brought_back_is_refused_after_the_first_pass(what):
    class Changing(Keeper):
        def step(self, batch):
            passes_run.append(1)
            if what == "dataset":
                self.dataset.pop()
            else:
                (self.bank if what == "bank" else self.many[3]).add_(1)

    passes_run = []
    owner = Changing()
    owner.dataset, owner.bank = list(range(20_000)), torch.zeros(2**20 + 1)
    owner.many = [torch.zeros(1) for _ in range(50)]
    with pytest.raises(RuntimeError, match=rf"training_step changes Changing\.{what} in a way.*make it a buffer"):
        run(1, TWO, owner)
    assert len(passes_run) == 1


# ---------------------------------------------------------------- the batch


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass(frozen=True)
class Record:
    x: Any
    y: Any = field(default=None)


class Tree(dict):
    pass


class Graph:
    """As many a package has them: made of attributes, and known to nobody."""

    def __init__(self, x, y):
        self.x, self.y = x, y


BATCHES = {
    "dict": lambda x: {"x": x, "more": [x.clone()]},
    "list": lambda x: [x, {"x": x}],
    "tuple": lambda x: ([x], x),
    "namedtuple": lambda x: Pair([x], {"x": x}),
    "dataclass": lambda x: Record([x], {"x": x}),
    "subclass": lambda x: Tree(x=[x]),
    "object": lambda x: Graph(x, [x.clone()]),
    "objects": lambda x: [Graph(x, {"x": [x.clone()]}), Graph(1, 2)],
}


def consume(part):
    """Take everything out of the containers, and write into every tensor."""
    if isinstance(part, torch.Tensor):
        found = part.tolist()
        part.mul_(2).add_(1)
        return found
    if isinstance(part, Record):
        part = [part.x, part.y]
    if isinstance(part, Graph):
        part = vars(part)
    if isinstance(part, int):
        return part
    if isinstance(part, dict):
        return {name: consume(part.pop(name)) for name in list(part)}
    if isinstance(part, list):
        return [consume(part.pop(0)) for _ in range(len(part))]
    return [consume(inner) for inner in part]


@pytest.mark.parametrize("passes", [TWO, THREE], ids=["two", "repeated ascent"])
@pytest.mark.parametrize("kind", BATCHES)
def test_a_batch_that_is_taken_apart_and_written_into_is_whole_in_every_pass(kind, passes):
    def batch():
        return BATCHES[kind](torch.arange(3.0))

    _, found = run(3, passes, step=consume, batch=batch)
    _, expected = run(3, ONE, step=consume, batch=batch)
    assert found == [[first] * len(passes) for (first,) in expected]


def test_the_first_pass_has_the_batch_itself_and_nothing_is_copied_that_is_left_alone():
    x = torch.arange(3.0)
    replay = Replay("training_step")
    storages = []
    for _ in range(3):
        given = [batch["x"] for _, batch in replay.passes(iter(TWO), [], {"x": x})]
        assert given[0] is x
        storages.append(given[1].data_ptr() == x.data_ptr())
    assert storages == [False, True, True]  # copied until a step is seen to leave it alone


def test_a_tensor_that_is_written_into_out_of_the_blue_is_refused_and_served_from_then_on():
    replay = Replay("training_step")

    def step(writes):
        for _, batch in replay.passes(iter(TWO), [], torch.zeros(3)):
            assert batch.sum() == 0
            if writes:
                batch.add_(1)

    step(False)
    step(False)
    with pytest.raises(RuntimeError, match="wrote into a tensor of its batch, which it had not done before"):
        step(True)
    step(True)
    step(True)


@pytest.mark.parametrize("first", [1, 2, 7])
def test_a_write_that_no_tensor_tells_is_seen_from_the_first_step_on_and_else_in_the_steps_4_8_and_so_on(first):
    replay = Replay("training_step")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(1, 12):
            for name, batch in replay.passes(iter(TWO), [], {"x": torch.zeros(3)}):
                is_as_it_was = batch["x"].sum() == 0
                assert is_as_it_was or (name == "descent" and step < {1: 1, 2: 4, 7: 8}[first])
                if step >= first:
                    batch["x"].data.add_(1)
    assert ["through .data or numpy" in str(warning.message) for warning in told] == [True] * (first > 1)


def test_a_gradient_of_the_inputs_stays_with_its_pass():
    replay, norms = Replay("training_step"), []
    for _, x in replay.passes(iter(TWO), [], torch.ones(3)):
        x.requires_grad_()
        (2 * x).sum().backward()
        norms.append(x.grad.tolist())
    assert norms == [[2.0] * 3] * 2


def test_a_batch_with_a_graph_is_refused():
    weight = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"a batch that carries a graph.*compute that part in training_step"):
        next(Replay("training_step").passes(iter(TWO), [], {"x": 2 * weight}))


# ---------------------------------------------------------------- inputs that are prepared


def test_inputs_are_prepared_once_and_the_generators_go_on_alike():
    calls = []

    def prepare(batch):
        calls.append(1)
        return {"x": torch.rand(3) * batch}

    replay, found = Replay("training_step"), []
    model = nn.Linear(1, 1)
    torch.manual_seed(0)
    prepared = replay.once(prepare, model)
    for _ in range(2):
        for _, given in replay.passes(iter(THREE), [], 2.0):
            inputs = [prepared(given), prepared(given)]
            found.append(([part["x"].tolist() for part in inputs], torch.rand(()).item()))
            inputs[0].pop("x").zero_()
    assert len(calls) == 4
    assert found[0] == found[1] == found[2] != found[3]
    assert found[3] == found[4] == found[5]


def test_inputs_are_prepared_every_time_where_one_pass_runs():
    replay, calls = Replay("training_step"), []
    prepared = replay.once(lambda x: calls.append(x))
    for _ in range(3):
        for _, given in replay.passes(iter(ONE), [], 1):
            prepared(given)
    assert calls == [1, 1, 1]


def test_inputs_that_only_the_second_pass_asks_for_are_refused():
    replay = Replay("MyTrainer.training_step")
    prepared = replay.once(lambda x: x)
    with pytest.raises(RuntimeError, match=r"MyTrainer\.training_step prepared its inputs more often in the second"):
        for name, given in replay.passes(iter(TWO), [], 1):
            if name == "descent":
                prepared(given)
