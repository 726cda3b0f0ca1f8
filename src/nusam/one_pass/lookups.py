"""Tables that are looked up by a vector of indices, of which a sample has one or more, or all samples the same ones."""

from nusam.one_pass.joint import CannotJoin, Rows

__all__ = ["Lookup", "Unseen"]


class Unseen(CannotJoin):
    """A table is looked up by a vector in a step that is not looked at, and was not so before."""

    def __init__(self) -> None:
        super().__init__("looks up a table that it had not looked up before", for_good=False)


class Lookup:
    """How one table is looked up by vectors.

    A vector's length can't tell where it is a multiple of the number of samples, as that of positions may be. But where
    a batch is by itself, the vector is shorter if it has the samples' indices, and as long if all of them share it. So
    the looks compare the two, and later steps go by what was found.
    """

    def __init__(self) -> None:
        self.is_noted = False  # whether a batch is by itself in order to compare
        self._is_shared: bool | None = None
        self._alone: set[int] = set()  # lengths of vectors there

    def note(self, length: int) -> None:
        """A vector of a batch by itself."""
        if self.is_noted:
            self._alone.add(length)

    def forget(self) -> None:
        """The look is over."""
        self.is_noted = False
        self._alone.clear()

    def is_shared(self, length: int, rows: Rows) -> bool:
        """Whether all samples share a vector where those of two batches travel together.

        Raises:
            Unseen: if that is not known.
            CannotJoin: if vectors of both kinds are looked up.
        """
        samples = sum(rows)
        if self._alone:
            same, scaled = length in self._alone, any(n * samples == length * rows.first for n in self._alone)
            if same == scaled or self._is_shared not in (None, same):
                raise CannotJoin("looks up a table now for each sample and now for all of them")
            self._is_shared = same
        if self._is_shared is None:
            if length % samples == 0:
                raise Unseen
            self._is_shared = True
        if not self._is_shared and length % samples:
            raise CannotJoin("folds the samples' dimension of a layer's input away")
        return self._is_shared
