"""Inputs out of the ordinary"""

import torch
from torch import nn

from tests.loops.loop import ALL, DOUBLE, Loop, mlp, to_target


class _SparseInput(Loop):
    def loss(self, step):
        x = self.normal(step, 8, 6)
        return to_target(self.model(self.sparse(x * (x > 0.8))))


class InputsMayBeSparseByCoordinates(_SparseInput):
    """Bag-of-words features as a sparse COO tensor"""

    def sparse(self, x):
        return x.to_sparse()


class InputsMayBeSparseByRows(_SparseInput):
    """The same as a sparse CSR tensor"""

    dtypes = DOUBLE

    def sparse(self, x):
        return x.to_sparse_csr()


class InputsMayBeJagged(Loop):
    """Sequences of several lengths as a jagged nested tensor"""

    def loss(self, step):
        parts = [self.normal(step + 50 * k, k + 2, 6) for k in range(3)]
        nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
        return to_target(self.model(nested).values())


class InputsMayBeNested(Loop):
    """The same as a strided nested tensor, padded at the end"""

    dtypes = DOUBLE

    def build(self):
        return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 8))

    def loss(self, step):
        parts = [self.normal(step + 50 * k, k + 2, 6) for k in range(3)]
        return to_target(self.model(torch.nested.nested_tensor(parts)).to_padded_tensor(0.0))


class OneSampleMayHaveNoBatch(Loop):
    """Online learning: a sample is a vector, without a batch dimension"""

    dtypes = ALL

    def loss(self, step):
        return to_target(self.model(self.normal(step, 6)))


class ABatchMayBeEmpty(Loop):
    """Detection: a head sees the regions that were found, sometimes none"""

    dtypes = ALL

    def build(self):
        return nn.ModuleDict({"body": mlp(6, 12, 12), "head": nn.Linear(12, 8), "boxes": nn.Linear(12, 8)})

    def loss(self, step):
        h = self.model["body"](self.normal(step, 8, 6)).tanh()
        found = h[: (3, 0, 4, 0, 0, 2, 0)[step]]
        return to_target(self.model["head"](h)) + (self.model["boxes"](found) - 1).square().sum()


class InputsMayBeExpandedViews(Loop):
    """Broadcast and transposed inputs, which are views of less than they show"""

    dtypes = DOUBLE

    def loss(self, step):
        x = self.normal(step, 6, 1, 4).expand(6, 3, 4).transpose(0, 2)
        return to_target(self.model(x))
