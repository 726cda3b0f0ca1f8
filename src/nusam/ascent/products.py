"""Gradients that are multiplied without being formed."""

from collections.abc import Hashable, Sequence
from functools import reduce

import torch
from torch import Tensor

from nusam.layers.kinds import Conv1D, Kind, Linear
from nusam.power_iteration import SMALL, Matrix

__all__ = ["LayerGradient", "Rows", "Sum"]


class LayerGradient:
    """The gradient of a layer's matrix, multiplied without being formed."""

    def __init__(self, layer: type[Kind], X: Tensor, D: Tensor, n: int) -> None:
        self.layer, self.X, self.D, self.n = layer, X, D, n

    def is_small(self) -> bool:
        return self.layer in (Linear, Conv1D) and self.X.numel() + self.D.numel() <= SMALL

    def kind(self) -> Hashable:
        """What small ones that can be stacked have in common."""
        if not self.is_small():
            return None
        return self.layer, self.X.shape, self.D.shape, self.X.dtype, self.D.dtype, self.X.device

    @staticmethod
    def stacked(gradients: "Sequence[LayerGradient]") -> "LayerGradient":
        """Several as one, for u (k, n, 1) and v (k, m, 1)."""
        Xs, Ds = torch.stack([G.X for G in gradients]), torch.stack([G.D for G in gradients])
        return LayerGradient(gradients[0].layer, Xs, Ds, gradients[0].n)

    def matvec(self, v: Tensor) -> Tensor:
        X, D = self._in(v)
        return self.layer.matvec(X, D, v.to(D.device), self.n).to(v.device)

    def rmatvec(self, u: Tensor) -> Tensor:
        X, D = self._in(u)
        return self.layer.rmatvec(X, D, u.to(D.device)).to(u.device)

    def _in(self, like: Tensor) -> tuple[Tensor, Tensor]:
        X = self.X.to(like.dtype) if self.X.is_floating_point() else self.X
        return X, self.D.to(like.dtype)


class Rows:
    """Rows of a matrix (n×m) whose other rows are zero: a piece of a packed projection."""

    def __init__(self, matrix: Matrix, rows: slice, n: int) -> None:
        self.matrix, self.rows, self.n = matrix, rows, n

    def matvec(self, v: Tensor) -> Tensor:
        u = v.new_zeros(self.n)
        u[self.rows] = self.matrix.matvec(v)
        return u

    def rmatvec(self, u: Tensor) -> Tensor:
        return self.matrix.rmatvec(u[self.rows])


class Sum:
    """A sum of matrices of one shape, such as the gradient of a matrix that was used several times."""

    def __init__(self, parts: list[Matrix]) -> None:
        self.parts = parts

    def matvec(self, v: Tensor) -> Tensor:
        return reduce(torch.add, [part.matvec(v) for part in self.parts])

    def rmatvec(self, u: Tensor) -> Tensor:
        return reduce(torch.add, [part.rmatvec(u) for part in self.parts])
