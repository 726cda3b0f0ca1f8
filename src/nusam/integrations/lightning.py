"""νSAM in Lightning's automatic optimization: ``Trainer(callbacks=[SharpnessAwareCallback()])``.

Lightning runs a closure where and as often as precision and accumulation want it: inside ``optimizer.step`` in float32,
before it under a scaler, by itself for a micro-batch that only accumulates. So here it is the closure that runs the
passes, and the step that runs none.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nusam.integrations.closures import OnePassClosures, logging_once
from nusam.integrations.replay import Replay
from nusam.optimizer import SharpnessAware

try:
    from pytorch_lightning import Callback, LightningModule, Trainer
except ImportError as error:
    try:  # the same under its other name
        from lightning.pytorch import Callback, LightningModule, Trainer  # type: ignore[no-redef]
    except ImportError:
        raise ImportError(
            'nusam.integrations.lightning needs pytorch-lightning, which is not there; pip install "nusam[lightning]".'
        ) from error

__all__ = ["SharpnessAwareCallback"]

# by name, since either package has its own
KEEP_GRADIENTS = {"DeepSpeedStrategy", "FSDPStrategy"}
METRICS = {"Metric", "MetricCollection"}
NO_CLOSURE = "do_nothing_closure"  # what a step is given that was called without one


class SharpnessAwareCallback(Callback):
    """Runs both passes over every batch when ``configure_optimizers`` returns one of nusam's optimizers.

    ``training_step`` runs once a pass, on the same batch; what it returns and logs counts in the ascent pass, at the
    weights themselves, and so does what it keeps in the LightningModule and in metrics of ``torchmetrics``. A batch for
    which it returns None in either pass is skipped.
    Every micro-batch of ``accumulate_grad_batches`` is perturbed on its own. Logged for each batch: ``active`` (1 once
    the delay is over), ``rho``, and ``sharpness_gap``, by how much the loss at the perturbed weights exceeds that at
    the weights themselves. With ``ascent_share`` below 1 it is the descent that counts, which sees the whole batch,
    and there is no gap to log.

    With ``one_pass=True`` it is :meth:`nusam.SharpnessAware.one_pass` that runs: ``training_step`` is called for the
    first samples of the next batch too (with its ``batch_idx``), and it is the descent that counts.

    In manual optimization the passes are the loop's own, ``for _ in self.optimizers().passes()``, or those of
    ``self.optimizers().step(closure)``.

    Args:
        one_pass: whether the next step's ascent rides in each step's descent; combine it with ``ascent_share``. In
            automatic optimization, in float32 or bfloat16.
    """

    def __init__(self, one_pass: bool = False) -> None:
        self._in_one_pass = one_pass
        self._riding: OnePassClosures | None = None  # while there is one
        self._traces = ExitStack()
        self._is_ready = False
        self._is_automatic = True  # automatic optimization
        self._has_closures = False  # whether Lightning builds its closures where we hook in
        self._in_step = False
        self._loss: Any = None  # what the closure of the step that runs has returned
        self._replay = Replay("training_step")
        self._owners: list[Any] = []
        self._callbacks: list[Callback] = []  # of the fit, which a search takes away for a while
        self._to_log: dict[str, float | Tensor] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hook into the loop, before searches (for a learning rate, a batch size) train without any callback."""
        if stage != "fit":
            return
        self._traces.close()
        self._replay = Replay("training_step")
        self._callbacks = list(cast(Any, trainer).callbacks)
        with ExitStack() as traces:
            self._has_closures = traces.enter_context(self._passes_in_closures(trainer, pl_module))
            traces.enter_context(self._closures_in_steps(trainer, pl_module))
            if self._in_one_pass:
                self._riding = OnePassClosures(trainer, pl_module)
                traces.enter_context(self._riding.running())
            traces.callback(setattr, self, "_is_ready", False)
            self._traces = traces.pop_all()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the optimizers.

        Raises:
            TypeError: if ``configure_optimizers`` returned none of nusam's optimizers.
            ValueError: under DDP, if the optimizer does not know the LightningModule; or if ``one_pass=True`` can't be
                had.
            NotImplementedError: under a strategy that keeps gradients to itself; in the first batch, if
                ``training_step`` takes a ``dataloader_iter``.
            RuntimeError: if this version of Lightning builds its closures elsewhere; in a batch, if ``training_step``
                changed what can't be brought back for the second pass.
        """
        self._get_ready(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for name, value in self._to_log.items():
            pl_module.log(name, value)
        self._to_log = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._traces.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._traces.close()

    def _get_ready(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._is_ready:
            return
        if KEEP_GRADIENTS & {kind.__name__ for kind in type(trainer.strategy).__mro__}:
            raise NotImplementedError(
                f"{type(trainer.strategy).__name__} keeps gradients where the two passes can't reach them; use "
                "ModelParallelStrategy (FSDP2) or DDPStrategy."
            )
        optimizers = [opt for opt in trainer.optimizers if isinstance(opt, SharpnessAware)]
        if not optimizers:
            raise TypeError(
                "SharpnessAwareCallback needs one of nusam's optimizers, and configure_optimizers returned "
                f"{[type(opt).__name__ for opt in trainer.optimizers]}; return nusam.NuSAM(optimizer, model=self)."
            )
        for opt in optimizers:
            self._traces.enter_context(_wrapped_model(opt, trainer, pl_module))
            if not _is_default("on_after_backward", pl_module):
                self._traces.enter_context(_by_gradients(opt))
        self._is_automatic = pl_module.automatic_optimization
        if self._is_automatic and not self._has_closures:
            raise RuntimeError(
                "This version of pytorch-lightning has no _make_closure, where SharpnessAwareCallback hooks in; "
                "install one that nusam's docs name, or use manual optimization."
            )
        if self._riding is not None:
            self._riding.check(self._is_automatic)
            changes = "on_after_backward may change the gradients that ε is found by"
            self._in_riding(None if _is_default("on_after_backward", pl_module) else changes)
            for opt in optimizers if self._riding is not None else ():
                opt._begin_one_pass()
        for opt in optimizers:
            self._traces.callback(opt.register_step_pre_hook(self._run_closure).remove)
        metrics = (m for m in pl_module.modules() if METRICS & {kind.__name__ for kind in type(m).__mro__})
        self._owners = [pl_module, *metrics]
        self._is_ready = True

    def _in_riding(self, refusal: str | None) -> None:
        """Go on in one pass, or say once why not."""
        if refusal is not None:
            warnings.warn(f"one_pass=True can't be had, since {refusal}; every step takes two passes.", stacklevel=3)
            self._riding = None

    @contextmanager
    def _passes_in_closures(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[bool]:
        """Let the closures of automatic optimization run the passes, if there are such closures."""
        loop: Any = trainer.fit_loop.epoch_loop.automatic_optimization
        make = getattr(loop, "_make_closure", None)
        if make is None:
            yield False
            return

        def make_with_passes(kwargs: Any, optimizer: Any, batch_idx: int) -> Any:
            self._get_ready(trainer, pl_module)
            closure = make(kwargs, optimizer, batch_idx)
            if closure._backward_fn is None:  # as where stochastic weight averaging gathers batch statistics
                return closure
            if "batch" not in kwargs:
                raise NotImplementedError(
                    "training_step(self, dataloader_iter) would take other batches in the second pass; let it take "
                    "(self, batch, batch_idx)."
                )
            # Lightning divides the losses of accumulated batches by their number, which a callback may change
            if self._riding is not None:
                self._in_riding(self._riding.refusal())
            if self._riding is None:
                closure.closure = self._with_passes(closure, kwargs, optimizer, trainer, pl_module)
            else:
                self._to_log = {"active": float(optimizer.active), "rho": max(optimizer._radii())}
                closure.closure = self._riding.of(closure, kwargs, optimizer, self._owners)
            return closure

        loop._make_closure = make_with_passes
        try:
            yield True
        finally:
            del loop._make_closure

    def _with_passes(
        self, closure: Any, kwargs: Any, opt: Any, trainer: Trainer, pl_module: LightningModule
    ) -> Callable[..., Any]:
        one_pass, zero_grad, batch = closure.closure, closure._zero_grad_fn, kwargs["batch"]

        def clear() -> None:
            if zero_grad is not None:
                with self._replay.for_good():
                    zero_grad()

        def passes(*_: Any, **__: Any) -> Any:
            self._to_log = {"active": float(opt.active), "rho": max(opt._radii())}
            opt._check_cut(batch)
            hooks = ("on_before_zero_grad", "optimizer_zero_grad")
            if zero_grad is not None and all(_is_default(hook, pl_module, self._callbacks) for hook in hooks):
                opt.zero_grad()  # what is cleared in the descent anyway takes no room in the ascent
            first: Any = None
            last: Any = None
            with logging_once(pl_module, self._replay):
                share = opt.ascent_share
                names = opt.passes(accumulate=True) if share == 1 else opt._passes(accumulate=True)
                for name, kwargs["batch"] in self._replay.passes(names, self._owners, batch, share):
                    # its hooks run once a batch, and find the gradients of the step before
                    closure._zero_grad_fn = clear if name == "descent" else None
                    last = one_pass()
                    first = last if first is None else first
                    if last.closure_loss is None:  # training_step skips the batch
                        break
            if last.closure_loss is None:
                if closure._zero_grad_fn is None:
                    clear()
                return last
            if opt.ascent_share < 1:
                return last
            if last is not first:
                self._to_log["sharpness_gap"] = (last.loss - first.loss) * trainer.accumulate_grad_batches
            return first

        return passes

    @contextmanager
    def _closures_in_steps(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        """Let every step return what its closure did, and in manual optimization let its closure run the passes."""
        strategy: Any = trainer.strategy
        step = strategy.optimizer_step

        def step_with_closure(optimizer: Any, closure: Any, *args: Any, **kwargs: Any) -> Any:
            if not isinstance(optimizer, SharpnessAware):
                return step(optimizer, closure, *args, **kwargs)
            self._get_ready(trainer, pl_module)
            has_closure = getattr(closure, "__name__", "") != NO_CLOSURE
            if has_closure and not self._is_automatic and not optimizer._had_pass:
                closure = self._around(closure, optimizer, pl_module)
            self._in_step = True
            try:
                output = step(optimizer, closure, *args, **kwargs)
                return self._loss if output is None else output
            finally:
                self._in_step, self._loss = False, None

        strategy.optimizer_step = step_with_closure
        try:
            yield
        finally:
            del strategy.optimizer_step

    def _around(self, closure: Callable[[], Any], opt: Any, pl_module: LightningModule) -> Callable[[], Any]:
        """The closure of a manual step, run once a pass."""

        def passes() -> Any:
            losses: list[Any] = []
            with torch.enable_grad(), logging_once(pl_module, self._replay):
                for _ in self._replay.passes(opt.passes(), self._owners, None):
                    losses.append(closure())
            return losses[-2:][0]  # an ascent that is run again does not count

        return passes

    def _run_closure(
        self, opt: SharpnessAware, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, Any] | None:
        """Run a step's closure, which runs its own passes, and leave a plain step."""
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None or not (self._in_step or self._is_automatic):
            return None  # or one of the loop's own, around which step() runs the passes
        with torch.enable_grad(), opt._in_closure():
            self._loss = closure()
        opt._given_losses = (self._loss,)
        return args[:1], {}


def _is_default(hook: str, pl_module: LightningModule, callbacks: Iterable[Callback] = ()) -> bool:
    """Whether neither the module nor one of the callbacks has a hook of this name of its own."""
    if getattr(getattr(pl_module, hook), "__func__", None) is not getattr(LightningModule, hook):
        return False
    return all(getattr(type(c), hook) is getattr(Callback, hook, None) for c in callbacks if hasattr(c, hook))


@contextmanager
def _by_gradients(opt: SharpnessAware) -> Iterator[None]:
    """Where ``ascent="auto"`` may choose, let it choose gradients, which a hook of the ascent may look at or change."""
    ascent = opt._ascent
    before = ascent.serve_from
    if before and opt.targets == "trainable":
        ascent.serve_from = None
    try:
        yield
    finally:
        ascent.serve_from = before


@contextmanager
def _wrapped_model(opt: SharpnessAware, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Let the optimizer know of DDP, whose processes would have perturbations of their own otherwise."""
    given, wrapped = opt.model, trainer.strategy.model
    if isinstance(wrapped, DistributedDataParallel) and given is not wrapped:
        if given is not pl_module:
            raise ValueError(
                f"Under DDP an optimizer of nusam's needs the LightningModule, got model={type(given).__name__}; build "
                "it in configure_optimizers with model=self."
            )
        opt.model = wrapped
    try:
        yield
    finally:
        opt.model = given
