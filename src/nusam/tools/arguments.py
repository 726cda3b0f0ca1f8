"""What the tools are given: each refusal is one sentence, and comes before anything is computed."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from nusam.guards.checks import check_radius
from nusam.optimizer import SharpnessAware

__all__ = [
    "check_batches",
    "check_function",
    "check_gradients_can_be_had",
    "check_method",
    "check_network",
    "check_takes_options",
    "check_several",
    "check_takes",
    "checked_radii",
    "first_sentence",
    "listed",
    "shortly",
]


def check_network(model: Any) -> None:
    """Whether it is a module with parameters, and not an optimizer, a class or a list of layers."""
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model must be a torch.nn.Module, got {given}; pass the network itself.")
    if next(model.parameters(), None) is None:
        raise ValueError(f"model {type(model).__name__} has no parameter; pass the network itself.")
    if any(map(is_lazy, model.parameters())):
        raise ValueError(f"model {type(model).__name__} has a lazy layer, not shaped yet; run it once before.")


def check_gradients_can_be_had(model: nn.Module, what: str) -> None:
    """Whether the weights are there, and autograd can record what is done with them."""
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise RuntimeError(
            f"{what} needs gradients, which torch.inference_mode() rules out; call it, and make the model, outside."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(f"{what} needs a model with weights, got one on the meta device; load them first.")


def check_method(what: str, method: Any) -> None:
    """Whether it can be a method: a class, a function, or a partial of either."""
    made_by = method
    while isinstance(made_by, partial):
        made_by = made_by.func
    is_other = isinstance(made_by, type) and not issubclass(made_by, SharpnessAware)
    if is_other or isinstance(made_by, Optimizer | nn.Module) or not callable(made_by):
        raise TypeError(
            f"{what} must be a method such as nusam.NuSAM, a function like it or a partial of either, got "
            f"{shortly(method)}."
        )


def check_takes_options(what: str, method: Any, options: Mapping[str, Any]) -> None:
    """Whether a method can be called with an optimizer and these options, as far as can be told."""
    try:
        inspect.signature(method, follow_wrapped=False).bind("base_optimizer", **options)
    except ValueError:  # of what is not written in Python
        return
    except TypeError as error:
        names = ", ".join(f"{name}=" for name in options)
        raise TypeError(f"{what} must take (base_optimizer, {names}), got one that does not: {error}.") from None


def check_function(what: str, function: Any, *takes: str) -> None:
    """Whether it is a function of such arguments, and no class."""
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"{what} must be a function, see help(nusam.find_rho), got {shortly(function)}.")
    check_takes(what, function, *takes)


def check_several(what: str, several: Any) -> None:
    """Whether it can be run through, and gives something else than letters or keys."""
    if not (hasattr(several, "__iter__") or hasattr(several, "__getitem__")) or isinstance(several, type):
        raise TypeError(f"{what} must be something to iterate over, got {shortly(several)}.")
    if isinstance(several, str | Mapping):
        raise TypeError(f"{what} must be a list or the like, got {shortly(several)}; put it into a list.")


def check_batches(what: str, batches: Any) -> None:
    """Whether they can be run through again and again."""
    check_several(what, batches)
    if isinstance(batches, Iterator):
        raise TypeError(
            f"{what} must give the same batches to every training, got a {type(batches).__name__}, which can be "
            "run through once; hand over a DataLoader or a list."
        )


def check_takes(what: str, function: Any, *takes: str) -> None:
    """Whether a function can be called with arguments of these names by their places, as far as can be told."""
    arguments = " and ".join(takes)
    if isinstance(function, _Loss):
        raise TypeError(
            f"{what} must be a function of {arguments}, got {shortly(function)}, which wants an output; write a "
            "function that makes that output and calls it."
        )
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        inspect.signature(called, follow_wrapped=False).bind(*takes)  # what wraps it may add arguments
    except ValueError:  # of what is not written in Python
        return
    except TypeError as error:
        raise TypeError(f"{what} must be a function of {arguments}, got one that takes others: {error}.") from None


def checked_radii(rhos: Sequence[float] | float, methods: Sequence[Any]) -> list[float]:
    """Sorted, and each once; all are positive."""
    rhos = listed(rhos)
    if not methods or not rhos:
        raise ValueError("find_rho needs at least one method and one rho, got none; name some.")
    for rho in rhos:
        check_radius(rho)
        if rho == 0:
            raise ValueError("rhos must be positive, got 0; the base optimizer alone is tried in any case.")
    return sorted(set(map(float, rhos)))


def listed(numbers: Any) -> list[Any]:
    """One or several, also as an array or a tensor."""
    numbers = numbers.tolist() if hasattr(numbers, "tolist") else numbers
    return list(numbers) if isinstance(numbers, Iterable) else [numbers]


def first_sentence(error: Exception) -> str:
    """What an error of somebody else's says, to be a part of a sentence."""
    return str(error).splitlines()[0].split(". ")[0].rstrip(".") if str(error) else type(error).__name__


def shortly(given: Any) -> str:
    """What was given, on one line."""
    if given is None or isinstance(given, type | str | int | float):
        return repr(given)
    if isinstance(given, Tensor):
        return f"a tensor of shape {tuple(given.shape)}"
    return f"a {type(given).__name__}"
