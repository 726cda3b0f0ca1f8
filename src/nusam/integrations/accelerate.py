"""νSAM in a loop on Hugging Face's accelerate, whose wrapper around an optimizer hides ``passes()``::

    model, opt, loader = accelerator.prepare(model, opt, loader)
    for x, y in loader:
        with accelerator.accumulate(model):
            for xs, ys in passes(opt, model, x, y):
                accelerator.backward(criterion(model(xs), ys))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()

or, in one pass a step (see ``docs/one-pass.md``)::

    for value in one_pass(opt, model, loader, lambda batch: criterion(model(batch[0]), batch[1]), accelerator):
        opt.step()
        opt.zero_grad()

``save_state`` and ``load_state`` need nothing. A closure is refused once a scaler is at work (fp16).

Under DeepSpeed, whose engine keeps gradients and the step to itself, there is no optimizer of nusam's::

    model, opt, loader = accelerator.prepare(model, opt, loader)  # the base optimizer
    perturbation = nusam.Perturbation(model, rho=0.05)
    accelerator.register_for_checkpointing(perturbation)

and ``passes(perturbation, model, x, y)`` in the same loop.
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.optim import Optimizer

from nusam.distributed.engines import is_engine
from nusam.guards.calls import check_loop
from nusam.integrations.deepspeed import before_the_step
from nusam.one_pass.looking_ahead import Ahead
from nusam.optimizer import SharpnessAware
from nusam.perturbation import Perturbation

try:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.state import GradientState
    from accelerate.utils import DistributedType
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
except ImportError as error:
    raise ImportError(
        'nusam.integrations.accelerate needs accelerate, which is not there; pip install "nusam[accelerate]".'
    ) from error

__all__ = ["LoaderAhead", "one_pass", "passes", "sharpness_aware"]

REDUCES_IN_STEP = {DistributedType.XLA, DistributedType.MEGATRON_LM}


def passes(optimizer: Optimizer | Perturbation, model: nn.Module, *batch: Any) -> Generator[Any, None, None]:
    """The passes over one micro-batch, :meth:`nusam.SharpnessAware.passes` with ``accumulate=True``.

    Call ``zero_grad()`` once a step, as accelerate asks for anyway. Every micro-batch is perturbed on its own.

    Args:
        optimizer: a :class:`nusam.SharpnessAware`, as ``Accelerator.prepare`` gave it back; under DeepSpeed a
            :class:`nusam.Perturbation` of the model that it gave back, and the engine steps when the passes are over.
            A perturbation is taken without DeepSpeed as well.
        model: as ``Accelerator.prepare`` gave it back. If the optimizer was built with ``model=``, it learns here by
            what that model is wrapped now, so that under DDP all processes share one perturbation.
        batch: what comes back once a pass, in the ascent cut to ``ascent_share``; without any the passes' names come.

    Raises:
        TypeError: if the optimizer is none of nusam's.
        NotImplementedError: under FSDP1 and Megatron-LM, on several XLA devices, and of an optimizer under DeepSpeed.
    """
    if isinstance(optimizer, Perturbation):
        parts = optimizer.passes(*batch, ends_step=GradientState().sync_gradients)
        yield from before_the_step(model, optimizer, parts) if is_engine(model) else parts
    else:
        yield from reaching(optimizer, model).passes(*batch, accumulate=True)


def one_pass(
    optimizer: Optimizer,
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    accelerator: Accelerator,
) -> Iterator[Tensor]:
    """One forward and one backward for each micro-batch, :meth:`nusam.SharpnessAware.one_pass` with accumulation.

    The body of the loop runs inside ``accelerator.accumulate(model)``: clip where ``accelerator.sync_gradients`` says
    so, and call ``step()`` and ``zero_grad()``.

    Args:
        optimizer: a :class:`nusam.SharpnessAware`, as ``Accelerator.prepare`` gave it back, built with ``model=``.
        model: as ``Accelerator.prepare`` gave it back.
        batches: a loader that ``Accelerator.prepare`` gave back, or anything else; looked ahead by one.
        loss: of one micro-batch, a tensor with one value.
        accelerator: runs the backward.

    Yields:
        The loss of a micro-batch at the perturbed weights, with its gradients in place.

    Raises:
        TypeError, NotImplementedError: as :func:`passes`.
        ValueError: as :meth:`nusam.SharpnessAware.one_pass`, or if a loader would save its place one batch ahead.
    """
    opt = reaching(optimizer, model)
    steps = opt._begin_one_pass()
    if getattr(batches, "use_stateful_dataloader", False):
        raise ValueError(
            "one_pass() looks one batch ahead, where a loader of use_stateful_dataloader=True would save its place; "
            "prepare it without, and resume by skip_first_batches."
        )
    check_loop(batches, loss)
    ahead = LoaderAhead(batches, accelerator)
    for batch in ahead:
        following = ahead.peek()
        reaching(optimizer, model)
        with accelerator.accumulate(model):
            yield steps.step(batch, following, loss, accelerator.backward, accumulate=True)


class LoaderAhead(Ahead):
    """Looks ahead in a loader without accelerate's knowing, which goes by the batch that its loader gave last."""

    def __init__(self, batches: Iterable[Any], accelerator: Accelerator) -> None:
        super().__init__(iter(batches))
        self._state = accelerator.gradient_state
        self._loader: Any = None

    def _fetched(self) -> tuple[Any, bool]:
        before = self._state.active_dataloader
        batch = next(self.batches)
        now = self._state.active_dataloader
        if now is not before:  # it begins
            self._loader = now
        return batch, self._loader is not None and self._loader.end_of_dataloader

    def _tell(self, is_last: bool) -> None:
        if self._loader is not None:
            self._loader.end_of_dataloader = is_last


def reaching(optimizer: Optimizer, model: nn.Module) -> SharpnessAware:
    """nusam's optimizer, which knows from now on by what ``Accelerator.prepare`` has wrapped its model.

    Raises:
        TypeError, NotImplementedError: as :func:`passes`.
    """
    if isinstance(optimizer, DeepSpeedOptimizerWrapper):
        raise NotImplementedError(
            "DeepSpeed steps inside its backward and keeps gradients where the two passes can't reach them; prepare "
            "the base optimizer, and hand passes() a nusam.Perturbation(model)."
        )
    opt = sharpness_aware(optimizer)
    is_sharded = isinstance(model, (FSDPModule, FullyShardedDataParallel))
    inner = model if is_sharded else getattr(model, "_orig_mod", model)  # what torch.compile wraps
    launch = optimizer.accelerator_state if isinstance(optimizer, AcceleratedOptimizer) else None
    if launch is not None and launch.distributed_type in REDUCES_IN_STEP and launch.num_processes > 1:
        raise NotImplementedError(
            f"accelerate adds up the gradients of {launch.distributed_type.value} processes in step() alone, behind "
            "the passes; use DDP or FSDP2 on devices that torch.distributed reaches, or a single process."
        )
    if isinstance(inner, FullyShardedDataParallel):
        raise NotImplementedError(
            "FullyShardedDataParallel (FSDP1) keeps gradients where the two passes can't reach them; use FSDP2, "
            "fsdp_version=2 in accelerate's configuration."
        )
    if opt.model is not None and opt.model is not model:
        opt.model = model
    if isinstance(inner, FSDPModule):
        inner.set_requires_gradient_sync(True)  # what accumulate() leaves unreduced could not be told apart
        _forget_replaced(opt)
    return opt


def sharpness_aware(optimizer: Optimizer) -> SharpnessAware:
    """nusam's optimizer behind accelerate's wrapper, for ``metrics()``, ``active`` and ``rho``.

    Raises:
        TypeError: if there is none.
    """
    inner = optimizer
    while isinstance(inner, AcceleratedOptimizer):
        inner = inner.optimizer
    if not isinstance(inner, SharpnessAware):
        raise TypeError(
            f"optimizer must be one of nusam's, got {type(inner).__name__}; wrap it before Accelerator.prepare, "
            "nusam.NuSAM(optimizer, model=model)."
        )
    return inner


def _forget_replaced(opt: SharpnessAware) -> None:
    """Let go of the whole parameters, which Accelerator.prepare shards after the optimizer was built."""
    held = {*opt._parameters(), *opt._outside().values()}
    for parameter in opt._states.keys() - held:
        del opt._states[parameter]
    opt.__dict__.pop("_normalization", None)  # SAMON's choice among them
