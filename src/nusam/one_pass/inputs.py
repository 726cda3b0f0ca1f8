"""What a layer is given: rows of samples, or the same for all samples."""

from nusam.one_pass.joint import CannotJoin, Rows

__all__ = ["Inputs", "Unseen"]


class Unseen(CannotJoin):
    """A table is looked up by a vector in a step that is not looked at, and was not so before."""

    def __init__(self) -> None:
        super().__init__("looks up a table that it had not looked up before", for_good=False)


class Inputs:
    """Those of the layers of one matrix.

    Where two batches travel together, an input is larger than where one is by itself if it has the samples' rows, and
    as large if all samples share it, as positions. The looks compare the two. Later steps go by what was found: a
    vector of indices may be of either kind, if its length is a multiple of the number of samples.
    """

    def __init__(self) -> None:
        self.is_noted = False  # whether a batch is by itself in order to compare
        self.has_shared = False  # whether the last look has seen inputs that all samples share
        self._shares_vectors: bool | None = None
        self._alone: set[tuple[int, ...]] = set()  # shapes of what a batch by itself gives

    def note(self, shape: tuple[int, ...]) -> None:
        """An input where a batch may be by itself."""
        if self.is_noted:
            self._alone.add(shape)

    def compare(self, shape: tuple[int, ...]) -> None:
        """An input where two batches travel together."""
        if shape in self._alone:
            self.has_shared = True

    def forget(self) -> None:
        """The look is over."""
        self.is_noted = False
        self._alone.clear()

    def are_shared(self, length: int, rows: Rows) -> bool:
        """Whether all samples share the indices of a vector where two batches travel together.

        Raises:
            Unseen: if that is not known.
            CannotJoin: if some vectors are shared and others are not.
        """
        samples = sum(rows)
        alone = [shape[0] for shape in self._alone if len(shape) == 1]
        if alone:
            same, scaled = length in alone, any(n * samples == length * rows.first for n in alone)
            if same == scaled or self._shares_vectors not in (None, same):
                raise CannotJoin("looks up a table now for each sample and now for all of them")
            self._shares_vectors = same
        if self._shares_vectors is None:
            if length % samples == 0:
                raise Unseen
            self._shares_vectors = True
        if not self._shares_vectors and length % samples:
            raise CannotJoin("folds the samples' dimension of a layer's input away")
        return self._shares_vectors
