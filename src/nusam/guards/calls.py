"""Calls as other libraries make them: of a constructor, and what it should have been; of a step."""

from collections.abc import Iterable, Mapping
from inspect import signature
from numbers import Real
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["check_call", "check_kind", "check_loop", "check_micro_batches"]


def check_call(kind: type, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Whether an optimizer was handed over where one belongs, before Python compares the call with a signature."""
    inits: list[Any] = [vars(one)["__init__"] for one in kind.__mro__ if "__init__" in vars(one)]
    signatures = [list(signature(init).parameters)[1:] for init in inits[:-1]]
    if "base_optimizer" not in signatures[0][:1] or not (args or "base_optimizer" in options):
        return  # a copy is being made, or a subclass constructs the base optimizer itself
    first = args[0] if args else options["base_optimizer"]
    arguments = [name for names in signatures if "base_optimizer" in names for name in names]
    is_ours = inits[0].__module__.partition(".")[0] == "nusam"
    hidden = {"base_optimizer", "options"} | (({"lmo", "rho"} if is_ours else {"lmo"}) - set(signatures[0]))
    own = [name for name in dict.fromkeys(arguments) if name not in hidden]
    theirs = {name: value for name, value in options.items() if name not in own}
    theirs.pop("base_optimizer", None)
    theirs.pop("adaptive", None)  # of davda54/sam, for another method
    ours = {name: value for name, value in options.items() if name in own}
    has_rho = "rho" in theirs and "rho" in hidden
    if has_rho:  # by another name, which comes first
        ours = {own[0]: theirs.pop("rho"), **ours}
    if getattr(kind, "_needs_model", False):
        ours.setdefault("model", None)
    others = [*args[1:], options.get("base_optimizer")]
    if isinstance(first, Optimizer):
        if not is_ours:
            return
        if "adaptive" in options:
            raise TypeError(
                f"{kind.__name__} takes no adaptive=; nusam.ASAM is what adaptive=True means elsewhere, nusam.SAM what "
                "adaptive=False does."
            )
        if has_rho:
            raise TypeError(
                f"{kind.__name__} takes its radius as {own[0]}, got rho; "
                f"write {_call('nusam.' + kind.__name__, '<the optimizer>', ours)}."
            )
        if theirs:
            raise TypeError(
                f"{kind.__name__} got {', '.join(map(repr, theirs))}, and takes {', '.join(own)}; what is the base "
                f"optimizer's own goes to it, {_call(type(first).__name__, 'model.parameters()', theirs)}."
            )
        return
    classes = [x for x in (first, *others) if isinstance(x, type) and issubclass(x, Optimizer)]
    constructed = [x for x in others if isinstance(x, Optimizer)]
    parameters = "model.parameters()" if theirs else "model.parameters(), ..."
    base = _call(classes[0].__name__ if classes else "torch.optim.AdamW", parameters, theirs)
    if constructed:
        raise TypeError(
            f"{kind.__name__} takes the base optimizer alone, got {type(first).__name__} before it; "
            f"write {_call('nusam.' + kind.__name__, '<the optimizer>', ours)}."
        )
    check_kind(first)
    what = f"an optimizer, got the class {classes[0].__name__}" if classes else None
    raise TypeError(
        f"base_optimizer must be {what or f'a torch.optim.Optimizer, got {type(first).__name__}'}; construct it first, "
        f"{base}, as in {_call('nusam.' + kind.__name__, base, ours)}."
    )


def check_kind(base: Any) -> None:
    """Whether what was constructed is a torch optimizer, if it steps as one."""
    if isinstance(base, type | Optimizer) or not (
        callable(getattr(base, "step", None)) and hasattr(base, "param_groups")
    ):
        return
    name = type(base).__name__
    raise TypeError(
        f"base_optimizer must be a torch.optim.Optimizer, got a {name}, which has a step() and is none; take one that "
        f"is, or put the {name} around nusam's optimizer instead, and loop over the passes of that one."
    )


def _call(name: str, first: str, options: Mapping[str, Any]) -> str:
    """The call as it should have been, with the caller's numbers."""
    shown = {key: repr(value) if isinstance(value, Real | str) else "..." for key, value in options.items()}
    if "model" in shown:
        shown["model"] = "model"
    return f"{name}({', '.join([first, *(f'{key}={value}' for key, value in shown.items())])})"


def check_micro_batches(closure: Any) -> None:
    """Whether a closure of Lightning's is of a step that takes more than its own micro-batch."""
    trainers = (getattr(given, "trainer", None) for given in getattr(closure, "args", ()))
    accumulated = max((getattr(trainer, "accumulate_grad_batches", 1) for trainer in trainers), default=1)
    if accumulated > 1:
        raise ValueError(
            f"accumulate_grad_batches={accumulated} runs micro-batches outside of step(closure), which would lose "
            "their gradients; add nusam.integrations.lightning.SharpnessAwareCallback() to the Trainer's callbacks."
        )


def check_loop(batches: Any, loss: Any) -> None:
    """Whether ``one_pass`` was given batches, and a function of one.

    Raises:
        TypeError: if not.
    """
    single = isinstance(batches, Tensor | Mapping) or (isinstance(batches, tuple) and _is_a_batch(batches))
    if single or not isinstance(batches, Iterable | _Indexed):
        raise TypeError(
            f"one_pass() goes through the batches itself and was given {'one of them' if single else 'none'}, a "
            f"{type(batches).__name__}; write 'for value in opt.one_pass(loader, loss): opt.step()'."
        )
    takes_one = callable(loss)
    try:
        signature(loss.forward if isinstance(loss, nn.Module) else loss).bind(None)
    except TypeError:
        takes_one = False
    except ValueError:  # of what has no signature
        pass
    if not takes_one:
        kind = "a function of other arguments" if callable(loss) else f"a {type(loss).__name__}"
        kind = type(loss).__name__ if isinstance(loss, nn.Module) else kind
        raise TypeError(
            f"The loss that one_pass() is given must be a function of a batch that calls the model, got {kind}; write "
            "'def loss(batch): x, y = batch; return criterion(model(x), y)'."
        )


@runtime_checkable
class _Indexed(Protocol):
    """What Python iterates over by its index."""

    def __getitem__(self, index: int) -> Any: ...


def _is_a_batch(entries: tuple[Any, ...]) -> bool:
    """Whether tensors are those of one batch, such as inputs and labels."""
    return all(isinstance(entry, Tensor) for entry in entries) and len({(e.shape, e.dtype) for e in entries}) > 1
