"""To save, to copy and to evaluate perturbed weights is refused; what a training step calls is not."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import nusam

METHODS = {
    "SAM": (nusam.SAM, {}),
    "νSAM": (nusam.NuSAM, {"ascent": "gradient"}),
    "matrix-free": (nusam.NuSAM, {"ascent": "matrix-free"}),
    "in the forward": (nusam.NuSAM, {"placement": "forward"}),
}


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 4))


class Only(nn.Module):
    """Has one child, and calls it in a way of its own."""

    def __init__(self, child, call=lambda child, x: child(x)):
        super().__init__()
        self.child = child
        self.call = call

    def forward(self, x):
        return self.call(self.child, x)


def optimizer(method, model):
    kind, options = METHODS[method]
    return kind(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model, **options)


def x():
    return torch.randn(5, 6)


def hooks_of(model):
    return [m for m in model.modules() if m._state_dict_pre_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrap", [lambda m: m, Only, lambda m: torch.compile(m, backend="eager")])
def test_saving_and_copying_any_part_is_refused(method, wrap):
    model = wrap(net())
    opt = optimizer(method, model)
    parts = [module for module in model.modules() if next(module.parameters(), None) is not None]
    assert len(parts) > 4
    for _ in range(2):
        for name in opt.passes():
            model(x()).square().mean().backward()
            for part in parts if name == "descent" else []:
                for use in (part.state_dict, lambda p=part: copy.deepcopy(p), lambda p=part: pickle.dumps(p)):
                    with pytest.raises(RuntimeError, match="can't be saved or copied there; do it after the pass"):
                        use()
                with pytest.raises(RuntimeError, match="can't be saved or copied there; do it after the pass"):
                    torch.save(part, io.BytesIO())
        opt.step()
    assert hooks_of(model) == []
    for part in parts:
        part.state_dict()
        copy.deepcopy(part)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("wrap", [lambda m: m, Only, lambda m: torch.compile(m, backend="eager")])
def test_an_evaluation_is_refused(method, way, wrap):
    inner = net()
    model = wrap(inner)
    opt = optimizer(method, model)
    for _ in range(2):
        for name in opt.passes():
            model(x()).square().mean().backward()
            if name == "descent":
                model.eval()
                for called in (model, inner):
                    with way(), pytest.raises(RuntimeError, match="perturbed; evaluate it after the pass"):
                        called(x())
                model.train()
        opt.step()
    model.eval()
    with way():
        model(x())
    assert hooks_of(model) == []


def test_an_evaluation_in_the_ascent_is_let_through():
    """The weights are the unperturbed ones there."""
    model = net()
    opt = optimizer("SAM", model)
    for name in opt.passes():
        model(x()).square().mean().backward()
        if name == "ascent":
            model.eval()
            with torch.no_grad():
                model(x())
            model.train()


def pseudo_labels(model):
    with torch.no_grad():
        target = model(x()).softmax(1)
    return F.cross_entropy(model(x()), target)


def cached_representations(model):
    chunks = [x(), x()]
    with torch.no_grad():
        cached = torch.cat([model(c) for c in chunks])
    cached.requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(cached @ cached.T, torch.arange(10)), cached)
    return sum((model(c) * g).sum() for c, g in zip(chunks, gradient.split(5), strict=True))


def self_conditioning(model):
    with torch.no_grad():
        guess = model(x())
    return (model(x()) - guess).square().mean()


def adversarial_in_eval_mode(model):
    """Finds its samples with gradients, in eval mode."""
    model.eval()
    found = x().requires_grad_()
    (gradient,) = torch.autograd.grad(model(found).square().mean(), found)
    model.train()
    return model(found.detach() + 0.1 * gradient.sign()).square().mean()


def reentrant(model):
    return checkpoint(model, x().requires_grad_(), use_reentrant=True).square().mean()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrap", [lambda m: m, Only])
@pytest.mark.parametrize(
    "loss_of", [pseudo_labels, cached_representations, self_conditioning, adversarial_in_eval_mode, reentrant]
)
def test_what_a_training_step_calls_without_gradients_is_let_through(method, wrap, loss_of):
    model = wrap(net())
    opt = optimizer(method, model)
    for _ in range(2):
        for _ in opt.passes():
            loss_of(model).backward()
        opt.step()


@pytest.mark.parametrize("method", METHODS)
def test_a_reentrant_checkpoint_around_an_only_child(method):
    def call(child, inputs):
        return checkpoint(child, inputs.clone().requires_grad_(), use_reentrant=True)

    for training in (True, False):
        model = Only(net(), call).train(training)
        opt = optimizer(method, model)
        for _ in range(2):
            for _ in opt.passes():
                model(x()).square().mean().backward()
            opt.step()


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_trained_in_eval_mode_throughout(method):
    """As where a classifier on top is fine-tuned; such a model may be called without gradients too."""
    model = Only(net()).eval()
    opt = optimizer(method, model)
    for _ in range(2):
        for _ in opt.passes():
            pseudo_labels(model).backward()
        opt.step()


def test_a_child_in_eval_mode_of_a_model_in_training_mode():
    model = Only(net())
    model.child.eval()
    opt = optimizer("SAM", model)
    for _ in opt.passes():
        with torch.no_grad():
            model.child(x())
        model(x()).square().mean().backward()


@pytest.mark.parametrize("method", METHODS)
def test_a_reference_model_with_adapters_off(method):
    """Direct preference optimization calls the model itself, without its adapters and without gradients."""

    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.adapter, self.on = net(), nn.Linear(6, 4), True

        def forward(self, inputs):
            return self.base(inputs) + (self.adapter(inputs) if self.on else 0)

    model = Adapted()
    opt = optimizer(method, model)
    for _ in range(2):
        for _ in opt.passes():
            model.on = False
            with torch.no_grad():
                reference = model(x())
            model.on = True
            (model(x()) - reference).square().mean().backward()
        opt.step()


def test_a_module_that_comes_later_is_guarded_too():
    model = net()
    opt = optimizer("SAM", model)
    for step in range(2):
        if step:
            model[3] = nn.Linear(8, 4)
        for name in opt.passes():
            model(x()).square().mean().backward()
            if name == "descent":
                with pytest.raises(RuntimeError, match="can't be saved or copied"):
                    model[3].state_dict()
