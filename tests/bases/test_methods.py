"""What a base optimizer can beyond torch.optim.Optimizer is within reach, where callers look for it with hasattr."""

import copy
import pickle

import pytest
import pytorch_optimizer
import schedulefree
import timm.optim
import torch
from torch import nn

import nusam
from tests.bases.problem import closure_of, flat, loss_of, net, sam_step

METHODS = {"nusam": nusam.NuSAM, "sam": nusam.SAM, "gauss": nusam.GaussSAM, "norm": nusam.NuSAMNorm}


class Recording(torch.optim.SGD):
    """A base with one of each: a method, a data attribute, a property, a static and a private method."""

    beat = 7
    calls = ()

    def refresh(self, times, *, hard=False):
        """Refresh."""
        self.calls = [(times, hard)]
        return times + 1

    @property
    def doubled(self):
        return 2 * self.beat

    @staticmethod
    def fixed(x):
        return x

    def _hidden(self):
        raise AssertionError


@pytest.mark.parametrize("method", METHODS)
def test_public_names_of_the_base_and_no_others(method):
    opt = METHODS[method](Recording(net().parameters(), lr=0.1))
    assert opt.refresh(2, hard=True) == 3
    assert opt.base_optimizer.calls == [(2, True)]
    assert (opt.beat, opt.doubled, opt.fixed(5)) == (7, 14, 5)
    assert opt.refresh.__doc__ == "Refresh."
    assert not hasattr(opt, "_hidden")
    assert not hasattr(opt, "train")
    opt.base_optimizer.beat = 8
    assert (opt.beat, opt.doubled) == (8, 16)
    with pytest.raises(AttributeError, match=r"'.*SAM.*' object has no attribute 'eval', nor has its base"):
        opt.eval()
    alone = METHODS[method](torch.optim.SGD(net().parameters(), lr=0.1))
    assert not any(hasattr(alone, name) for name in ("train", "eval", "refresh", "beat", "optimizer", "model_"))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_a_copy_reaches_its_own_base(duplicate):
    opt = nusam.SAM(Recording(net().parameters(), lr=0.1))
    other = duplicate(opt)
    other.refresh(1)
    assert other.base_optimizer.calls == [(1, False)]
    shared = other.base_optimizer is opt.base_optimizer
    assert opt.base_optimizer.calls == ([(1, False)] if shared else ())
    bare = nusam.SAM.__new__(nusam.SAM)  # as pickle makes it, before there is anything in it
    assert not hasattr(bare, "refresh")
    assert not hasattr(bare, "__deepcopy__")


@pytest.mark.parametrize("inside", ["ascent", "descent"])
def test_a_method_that_may_move_the_weights_is_refused_inside_a_pass(inside):
    model = net()
    base = pytorch_optimizer.ScheduleFreeAdamW(model.parameters(), lr=0.1)
    opt = nusam.SAM(base)
    opt.train()
    held = opt.eval  # asked for before the pass
    before = flat(model)
    for name in opt.passes():
        loss_of(model).backward()
        if name == inside:
            assert hasattr(opt, "eval")
            for call in (opt.eval, held):
                with pytest.raises(RuntimeError, match=rf"eval\(\) was called inside the {inside} pass"):
                    call()
    assert base.param_groups[0]["train_mode"]
    assert torch.equal(flat(model), before)
    opt.step()
    opt.eval()
    assert not base.param_groups[0]["train_mode"]


@pytest.mark.parametrize("rho", [0.0, 0.05])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: pytorch_optimizer.ScheduleFreeAdamW(p, lr=0.1),
        lambda p: pytorch_optimizer.ScheduleFreeSGD(p, lr=0.1),
        lambda p: pytorch_optimizer.ScheduleFreeWrapper(torch.optim.SGD(p, lr=0.1)),
        lambda p: schedulefree.AdamWScheduleFree(p, lr=0.1),
        lambda p: schedulefree.SGDScheduleFree(p, lr=0.1, foreach=False),
    ],
)
def test_a_schedule_free_base_evaluates_at_its_average(make, rho):
    """By hand: the base's own train() and eval() around SAM by copies of the weights."""
    wrapped, plain = net(), net()
    opt, base = nusam.SAM(make(wrapped.parameters()), rho=rho), make(plain.parameters())
    for _ in range(2):
        opt.train()
        base.train()
        for _ in range(3):
            for _ in opt.passes():
                loss_of(wrapped).backward()
            opt.step()
            sam_step(plain, base, rho)
        training = flat(wrapped)
        opt.eval()
        base.eval()
        assert not torch.equal(flat(wrapped), training)
        assert (flat(wrapped) - flat(plain)).abs().max() <= 1e-12


def test_timms_lookahead_is_synchronized_at_the_end_of_an_epoch():
    ends = []
    for wrap in (lambda o: o, lambda o: nusam.NuSAM(o, rho=0.0)):
        model = net()
        opt = wrap(timm.optim.create_optimizer_v2(model, "lookahead_adamw", lr=0.1))
        for _ in range(2):
            for _ in range(4):
                opt.step(closure_of(model, opt))
            if hasattr(opt, "sync_lookahead"):  # as timm's train.py has it
                opt.sync_lookahead()
        ends.append(flat(model))
    assert torch.equal(*ends)


def test_accelerate_finds_train_and_eval():
    from accelerate import Accelerator

    model = net()
    base = pytorch_optimizer.ScheduleFreeAdamW(model.parameters(), lr=0.1)
    opt = Accelerator(cpu=True).prepare(nusam.SAM(base))
    opt.train()
    assert base.param_groups[0]["train_mode"]
    opt.eval()
    assert not base.param_groups[0]["train_mode"]


def test_names_of_the_wrapper_come_first():
    class Clashing(torch.optim.SGD):
        model = seed = delay = metrics = "the base's"

    opt = nusam.SAM(Clashing(net().parameters(), lr=0.1), delay=3, seed=4)
    assert (opt.model, opt.delay, opt.seed) == (None, 3, 4)
    assert isinstance(opt.metrics(), dict)


def test_lightnings_and_fabrics_wrappers_reach_the_base_too():
    from lightning_fabric.wrappers import _FabricOptimizer
    from pytorch_lightning.core.optimizer import LightningOptimizer

    for around in (LightningOptimizer, lambda opt: _FabricOptimizer(opt, strategy=None)):
        opt = nusam.SAM(Recording(nn.Linear(2, 2).parameters(), lr=0.1))
        outer = around(opt)
        assert outer.refresh(1) == 2
        assert outer.defaults["lr"] == 0.1
        assert not hasattr(outer, "train")
        outer.defaults["lr"] = 0.3
        outer.defaults["rho"] = 0.4
        assert (opt.base_optimizer.defaults["lr"], opt.defaults["rho"]) == (0.3, 0.4)
