"""Weights that are used otherwise than by their layers, seen by the parameter's class.

While a descent runs, a watched parameter is of a class of which torch tells every use: in any thread, in recomputation
by activation checkpointing, and without gradients too. It costs nothing where only layers use their weights.
"""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils._pytree import tree_map

from nusam.interrupts import always, around_backwards

__all__ = [
    "Backwards",
    "Switched",
    "Watched",
    "Watcher",
    "is_in_a_pass",
    "read_again",
    "told_of_functions",
    "untold",
    "watched",
]


_NEW = nn.Parameter.__new__.__code__


class Watcher(Protocol):
    """Who is told of a parameter's uses."""

    def value(self, W: Tensor, tracked: bool) -> Tensor:
        """What a function gets in the parameter's place; ``tracked``: whether autograd is to follow it."""
        ...


class _InAPass(nn.Parameter):
    """A parameter in a pass; to everybody else, and in files, it is what it was."""

    def detach(self) -> Any:
        if not torch.compiler.is_compiling() and sys._getframe(1).f_code is _NEW:
            return _Detached(self, sys._getframe(1).f_locals["cls"])
        return super().detach()

    @property
    def _is_param(self) -> bool:
        return True

    @_is_param.setter
    def _is_param(self, _: bool) -> None:
        self.__class__ = vars(self).pop(_KIND)  # torch has made it of a weight in a pass

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        values = _values(self)
        memo[id(self)] = copy = untold(lambda: nn.Parameter(values.clone(), self.requires_grad))
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        plain: nn.Parameter = untold(lambda: nn.Parameter(self.detach(), self.requires_grad))
        return plain.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class _Detached(NamedTuple):
    """What ``nn.Parameter(weight)`` gets of a weight in a pass, of which it wants another one of the same class."""

    weight: _InAPass
    kind: type[nn.Parameter]  # what it is to be

    def requires_grad_(self, requires_grad: bool) -> nn.Parameter:
        """That one, until torch marks it as a parameter."""
        made = nn.Parameter(_values(self.weight), requires_grad)
        vars(made)[_KIND] = self.kind
        made.__class__ = type(self.weight)
        return made


class Switched(_InAPass):
    """One whose watcher is told of ``requires_grad`` alone, which costs its uses nothing."""

    @property
    def requires_grad(self) -> bool:
        flag: bool = _FLAG.__get__(self)
        return flag

    @requires_grad.setter
    def requires_grad(self, flag: bool) -> None:
        self.requires_grad_(flag)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        vars(self)[_WATCHER].told("requires_grad", requires_grad)
        return self


class Watched(_InAPass):
    """One whose watcher is told of every use."""

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if not _reads(name, function) or _is_an_engines(name, function, args):
            of = "requires_grad" if name == "requires_grad_" else _TOLD.get(function)
            tell = getattr(vars(args[0])[_WATCHER], "told", None) if of else None
            if tell and tell(of, *args[1:], **kwargs):  # who wants to know of its gradient
                return args[0]
            if function == _DATA_SET:
                _keep(args[0])
            return untold(function, *args, **kwargs)
        others = any(kind not in (cls, Tensor, nn.Parameter) for kind in types)  # subclasses to be told of the call
        writes = (name.endswith("_") and not name.endswith("__")) or name in _WRITING
        args, kwargs = _with_values(name, function, writes, others, args, kwargs)
        if function == _DATA and type(args[0]) is not cls:
            return args[0].detach()  # the same, but for a count of writes
        return function(*args, **kwargs) if others and not writes else untold(function, *args, **kwargs)


def is_in_a_pass(parameter: Tensor) -> bool:
    """Whether some pass watches the parameter."""
    return isinstance(parameter, _InAPass)


def untold(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the function gives; its uses of watched parameters are nobody's business.

    torch turns its telling on again by itself: after a ``with`` an interrupt could come before that.
    """
    return torch._C._disabled_torch_function_impl(function, (), args, kwargs)


def read_again(output: Tensor, W: Tensor) -> Tensor:
    """The output of a function that got a weight itself, whose backward gets it so too where Python runs that."""
    if type(W) is Watched and not torch._C._is_torch_function_enabled():
        node: Any = output.grad_fn
        if isinstance(node, BackwardCFunction):
            itself, run = weakref.ref(node), type(node).apply  # what it keeps would live on in a circle
            node.apply = lambda *gradients: untold(run, itself(), *gradients)  # type: ignore[method-assign]
    return output


@contextmanager
def watched(watchers: Mapping[Tensor, Any], kind: type[nn.Parameter] = Watched) -> Iterator[None]:
    """Inside, the watchers are told of what is done with their parameters, as far as these are torch's plain ones."""
    parameters = [parameter for parameter in watchers if type(parameter) is nn.Parameter]

    def undo() -> None:
        for parameter in parameters:
            parameter.__class__ = nn.Parameter
            vars(parameter).pop(_WATCHER, None)

    with always(undo) if parameters else nullcontext():
        for parameter in parameters:
            vars(parameter)[_WATCHER] = watchers[parameter]
            parameter.__class__ = kind
        yield


@contextmanager
def told_of_functions() -> Iterator[None]:
    """Inside, functions with a backward of their own get watched parameters by their values too.

    torch tells of every function but those.
    """
    function: Any = torch.autograd.Function
    apply = vars(function)["apply"]

    def with_values(cls: Any, *args: Any, **kwargs: Any) -> Any:
        bound = apply.__get__(None, cls)
        return bound(*(_value(x) for x in args), **{name: _value(x) for name, x in kwargs.items()})

    def undo() -> None:
        function.apply = apply

    with always(undo):
        function.apply = classmethod(with_values)
        yield


def _keep(parameter: Tensor) -> None:
    """Others are about to stand in the place of its entries."""
    keep = getattr(vars(parameter)[_WATCHER], "keep", None)
    if keep and not hasattr(parameter, "ds_id"):  # an engine's own
        keep(untold(_DATA, parameter))


def _values(parameter: Tensor) -> Tensor:
    """What whoever makes another parameter of it finds in it."""
    if type(parameter) is Watched:
        parameter = untold(vars(parameter)[_WATCHER].value, parameter, False)
    values: Tensor = untold(parameter.detach)
    return values


def _value(x: Any) -> Any:
    return untold(vars(x)[_WATCHER].value, x, True) if type(x) is Watched else x


class Backwards:
    """Counts the backwards of both passes: after the last one, what the loop reads is no part of the computation."""

    def __init__(self) -> None:
        self._in_ascent = self._count = 0

    @contextmanager
    def of_ascent(self) -> Iterator[None]:
        """Count those of an ascent."""
        with self.of_descent():
            yield
        self._in_ascent = self._count

    @contextmanager
    def of_descent(self) -> Iterator[None]:
        """Count those of the descent that follows."""
        self._count = 0

        def counted(run: Callable[..., Any]) -> Callable[..., Any]:
            def run_and_count(*args: Any, **kwargs: Any) -> Any:
                found = run(*args, **kwargs)
                self._count += 1
                return found

            return run_and_count

        with around_backwards(counted):
            yield

    @property
    def ran(self) -> bool:
        """Whether the descent has had any."""
        return self._count > 0

    def is_over(self) -> bool:
        """Whether the descent has had as many as the ascent."""
        return self._count >= self._in_ascent


_WATCHER = "_nusam_watcher"
_KIND = "_nusam_kind"
_READING_PROPERTIES = [getattr(Tensor, name).__get__ for name in ("data", "T", "mT", "H", "mH", "real", "imag")]
_DATA = _READING_PROPERTIES[0]
_FLAG: Any = vars(torch._C.TensorBase)["requires_grad"]
_DATA_SET = Tensor.data.__set__  # type: ignore[attr-defined]
_TOLD = {
    getattr(getattr(Tensor, name), function): name
    for name, function in (("requires_grad", "__set__"), ("grad", "__get__"), ("grad", "__set__"))
}
# what asks for a tensor's shape or place, or speaks of the very tensor
_NOT_READING = {
    "size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "storage_offset", "get_device",
    "__len__", "__hash__", "__repr__", "__format__", "__dir__", "__reduce_ex__", "__setstate__", "result_type",
    "can_cast", "register_hook", "register_post_accumulate_grad_hook", "requires_grad_", "retain_grad", "data_ptr",
    "storage", "untyped_storage", "_typed_storage", "share_memory_", "backward", "grad", "__set__", "__delete__",
}  # fmt: skip


def _is_an_engines(name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether it stores the parameter, or looks for the node that accumulates its gradient: a view as itself."""
    itself = name in ("view_as", "expand_as") and len(args) == 2 and args[0] is args[1]
    return itself or (function == _DATA and hasattr(args[0], "ds_id"))


def _reads(name: str, function: Callable[..., Any]) -> bool:
    """Whether a function's result depends on the entries that it is given."""
    if name == "__get__":
        return function in _READING_PROPERTIES
    return name not in _NOT_READING and not name.startswith(("new_", "is_")) and not name.endswith("_like")


def _with_values(
    name: str,
    function: Callable[..., Any],
    writes: bool,
    others: bool,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Its arguments, each watched parameter by the value that its watcher has for it, but for what is written."""
    tracked = name != "detach" and function != _DATA

    def value(x: Any) -> Any:
        if type(x) is not Watched:
            return x
        found = untold(vars(x)[_WATCHER].value, x, tracked)
        # another subclass would not know what ours is
        return untold(found.view_as, found) if others and type(found) is Watched else found

    if writes and not args:
        return args, kwargs
    whole = args[:1] if writes else ()
    if name.endswith("_as"):
        return (*tree_map(value, args[:1]), *args[1:]), kwargs
    out = {"out": kwargs["out"]} if "out" in kwargs else {}
    return (*whole, *tree_map(value, args[len(whole) :])), {**tree_map(value, kwargs), **out}


_WRITING = {"__setitem__", *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"))}
