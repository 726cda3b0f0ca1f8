"""Weights that are made from parameters"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from tests.loops.loop import ALL, DOUBLE, Loop, to_target


class _Normed(Loop):
    def build(self):
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), self.wrapped(nn.Linear(12, 12)), nn.Tanh(), nn.Linear(12, 8))

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6)))


class WeightNormHasTwoFactors(_Normed):
    """torch.nn.utils.parametrizations.weight_norm"""

    dtypes = ALL

    def wrapped(self, layer):
        return parametrizations.weight_norm(layer)


class SpectralNormsVectorsMoveOnce(_Normed):
    """torch.nn.utils.parametrizations.spectral_norm"""

    dtypes = DOUBLE

    def wrapped(self, layer):
        return parametrizations.spectral_norm(layer)


class SpectralNormsHooksMoveOnce(_Normed):
    """torch.nn.utils.spectral_norm, the older one, by a hook"""

    dtypes = DOUBLE

    def wrapped(self, layer):
        return nn.utils.spectral_norm(layer)


class OrthogonalWeightsAreMadeFromOthers(_Normed):
    """torch.nn.utils.parametrizations.orthogonal"""

    dtypes = DOUBLE

    def wrapped(self, layer):
        return parametrizations.orthogonal(layer, orthogonal_map="cayley")


class AParametrizationMayBeAnything(_Normed):
    """A bounded weight by a parametrization of one's own"""

    dtypes = ALL

    def wrapped(self, layer):
        parametrize.register_parametrization(layer, "weight", _Bounded())
        return layer


class _Bounded(nn.Module):
    def forward(self, W):
        return (2 * W).tanh()


class PrunedWeightsAreMadeOfTwo(_Normed):
    """torch.nn.utils.prune: weight_orig times a mask, by a hook"""

    dtypes = ALL

    def wrapped(self, layer):
        return prune.l1_unstructured(layer, "weight", 0.4)


class _OwnLayer(Loop):
    layer: type[nn.Module]

    def build(self):
        return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), self.layer(12, 12), nn.Tanh(), nn.Linear(12, 8))

    def loss(self, step):
        return to_target(self.model(self.normal(step, 8, 6)))


class _Cosine(nn.Linear):
    def forward(self, x):
        return 3 * F.linear(F.normalize(x), F.normalize(self.weight))


class _Standardized(nn.Linear):
    def forward(self, x):
        W = self.weight - self.weight.mean(1, keepdim=True)
        return F.linear(x, W / (W.std(1, keepdim=True) + 0.1), self.bias)


class _Product(nn.Module):
    def __init__(self, n, m):
        super().__init__()
        self.W = nn.Parameter(0.3 * torch.randn(n, m))

    def forward(self, x):
        return torch.einsum("bi,ij->bj", x, self.W)


class _HandMerged(nn.Linear):
    def __init__(self, n, m):
        super().__init__(n, m)
        self.A, self.B = nn.Parameter(0.3 * torch.randn(8, n)), nn.Parameter(0.3 * torch.randn(m, 8))

    def forward(self, x):
        return F.linear(x, self.weight + self.B @ self.A, self.bias)


class _DropConnect(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.dropout(self.weight, 0.3, self.training), self.bias)


class CosineClassifiersNormalizeTheirWeight(_OwnLayer):
    """A cosine classifier: a subclass of nn.Linear that normalizes its weight in the forward"""

    dtypes = ALL
    layer = _Cosine


class WeightsMayBeStandardized(_OwnLayer):
    """Weight standardization in a subclass of nn.Linear"""

    dtypes = ALL
    layer = _Standardized


class AMatrixMayHaveNoKnownLayer(_OwnLayer):
    """A plain parameter, multiplied by einsum in a module of one's own"""

    dtypes = ALL
    layer = _Product


class AdaptersMayBeMergedByHand(_OwnLayer):
    """LoRA by hand: F.linear(x, W + BA)"""

    dtypes = ALL
    layer = _HandMerged


class WeightsMayBeDropped(_OwnLayer):
    """DropConnect in a subclass of nn.Linear"""

    dtypes = ALL
    layer = _DropConnect
