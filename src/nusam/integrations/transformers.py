"""νSAM in Hugging Face's Trainer: ``class MyTrainer(NuSAMTrainerMixin, Trainer)``, and nothing else changes.

Only public hooks are overridden (``create_optimizer``, ``create_scheduler``, ``training_step``, ``log``), each calls
Trainer's own; ``_prepare_inputs`` is called once a step, in the first pass. Accumulation, fp16 and bf16, clipping,
``torchrun`` and resuming are Trainer's.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nusam.integrations.replay import Replay
from nusam.methods import NuSAM
from nusam.optimizer import SharpnessAware

try:
    from transformers import Trainer

    from nusam.integrations.accelerate import reaching, sharpness_aware
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
    themselves. With ``ascent_share`` below 1 it is the one in the descent, which sees the whole batch, and there is no
    gap to log.

    ``training_step`` runs once a pass, ``_prepare_inputs`` in the first pass alone, so that what it generates or takes
    out of a buffer is the same in both. What a class counts, gathers and logs in its ``training_step`` and
    ``compute_loss`` counts once, as the first pass left it.

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
        self._gap = torch.zeros((), device="cpu")
        self._gap_steps = 0
        self._replay = Replay(f"{type(self).__name__}.training_step")
        self._calls = _Calls()
        self._step_hook: Any = None  # on the optimizer
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
        opt = sharpness_aware(self.optimizer)
        if self._step_hook is not None:
            self._step_hook.remove()
        self._step_hook = opt.register_step_pre_hook(self._refuse_step_without_passes)
        return cast(Optimizer, self.optimizer)

    def _refuse_step_without_passes(self, opt: Any, *_: Any) -> None:
        at_work = any(float(group.get("lr", 1.0)) != 0 for group in opt.param_groups)
        if at_work and not opt._had_pass:  # torch.distributed.checkpoint takes one at rate 0 to make empty state
            raise RuntimeError(
                f"{type(self).__name__}.training_step reaches neither NuSAMTrainerMixin's, which runs the passes, nor "
                "runs them itself; call super().training_step(model, inputs), or put the class that has it behind the "
                "mixin."
            )

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        if self._delay_ratio is not None:
            sharpness_aware(self.optimizer).delay = int(self._delay_ratio * num_training_steps)
        return super().create_scheduler(num_training_steps, *args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        opt = sharpness_aware(self.optimizer)
        self._taken = {"active": float(opt.active), "rho": max(opt._radii())}
        first: Any = None
        last: Any = None
        owners, kept = (self, self.state), self._replay  # type: ignore[attr-defined]
        with _in_training_mode(self.optimizer), self._inputs_prepared_once(model):
            reached, share = reaching(self.optimizer, model), opt.ascent_share
            names = reached.passes(accumulate=True) if share == 1 else reached._passes(accumulate=True)
            for name, given in kept.passes(names, owners, inputs, share):
                several = share == 1 and (kept.later or name == "ascent")
                with self._calls.compared(model, type(self).__name__, kept.later) if several else nullcontext():
                    last = super().training_step(model, given, *args, **kwargs)  # type: ignore[misc]
                first = last if first is None else first
        if opt.ascent_share < 1:
            return cast(Tensor, last)
        if last is not first:
            self._gap = self._gap.to(last.device) + last - first
            self._gap_steps += self.accelerator.sync_gradients  # type: ignore[attr-defined]
        return cast(Tensor, first)

    @contextmanager
    def _inputs_prepared_once(self, model: nn.Module) -> Iterator[None]:
        """Let whatever prepares the inputs, which may count its calls and generate, do so in the first pass alone."""
        own, kind = vars(self), cast(Any, type(self))
        draws = kind._prepare_inputs is not Trainer._prepare_inputs
        own["_prepare_inputs"] = self._replay.once(cast(Any, self)._prepare_inputs, model if draws else None)
        try:
            yield
        finally:
            del own["_prepare_inputs"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if not self._replay.counts:
            return
        if "loss" in logs:
            logs |= self._taken
            if self._gap_steps:
                logs["sharpness_gap"] = self._gap.item() / self._gap_steps
            self._gap, self._gap_steps = torch.zeros((), device="cpu"), 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


@contextmanager
def _in_training_mode(optimizer: Any) -> Iterator[None]:
    """Put a base optimizer that has modes into training before the passes: Trainer asks for it inside them."""
    if not callable(getattr(optimizer, "train", None)):
        yield
        return
    optimizer.train()
    optimizer.train = lambda: None
    try:
        yield
    finally:
        del optimizer.train


class _Calls:
    """The inputs that a model is called on, the same in every pass over a batch.

    Sizes are compared in every step, and what tokens and masks say, which waits for the device, in the first, second,
    fourth, ... of them. Labels may come from the model itself.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._first: list[dict[str, Tensor | torch.Size]] = []

    @contextmanager
    def compared(self, model: nn.Module, name: str, later: bool) -> Iterator[None]:
        """Compare the calls of a later pass with those of the first.

        Raises:
            RuntimeError: if they differ.
        """
        self._steps += not later
        by_value = self._steps & (self._steps - 1) == 0
        made: list[dict[str, Tensor | torch.Size]] = []

        def differ() -> RuntimeError:
            return RuntimeError(
                f"{name} calls its model on other inputs in the second pass over a batch than in the first, since its "
                "training_step makes or draws them; let _prepare_inputs make them, which is called once."
            )

        def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not torch.is_grad_enabled():
                return
            made.append(_what_counts({**{str(i): value for i, value in enumerate(args)}, **kwargs}, by_value))
            if later and not (len(made) <= len(self._first) and _agree(made[-1], self._first[len(made) - 1])):
                raise differ()

        handle = model.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        if not later:
            self._first = made
        elif len(made) != len(self._first):
            raise differ()


def _what_counts(inputs: dict[str, Any], by_value: bool) -> dict[str, Tensor | torch.Size]:
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and name != "labels"}
    discrete = {name for name, value in tensors.items() if not (value.is_floating_point() or value.is_complex())}
    return {name: value if by_value and name in discrete else value.shape for name, value in tensors.items()}


def _agree(one: dict[str, Tensor | torch.Size], other: dict[str, Tensor | torch.Size]) -> bool:
    if one.keys() != other.keys():
        return False
    pairs = [(value, other[name]) for name, value in one.items()]
    return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs)
