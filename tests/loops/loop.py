"""What a training loop of the wild says of itself; the files beside this one hold such loops, one class each."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

DOUBLE = (torch.float64,)  # for variants of what another loop tries in every precision
FULL = (torch.float64, torch.float32)
ALL = (*FULL, torch.bfloat16)


def stepped(optimizer: Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    """The optimizer's step, by the scaler if there is one."""
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


class Driver(Protocol):
    """What runs a step's passes: the library's optimizer, or the oracle."""

    base: Optimizer

    def passes(self, backward: Callable[[], None], accumulate: bool = False) -> None: ...
    def halves(self, backward: Callable[[], None]) -> None: ...
    def closure(self, backward: Callable[[], None]) -> None: ...
    def update(self, scaler: torch.amp.GradScaler | None = None) -> None: ...
    def add_param_group(self, group: dict[str, Any]) -> None: ...
    def resume(self, base: Optimizer) -> None: ...


class Loop:
    """A training loop. Its class is named after what holds, its docstring says what the loop does.

    All that it needs for a step follows from the number of the step, so that two drivers train the same. Weights and
    samples are bfloat16's to begin with, whatever the dtype: all dtypes start at the same point.
    """

    known: ClassVar[list[type["Loop"]]] = []

    steps = 6  # past the first checks, and off their beat
    rho = 0.3
    lr = 0.03
    seed = 0
    dtypes: tuple[torch.dtype, ...] = FULL
    frozen = False  # targets="frozen"
    halves = False  # whether only the loop could repeat a pass: a surprise may cost a matrix its ε, with a warning
    slow = False
    worth_serving: int | None = 60  # entries: hidden layers are served by default here, and heads left to gradients
    options: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        if cls.__doc__:
            Loop.known.append(cls)

    def __init__(self, dtype: torch.dtype, drive: Callable[..., Driver]) -> None:
        self.dtype = dtype
        torch.default_generator.manual_seed(self.seed)
        self.model = self.build().to(torch.bfloat16).to(dtype)
        self.prepare()
        self.drivers = [drive(base, model) for base, model in self.optimizers()]

    # ------------------------------------------------------------ what a loop is

    def build(self) -> nn.Module:
        """The model; all that is trained is in it."""
        return mlp(6, 12, 12, 3)

    def prepare(self) -> None:
        """What a loop makes of its model before it has an optimizer."""

    def optimizers(self) -> list[tuple[Optimizer, nn.Module]]:
        return [(self.base(), self.model)]

    def base(self) -> Optimizer:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=self.lr, momentum=0.9)

    def step(self, step: int) -> None:
        self.driver.passes(lambda: self.backward(step))
        self.driver.update()

    def backward(self, step: int) -> None:
        """One pass: forward and backward, however many."""
        self.loss(step).backward()

    def loss(self, step: int) -> Tensor:
        raise NotImplementedError

    def as_it_writes(self, weight: Tensor) -> Tensor:
        """What a pass itself makes of a weight, ε apart."""
        return weight

    # ------------------------------------------------------------ what loops use

    @property
    def driver(self) -> Driver:
        return self.drivers[0]

    def normal(self, step: int, *shape: int, shift: float = 1.0, scale: float = 0.6) -> Tensor:
        """A sample; its mean is what gives gradients a clear first singular vector."""
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        x = shift + scale * torch.randn(*shape, generator=generator, dtype=torch.float64)
        return x.to(torch.bfloat16).to(self.dtype)

    def noise(self, *shape: int) -> Tensor:
        """Drawn from the global generator, the same for every dtype."""
        return torch.randn(*shape, dtype=torch.float64).to(torch.bfloat16).to(self.dtype)

    def whole(self, step: int, high: int, *shape: int) -> Tensor:
        """Labels, tokens, indices."""
        return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(1000 * self.seed + step))


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n, m in pairwise(widths):
        layers += [nn.Linear(n, m), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def to_target(y: Tensor, target: float = 1.5) -> Tensor:
    """A regression loss: all samples pull one way."""
    return F.mse_loss(y, torch.full_like(y, target))
