"""What a training loop calls: the passes over a batch, and the base optimizer's step."""

import warnings
import weakref
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

import torch

from nusam.base_optimizer import needs_closure, step_knowing
from nusam.batch import first_samples
from nusam.coverage import warn_of_small_reach
from nusam.guards.calls import check_micro_batches
from nusam.guards.checks import check_alone, check_batch, check_closure, check_served
from nusam.guards.rewinding import Rewinding
from nusam.lmo import Nuclear, Unnormalized
from nusam.placement.step_in_backward import StepInBackward
from nusam.two_passes import TwoPasses
from nusam.uncompiled import Uncompiled
from nusam.wrapper import itself

__all__ = ["Stepping", "step_in_backward"]


class Stepping(TwoPasses):
    """An optimizer whose step is the base optimizer's, with the gradient that the descent left."""

    _few_by_design = False  # whether the method is meant to reach few of the entries
    _cleared = False  # whether passes since the last step have cleared the gradients of others
    _wasteful = 0  # steps before which they had
    _batches: Rewinding | None = None  # of the loop over passes()
    _was_cut = False  # whether a batch could be cut, before the first ascent
    _plain = 0  # steps without passes, as long as there was no ascent

    def passes(self, *batch: Any, accumulate: bool = False) -> Uncompiled[Any]:
        """Iterate over the passes of one step: the ascent, then the descent; only the latter while inactive.

        The loop body computes the loss and calls ``backward``. Each pass starts with cleared gradients; with
        ``accumulate=True`` the descent gradient adds to what is there, and the ascent leaves no trace in it:
        every micro-batch gets its own perturbation. However the loop is left, the weights are the unperturbed
        ones afterwards; a loop left in the ascent leaves no gradient of it behind, and one left in the descent the
        gradient that it has by then. If you keep what is returned in a variable, close it where its loop may be left
        midway, ``with contextlib.closing(opt.passes()) as passes:``; otherwise the pass lasts until you let go of it,
        and an exception's traceback keeps variables, such as the hidden one of a comprehension. Optimizers over parts
        of one model may run together, ``for _ in zip(a.passes(), b.passes(), strict=True)``, if they have as many
        passes each.

        The ascent comes twice in a step that turns out to use a matrix otherwise than the steps did in which its
        layer was compared with its gradient: the second time its gradient is formed. Both passes come twice in a step
        whose loop turns out to need gradients inside them, and looked for one that the ascent had not formed.

        Args:
            batch: what comes back once a pass: several arguments as a tuple, one (a tensor, dictionary, dataclass,
                list, ...) as itself, and every pass finds it as the first one did. In the ascent it is cut to
                ``ascent_share`` of its samples, see :func:`nusam.batch.first_samples`. Without any, ``"ascent"`` and
                ``"descent"`` come.
            accumulate: whether gradients of micro-batches add up.

        Raises:
            RuntimeError: inside another pass, or if a pass computed no gradient at all.
            ValueError: if ``rho_schedule`` or a group's ``rho`` gave something else than a finite number ≥ 0, or if
                there is no batch that could be cut though ``ascent_share`` is below 1.
        """
        return Uncompiled(self._over(batch, accumulate))

    def _over(self, batch: tuple[Any, ...], accumulate: bool) -> Generator[Any, None, None]:
        """The batch, once a pass."""
        self = itself(self)
        share = self.ascent_share if self._needs_ascent else 1.0
        check_batch(batch, share)
        whole: Any = batch[0] if len(batch) == 1 else batch or "descent"
        part: Any = whole if batch else "ascent"
        if share < 1 and self.active:
            part = first_samples(whole, share)
        self._check_cut(whole)
        rewinding = None
        if batch and self.active and self._needs_ascent:
            rewinding = self._batches = self._batches or Rewinding()
            rewinding.keep((whole, part))
        try:
            with closing(self._passes(accumulate)) as names:
                for number, name in enumerate(names):
                    if rewinding and number:
                        rewinding.rewind()
                    yield part if name == "ascent" else whole
        finally:
            if rewinding:
                rewinding.end()

    def _check_cut(self, batch: Any) -> None:
        """Cut the first batch while there is no ascent, so that one that can't be cut is refused before the delay."""
        is_cut = self.ascent_share < 1 and self._needs_ascent and self._is_wanted()
        if self._was_cut or self.active or not is_cut:
            return
        first_samples(batch, self.ascent_share)
        self._was_cut = True

    def _passes(self, accumulate: bool) -> Generator[str, None, None]:
        """The passes by name, for loops that cut the batch themselves."""
        check_closure(self.base_optimizer, needs_closure(self.base_optimizer) and not self._has_closure)
        if self._had_pass and not (accumulate or self._in_scaler):  # a scaler skips steps
            self._cleared |= any(p.grad is not None for p in self._parameters())
        if not (self.active and self._needs_ascent):
            with self.descent(accumulate):
                yield "descent"
            return
        try:
            may_start_over = not accumulate and self.combination is None
            for again in (False, True):
                self._may_repeat = True
                with self.ascent(accumulate):
                    yield "ascent"
                if self._repeats:
                    self._guard.rewind()
                    with self.ascent(accumulate):
                        yield "ascent"
                self._may_repeat = self._repeats = False
                self._may_start_over = may_start_over and not again
                with self.descent(accumulate):
                    yield "descent"
                if not self._starts_over:
                    break
                self._start_over()
                self._starts_over = False
        finally:
            self._may_repeat = self._repeats = self._may_start_over = self._starts_over = False

    def _start_over(self) -> None:
        """Go back to before the step's ascent, of which nothing but its verdicts remains."""
        self._guard.start_over()
        if self._states_before is not None:
            self._ascent.states = self._states_before
            self._progress.ascents -= 1

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
        if not self._had_pass:
            self._check_no_engine()
        has_loss = closure is not None or bool(losses)
        check_closure(self.base_optimizer, not has_loss and needs_closure(self.base_optimizer))
        if closure is not None:
            losses = self._losses_of(closure)
        self._close_left()
        self._pending = None
        self._warn_of_plain_steps()
        self._warn_of_cleared_gradients()
        if self._in_backward is None:
            if losses:
                self._step_base_knowing(losses[0])
            else:
                self.base_optimizer.step()
        self._count()
        return losses[0] if losses else None

    def _count(self) -> None:
        """A step is taken."""
        if self._had_pass or not self._stands_still():
            self._progress.steps += 1
            self._progress.wanted |= self._is_wanted()
        self._had_pass = False
        if self._progress.ascents and not self._progress.told_reach:
            self._progress.told_reach = True
            if not self._few_by_design:
                option = isinstance(self.lmo, Nuclear) and not self.lmo.convolutions
                warn_of_small_reach(self._candidates(), self._perturbs, self._what_it_perturbs, option)

    def _losses_of(self, closure: Callable[[], Any]) -> list[Any]:
        """What the closure returns in each pass; an ascent that is run again does not count."""
        if self.ascent_share < 1 and self._needs_ascent:
            raise ValueError(
                f"step(closure) would run the whole batch in both passes, though ascent_share={self.ascent_share:g}; "
                "loop over opt.passes(*batch) and call step() without a closure, or use ascent_share=1. In Lightning, "
                "which hands one over, add nusam.integrations.lightning.SharpnessAwareCallback()."
            )
        check_micro_batches(closure)
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

    def _warn_of_cleared_gradients(self) -> None:
        """Of a loop that might have meant to add them up; to throw some away once may be meant."""
        self._wasteful += self._cleared
        if self._cleared and self._wasteful == 2:
            warnings.warn(
                "passes() has cleared the gradients of passes that no step() had taken yet; where micro-batches add up "
                "to one step, loop over opt.passes(*batch, accumulate=True).",
                stacklevel=4,
            )
        self._cleared = False

    def _warn_of_plain_steps(self) -> None:
        """Of a loop that runs no passes; a single step without them may be meant."""
        had_passes = self._had_pass or self._progress.ascents or not self.active
        if had_passes or self._stands_still() or all(p.grad is None for p in self._parameters()):
            return
        self._plain += 1
        if self._plain == 2:
            warnings.warn(
                "step() has been called twice without passes before it, so that the base optimizer trains alone; loop "
                "over opt.passes(*batch), or call opt.step(closure).",
                stacklevel=4,
            )

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
        if self.direction.sees_scale or (isinstance(self.lmo, Unnormalized) and self.direction.needs_gradient):
            raise RuntimeError(
                f"{type(self).__name__} takes gradients as they are, which a GradScaler has scaled; use bfloat16 "
                "without a scaler, or another method."
            )
        self._in_scaler = True
        return False


def step_in_backward(opt: Stepping) -> None:
    """Let each parameter's update run inside the descent's backward, as soon as its gradient is complete.

    Gradients are freed at once, so that with a matrix-free ascent a step needs the weights, the optimizer's state,
    one gradient and Σ(n+m) floats: less than the base optimizer alone. ``opt.step()`` is still called once a step,
    for schedules and the count. ε then lives in the forward (``placement="forward"``), since weights change
    while it is in use; stacks of experts, which have none there, are left out.

    What needs whole gradients at once can't be had with it: clipping by a global norm finds none and does nothing;
    accumulation, several backwards to a parameter in a pass, and a GradScaler are refused. ``opt.detach()`` undoes it.

    Raises:
        ValueError: if some perturbed matrix has no layer in whose forward ε could live, or under DDP.
        TypeError: if the base optimizer wraps another.
    """
    opt = itself(opt)
    opt._refuse_inside_pass("step_in_backward()")
    check_served("step_in_backward()", opt.lmo, opt.model)
    check_closure(opt.base_optimizer, needs_closure(opt.base_optimizer))
    check_alone(opt.base_optimizer)
    if opt._workers().replicates:
        raise ValueError(
            "step_in_backward() would step before DistributedDataParallel has reduced the gradients; use fully_shard "
            "(FSDP2), or leave it out."
        )
    before, vars(opt)["placement"] = opt.placement, "forward"
    try:
        opt._check_targets()
    except ValueError:
        vars(opt)["placement"] = before
        raise
    if opt._in_backward is None:
        opt._in_backward = StepInBackward(opt.base_optimizer)
        weakref.finalize(opt, opt._in_backward.remove)
