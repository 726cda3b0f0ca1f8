"""What a model learns by and is judged by: classes or scores, and accuracy or the metric that a task has of its own."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from nusam.experiments.training.splits import Images

__all__ = ["loss", "score"]

EVALUATION_BATCH = 128  # stays in a processor's cache


def loss(outputs: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross entropy of classes; of scores, which are floating-point numbers, the squared error of a single output."""
    if labels.is_floating_point():
        return mse_loss(outputs.squeeze(1), labels, reduction=reduction)
    return cross_entropy(outputs, labels, reduction=reduction)


def score(model: nn.Module, examples: Images, metric: str = "accuracy") -> float:
    """How well the model does by one of :data:`nusam.experiments.training.spec.METRICS`; 1 is best."""
    model.eval()
    starts = range(0, len(examples), EVALUATION_BATCH)
    with torch.no_grad():
        outputs = torch.cat([model(examples.pixels[start : start + EVALUATION_BATCH]) for start in starts])
    return _METRICS[metric](outputs, examples.labels)


def _accuracy(outputs: Tensor, labels: Tensor) -> float:
    return int((outputs.argmax(1) == labels).sum()) / len(labels)


def _matthews(outputs: Tensor, labels: Tensor) -> float:
    """The correlation of two classes, found and true; 0 where all are found to be one."""
    return _correlation(outputs.argmax(1), labels)


def _correlations(outputs: Tensor, labels: Tensor) -> float:
    """The mean of Pearson's and Spearman's, as GLUE has it for scores."""
    found = outputs.squeeze(1)
    return (_correlation(found, labels) + _correlation(_ranks(found), _ranks(labels))) / 2


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = (values.double() - values.double().mean() for values in (a, b))
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Equal values share the mean of their ranks."""
    place, counts = torch.unique(values, return_inverse=True, return_counts=True)[1:]
    ranks: Tensor = (counts.cumsum(0).double() - (counts - 1) / 2)[place]
    return ranks


_METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": _accuracy,
    "matthews": _matthews,
    "correlations": _correlations,
}
