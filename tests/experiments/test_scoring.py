"""What GLUE's tasks are judged by, held to scikit-learn's and scipy's metrics."""

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import matthews_corrcoef
from torch import nn

from nusam.experiments.training import text
from nusam.experiments.training.methods import BASES
from nusam.experiments.training.scoring import loss, score
from nusam.experiments.training.spec import METRICS
from nusam.experiments.training.splits import Images


class Given(nn.Module):
    """Its outputs are its inputs."""

    def forward(self, x):
        return x


def judged(outputs, labels, metric):
    return score(Given(), Images(torch.as_tensor(outputs), torch.as_tensor(labels)), metric)


@pytest.mark.parametrize("count", [2, 7, 300])  # 300 are several batches
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_metrics_are_those_of_other_packages(count, kind):
    noise = np.random.default_rng(count)
    logits, classes = noise.standard_normal((count, 2)).astype(kind), noise.integers(2, size=count)
    assert judged(logits, classes, "accuracy") == (logits.argmax(1) == classes).mean()
    assert judged(logits, classes, "matthews") == pytest.approx(matthews_corrcoef(classes, logits.argmax(1)))
    scores = (noise.integers(6, size=count) + noise.integers(2, size=count) / 4).astype(kind)  # with ties
    scores[:2] = 0, 5
    found = (scores + noise.standard_normal(count)).astype(kind).round(1)
    expected = (stats.pearsonr(found, scores).statistic + stats.spearmanr(found, scores).statistic) / 2
    assert judged(found[:, None], scores, "correlations") == pytest.approx(expected)


def test_a_model_that_says_the_same_of_all_has_no_correlation():
    assert judged(np.ones((9, 2)) * [0, 1], np.arange(9) % 2, "matthews") == 0
    assert judged(np.ones((9, 1), np.float32), np.arange(9, dtype=np.float32), "correlations") == 0


def test_a_loss_is_that_of_its_labels():
    outputs, classes, scores = torch.randn(5, 1), torch.zeros(5, dtype=torch.int64), torch.rand(5)
    assert torch.allclose(loss(outputs, scores, "sum"), ((outputs[:, 0] - scores) ** 2).sum())
    assert torch.equal(loss(outputs, classes), nn.functional.cross_entropy(outputs, classes))


def test_every_task_has_a_known_metric():
    assert {name for name in text.GLUE if text.metric_of(name) != "accuracy"} == {"glue-cola", "glue-stsb"}
    assert {text.metric_of(name) for name in text.GLUE} == METRICS.keys()
    assert text.metric_of("digits") == "accuracy"


def test_beta2_reaches_the_base_optimizer():
    (group,) = BASES["adam"].make(nn.Linear(2, 2), 1e-3, 0.0, 0.98).param_groups
    assert group["betas"] == (0.9, 0.98)
    (group,) = BASES["adam"].make(nn.Linear(2, 2), 1e-3, 0.0).param_groups
    assert group["betas"] == (0.9, 0.999)
