"""What every loop of the battery trains, and what it reports."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import nusam

BATCHES = 5  # steps of an epoch
LR, MOMENTUM, RHO = 0.1, 0.9, 0.05


@dataclass(frozen=True)
class Run:
    """What a loop is asked to do.

    Attributes:
        steps: optimizer steps in all, a multiple of BATCHES.
        micro_batches: how many make a step; their losses are averaged.
        batch: images of a micro-batch.
        clip: norm that a step's gradient is clipped to, or None.
        precision: "float32", "bfloat16" (autocast), or "float16" (autocast with a GradScaler).
        delay: of the perturbation, in steps.
        share: of each micro-batch, that the ascent sees.
        one_pass: whether the next micro-batch's ascent rides in each one's descent.
        schedule: whether the learning rate falls linearly to 0 over the steps.
        overflow: number of the forward pass (from 0) whose loss overflows, or None.
        folder: where to save after the last step and to resume from.
        resume: whether to go on from what a run saved in ``folder``.
        method: by its name in nusam.
    """

    steps: int = 20
    micro_batches: int = 1
    batch: int = 16
    clip: float | None = None
    precision: str = "float32"
    delay: int = 0
    share: float = 1.0
    one_pass: bool = False
    schedule: bool = False
    overflow: int | None = None
    folder: Path | None = None
    resume: bool = False
    method: str = "NuSAM"

    def rate(self, step: int) -> float:
        """The factor on the learning rate of a step."""
        return max(0.0, 1 - step / self.steps) if self.schedule else 1.0

    @property
    def epochs(self) -> int:
        return self.steps // BATCHES


class Net(nn.Module):
    """Two matrices of which one is wide enough for a matrix-free ascent; counts its training forwards."""

    def __init__(self, overflow: int | None = None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 1024), nn.LayerNorm(1024), nn.GELU(), nn.Linear(1024, 10))
        self.overflow = overflow
        self.forwards = 0
        self.through_layers = 0  # fewer where two forwards share them
        self.layers.register_forward_hook(self._count)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.layers(x)
        if self.training:
            if self.forwards == self.overflow:
                logits = logits * 1e30  # beyond float16
            self.forwards += 1
        return logits

    def _count(self, layers: nn.Module, *_: object) -> None:
        self.through_layers += layers.training

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self(x), y)


def data(run: Run) -> TensorDataset:
    """An epoch of real images and their labels, in a fixed order."""
    images, labels = load_digits(return_X_y=True)
    size = BATCHES * run.micro_batches * run.batch
    return TensorDataset(torch.as_tensor(images[:size]).float() / 16, torch.as_tensor(labels[:size]))


def loader(run: Run) -> DataLoader:
    """Micro-batches, in order."""
    return DataLoader(data(run), batch_size=run.batch)


def scaler(run: Run) -> torch.amp.GradScaler:
    """Of a scale that digits don't make overflow."""
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=run.precision == "float16")


def micro_batches(run: Run) -> Iterator[tuple[Tensor, Tensor]]:
    """All micro-batches of a run, epoch after epoch."""
    for _ in range(run.epochs):
        yield from loader(run)


@dataclass
class Trained:
    """What a loop left: filled by :meth:`wrap` and by the loop."""

    run: Run
    model: Net
    rates: list[float] = field(default_factory=list)  # learning rate of every step that was taken
    after: list[list[Tensor]] = field(default_factory=list)  # weights after every step that was taken
    opt: nusam.SharpnessAware | nusam.Perturbation | None = None

    @classmethod
    def start(cls, run: Run, kind: type[Net] = Net) -> "Trained":
        torch.manual_seed(0)
        return cls(run, kind(run.overflow))

    def base(self) -> Optimizer:
        """SGD on the groups that Hugging Face's Trainer makes: first what weight decay is for, then the rest."""
        parameters = list(self.model.parameters())
        matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        rest = [parameter for parameter in parameters if parameter.ndim == 1]
        return torch.optim.SGD([{"params": matrices}, {"params": rest}], lr=LR, momentum=MOMENTUM)

    def wrap(self, base: Optimizer, model: nn.Module) -> nusam.SharpnessAware:
        """The method around a base optimizer, noting the steps that it takes."""
        kind = getattr(nusam, self.run.method)
        self.opt = kind(base, RHO, delay=self.run.delay, ascent_share=self.run.share, model=model)
        self.opt.register_step_post_hook(self.note)
        return self.opt

    def note(self, opt: Optimizer, *_: object) -> None:
        self.rates.append(opt.param_groups[0]["lr"])
        self.after.append(self.weights)

    def schedule(self, optimizer: Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, self.run.rate)

    @property
    def states(self) -> dict[object, dict[str, Tensor]]:
        """What is kept of every matrix."""
        saved = self.opt.state_dict()
        return saved["matrices" if isinstance(self.opt, nusam.Perturbation) else "state"]

    @property
    def weights(self) -> list[Tensor]:
        return [parameter.detach().cpu().clone() for parameter in self.model.parameters()]
