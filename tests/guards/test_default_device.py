"""The device that factory functions take by default is none of the library's business."""

import pytest
import torch
from torch import nn

import nusam
from nusam.tools.sharpness import sharpness

METHODS = {
    "SAM": (nusam.SAM, {}),
    "SAM-ON": (nusam.SAMON, {}),
    "Gaussian": (nusam.GaussSAM, {}),
    "νSAM by gradients": (nusam.NuSAM, {"ascent": "gradient"}),
    "νSAM, matrix-free": (nusam.NuSAM, {"ascent": "matrix-free"}),
    "νSAM in the forward": (nusam.NuSAM, {"placement": "forward"}),
    "νSAM-Norm": (nusam.NuSAMNorm, {}),
}


@pytest.fixture
def elsewhere():
    """Stands for torch.set_default_device("cuda") where there is none."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def train(method):
    torch.manual_seed(1)
    with torch.device("cpu"):
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 3))
        x = torch.randn(4, 6)
    kind, options = METHODS[method]
    opt = kind(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model=model, **options)
    for _ in range(3):
        for _ in opt.passes():
            model(x).square().mean().backward()
        opt.step()
    opt.metrics()
    opt.load_state_dict(opt.state_dict())
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_same(method, request):
    expected = train(method)
    request.getfixturevalue("elsewhere")
    for parameter, wanted in zip(train(method), expected, strict=True):
        assert torch.equal(parameter, wanted)


def test_sharpness_is_measured_where_the_model_is(elsewhere):
    with torch.device("cpu"):
        model, x = nn.Linear(6, 3), torch.randn(4, 6)
    assert sharpness(model, lambda m: m(x).square().mean()).loss > 0
