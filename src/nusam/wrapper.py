"""What every optimizer around another has of it: its hyperparameters and its own methods."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from functools import wraps
from inspect import ismethod
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from torch import Tensor
from torch.optim import Optimizer

from nusam.guards.calls import check_call
from nusam.guards.checks import check_radius

__all__ = ["Adjustable", "Defaults", "Given", "OfPasses", "Wrapper", "itself", "refuse_setting"]

T = TypeVar("T")


class _Named(Generic[T]):
    """An attribute that knows its name."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name


class Adjustable(_Named[T]):
    """An argument of the constructor, which checks it; it may be changed between steps, and ``check`` sees the new one.

    It is kept among the attributes of the optimizer, under its own name.
    """

    def __init__(self, check: Callable[[Any], None]) -> None:
        self._check = check

    def __get__(self, opt: Any, owner: type | None = None) -> T:
        if opt is None:
            return cast(T, self)
        return cast(T, vars(itself(opt))[self._name])

    def __set__(self, opt: Any, value: T) -> None:
        opt = itself(opt)
        if self._name in vars(opt):
            self._check(value)
            opt._refuse_inside_pass(f"setting {self._name}")
        vars(opt)[self._name] = value


class OfPasses(_Named[T]):
    """An attribute of what holds the optimizer as its ``_passes``, which has it; it may be changed between steps."""

    def __init__(self, doc: str) -> None:
        self.__doc__ = f"{doc} May be changed between steps."

    def __get__(self, perturbation: Any, owner: type | None = None) -> T:
        return cast(T, self if perturbation is None else getattr(perturbation._passes, self._name))

    def __set__(self, perturbation: Any, value: T) -> None:
        setattr(perturbation._passes, self._name, value)


class Given(_Named[T]):
    """An argument of the constructor that a training goes by from its first step to its last.

    Args:
        kept: whether it can be read as an attribute.
    """

    def __init__(self, kept: bool = True) -> None:
        self._kept = kept

    def __get__(self, opt: Any, owner: type | None = None) -> T:
        if opt is None:
            return cast(T, self)
        while self._name not in vars(opt):
            if "_optimizer" not in vars(opt):  # of a wrapper that imitates our class
                raise AttributeError(f"{type(opt).__name__!r} object has no attribute {self._name!r}")
            opt = opt._optimizer
        return cast(T, vars(opt)[self._name])

    def __set__(self, opt: Any, value: T) -> None:
        if not self._kept or self._name in vars(itself(opt)):
            raise AttributeError(
                f"{self._name} is given once, when {type(opt).__name__} is built, and what follows from it would stay "
                "as it is; build another one with it, and load the state_dict() of this one."
            )
        vars(opt)[self._name] = value


def refuse_setting(kind: type, name: str) -> None:
    """Let an argument that instances don't keep not be set on them, where nothing would read it."""
    attribute = Given[Any](kept=False)
    attribute.__set_name__(kind, name)
    setattr(kind, name, attribute)


class Wrapper(Optimizer):
    """An optimizer around ``base_optimizer``, whose hyperparameters and own methods stay within reach."""

    base_optimizer: Given[Optimizer] = Given()
    _rho: float  # of groups that name none
    _pass: str | None = None  # the pass that is running
    _has_closure = False  # while a closure's passes run
    _given_losses: Sequence[Any] = ()  # those of passes that a framework ran in a closure, before it calls step()
    _took_a_closure = False  # whether the base has been seen to read the loss at the weights where it was found

    if not TYPE_CHECKING:  # a checker reads __init__, and should go on to report names that nobody has

        def __new__(cls, *args: Any, **options: Any) -> "Wrapper":
            check_call(cls, args, options)
            return super().__new__(cls)

        def __getattr__(self, name: str) -> Any:
            base = self.__dict__.get("base_optimizer")  # not there yet while a copy is made
            if name.startswith("_") or base is None or not hasattr(base, name):
                where = "" if base is None else f", nor has its base optimizer {type(base).__name__}"
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{where}")
            value = getattr(base, name)
            if not ismethod(value):
                return value

            @wraps(value)
            def outside_of_passes(*args: Any, **options: Any) -> Any:
                self._refuse_inside_pass(f"{name}()")  # it may move the weights, as eval() of schedule-free ones does
                return value(*args, **options)

            return outside_of_passes

        def __setattr__(self, name: str, value: Any) -> None:
            if not callable(value) and callable(getattr(type(self), name, None)):
                raise AttributeError(
                    f"{name}() of {type(self).__name__} is what loops call, and can't become {value!r:.40}; arguments "
                    f"such as ascent= are given once, when {type(self).__name__} is built: build another one with it, "
                    "and load the state_dict() of this one."
                )
            super().__setattr__(name, value)

    @contextmanager
    def _in_closure(self) -> Iterator[None]:
        """Passes inside end with a loss, which the base optimizer may ask for."""
        self._has_closure = True
        try:
            yield
        finally:
            self._has_closure = False

    def _refuse_inside_pass(self, what: str) -> None:
        running = itself(self)._pass
        if running is not None:
            raise RuntimeError(
                f"{what} was called inside the {running} pass, where gradients and weights are not the step's own; "
                "leave the pass first."
            )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups, each with a key ``"rho"``."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = groups

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @property
    def state(self) -> Any:
        """The base optimizer's state, exactly as it would be alone."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base_optimizer.state = state

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as the base optimizer does it."""
        self.base_optimizer.zero_grad(set_to_none)

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults, live, and ``"rho"``."""
        return Defaults(itself(self))

    @defaults.setter
    def defaults(self, values: Mapping[str, Any]) -> None:
        opt, given = itself(self), dict(values)
        opt._rho = given.pop("rho", opt.__dict__.get("_rho"))
        own = opt.base_optimizer.defaults  # written in place: a base that wraps another may share it with that one
        own.clear()
        own.update(given)


if TYPE_CHECKING:
    _Dict = dict[str, Any]
else:

    class _Dict(MutableMapping, dict):
        """A dict whose methods go through those few that a view defines."""


class Defaults(_Dict):
    """A live view: ``"rho"`` is the wrapper's, every other key its base optimizer's.

    What it holds as a dict is for readers in C, such as ``json``'s: the values at the time that it was asked for.
    """

    def __init__(self, opt: Any) -> None:
        self._opt = opt
        dict.__init__(self, {**opt.base_optimizer.defaults, "rho": opt._rho})

    def __getitem__(self, key: str) -> Any:
        return self._opt._rho if key == "rho" else self._opt.base_optimizer.defaults[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "rho":
            check_radius(value)
            self._opt._rho = value
        else:
            self._opt.base_optimizer.defaults[key] = value
        dict.__setitem__(self, key, value)

    def __delitem__(self, key: str) -> None:
        if key == "rho":
            raise TypeError("The default of 'rho' can't be deleted; set it to 0 to leave new groups unperturbed.")
        del self._opt.base_optimizer.defaults[key]
        dict.pop(self, key, None)

    def __iter__(self) -> Iterator[str]:
        yield from self._opt.base_optimizer.defaults
        yield "rho"

    def __reversed__(self) -> Iterator[str]:
        return reversed(list(self))

    def __len__(self) -> int:
        return len(self._opt.base_optimizer.defaults) + 1

    def update(self, *args: Any, **values: Any) -> None:
        given = dict(*args, **values)
        if "rho" in given:
            self["rho"] = given.pop("rho")
        self._opt.base_optimizer.defaults.update(given)
        dict.update(self, given)

    def copy(self) -> dict[str, Any]:
        return dict(self)

    def __or__(self, other: Any) -> Any:
        return dict(self) | other

    def __ror__(self, other: Any) -> Any:
        return other | dict(self)

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> Any:
        return dict, (dict(self),)


def itself(opt: T) -> T:
    """The optimizer behind a wrapper that imitates its class, as Lightning's and Fabric's do.

    Our methods run on the wrapper then: it lets attributes be read through, but what is written stays on it.
    """
    while "base_optimizer" not in opt.__dict__:
        opt = cast(Any, opt)._optimizer
    return opt
