"""The gradient at the weights, kept until the descent has the one at the perturbed weights."""

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from nusam.combinations import Combination
from nusam.distributed.blocks import complete, is_sharded, local, local_state, route
from nusam.distributed.data_parallel import DataParallel
from nusam.distributed.sums import Ranks
from nusam.lmo import State
from nusam.placement.ledger import clear_gradients

__all__ = ["BothGradients"]


class BothGradients:
    """Lets a combination make the base optimizer's gradient of both.

    It sees real numbers in dense tensors: sparse gradients are spread out for it and gathered again, complex ones are
    pairs of numbers.

    Args:
        combination: what it is made by; None leaves the descent's gradient alone.
    """

    def __init__(self, combination: Combination | None) -> None:
        self.combination = combination
        self._clean: dict[Tensor, Tensor] = {}
        self.are_apart = False  # whether the last descent was left with its own gradient alone

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_clean": {}}

    def keep(self, parameters: Sequence[Tensor]) -> None:
        """The ascent is over: what is in ``grad`` is g."""
        if self.combination is not None:
            reached = _completed(parameters)
            self._clean = {p: _numbers(local(gradient).detach()).clone() for p, gradient in reached.items()}

    def forget(self) -> None:
        """The next descent follows no ascent, whatever an earlier one has left."""
        self._clean = {}

    @contextmanager
    def combined(
        self,
        parameters: Sequence[Tensor],
        workers: DataParallel,
        accumulate: bool,
        state_of: Callable[[Tensor], State],
        known: Container[Tensor] = (),
    ) -> Iterator[None]:
        """A descent; then ``grad`` is what the combination makes of it, added to earlier micro-batches' if told.

        Processes reduce its gradients, as they do those of the ascent: both must be of the same samples. A loop that is
        left has its gradients mixed too, but where processes do that together: an exception may have left one alone.
        A gradient that is not there counts as zeros, of what had one in the ascent or is ``known`` from earlier steps.
        """
        kept = [workers.kept(p.grad) if accumulate else None for p in parameters]
        if accumulate:
            clear_gradients(parameters)
        self.are_apart = True
        try:
            try:
                with workers.reducing():
                    yield
            except GeneratorExit:
                if not (workers.replicates or workers.shards):
                    self._combine(parameters, state_of, known)
                raise
            self._combine(parameters, state_of, known)
        finally:
            self.forget()
            for parameter, earlier in zip(parameters, kept, strict=True):
                if earlier is not None:
                    parameter.grad = earlier if parameter.grad is None else _sum(parameter.grad, earlier)

    @torch.no_grad()
    def _combine(
        self, parameters: Sequence[Tensor], state_of: Callable[[Tensor], State], known: Container[Tensor]
    ) -> None:
        self.are_apart = False
        combination, is_perturbed = self.combination, bool(self._clean)
        assert combination is not None
        reached = _completed(p for p in parameters if p in self._clean or not is_perturbed)
        if not reached:
            return
        idle = [p for p in parameters if p.grad is None and p.requires_grad and (p in self._clean or p in known)]
        everything = reached | {p: complete(None, p) for p in idle}
        written = [local(gradient).detach() for gradient in everything.values()]
        gradients = list(map(_numbers, written))
        states = [{name: _numbers(x) for name, x in local_state(state_of(p)).items()} for p in everything]
        together = Ranks(list(map(route, everything.values())))
        if is_perturbed:
            clean = [self._clean.get(p) for p in everything]
            there = [torch.zeros_like(g) if c is None else c for c, g in zip(clean, gradients, strict=True)]
            found = combination.of(there, gradients, states, together)
        else:
            found = combination.alone(gradients, states, together)
        torch._foreach_copy_(gradients, found)
        for parameter, old, new in zip(reached, written, gradients, strict=False):
            if old.layout != torch.strided:
                parameter.grad = _as_complex(new, old).to_sparse(old.sparse_dim())
            elif old.is_conj():  # whose numbers are another tensor
                parameter.grad = _as_complex(new, old)


def _completed(parameters: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """The gradients that are there, which tensor parallelism may have left in summands, and leaves complete then."""
    reached = [p for p in parameters if p.grad is not None]
    for parameter in filter(is_sharded, reached):
        parameter.grad = complete(parameter.grad, parameter)
    return {p: p.grad for p in reached if p.grad is not None}


def _numbers(x: Tensor) -> Tensor:
    """Real numbers in a dense tensor, which shares the memory of ``x`` if that is dense."""
    if x.layout != torch.strided:
        x = x.to_dense()
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def _as_complex(numbers: Tensor, like: Tensor) -> Tensor:
    return torch.view_as_complex(numbers) if like.is_complex() else numbers


def _sum(gradient: Tensor, earlier: Tensor) -> Tensor:
    """Both gradients, in the memory of the first unless that is sparse and the other is not."""
    if gradient.layout != torch.strided and earlier.layout == torch.strided:
        return earlier + gradient
    return gradient.add_(earlier)
