"""νSAM in Hugging Face's Trainer: ``class MyTrainer(NuSAMTrainerMixin, Trainer)``, and nothing else changes.

Only public hooks are overridden (``create_optimizer``, ``create_scheduler``, ``training_step``, ``log``), each calls
Trainer's own. Accumulation, fp16 and bf16, clipping, ``torchrun`` and resuming are Trainer's.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nusam.methods import NuSAM
from nusam.sharpness_aware import SharpnessAware

try:
    from transformers import Trainer

    from nusam.integrations.accelerate import passes, sharpness_aware
except ImportError as error:
    raise ImportError(
        "nusam.integrations.transformers needs transformers and accelerate, which are not both there; "
        'pip install "nusam[transformers]".'
    ) from error

__all__ = ["NuSAMTrainerMixin"]


class NuSAMTrainerMixin:
    """To be put in front of ``transformers.Trainer``, or of a class derived from it.

    Logged beside the loss: ``active`` (1 once the delay is over) and ``rho`` of the last step, and ``sharpness_gap``,
    by how much the loss at the perturbed weights exceeds that at the weights themselves, a mean over the perturbed
    steps since the last log, of this process's share of the batch. The loss that Trainer logs is the one at the weights
    themselves.

    Args:
        sharpness_aware: the method, called with Trainer's own optimizer and ``model=``, such as
            ``functools.partial(nusam.NuSAM, rho=0.02)``. An optimizer of nusam's handed over in ``optimizers=`` stays.
        delay_ratio: share of all steps, from 0 to 1, before the perturbation starts; the paper delays by 0.1.
            None leaves ``delay`` (in steps) to ``sharpness_aware``.
    """

    def __init__(
        self,
        *args: Any,
        sharpness_aware: Callable[..., SharpnessAware] = NuSAM,
        delay_ratio: float | None = None,
        **kwargs: Any,
    ) -> None:
        if delay_ratio is not None and not 0 <= delay_ratio <= 1:
            raise ValueError(f"delay_ratio must be a share of the steps from 0 to 1, or None, got {delay_ratio!r}.")
        self._sharpness_aware = sharpness_aware
        self._delay_ratio = delay_ratio
        self._taken: dict[str, float] = {}
        self._gap = torch.zeros(())
        self._gap_steps = 0
        super().__init__(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls, Trainer) and cls.__mro__.index(Trainer) < cls.__mro__.index(NuSAMTrainerMixin):
            raise TypeError(
                f"{cls.__name__} has Trainer in front of NuSAMTrainerMixin, which would never be asked; write "
                f"class {cls.__name__}(NuSAMTrainerMixin, Trainer)."
            )

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        self.optimizer: Any = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        try:
            sharpness_aware(self.optimizer)
        except TypeError:
            self.optimizer = self._sharpness_aware(self.optimizer, model=self.model)  # type: ignore[attr-defined]
        return cast(Optimizer, self.optimizer)

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        if self._delay_ratio is not None:
            sharpness_aware(self.optimizer).delay = int(self._delay_ratio * num_training_steps)
        return super().create_scheduler(num_training_steps, *args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        opt = sharpness_aware(self.optimizer)
        self._taken = {"active": float(opt.active), "rho": max(opt._radii())}
        losses: list[Tensor] = []
        for _ in passes(self.optimizer, model):
            # a copy, since Trainer may take the labels out of it
            losses.append(super().training_step(model, inputs.copy(), *args, **kwargs))  # type: ignore[misc]
        if len(losses) > 1:
            self._gap = self._gap.to(losses[0].device) + losses[1] - losses[0]
            self._gap_steps += self.accelerator.sync_gradients  # type: ignore[attr-defined]
        return losses[0]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs |= self._taken
            if self._gap_steps:
                logs["sharpness_gap"] = self._gap.item() / self._gap_steps
            self._gap, self._gap_steps = torch.zeros(()), 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]
