"""What ``model=`` switches on: one count of batch statistics, one dropout mask, no use of perturbed weights."""

import copy
import pickle

import pytest
import torch
from torch import nn

import nusam


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.batch_norm = nn.BatchNorm1d(8)
        self.cumulative = nn.BatchNorm1d(8, momentum=None)
        self.frozen = nn.BatchNorm1d(8).eval()
        self.instance_norm = nn.InstanceNorm1d(8, track_running_stats=True)
        self.dropout = nn.Dropout(0.5)
        self.masks = []

    def forward(self, x):
        h = self.cumulative(self.batch_norm(self.inner(x)))
        h = self.instance_norm(h.T[None]).squeeze(0).T + self.frozen(h)
        dropped = self.dropout(torch.ones_like(h))
        self.masks.append(dropped.detach() > 0)
        return h * dropped


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def run_pass(model):
    torch.manual_seed(3)
    x = torch.randn(16, 6)
    torch.manual_seed(4 + len(model.masks))  # every pass would draw another mask
    return model(x).square().mean()


def optimizer(net, **options):
    return nusam.NuSAM(torch.optim.SGD(net.parameters(), lr=0.1), rho=0.5, **options)


def test_running_statistics_move_once_and_are_the_ascent_passes():
    model = Net()
    alone = copy.deepcopy(model)
    run_pass(alone)
    opt = optimizer(model, model=model)
    for _ in opt.passes():
        run_pass(model).backward()
    for name, buffer in statistics(model).items():
        assert torch.equal(buffer, statistics(alone)[name]), name
    assert model.batch_norm.track_running_stats
    assert model.instance_norm.momentum == 0.1
    assert model.batch_norm.num_batches_tracked == 1


def test_the_descent_pass_still_normalizes_with_the_batch():
    """Freezing the statistics changes no gradient."""
    guarded, plain = Net(), Net()
    plain.load_state_dict(guarded.state_dict())
    for model, options in ((guarded, {"model": guarded, "ascent": "gradient"}), (plain, {})):
        model.dropout.p = 0.0
        opt = optimizer(model, **options)
        for _ in opt.passes():
            run_pass(model).backward()
    assert torch.equal(guarded.inner.weight.grad, plain.inner.weight.grad)
    assert plain.batch_norm.num_batches_tracked == 2  # what happens without model=


def test_statistics_move_in_the_only_pass_while_inactive():
    model = Net()
    opt = optimizer(model, model=model, delay=5)
    for _ in opt.passes():
        run_pass(model).backward()
    assert model.batch_norm.num_batches_tracked == 1


def test_an_exception_leaves_the_statistics_counting():
    model = Net()
    opt = optimizer(model, model=model)

    def run():
        for name in opt.passes():
            run_pass(model).backward()
            if name == "descent":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert model.batch_norm.track_running_stats
    assert model.instance_norm.momentum == 0.1
    model.state_dict()


def masks_of(model, opt):
    torch.manual_seed(7)
    for _ in opt.passes():
        model(torch.ones(16, 6)).square().mean().backward()
    after_step = torch.rand(1)
    return model.masks[-2:], after_step


def test_dropout_draws_the_same_mask_in_both_passes_with_the_model_at_hand():
    model = Net()
    (ascent, descent), after = masks_of(model, optimizer(model, model=model))
    assert torch.equal(ascent, descent)
    torch.manual_seed(7)
    model(torch.ones(16, 6))
    assert torch.equal(after, torch.rand(1))  # the generator stands where one pass leaves it


def test_dropout_draws_two_masks_without_the_model():
    model = Net()
    (ascent, descent), _ = masks_of(model, optimizer(model))
    assert not torch.equal(ascent, descent)


def test_saving_copying_and_evaluating_perturbed_weights_is_refused():
    model = nn.Sequential(nn.Linear(6, 4))  # a wrapper, as DistributedDataParallel is one
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    x = torch.randn(3, 6)
    uses = {
        "state_dict": model.state_dict,
        "state_dict of what it wraps": model[0].state_dict,
        "deepcopy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.dumps(model),
    }
    for name in opt.passes():
        model(x).sum().backward()
        if name == "descent":
            for use in uses.values():
                with pytest.raises(RuntimeError, match="weights are perturbed inside the descent pass"):
                    use()
            model.eval()
            with torch.no_grad(), pytest.raises(RuntimeError, match="evaluate it after the pass"):
                model(x)
            model.train()
    for use in uses.values():
        use()
    with torch.no_grad():
        model(x)
    assert not any(m._state_dict_pre_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_copy_of_the_model_is_a_plain_model():
    model = Net()
    opt = optimizer(model, model=model)
    for _ in opt.passes():
        run_pass(model).backward()
    opt.step()
    assert copy.deepcopy(model).state_dict().keys() == Net().state_dict().keys()
    assert type(model) is Net
    assert "forward" not in vars(model)
