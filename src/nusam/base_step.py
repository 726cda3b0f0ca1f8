"""How the base optimizer steps, with a closure or without one."""

from collections.abc import Callable
from typing import Any

import torch

from nusam.base_optimizer import needs_closure, step_knowing
from nusam.coverage import warn_of_small_reach
from nusam.guards.checks import check_closure
from nusam.two_passes import TwoPasses

__all__ = ["Stepping"]


class Stepping(TwoPasses):
    """An optimizer whose step is the base optimizer's, with the gradient that the descent left."""

    _few_by_design = False  # whether the method is meant to reach few of the entries

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the base optimizer step with the gradients that are there.

        Args:
            closure: runs one pass ([zero_grad,] forward, backward) and returns the loss. With it, ``step``
                first runs the passes itself, and returns the loss at the unperturbed weights, which the base
                optimizer's own ``step`` may read too.

        Raises:
            RuntimeError: inside a pass, if a GradScaler hands over a closure, or if the base optimizer needs one.
        """
        losses, self._given_losses = list(self._given_losses), ()
        self._refuse_inside_pass("step()")
        in_scaler, self._in_scaler = self._in_scaler, False
        if closure is not None and in_scaler:
            raise RuntimeError(
                "A GradScaler called step() with a closure, whose gradients it would not unscale; run the passes "
                "yourself, 'for _ in opt.passes(): scaler.scale(loss).backward()', and step without a closure."
            )
        has_loss = closure is not None or bool(losses)
        check_closure(self.base_optimizer, not has_loss and needs_closure(self.base_optimizer))
        if closure is not None:
            losses = self._losses_of(closure)
        self._pending = None
        if self._in_backward is None:
            if losses:
                self._step_base_knowing(losses[0])
            else:
                self.base_optimizer.step()
        if self._had_pass or not self._stands_still():
            self._progress.steps += 1
            self._progress.wanted |= self._is_wanted()
        self._had_pass = False
        if self._progress.ascents and not self._progress.told_reach:
            self._progress.told_reach = True
            if not self._few_by_design:
                warn_of_small_reach(self._candidates(), self._perturbs, self._what_it_perturbs)
        return losses[0] if losses else None

    def _losses_of(self, closure: Callable[[], Any]) -> list[Any]:
        """What the closure returns in each pass; an ascent that is run again does not count."""
        if self.ascent_share < 1:
            raise ValueError(
                f"step(closure) would run the whole batch in both passes, though ascent_share={self.ascent_share:g}; "
                "loop over opt.passes(*batch) and call step() without a closure, or use ascent_share=1."
            )
        losses = []
        with self._in_closure():
            for _ in self.passes():
                with torch.enable_grad():
                    losses.append(closure())
        return losses[-2:]

    def _step_base_knowing(self, loss: Any) -> None:
        kind = type(self.base_optimizer)
        copies = not self._took_a_closure and not kind.__module__.startswith("torch.optim.")
        step_knowing(self.base_optimizer, loss, copies)
        self._took_a_closure = True

    def _is_wanted(self) -> bool:
        return any(group["rho"] > 0 for group in self.param_groups)

    def _stands_still(self) -> bool:
        """Whether no step moves anything: torch.distributed.checkpoint takes one such to make empty state."""
        return all(float(group.get("lr", 1.0)) == 0 for group in self.param_groups)

    @property
    def _step_supports_amp_scaling(self) -> bool:  # asked by GradScaler.step
        if self._in_backward is not None:
            raise RuntimeError(
                "A GradScaler can't unscale gradients that step_in_backward() has spent already; use bfloat16 without "
                "a scaler, or leave step_in_backward() out."
            )
        self._in_scaler = True
        return False
