"""Whether the tensors of a batch are copied before somebody's code gets them."""

__all__ = ["BatchCopies", "Written"]


class Written(RuntimeError):
    """A batch was written into, of which there is no copy."""


class BatchCopies:
    """They are made until a step has been seen to leave its batch alone, and from a step on that has been seen not to.

    Args:
        whose: what users call the code.
    """

    def __init__(self, whose: str) -> None:
        self.are_made = True
        self._whose = whose
        self._writes = False

    def note(self, wrote: bool) -> None:
        """What a call within a step did.

        Raises:
            Written: if it wrote into a tensor where no copy had been made.
        """
        self._writes |= wrote
        if wrote and not self.are_made:
            self.are_made = True
            raise Written(
                f"{self._whose} wrote into a tensor of its batch, which it had not done before, so that no copy is "
                "there for its other calls in the step; write into a clone of it, or do so from the first step on."
            )

    def step_is_over(self) -> None:
        """What it did tells what the next one will do."""
        self.are_made, self._writes = self._writes, False
