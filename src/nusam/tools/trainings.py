"""Short trainings of copies of a model, which differ in method, radius and seed alone."""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from nusam.guards.checks import check_base_optimizer
from nusam.lmo import Nuclear
from nusam.one_pass.looking import checked
from nusam.optimizer import SharpnessAware
from nusam.tools.arguments import check_takes_options, first_sentence, shortly
from nusam.tools.generators import Generators

__all__ = ["Method", "Trained", "Trainings", "first", "values"]

Method = Callable[..., SharpnessAware]


class Trained(NamedTuple):
    """What a training leaves."""

    model: nn.Module
    optimizer: Optimizer
    seconds: float

    def states(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """State dicts of model and optimizer, on the CPU, with the learning rate of before the schedule."""
        for group in self.optimizer.param_groups:
            group["lr"] = group.pop("initial_lr", group["lr"])
        return _on_cpu(self.model.state_dict()), _on_cpu(self.optimizer.state_dict())

    def size(self) -> float:
        """Of the weights all together: two trainings that agree in it, and in their score, went the same way."""
        return math.fsum(float(p.detach().abs().float().sum()) for p in self.model.parameters() if p.requires_grad)


@dataclass(frozen=True)
class Trainings:
    """What all of them have in common; see :func:`nusam.find_rho`."""

    model: nn.Module
    base: Callable[[nn.Module], Optimizer]
    loss: Callable[[nn.Module, Any], Tensor]
    loader: Iterable[Any]
    steps: int
    delay: float
    warm_up: float
    one_pass: bool
    generators: Generators
    like: Any = None
    """A batch that the loss also gets, or None."""

    def wrap(self, method: Method, rho: float, share: float) -> Callable[..., SharpnessAware]:
        """The method with everything but the base optimizer and the model."""
        options: dict[str, Any] = {} if share == 1 else {"ascent_share": share}
        options |= {_radius_of(method): rho, "delay": int(self.delay * self.steps)}
        check_takes_options("methods", method, {**options, "model": self.model})
        return partial(method, **options)

    def prepared(self, method: Method | None, rho: float, share: float) -> tuple[nn.Module, Optimizer]:
        """A copy of the model, and its optimizer; None is the base optimizer alone."""
        trained = self.copied()
        if not self.model.training:
            trained.train()
        optimizer = self.base(trained)
        if isinstance(optimizer, SharpnessAware):
            raise TypeError(
                "base must return the optimizer alone, which find_rho() wraps, but its base_optimizer is a "
                f"{type(optimizer).__name__}, itself a wrapper; return the one inside it."
            )
        check_base_optimizer(optimizer)
        own = set(trained.parameters())
        if not any(parameter in own for group in optimizer.param_groups for parameter in group["params"]):
            raise ValueError(
                "base must make the optimizer of the model that it is given, which is a copy, and made one of other "
                "parameters; write lambda copy: torch.optim.AdamW(copy.parameters())."
            )
        if method is not None:
            optimizer = self.wrap(method, rho, share)(optimizer, model=trained)
            if not isinstance(optimizer, SharpnessAware):
                raise TypeError(f"A method must make a nusam.SharpnessAware, got {shortly(optimizer)}; name others.")
            if self.one_pass:
                if not isinstance(optimizer.lmo, Nuclear):
                    raise ValueError(
                        "one_pass=True needs methods with the rank-one perturbation of NuSAM or NuSAMNorm, got "
                        f"{type(optimizer).__name__}; name others, such as methods=(nusam.NuSAM,)."
                    )
                optimizer._begin_one_pass()
        return trained, optimizer

    def copied(self) -> nn.Module:
        """A model to be trained."""
        try:
            return copy.deepcopy(self.model)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise TypeError(
                f"find_rho() trains copies of the model, and a {type(self.model).__name__} could not be deep-copied "
                f"({first_sentence(error)}); hand over one that keeps no activations, and no weights that it makes "
                "anew, as the old weight_norm does."
            ) from error

    def run(self, method: Method | None, rho: float, share: float, seed: int, steps: int) -> Trained:
        """Train for so many steps."""
        trained, optimizer = self.prepared(method, rho, share)
        _switched(optimizer, "train")
        self.generators.seed(seed)
        batches = self.alike(_repeated(self.loader, steps))
        taken = _in_one_pass if self.one_pass and method is not None else _step_by_step
        gradients = taken(trained, optimizer, self.loss, batches)
        began = _now(trained)
        _train(optimizer, gradients, max(1, int(self.warm_up * steps)), steps)
        seconds = _now(trained) - began
        _switched(optimizer, "eval")
        return Trained(trained, optimizer, seconds)

    def alike(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, if the first is of the kind of those to validate on: else one of them is no batch."""
        for number, batch in enumerate(batches):
            if number == 0 and {_kind(batch), _kind(self.like)} == {"parts", "piece"}:
                raise TypeError(
                    f"loader and validation must both give batches, got {shortly(batch)} from loader and "
                    f"{shortly(self.like)} from validation; put a batch that is the only one into a list, [batch]."
                )
            yield batch


def _kind(batch: Any) -> str | None:
    if isinstance(batch, Tensor | str):
        return "piece"
    return "parts" if isinstance(batch, list | tuple | Mapping) else None


def _radius_of(method: Method) -> str:
    """The argument that is the radius: sigma where there is no rho, as of :class:`nusam.RWP`."""
    try:
        parameters = inspect.signature(method).parameters
    except ValueError:  # of what has none
        return "rho"
    return "sigma" if "sigma" in parameters and "rho" not in parameters else "rho"


def _switched(optimizer: Optimizer, mode: str) -> None:
    """To train or eval, where an optimizer has these modes, as the schedule-free ones do."""
    switch = getattr(optimizer, mode, None)
    if callable(switch):
        switch()


def _now(model: nn.Module) -> float:
    """Seconds, once the model's device has done all that it was asked for."""
    for kind in {parameter.device.type for parameter in model.parameters()} - {"cpu", "meta"}:
        torch.accelerator.synchronize(kind)
    return perf_counter()


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        mine = copy.copy(value)  # with the versions of the model's parts, an attribute of its state dict
        mine.update({key: _on_cpu(entry) for key, entry in value.items()})
        return mine
    return type(value)(map(_on_cpu, value)) if type(value) in (list, tuple) else value


def _train(optimizer: Optimizer, gradients: Iterator[None], warm_up: int, steps: int) -> None:
    def rate(step: int) -> float:
        rest = (step - warm_up) / max(1, steps - warm_up)
        return (step + 1) / (warm_up + 1) if step < warm_up else (1 + math.cos(math.pi * rest)) / 2

    schedule = LambdaLR(optimizer, rate)
    for _ in gradients:
        optimizer.step()
        torch.clear_autocast_cache()  # an autocast around the search would go on with its copy of the weights
        schedule.step()


def _step_by_step(
    model: nn.Module, optimizer: Optimizer, loss: Callable[[nn.Module, Any], Tensor], batches: Iterator[Any]
) -> Iterator[None]:
    is_new = True
    for batch in batches:
        optimizer.zero_grad()
        for part in optimizer.passes(batch) if isinstance(optimizer, SharpnessAware) else (batch,):
            value = checked(loss(model, part), "find_rho()")
            if is_new and not value.requires_grad:
                raise ValueError(f"{_NOT_OF_THE_COPY}, and gave a number that depends on no parameter.")
            value.backward()  # type: ignore[no-untyped-call]
        if is_new and all(parameter.grad is None for parameter in model.parameters()):
            raise ValueError(
                f"{_NOT_OF_THE_COPY}, and left no gradient in it; write lambda copy, batch: ... copy(...)."
            )
        is_new = False
        yield


_NOT_OF_THE_COPY = "loss must compute with the model that it is given, which is a copy"


def _in_one_pass(
    model: nn.Module, optimizer: Optimizer, loss: Callable[[nn.Module, Any], Tensor], batches: Iterator[Any]
) -> Iterator[None]:
    assert isinstance(optimizer, SharpnessAware)
    for _ in optimizer.one_pass(batches, partial(loss, model)):
        yield


def _repeated(loader: Iterable[Any], count: int) -> Iterator[Any]:
    """So many batches."""
    while count:
        before = count
        for batch in loader:
            yield batch
            count -= 1
            if not count:
                return
        if count == before:
            raise ValueError("The loader gave no batch; hand over one that can be run through several times.")


def first(batches: Iterable[Any]) -> Any:
    """The first batch to validate on."""
    for batch in batches:
        return batch
    raise ValueError(_NO_BATCH)


def values(model: nn.Module, loss: Callable[[nn.Module, Any], Tensor], batches: Iterable[Any]) -> list[float]:
    """The loss of every batch to validate on."""
    found = [float(loss(model, batch)) for batch in batches]
    if not found:
        raise ValueError(_NO_BATCH)
    return found


_NO_BATCH = "validation gave no batch; hand over one that can be run through several times."
