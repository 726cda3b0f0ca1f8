"""Lightning's closures in one pass a step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from nusam.integrations.fetching import NextBatch
from nusam.integrations.riding import Riding, Skipped

__all__ = ["OnePassClosures", "logging_once"]


class Counting(Protocol):
    """What knows whether what is logged counts."""

    counts: bool


class OnePassClosures:
    """Closures of automatic optimization that run a batch, and behind it the first samples of the next one.

    Args:
        trainer: Lightning's.
        pl_module: what it fits.
    """

    def __init__(self, trainer: Any, pl_module: Any) -> None:
        self._trainer, self._pl_module = trainer, pl_module
        self._next = NextBatch(trainer, pl_module)
        self._riding = Riding("training_step")

    @contextmanager
    def running(self) -> Iterator[None]:
        """While a fit lasts."""
        with self._next.running():
            yield

    def check(self, is_automatic: bool) -> None:
        """Refuse what can't be had.

        Raises:
            ValueError: in manual optimization, and with a scaler.
        """
        if not is_automatic:
            raise ValueError(
                "SharpnessAwareCallback(one_pass=True) needs automatic optimization, where it is the callback that "
                "runs the passes; leave it out, and loop over self.optimizers().passes()."
            )
        if getattr(self._trainer.precision_plugin, "scaler", None) is not None:
            raise ValueError(
                "SharpnessAwareCallback(one_pass=True) can't be had in float16, where the samples behind would leave "
                "nothing; use precision='bf16-mixed', or leave it out."
            )

    def refusal(self) -> str | None:
        """Why a loader can't be looked ahead of."""
        return "a loader saves its place, which would be one batch ahead" if self._next.saves_its_place() else None

    def of(self, closure: Any, kwargs: Any, opt: Any, owners: Sequence[object]) -> Callable[..., Any]:
        """What the closure of a batch does.

        Args:
            closure: as Lightning made it.
            kwargs: of ``training_step``.
            opt: the optimizer.
            owners: whose attributes ``training_step`` may change.
        """
        batch, index = kwargs["batch"], kwargs.get("batch_idx")
        trainer, pl_module = self._trainer, self._pl_module
        results = trainer.fit_loop.epoch_loop.automatic_optimization.output_result_cls

        def run(part: Any, behind: bool) -> tuple[Tensor | None, Any]:
            kwargs["batch"] = part
            if index is not None:
                kwargs["batch_idx"] = index + behind
            if not behind:
                result = closure._step_fn()
            else:  # as Lightning does it, but for its profiler, which measures one call at a time
                pl_module._current_fx_name = "training_step"
                output = trainer.strategy.training_step(*kwargs.values())
                result = results.from_training_step_output(output, trainer.accumulate_grad_batches)
            return result.closure_loss, result

        def step(*_: Any, **__: Any) -> Any:
            if closure._zero_grad_fn is not None:
                closure._zero_grad_fn()
            following = self._next.after()
            try:
                with torch.enable_grad(), logging_once(pl_module, self._riding):
                    return self._riding.step(opt, owners, batch, following, run, closure._backward_fn)
            except Skipped as skipped:
                closure.warning_cache.warn(
                    "`training_step` returned `None`. If this was on purpose, ignore this warning..."
                )
                return skipped.result
            finally:
                kwargs["batch"] = batch

        return step


@contextmanager
def logging_once(pl_module: Any, counting: Counting) -> Iterator[None]:
    """Log in one pass of a batch alone: the first, or where that sees a share, the last."""
    own, log = pl_module.__dict__, pl_module.log
    before = {name: own[name] for name in ("log",) if name in own}
    own["log"] = lambda *args, **kwargs: log(*args, **kwargs) if counting.counts else None
    try:
        yield
    finally:
        del own["log"]
        own.update(before)
