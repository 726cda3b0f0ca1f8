"""νSAM in Lightning's automatic optimization: ``Trainer(callbacks=[SharpnessAwareCallback()])``.

Lightning runs a closure where and as often as precision and accumulation want it: inside ``optimizer.step`` in float32,
before it under a scaler, by itself for a micro-batch that only accumulates. So here it is the closure that runs the
passes, and the step that runs none.
"""

import copy
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nusam.sharpness_aware import SharpnessAware

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

KEEP_GRADIENTS = {"DeepSpeedStrategy", "FSDPStrategy"}  # by name, since either package has its own


class SharpnessAwareCallback(Callback):
    """Runs both passes over every batch when ``configure_optimizers`` returns one of nusam's optimizers.

    ``training_step`` runs once a pass, on the same tensors in fresh containers; what it returns and logs counts in the
    ascent pass, at the weights themselves. A batch for which it returns None in either pass is skipped.
    Every micro-batch of ``accumulate_grad_batches`` is perturbed on its own. Logged for each batch: ``active`` (1 once
    the delay is over), ``rho``, and ``sharpness_gap``, by how much the loss at the perturbed weights exceeds that at
    the weights themselves.

    In manual optimization the passes are the loop's own, ``for _ in self.optimizers().passes()``.
    """

    def __init__(self) -> None:
        self._traces = ExitStack()
        self._to_log: dict[str, float | Tensor] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook into the loop.

        Raises:
            TypeError: if ``configure_optimizers`` returned none of nusam's optimizers.
            ValueError: under DDP, if the optimizer does not know the LightningModule.
            NotImplementedError: under a strategy that keeps gradients to itself; in the first batch, if
                ``training_step`` takes a ``dataloader_iter``.
            RuntimeError: if this version of Lightning builds its closures elsewhere.
        """
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
        with ExitStack() as traces:
            for opt in optimizers:
                traces.enter_context(_wrapped_model(opt, trainer, pl_module))
                before_step = _run_closure if pl_module.automatic_optimization else _run_closure_after_passes
                traces.callback(opt.register_step_pre_hook(before_step).remove)
            if pl_module.automatic_optimization:
                traces.enter_context(self._passes_in_closures(optimizers[0], trainer, pl_module))
            self._traces = traces.pop_all()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        for name, value in self._to_log.items():
            pl_module.log(name, value)
        self._to_log = {}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._traces.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._traces.close()

    @contextmanager
    def _passes_in_closures(self, opt: SharpnessAware, trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
        loop: Any = trainer.fit_loop.epoch_loop.automatic_optimization
        make = getattr(loop, "_make_closure", None)
        if make is None:
            raise RuntimeError(
                "This version of pytorch-lightning has no _make_closure, where SharpnessAwareCallback hooks in; "
                "install one that nusam's docs name, or use manual optimization."
            )

        def make_with_passes(kwargs: Any, optimizer: Any, batch_idx: int) -> Any:
            if "batch" not in kwargs:
                raise NotImplementedError(
                    "training_step(self, dataloader_iter) would take other batches in the second pass; let it take "
                    "(self, batch, batch_idx)."
                )
            closure = make(kwargs, optimizer, batch_idx)
            batch, on_one_batch = kwargs["batch"], closure.closure

            def one_pass() -> Any:
                kwargs["batch"] = _in_own_containers(batch)
                return on_one_batch()

            # Lightning divides the losses of accumulated batches by their number, which a callback may change
            accumulated = trainer.accumulate_grad_batches
            starts = batch_idx % accumulated == 0
            closure.closure = self._with_passes(one_pass, opt, pl_module, starts, accumulated)
            return closure

        loop._make_closure = make_with_passes
        try:
            yield
        finally:
            del loop._make_closure

    def _with_passes(
        self, one_pass: Callable[[], Any], opt: Any, pl_module: LightningModule, starts: bool, accumulated: int
    ) -> Callable[..., Any]:
        def passes(*_: Any, **__: Any) -> Any:
            self._to_log = {"active": float(opt.active), "rho": max(opt._radii())}
            if starts:
                opt.zero_grad()
            results: list[Any] = []
            for _name in opt.passes(accumulate=True):
                with _silent(pl_module, results != []):
                    results.append(one_pass())
                if results[-1].closure_loss is None:  # training_step skips the batch
                    return results[-1]
            if len(results) > 1:
                self._to_log["sharpness_gap"] = (results[1].loss - results[0].loss) * accumulated
            return results[0]

        return passes


def _run_closure(opt: SharpnessAware, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Run a step's closure, which runs its own passes, and leave a plain step."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        return None
    with torch.enable_grad():
        closure()
    return args[:1], {}


def _run_closure_after_passes(opt: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """The same in manual optimization, where Lightning makes up an empty closure; one of the loop's own is left."""
    return _run_closure(opt, args, kwargs) if opt._had_pass else None


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


def _in_own_containers(batch: Any) -> Any:
    """The same tensors in fresh dicts, lists and tuples, since ``training_step`` may take some out of them."""
    if isinstance(batch, MutableMapping):
        fresh = copy.copy(batch)
        for name, part in batch.items():
            fresh[name] = _in_own_containers(part)
        return fresh
    if type(batch) in (list, tuple):
        return type(batch)(_in_own_containers(part) for part in batch)
    return batch


@contextmanager
def _silent(pl_module: LightningModule, silent: bool) -> Iterator[None]:
    """Log nothing: the batch has been logged in its ascent pass."""
    own = pl_module.__dict__
    before = {name: own[name] for name in ("log",) if name in own}
    if silent:
        own["log"] = lambda *_, **__: None
    try:
        yield
    finally:
        if silent:
            del own["log"]
            own.update(before)
