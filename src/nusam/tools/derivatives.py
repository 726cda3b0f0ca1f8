"""First and second derivatives of a loss by the parameters of a model."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from nusam.ascent.serving import full_precision
from nusam.interrupts import always, around_backwards
from nusam.tools.arguments import first_sentence

__all__ = ["Gradients", "Hessian", "owned"]


class Gradients:
    """Of losses by these parameters, whatever autocast surrounds the call; zero where a parameter is unused."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = parameters
        self.are_nested = False  # whether a backward has run another inside, which leaves gradients by itself

    def __call__(self, loss: Tensor) -> list[Tensor]:
        nodes = list(_nodes([loss]))
        with full_precision(self._parameters):
            if any(isinstance(node, BackwardCFunction) for node in nodes):
                leaves: list[Any] = [node for node in nodes if node.name() == "torch::autograd::AccumulateGrad"]
                found = self._left_in_grad(loss, [leaf.variable for leaf in leaves])
            else:
                found = list(torch.autograd.grad(loss, self._parameters, materialize_grads=True))
        return [gradient.to_dense() for gradient in found]  # that of a sparse embedding is not

    def _left_in_grad(self, loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
        """What ``loss.backward()`` leaves: functions written in Python may run a backward inside theirs.

        ``leaves`` may be anybody's; their ``.grad`` stays, and hooks that wait for it are not told.
        """
        kept = [(leaf, leaf.grad) for leaf in dict.fromkeys([*self._parameters, *leaves])]
        hooks = [own for leaf, _ in kept if (own := getattr(leaf, "_post_accumulate_grad_hooks", None))]
        put_aside = [dict(own) for own in hooks]

        def undo() -> None:
            for own, aside in zip(hooks, put_aside, strict=True):
                own.update(aside)
            for leaf, gradient in kept:
                leaf.grad = gradient

        with always(undo), around_backwards(self._noting):
            for own in hooks:
                own.clear()
            for leaf, _ in kept:
                leaf.grad = None
            loss.backward()  # type: ignore[no-untyped-call]
            return [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]

    def _noting(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            self.are_nested |= torch._C._current_graph_task_id() != -1 and bool(options.get("accumulate_grad"))
            return run(*args, **options)

        return noted


class Hessian:
    """The second derivative of a loss, as a product with vectors over all the parameters.

    Raises:
        NotImplementedError: if torch can't give it.
    """

    def __init__(self, parameters: list[Tensor], loss: Tensor) -> None:
        self._parameters = parameters
        self._gradients = _derivative([loss], parameters, None, create_graph=True)
        # autograd leaves such a node out where it is asked for some derivatives only, as if there were nothing behind
        if any(node.name() == "torch::autograd::Error" for node in _nodes(self._gradients)):
            raise _missing("an operation is only once differentiable")
        self._curved = [i for i, gradient in enumerate(self._gradients) if gradient.requires_grad]

    def __matmul__(self, vector: list[Tensor]) -> list[Tensor]:
        if not self._curved:
            return [torch.zeros_like(parameter) for parameter in self._parameters]
        gradients = [self._gradients[i] for i in self._curved]
        return owned(_derivative(gradients, self._parameters, [vector[i] for i in self._curved], retain_graph=True))


def _derivative(of: list[Tensor], by: list[Tensor], along: list[Tensor] | None, **options: bool) -> Sequence[Tensor]:
    """One of the two derivatives that make the second; zero where there is none."""
    try:
        with full_precision(by):
            return torch.autograd.grad(of, by, along, materialize_grads=True, **options)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # NotImplementedError is one
        raise _missing(first_sentence(error)) from error


def _missing(why: str) -> NotImplementedError:
    return NotImplementedError(
        f"torch has no second derivative of the loss ({why}); leave the Hessian out with hessian_iterations=0."
    )


def _nodes(tensors: Sequence[Tensor]) -> Iterator[Node]:
    """Of the graph that they depend on."""
    waiting, seen = [tensor.grad_fn for tensor in tensors], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            yield node


def owned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Dense copies that may be overwritten, which autograd's answers (shared, expanded) may not."""
    return [tensor.detach().to_dense().clone(memory_format=torch.contiguous_format) for tensor in tensors]
