"""Whether a share of a Trainer's batch is one of its samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from nusam.batch import samples_in

__all__ = ["check_rows", "without_generating"]


def check_rows(trainer: Any, inputs: Any, share: float) -> None:
    """Compare the rows of a batch with the samples that the loader put into it.

    Raises:
        ValueError: if they are others, as where pairs stand one half above the other, or sequences are packed.
    """
    loader, accelerator = trainer.callback_handler.train_dataloader, trainer.accelerator
    samples = _samples_per_batch(loader, accelerator.num_processes)
    rows = samples_in(inputs)
    state = accelerator.gradient_state
    may_be_fewer = state.end_of_dataloader or not state.in_dataloader
    if samples is None or rows == samples or (rows < samples and may_be_fewer):
        return
    raise ValueError(
        f"ascent_share={share:g} can't cut a batch of {type(trainer).__name__}'s, which makes {rows} rows of {samples} "
        "samples, as of pairs or packed sequences; use ascent_share=1, or a collator that makes one row of each."
    )


@contextmanager
def without_generating(trainer: Any, model: Any, share: float) -> Iterator[None]:
    """Inside, ``model.generate`` is refused: in the descent its samples would be others, of perturbed weights.

    Raises:
        RuntimeError: if it is called.
    """
    inner = trainer.accelerator.unwrap_model(model)

    def generate(*_: Any, **__: Any) -> None:
        raise RuntimeError(
            f"{type(trainer).__name__} generates inside training_step, in the descent from perturbed weights, so that "
            f"ascent_share={share:g} would have no share of its samples; let _prepare_inputs generate, which is called "
            "once, or use ascent_share=1."
        )

    own = vars(inner)
    before = own.get("generate")
    if callable(getattr(inner, "generate", None)):
        own["generate"] = generate
    try:
        yield
    finally:
        own.pop("generate", None)
        if before is not None:
            own["generate"] = before


def _samples_per_batch(loader: Any, processes: int) -> int | None:
    """How many samples a process finds in a batch of the loader; None where that can't be told."""
    try:
        total = loader.total_batch_size
    except AttributeError:  # none of accelerate's, or its batch sampler has no fixed size
        return None
    return int(total) // processes if total else None
