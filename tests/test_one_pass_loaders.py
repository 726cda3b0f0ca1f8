"""One pass looks one batch ahead: whatever a loader does for the next batch, every step has its own as it was."""

import collections
import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch

from tests.test_one_pass import B, assert_same, by_hand, run, wrapped
from tests.test_one_pass_losses import mlp, plainly, samples

Pair = collections.namedtuple("Pair", "x scale")


@dataclasses.dataclass
class Item:
    x: torch.Tensor


def read(batch):
    """The samples of a batch, however it is held."""
    if isinstance(batch, Item):
        return batch.x
    while not isinstance(batch, torch.Tensor | np.ndarray):
        batch = batch["x"] if isinstance(batch, dict) else batch[0]
    return torch.as_tensor(batch)


def by(model, batch):
    return plainly(model, read(batch))


def expected(batches, carries=None):
    model = mlp()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    by_hand(model, base, batches, plainly, carries=carries)
    return model


# ------------------------------------------------------------------------------- loaders that fill something anew


def one_dict(batches):
    batch = {}
    for x in batches:
        batch["x"] = x
        yield batch


def one_dict_inside(batches):
    inner = {}
    for x in batches:
        inner["x"] = x
        yield inner, "a name"


def one_list(batches):
    batch = [None, "a name"]
    for x in batches:
        batch[0] = x
        yield batch


def one_object(batches):
    batch = Item(torch.empty(0))
    for x in batches:
        batch.x = x
        yield batch


def one_array(batches):
    array = np.empty((B, 6))
    for x in batches:
        array[: len(x)] = x
        yield array[: len(x)]


def tensors_of_one_array(batches):
    array = np.empty((B, 6))
    for x in batches:
        array[: len(x)] = x
        yield {"x": torch.from_numpy(array)[: len(x)]}


def one_tensor_through_numpy(batches):
    buffer = torch.empty(B, 6, dtype=torch.float64)
    array = buffer.numpy()
    for x in batches:
        array[: len(x)] = x
        yield Pair(buffer[: len(x)], 1)


def bytes_of(batches):
    memory = bytearray(B * 6 * 8)
    for x in batches:
        memory[: x.numel() * 8] = x.numpy().tobytes()
        yield torch.frombuffer(memory, dtype=torch.float64)[: x.numel()].view(len(x), 6)


FILLING = [
    one_dict,
    one_dict_inside,
    one_list,
    one_object,
    one_array,
    tensors_of_one_array,
    one_tensor_through_numpy,
    bytes_of,
]


@pytest.mark.parametrize("last", [B, 4])
@pytest.mark.parametrize("loader", FILLING)
@pytest.mark.filterwarnings("error")
def test_containers_and_arrays_may_be_filled_anew(loader, last):
    batches = samples(7, 6)
    batches[-1] = batches[-1][:last]
    model = mlp()
    run(wrapped(model), model, loader(batches), by)
    assert_same(model, expected(batches))


def through_data(buffer, x):
    buffer.data.copy_(x)


def through_another_alias(buffer, x):
    torch.empty(0, dtype=x.dtype).set_(buffer.untyped_storage(), 0, buffer.shape).copy_(x)


def in_inference_mode(buffer, x):
    with torch.inference_mode():
        buffer.copy_(x)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("write", [torch.Tensor.copy_, through_data, through_another_alias, in_inference_mode])
@pytest.mark.parametrize("fresh", [0, 1])
def test_a_loader_that_writes_over_the_last_batch_is_refused(write, shared, fresh):
    """At once, or one batch later if it did not do so from the beginning."""

    def loader():
        buffer = torch.zeros(B, 6, dtype=torch.float64)
        if shared:
            buffer.share_memory_()
        for number, x in enumerate(samples(6, 6)):
            if number < fresh:
                yield x
                continue
            write(buffer, x)
            yield buffer

    model = mlp()
    taken = 0
    with pytest.raises(ValueError, match="the loader has written into the tensors of the batch before"):
        for _ in wrapped(model).one_pass(loader(), lambda batch: by(model, batch)):
            taken += 1
    assert taken <= 2 * fresh


class Meta:
    """An object, no container."""

    scale: torch.Tensor


class Slotted:
    """One without a dictionary."""

    __slots__ = ("scale",)


class Single(Meta):
    """One of which there is no other."""

    def __copy__(self):
        return self


def with_one(kind, batches):
    meta = kind()
    for x in batches:
        meta.scale = x.mean()
        yield x, meta


def scaled(model, batch):
    return plainly(model, batch[0]) * batch[1].scale


@pytest.mark.parametrize("kind", [Meta, Slotted])
def test_an_object_that_is_filled_anew(kind):
    model, by_itself = mlp(), mlp()
    batches = list(samples(4, 6))
    run(wrapped(model, share=1), model, with_one(kind, batches), scaled)
    run(wrapped(by_itself, share=1), by_itself, [(x, torch.stack([x.mean()])) for x in batches], scaled_by_tensor)
    assert_same(model, by_itself)


def scaled_by_tensor(model, batch):
    return plainly(model, batch[0]) * batch[1][0]


def test_an_object_that_is_filled_anew_and_has_no_copy_is_refused():
    model = mlp()
    with pytest.raises(ValueError, match="the loader has written into the tensors of the batch before"):
        run(wrapped(model, share=1), model, with_one(Single, samples(4, 6)), scaled)


@pytest.mark.filterwarnings("error")
def test_batches_that_overlap_may_come_if_nothing_is_written():
    """Windows of one series, and one batch several times; NaN is the same NaN."""
    series = torch.cat(samples(2, 6))
    batches = [series[i : i + B] for i in range(0, 8, 2)] + [series[:B]] * 3
    model = mlp()
    run(wrapped(model), model, [(x, torch.full((len(x),), torch.nan)) for x in batches], by)
    assert_same(model, expected(batches))


# ------------------------------------------------------------------------------- iterators that are left, and that fail


@pytest.mark.parametrize(
    "kind", [iter, lambda batches: (x for x in batches), lambda batches: zip(batches, strict=True)]
)
def test_an_iterator_that_a_loop_left_goes_on_with_the_batch_that_was_looked_ahead_to(kind):
    batches = samples(12, 6)
    model, seen = mlp(), []
    opt = wrapped(model)

    def loss(batch):
        if opt._one_pass.counts:
            seen.append(next(i for i, x in enumerate(batches) if torch.equal(read(batch)[0], x[0])))
        return by(model, batch)

    iterator = kind(batches)
    for _ in range(4):
        for _ in itertools.islice(opt.one_pass(iterator, loss), 3):
            opt.step()
    assert list(dict.fromkeys(seen)) == list(range(12))
    assert_same(model, expected(batches))


def test_several_iterators_are_gone_on_with_in_turn():
    model, batches = mlp(), [samples(12, 6)[:6], samples(12, 6)[6:]]
    opt, iterators = wrapped(model), [iter(given) for given in batches]
    for turn in range(6):
        for _ in itertools.islice(opt.one_pass(iterators[turn % 2], lambda x: plainly(model, x)), 2):
            opt.step()
    assert [list(iterator) for iterator in iterators] == [[], []]
    order = [x for first in (0, 2, 4) for given in batches for x in given[first : first + 2]]
    assert_same(model, expected(order, carries=[number % 2 == 0 for number in range(12)]))


def test_two_loops_over_one_iterator_share_what_was_looked_ahead_to():
    iterator, model = iter(samples(5, 6)), mlp()
    opt = wrapped(model)
    loops = [opt.one_pass(iterator, lambda x: plainly(model, x)) for _ in range(2)]
    taken = 0
    for loop in itertools.cycle(loops):
        if next(loop, None) is None:
            break
        opt.step()
        taken += 1
    assert taken == 5


def test_an_optimizer_is_copied_in_the_middle_of_a_loop():
    model, batches = mlp(), samples(6, 6)
    opt = wrapped(model)
    for number, _ in enumerate(opt.one_pass((x for x in batches), lambda x: plainly(model, x))):
        opt.step()
        if number == 2:
            break
    other, copied = copy.deepcopy((model, opt))
    run(opt, model, batches[3:], plainly)
    run(copied, other, batches[3:], plainly)
    assert_same(model, other)


def test_an_error_of_the_loader_comes_after_the_steps_of_the_batches_before_it():
    batches = samples(6, 6)

    def loader():
        yield from batches[:4]
        raise OSError("disk")

    model, taken = mlp(), 0
    opt = wrapped(model)
    with pytest.raises(OSError, match="disk"):
        for _ in opt.one_pass(loader(), lambda x: plainly(model, x)):
            opt.step()
            taken += 1
    assert taken == 4
    assert_same(model, expected(batches[:4]))


def test_epochs_in_a_chain_look_ahead_from_one_to_the_next():
    batches = samples(4, 6)
    model = mlp()
    run(wrapped(model), model, itertools.chain(batches, batches), plainly)
    assert_same(model, expected(batches * 2))
