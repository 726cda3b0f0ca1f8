"""Two computations whose calls of certain modules are joined: the samples of one travel behind those of the other.

Each computation is a function of a batch, such as a loss, and is run once, as it stands. Where both call a module whose
outputs have the samples' dimension, the module runs once, on the samples of both; everything else (a loss, a model that
computes its own) runs for each by itself.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nusam.interrupts import always, around_backwards
from nusam.layers.module_tree import outside_of_graphs
from nusam.one_pass.joining import CannotJoin, Joining, Roles, Rows, leaves, part_of
from nusam.one_pass.turns import Call, Done, Settings, Turns

__all__ = ["CannotJoin", "Joint", "Rows", "joinable", "leaves", "observed", "part_of"]

T = TypeVar("T")


# ---------------------------------------------------------------- which modules are joined


@contextmanager
def observed(model: nn.Module, samples: int, seen: dict[nn.Module, list[int | None]]) -> Iterator[None]:
    """Inside, note of every call of a module how many rows its outputs have for each sample; None if it has none."""

    def note(module: nn.Module, _: Any, output: Any) -> None:
        lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in leaves(output)}
        (length,) = lengths if len(lengths) == 1 else (0,)
        seen.setdefault(module, []).append(length // samples if length and length % samples == 0 else None)

    modules = list(outside_of_graphs(model))
    graphs = {module: module._compiled_call_impl for module in modules if module._compiled_call_impl is not None}

    def noting(module: nn.Module, graph: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            output = graph(*args, **kwargs)
            note(module, args, output)
            return output

        return call

    handles: list[Any] = []

    def undo() -> None:
        for handle in handles:
            handle.remove()
        for module, graph in graphs.items():
            module._compiled_call_impl = graph

    with always(undo):
        for module in modules:
            if module in graphs:  # whose hooks are in the graph
                module._compiled_call_impl = noting(module, graphs[module])
            else:
                handles.append(module.register_forward_hook(note))
        yield


def joinable(model: nn.Module, passes: Sequence[dict[nn.Module, list[int | None]]]) -> list[nn.Module]:
    """The outermost modules whose outputs had as many rows for each sample in all of the observed passes."""
    calls = [seen.get(model, []) for seen in passes]
    if calls[0] and None not in calls[0] and all(others == calls[0] for others in calls):
        return [model]
    return list(dict.fromkeys(found for child in model.children() for found in joinable(child, passes)))


# ---------------------------------------------------------------- joining them


class Joint:
    """Runs a function of two batches in turns.

    Args:
        modules: whose calls are joined.
        rows: the samples of both.
        aside: a context for every turn of the second computation, which is to leave no trace for the first.
        roles: of the arguments that earlier calls were given, by module and number of the call.

    Attributes:
        side: whose samples a layer sees where it is called: ``"both"``, ``"first"`` or ``"second"``.
        rows: the samples of both.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        rows: Rows,
        aside: Callable[[], AbstractContextManager[object]] = nullcontext,
        roles: dict[tuple[nn.Module, int], Roles] | None = None,
    ) -> None:
        self.modules = modules
        self.rows = rows
        self.aside = aside
        self._roles = {} if roles is None else roles
        self._calls: Counter[nn.Module] = Counter()
        self.side = "first"
        self.looks: Callable[[Tensor, int], None] | None = None  # at gradients of what joined modules are given
        self.is_inside = False  # whether the loss itself runs a backward for gradients of its own
        self._second: Turns | None = None
        self._answer: Any = None
        self._request: Call | Done | Exception | None = None  # of the second computation, which has had its turn

    def run(self, function: Callable[[Any], T], first: Any, second: Any) -> tuple[T, T]:
        """What the function makes of both batches.

        Raises:
            CannotJoin: if the two computations call the modules differently.
        """
        turns = self._second = Turns(lambda: function(second))
        self._request = None
        self._calls.clear()
        self._settings = Settings()

        # what was compiled in place is called past its own _call_impl
        compiled = {module: graph for module in self.modules if (graph := module._compiled_call_impl) is not None}

        def inside(run: Callable[..., Any]) -> Callable[..., Any]:
            def run_inside(*args: Any, **kwargs: Any) -> Any:
                self.is_inside = True
                try:
                    return run(*args, **kwargs)
                finally:
                    self.is_inside = False

            return run_inside

        def undo() -> None:
            if turns.waits():
                with self._settings.swapped(), self.aside():
                    turns.close()
            for module in self.modules:
                vars(module).pop("_call_impl", None)
            for module, graph in compiled.items():
                module._compiled_call_impl = graph
            self.side = "both"

        with always(undo), around_backwards(inside):
            self.side = "first"
            for module in self.modules:
                if module in compiled:
                    module._compiled_call_impl = self._meeting(module, compiled[module])
                else:
                    vars(module)["_call_impl"] = self._meeting(module, module._call_impl)
            found = function(first)
            request = self._asked()
            if isinstance(request, Call):
                raise CannotJoin("calls its modules a number of times that depends on the samples")
            return found, request.value

    def _meeting(self, module: nn.Module, alone: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            turns = self._second
            if self.side == "both" or turns is None:
                return alone(*args, **kwargs)
            if not torch.is_grad_enabled():
                return alone(*args, **kwargs)  # a side's own business, such as pseudo-labels
            mine = Call(module, args, kwargs)
            if self.side == "second":
                return turns.ask(mine)
            if _has_saved_tensor_hooks():
                raise CannotJoin("is checkpointed around the modules that could be joined")
            other = self._asked()
            if not isinstance(other, Call) or other.module is not module:
                raise CannotJoin("calls its modules in an order that depends on the samples")
            joined = self._joined(mine, other)
            self.side = "both"
            try:
                output = alone(*joined[0], **joined[1])
            finally:
                self.side = "first"
            if any(not leaf.ndim or len(leaf) % sum(self.rows) for leaf in leaves(output)):
                raise CannotJoin("gives a tensor without the samples' dimension")
            self._answer = part_of(output, self.rows, second=True)
            if self.looks is None:
                _keep_finite(self._answer, output)
            self._resume()
            return part_of(output, self.rows, second=False)

        # a function around the module may be compiled, as Lightning compiles a training step
        hidden = "torch._dynamo" in sys.modules
        return torch.compiler.disable(call) if hidden else call  # type: ignore[no-untyped-call]

    def _joined(self, mine: Call, other: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of both."""
        module = mine.module
        self._calls[module] += 1
        roles = dict(self._roles.get((module, self._calls[module]), {}))
        joining = Joining(self.rows, self.looks is not None, roles)
        args, kwargs = joining.of((mine.args, mine.kwargs), (other.args, other.kwargs))
        self._roles[module, self._calls[module]] = roles
        if self.looks is not None:
            self._watch(joining.together, self.looks)
        return args, kwargs

    def _watch(self, given: list[Tensor], looks: Callable[[Tensor, int], None]) -> None:
        """Look at the gradients of samples that travel together, which only the module's own input would show."""

        def hook_for(cut: int) -> Callable[[Tensor], None]:
            return lambda D: looks(D, cut)

        for tensor in given:
            if tensor.requires_grad:
                tensor.register_hook(hook_for(len(tensor) // sum(self.rows) * self.rows.first))  # type: ignore[no-untyped-call]

    def _asked(self) -> Call | Done:
        """What the second computation asks for, or has come to; what it has raised is raised."""
        if self._request is None:
            self._resume()
        request, self._request = self._request, None
        if isinstance(request, Exception):
            raise request
        assert request is not None
        return request

    def _resume(self) -> None:
        """Let the second computation go on until it calls a module that is joined, or is done.

        It does so as soon as it has an answer: what it has entered since the first one's call it then leaves before
        that one goes on, and settings of the process come back in the order in which they were made.
        """
        answer, self._answer = self._answer, None
        assert self._second is not None
        self.side = "second"
        try:
            with self._settings.swapped(), self.aside():
                self._request = self._second.resume(answer)
        except Exception as error:
            self._request = error
        finally:
            self.side = "first"


def _has_saved_tensor_hooks() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _keep_finite(behind: Any, output: Any) -> None:
    """Let no gradient that is not finite come from the loss of the rows behind, which other rows would share."""
    for rows, whole in zip(leaves(behind), leaves(output), strict=True):
        if rows is not whole and rows.requires_grad and type(rows) is Tensor:
            rows.register_hook(_finite)  # type: ignore[no-untyped-call]


def _finite(D: Tensor) -> Tensor:
    return D.nan_to_num(0.0, 0.0, 0.0)
