"""What the tools are given: each refusal is one sentence, and comes before anything is computed."""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from nusam.optimizer import SharpnessAware

__all__ = ["check_gradients_can_be_had", "check_method", "check_network", "check_takes", "shortly"]


def check_network(model: Any) -> None:
    """Whether it is a module, and not an optimizer, a class or a list of layers."""
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model must be a torch.nn.Module, got {given}; pass the network itself.")
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


def check_takes(what: str, function: Any, *takes: str) -> None:
    """Whether a function can be called with arguments of these names by their places, as far as can be told."""
    arguments = " and ".join(takes)
    if isinstance(function, _Loss):
        raise TypeError(
            f"{what} must be a function of {arguments}, got {shortly(function)}, which wants an output; write a "
            "function that makes that output and calls it."
        )
    try:
        inspect.signature(function.forward if isinstance(function, nn.Module) else function).bind(*takes)
    except ValueError:  # of what is not written in Python
        return
    except TypeError as error:
        raise TypeError(f"{what} must be a function of {arguments}, got one that takes others: {error}.") from None


def shortly(given: Any) -> str:
    """What was given, on one line."""
    if given is None or isinstance(given, type | str | int | float):
        return repr(given)
    if isinstance(given, Tensor):
        return f"a tensor of shape {tuple(given.shape)}"
    return f"a {type(given).__name__}"
