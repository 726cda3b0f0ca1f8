"""Engines that keep gradients, weights and the step to themselves: DeepSpeed's, which nobody here imports."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from nusam.distributed.sums import Group
from nusam.interrupts import always

__all__ = ["Engine", "is_engine"]

AROUND_BACKWARDS = ("_backward_prologue", "_backward_epilogue")  # where an engine reduces gradients and counts them


def is_engine(model: Any) -> bool:
    """Whether the module is DeepSpeed's engine around one."""
    return _is_a(model, "DeepSpeedEngine", "PipelineEngine")


class Engine:
    """DeepSpeed's engine: who shares the batch, and an ascent that it does not take for a step of its own.

    Args:
        engine: as ``deepspeed.initialize`` gave it back.
    """

    def __init__(self, engine: nn.Module) -> None:
        self._engine: Any = engine

    @property
    def module(self) -> nn.Module:
        """What it trains."""
        module: nn.Module = self._engine.module
        return module

    @property
    def groups(self) -> tuple[Group, ...]:
        """Whose processes split the batch."""
        return (self._engine.seq_data_parallel_group,)

    @property
    def skipped(self) -> int:
        """Steps that it did not take, since gradients overflowed."""
        return int(self._engine.skipped_steps)

    def refuse(self) -> None:
        """Refuse an engine whose parameters are not all of every process that splits the batch.

        Raises:
            NotImplementedError: in one sentence.
        """
        engine = self._engine
        given = (
            "a pipeline's engine"
            if _is_a(engine, "PipelineEngine")
            else "layers of experts"
            if getattr(engine, "has_moe_layers", False)
            else "tensor parallelism"
            if getattr(engine, "mpu", None) is not None or engine.autotp_size() > 1
            else "DeepCompile"
            if engine.is_deepcompile_enabled()
            else "ZenFlow"
            if getattr(engine, "zenflow", False)
            else None
        )
        if given is not None:
            raise NotImplementedError(
                f"A perturbation under DeepSpeed can't be had with {given}, where its matrices or their passes are not "
                "those of one process; use data parallelism with ZeRO 0 to 3."
            )

    @contextmanager
    def ascent(self) -> Iterator[None]:
        """Inside, ``engine.backward(loss)`` scales the loss and runs it backwards, and nothing else."""
        engine = self._engine
        own = vars(engine)
        counted = own.get("_unmanaged_backward_count")

        def undo() -> None:
            for name in AROUND_BACKWARDS:
                own.pop(name, None)
            if counted is not None:
                engine._unmanaged_backward_count = counted
            offload = getattr(engine.optimizer, "parameter_offload", None)
            if offload is not None:
                offload.release_backward_leftovers()

        with always(undo):
            for name in AROUND_BACKWARDS:
                own[name] = _nothing
            yield

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Inside, the engine refuses to step, unless somebody has put off its steps already."""
        own = vars(self._engine)
        if "step" in own:
            yield
            return

        def refuse(*_: Any, **__: Any) -> None:
            raise RuntimeError(
                "engine.step() was called inside the passes over a micro-batch, of which it would count each as one; "
                "call it once, after the loop over them."
            )

        def undo() -> None:
            own.pop("step", None)

        with always(undo):
            own["step"] = refuse
            yield


def _is_a(model: Any, *names: str) -> bool:
    """By the names of its classes, since nobody here imports them."""
    return any(kind.__name__ in names for kind in type(model).__mro__)


def _nothing() -> None:
    """What an engine does around a backward that is none of its own."""
