"""νSAM in Hugging Face's Trainer: ``class MyTrainer(NuSAMTrainerMixin, Trainer)``, and nothing else changes.

Only public hooks are overridden (``train``, ``create_optimizer``, ``create_scheduler``, ``get_batch_samples``,
``training_step``, ``log``), each calls Trainer's own; ``_prepare_inputs`` is called once a step, in the first of two
passes. Accumulation, fp16 and bf16, clipping, ``torchrun`` and resuming are Trainer's. Under DeepSpeed the passes are
those of :class:`nusam.Perturbation`, whose state lies beside the engine's in the checkpoints.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nusam.guards.checks import check_sharpness_aware
from nusam.integrations.deepspeed import InEngine, replaced
from nusam.integrations.model_calls import Calls
from nusam.integrations.replay import Replay
from nusam.integrations.riding import Riding
from nusam.integrations.rows import check_rows, without_generating
from nusam.methods import NuSAM
from nusam.optimizer import SharpnessAware

try:
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_utils import get_last_checkpoint

    from nusam.integrations.accelerate import LoaderAhead, reaching, sharpness_aware
except ImportError as error:
    raise ImportError(
        "nusam.integrations.transformers needs transformers and accelerate, which are not both there; "
        'pip install "nusam[transformers]".'
    ) from error

__all__ = ["NuSAMTrainerMixin"]

OF_A_BATCH = ("training_step", "_prepare_inputs")  # what makes a batch, or does with it more than its loss


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

    With ``one_pass=True`` it is :meth:`nusam.SharpnessAware.one_pass` that runs: ``compute_loss`` is called for the
    first samples of the next batch too, the loss logged is that in the descent, and so is what is counted and kept.
    A class with a ``training_step`` or a ``_prepare_inputs`` of its own takes two passes, with one warning.

    Args:
        sharpness_aware: the method, called with Trainer's own optimizer and ``model=``, such as
            ``functools.partial(nusam.NuSAM, rho=0.02)``; :class:`nusam.NuSAM` unless given. Or hand over an optimizer
            of nusam's in ``optimizers=``, which stays as it is.
        delay_ratio: share of all steps, from 0 to 1, before the perturbation starts; the paper delays by 0.1.
            None leaves ``delay`` (in steps) to ``sharpness_aware``.
        one_pass: whether the next step's ascent rides in each step's descent; combine it with ``ascent_share``.
    """

    def __init__(
        self,
        *args: Any,
        sharpness_aware: Callable[..., SharpnessAware] | None = None,
        delay_ratio: float | None = None,
        one_pass: bool = False,
        **kwargs: Any,
    ) -> None:
        check_sharpness_aware(sharpness_aware or NuSAM)
        if delay_ratio is not None and not (isinstance(delay_ratio, int | float) and 0 <= delay_ratio <= 1):
            raise ValueError(f"delay_ratio must be a share of the steps from 0 to 1, or None, got {delay_ratio!r}.")
        self._sharpness_aware = sharpness_aware or NuSAM
        self._delay_ratio = delay_ratio
        self._in_one_pass = one_pass
        self._taken: dict[str, float] = {}
        self._gap = torch.zeros((), device="cpu")
        self._gap_steps = 0
        self._replay = Replay(f"{type(self).__name__}.training_step")
        self._riding = Riding(f"{type(self).__name__}.compute_loss")
        self._followers: list[tuple[Any, Any]] = []  # every batch of an update with the one behind it
        self._calls = Calls()
        self._step_hook: Any = None  # on the optimizer
        self._engine: InEngine | None = None  # under DeepSpeed
        super().__init__(*args, **kwargs)
        if sharpness_aware is not None and isinstance(getattr(self, "optimizer", None), SharpnessAware):
            raise ValueError(
                f"{type(self).__name__} got sharpness_aware= and, in optimizers=, a {type(self.optimizer).__name__}; "
                "give one of them."
            )
        if cast(Any, self).is_deepspeed_enabled:
            if one_pass:
                raise NotImplementedError(
                    "one_pass=True can't be had under DeepSpeed, whose engine would count the next batch's samples as "
                    "this step's; leave it out."
                )
            self._engine = InEngine(self._sharpness_aware)
            cast(Any, self).add_callback(_BesideEngine(self._engine, self._no_passes()))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if issubclass(cls, Trainer) and cls.__mro__.index(Trainer) < cls.__mro__.index(NuSAMTrainerMixin):
            raise TypeError(
                f"{cls.__name__} has Trainer in front of NuSAMTrainerMixin, which would never be asked; write "
                f"class {cls.__name__}(NuSAMTrainerMixin, Trainer)."
            )

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if self._engine is not None:
            last: Callable[[str], Any] = get_last_checkpoint
            given = resume_from_checkpoint
            found = last(cast(Any, self).args.output_dir) if given is True else given
            self._engine.begin(Path(found) if found else None)
        return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Optimizer:
        self.optimizer: Any = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if self._engine is not None:
            return cast(Optimizer, self.optimizer)
        try:
            sharpness_aware(self.optimizer)
        except TypeError:
            self.optimizer = self._sharpness_aware(self.optimizer, model=self.model)  # type: ignore[attr-defined]
        opt = sharpness_aware(self.optimizer)
        if self._in_one_pass and self._takes_one_pass():
            opt._begin_one_pass()  # or refuse it before anything is trained
        if self._step_hook is not None:
            self._step_hook.remove()
        self._step_hook = opt.register_step_pre_hook(self._refuse_step_without_passes)
        return cast(Optimizer, self.optimizer)

    def _refuse_step_without_passes(self, opt: Any, *_: Any) -> None:
        at_work = any(float(group.get("lr", 1.0)) != 0 for group in opt.param_groups)
        if at_work and not opt._had_pass:  # torch.distributed.checkpoint takes one at rate 0 to make empty state
            raise RuntimeError(self._no_passes())

    def _no_passes(self) -> str:
        return (
            f"{type(self).__name__}.training_step reaches neither NuSAMTrainerMixin's, which runs the passes, nor "
            "runs them itself; call super().training_step(model, inputs), or put the class that has it behind the "
            "mixin."
        )

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        if self._delay_ratio is not None:
            delay = int(self._delay_ratio * num_training_steps)
            if self._engine is not None:
                self._engine.delay(delay)
            else:
                sharpness_aware(self.optimizer).delay = delay
        return super().create_scheduler(num_training_steps, *args, **kwargs)  # type: ignore[misc]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        engine = self._engine
        opt = engine.of(model)._passes if engine is not None else sharpness_aware(self.optimizer)
        self._taken = {"active": float(opt.active), "rho": max(opt._radii())}
        cuts = opt.ascent_share < 1 and not self._draws
        if cuts:
            check_rows(self, inputs, opt.ascent_share)
            opt._check_cut(inputs)
        if self._in_one_pass:
            followers = [following for batch, following in self._followers if batch is inputs]
            if followers:
                return self._step_in_one_pass(model, inputs, followers[0], *args, **kwargs)
            self._takes_two_passes(f"{type(self).__name__} trains on other batches than get_batch_samples gave")
        first: Any = None
        last: Any = None
        owners, kept = (self, self.state), self._replay  # type: ignore[attr-defined]
        share = opt.ascent_share
        alone = without_generating(self, model, share) if cuts else nullcontext()
        with _in_training_mode(self.optimizer), self._inputs_prepared_once(model), alone:
            if engine is not None:
                names: Iterator[str] = engine.passes(model, cast(Any, self).accelerator.sync_gradients)
            else:
                reached = reaching(self.optimizer, model)
                names = reached.passes(accumulate=True) if share == 1 else reached._passes(accumulate=True)
            for name, given in kept.passes(names, owners, inputs, share, self._draws):
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

    # ---------------------------------------------------------------- one pass

    def get_batch_samples(self, epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
        ahead = self._riding.ahead
        if ahead is None or ahead.batches is not epoch_iterator:
            if not self._in_one_pass:
                return super().get_batch_samples(epoch_iterator, *args, **kwargs)  # type: ignore[misc]
            ahead = self._riding.ahead = LoaderAhead(epoch_iterator, self.accelerator)  # type: ignore[attr-defined]
        samples, items = super().get_batch_samples(ahead, *args, **kwargs)  # type: ignore[misc]
        following = ahead.peek() if self._in_one_pass else None
        self._followers = list(zip(samples, [*samples[1:], following], strict=False))  # none at the end of a stream
        return samples, items

    def _takes_one_pass(self) -> bool:
        """Whether the samples of the next batch can be given to the same loss."""
        parallelism = getattr(self.accelerator, "parallelism_config", None)  # type: ignore[attr-defined]
        others = [kind for kind in type(self).__mro__ if kind not in (NuSAMTrainerMixin, Trainer)]
        owners = {name: kind for name in OF_A_BATCH for kind in others if name in vars(kind)}
        if owners:
            name, kind = next(iter(owners.items()))
            self._takes_two_passes(
                f"{kind.__name__} has a {name} of its own, which may make more of a batch than its loss"
            )
        elif parallelism is not None and parallelism.cp_enabled:
            self._takes_two_passes("context parallelism cuts one batch at a time")
        return self._in_one_pass

    def _takes_two_passes(self, reason: str) -> None:
        warnings.warn(f"one_pass=True can't be had, since {reason}; every step takes two passes.", stacklevel=3)
        self._in_one_pass = False

    def _step_in_one_pass(self, model: nn.Module, inputs: Any, following: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's own step, whose backward runs once, on the losses of both batches."""
        train = super().training_step  # type: ignore[misc]
        accelerator = cast(Any, self).accelerator
        captured = threading.local()  # the two batches take turns in threads of their own

        def capture(loss: Tensor, **options: Any) -> None:
            captured.losses.append(loss)
            captured.options = options

        def run(part: Any, behind: bool) -> tuple[Tensor, Tensor]:
            captured.losses = []
            returned = train(model, part, *args, **kwargs)
            if len(captured.losses) != 1:
                raise RuntimeError(
                    f"one_pass=True needs one call of accelerator.backward in a step, and {type(self).__name__} makes "
                    f"{len(captured.losses)}; leave it out."
                )
            return captured.losses[0], returned

        with _in_training_mode(self.optimizer), replaced(accelerator, "backward", capture) as backward:
            opt, owners = reaching(self.optimizer, model), (self, cast(Any, self).state)
            returned = self._riding.step(
                opt, owners, inputs, following, run, lambda loss: backward(loss, **captured.options)
            )
        return cast(Tensor, returned)

    @property
    def _draws(self) -> bool:
        """Whether inputs are prepared otherwise than by Trainer, such as generated."""
        return cast(Any, type(self))._prepare_inputs is not Trainer._prepare_inputs

    @contextmanager
    def _inputs_prepared_once(self, model: nn.Module) -> Iterator[None]:
        """Let whatever prepares the inputs, which may count its calls and generate, do so in the first pass alone."""
        own = vars(self)
        own["_prepare_inputs"] = self._replay.once(cast(Any, self)._prepare_inputs, model if self._draws else None)
        try:
            yield
        finally:
            del own["_prepare_inputs"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if not (self._replay.counts and self._riding.counts):
            return
        if "loss" in logs:
            logs |= self._taken
            if self._gap_steps:
                logs["sharpness_gap"] = self._gap.item() / self._gap_steps
            self._gap, self._gap_steps = torch.zeros((), device="cpu"), 0
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class _BesideEngine(TrainerCallback):
    """Keeps νSAM's state beside the engine's, and sees that every step had its passes."""

    def __init__(self, engine: InEngine, otherwise: str) -> None:
        self._engine, self._otherwise = engine, otherwise

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._engine.had_passes():
            raise RuntimeError(self._otherwise)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.should_save:
            self._engine.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")


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
