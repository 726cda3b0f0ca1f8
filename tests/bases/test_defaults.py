"""opt.defaults is the base optimizer's and rho: what is written there is what a later group gets."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import nusam
from tests.bases.problem import net


def made(**options):
    return nusam.SAM(torch.optim.SGD(net().parameters(), lr=0.1, momentum=0.9), rho=0.03, **options)


def group():
    return {"params": [nn.Parameter(torch.ones(2, 2))]}


def test_a_later_group_follows_what_is_written_to_either():
    opt = made()
    opt.defaults["lr"] = 0.5
    opt.base_optimizer.defaults["momentum"] = 0.7
    opt.defaults["rho"] = 0.2
    opt.add_param_group(group())
    added = opt.param_groups[-1]
    assert (added["lr"], added["momentum"], added["rho"]) == (0.5, 0.7, 0.2)
    assert opt.defaults["momentum"] == 0.7
    assert opt.base_optimizer.defaults["lr"] == 0.5
    assert "rho" not in opt.base_optimizer.defaults
    held = opt.defaults  # a view taken before is a view still
    opt.base_optimizer.defaults["lr"] = 0.6
    assert held["lr"] == 0.6 == dict(held)["lr"] == {**held}["lr"] == held.copy()["lr"]


def test_it_is_a_dict_in_every_way():
    opt = made()
    expected = {**opt.base_optimizer.defaults, "rho": 0.03}
    view = opt.defaults
    assert isinstance(view, dict)
    assert view == expected
    assert expected == view
    assert len(view) == len(expected)
    assert list(view) == list(expected)
    assert list(view.items()) == list(expected.items())
    assert list(reversed(view)) == list(reversed(expected))
    assert list(view.values()) == list(expected.values())
    assert view.get("lr") == 0.1
    assert view.get("nothing", 3) == 3
    assert "momentum" in view
    assert "nothing" not in view
    assert repr(view) == repr(expected)
    assert json.loads(json.dumps(view)) == json.loads(json.dumps(expected))
    assert (view | {"lr": 1})["lr"] == 1
    assert ({"lr": 1} | view)["lr"] == 0.1
    assert opt.defaults["lr"] == 0.1
    with pytest.raises(KeyError):
        view["nothing"]
    view.update(lr=0.2, rho=0.04)
    view |= {"momentum": 0.1}
    assert view.setdefault("new", 5) == 5
    assert view.pop("new") == 5
    assert "new" not in opt.base_optimizer.defaults
    assert opt.base_optimizer.defaults["lr"] == 0.2
    assert opt.base_optimizer.defaults["momentum"] == 0.1
    assert opt.defaults["rho"] == 0.04
    del view["dampening"]
    assert "dampening" not in opt.base_optimizer.defaults


def test_a_radius_that_is_none_is_refused():
    opt = made()
    with pytest.raises(ValueError, match="rho must be a finite number of at least 0, got -1"):
        opt.defaults["rho"] = -1
    with pytest.raises(TypeError, match="The default of 'rho' can't be deleted; set it to 0"):
        del opt.defaults["rho"]
    assert opt.defaults["rho"] == 0.03


def test_all_of_it_may_be_assigned():
    opt = made()
    own = opt.base_optimizer.defaults
    opt.defaults = {**opt.defaults, "lr": 0.7, "rho": 0.1}
    assert opt.base_optimizer.defaults is own
    assert own["lr"] == 0.7
    assert "rho" not in own
    assert opt.defaults["rho"] == 0.1
    opt.defaults = opt.defaults
    assert own["lr"] == 0.7
    assert opt.defaults["rho"] == 0.1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies(duplicate):
    opt = made()
    opt.defaults["lr"] = 0.4
    other = duplicate(opt)
    other.defaults["lr"], other.defaults["rho"] = 0.8, 0.5
    assert (opt.defaults["lr"], opt.defaults["rho"]) == (0.4, 0.03)
    assert (other.base_optimizer.defaults["lr"], other.defaults["rho"]) == (0.8, 0.5)
    alone = duplicate(opt.defaults)
    assert type(alone) is dict
    assert alone == opt.defaults


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_schedulers_that_ask_it_for_momentum(base):
    opt = nusam.SAM(base(net().parameters(), lr=0.1, **({"momentum": 0.9} if base is torch.optim.SGD else {})))
    for scheduler in (
        torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=0.2, total_steps=10),
        torch.optim.lr_scheduler.CyclicLR(opt, base_lr=0.01, max_lr=0.1),
    ):
        assert scheduler.cycle_momentum
        assert scheduler.use_beta1 == (base is torch.optim.AdamW)
