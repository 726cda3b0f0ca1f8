"""The generators that batches are drawn by: all are seeded for each training, and put back in the end."""

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from types import BuiltinMethodType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

__all__ = ["Generators"]

MANY = 100  # entries: a longer list is one of samples, and no list of transforms


class Generator(NamedTuple):
    """What is done with one, whoever made it."""

    state: Callable[[], Any]
    put_back: Callable[[Any], Any]
    seed: Callable[[int], Any]


class Generators:
    """The global ones of Python, numpy and torch, and those that some objects hold, however deep.

    Args:
        holders: loaders, with their samplers, data sets and transforms. What the globals of a module hold is not found.
    """

    def __init__(self, *holders: Any) -> None:
        on_cpu = Generator(torch.get_rng_state, torch.set_rng_state, torch.manual_seed)
        of_python = Generator(random.getstate, random.setstate, random.seed)
        self._all = [on_cpu, of_python, *_of_numpy(), *map(_as_one, _held(holders))]

    def seed(self, seed: int) -> None:
        """Let all begin anew, alike for each training of a seed."""
        for generator in self._all:
            generator.seed(seed)

    @contextmanager
    def put_back(self) -> Iterator[None]:
        """After the block, all are as they were before it; but for the global ones of other devices."""
        states = [generator.state() for generator in self._all]
        try:
            yield
        finally:
            for generator, state in zip(self._all, states, strict=True):
                generator.put_back(state)


def _of_numpy() -> list[Generator]:
    """The global one, where torch has numpy with it."""
    numpy = sys.modules.get("numpy")
    return [Generator(numpy.random.get_state, numpy.random.set_state, numpy.random.seed)] if numpy else []


def _held(holders: Any) -> Iterator[Any]:
    """Every generator that can be reached by attributes, closures and short lists, each once."""
    seen: dict[int, Any] = {}  # keeps what it has seen, so that no id is given twice
    left = [holders]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, type | ModuleType | torch.Tensor | nn.Module):
            continue
        seen[id(one)] = one
        if _is_generator(one):
            yield one
        elif isinstance(one, Mapping | list | tuple | set):
            if len(one) <= MANY:
                left += one.values() if isinstance(one, Mapping) else one
        else:
            left += _parts(one)


def _parts(one: Any) -> Iterator[Any]:
    if isinstance(one, partial):
        yield from (one.func, one.args, one.keywords)
    if isinstance(one, BuiltinMethodType | MethodType):
        yield one.__self__
    if isinstance(one, FunctionType):
        with suppress(ValueError):  # of a name that has no value yet
            yield from [cell.cell_contents for cell in one.__closure__ or ()]
    yield from getattr(one, "__dict__", {}).values()


def _is_generator(one: Any) -> bool:
    numpy = sys.modules.get("numpy")
    kinds = (torch.Generator, random.Random)
    return isinstance(one, (*kinds, numpy.random.Generator, numpy.random.RandomState) if numpy else kinds)


def _as_one(held: Any) -> Generator:
    if isinstance(held, torch.Generator):
        return Generator(held.get_state, held.set_state, held.manual_seed)
    if isinstance(held, random.Random):
        return Generator(held.getstate, held.setstate, held.seed)
    if hasattr(held, "get_state"):  # numpy's old kind
        return Generator(held.get_state, held.set_state, held.seed)
    bits = held.bit_generator

    def put_back(state: Any) -> None:
        bits.state = state

    return Generator(lambda: bits.state, put_back, lambda seed: put_back(type(bits)(seed).state))
