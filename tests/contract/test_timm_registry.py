"""timm's registry holds classes, which others ask for, construct, derive from and pickle."""

import copy
import inspect
import pickle

import pytest
import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from torch import nn

import nusam
import nusam.integrations.timm
from tests.conftest import mlp, train_step, weights

NAMES = list_optimizers("*-*")
KINDS = {"nusam": nusam.NuSAM, "nusamnorm": nusam.NuSAMNorm, "sam": nusam.SAM, "samon": nusam.SAMON}


@pytest.mark.parametrize("name", NAMES)
def test_it_gives_a_class_as_for_its_own(name):
    kind = get_optimizer_class(name, bind_defaults=False)
    prefix, base = name.split("-", 1)
    assert inspect.isclass(kind)
    assert issubclass(kind, torch.optim.Optimizer)
    assert issubclass(kind, KINDS[prefix])
    assert kind.base is get_optimizer_class(base, bind_defaults=False)
    assert pickle.loads(pickle.dumps(kind)) is kind
    assert kind.__name__ in repr(kind)
    bound, plain = get_optimizer_class(name), get_optimizer_class(base)
    assert (getattr(bound, "keywords", None)) == getattr(plain, "keywords", None)


@pytest.mark.parametrize("prefix", KINDS)
@pytest.mark.parametrize("how", ["list", "groups", "named", "positional"])
def test_it_is_constructed_from_parameters_and_keywords(prefix, how):
    model = mlp()
    kind = get_optimizer_class(f"{prefix}-sgd", bind_defaults=False)
    options = {"momentum": 0.8, "rho": 0.3, "delay": 2, "model": model}
    if how == "list":
        opt = kind(list(model.parameters()), lr=0.1, **options)
    elif how == "groups":
        opt = kind(
            [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1:].parameters()}], lr=0.1, **options
        )
    elif how == "named":
        opt = kind(model.named_parameters(), lr=0.1, **options)
    else:
        opt = kind(model.parameters(), 0.1, **options)
    assert type(opt) is KINDS[prefix]
    assert isinstance(opt, kind)
    assert not isinstance(opt, get_optimizer_class(f"{prefix}-adamw", bind_defaults=False))
    assert not isinstance(torch.optim.SGD(model.parameters()), kind)
    assert all((group["lr"], group["momentum"], group["rho"]) == (0.1, 0.8, 0.3) for group in opt.param_groups)
    assert (opt.delay, opt.model) == (2, model)
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentumm'"):
        kind(model.parameters(), lr=0.1, momentumm=0.9)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("name", ["nusam-sgd", "sam-adamw", "nusamnorm-lamb", "samon-lion", "nusam-muon"])
def test_a_copy_goes_on_as_the_original(name, copied):
    model = mlp()
    opt = get_optimizer_class(name, bind_defaults=False)(model.parameters(), lr=0.01, model=model)
    train_step(model, opt)
    other, twin = copied((model, opt))
    assert twin.model is other
    for _ in range(2):
        train_step(model, opt)
        train_step(other, twin)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_derived_class_is_its_own():
    class Noting(get_optimizer_class("nusam-sgd", bind_defaults=False)):
        def step(self, closure=None):
            self.steps = getattr(self, "steps", 0) + 1
            return super().step(closure)

    model, other = mlp(), mlp()
    other.load_state_dict(model.state_dict())
    opt = Noting(model.parameters(), lr=0.1, rho=0.2, model=model)
    plain = nusam.NuSAM(torch.optim.SGD(other.parameters(), lr=0.1), rho=0.2, model=other)
    assert isinstance(opt, Noting)
    for step in range(3):
        train_step(model, opt, step)
        train_step(other, plain, step)
    assert opt.steps == 3
    assert copy.deepcopy(opt).steps == 3
    for a, b in zip(weights(model), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["nusam_adamw", "sam_sgd", "lookahead_sam_adamw", "NuSAM_AdamW"])
def test_a_name_that_timm_would_take_for_its_own_is_refused(name):
    """With an underscore timm trains the base alone, without a word."""
    method, base = name.lower().removeprefix("lookahead_").split("_")
    with pytest.raises(ValueError, match=rf"is {base} alone to timm, which drops {method}_; write {method}-{base}\.$"):
        create_optimizer_v2(nn.Linear(2, 2), name, lr=0.1)


def test_timms_own_wrapper_goes_on_working():
    assert type(create_optimizer_v2(nn.Linear(2, 2), "lookahead_adamw", lr=0.1)).__name__ == "Lookahead"
    assert type(create_optimizer_v2(nn.Linear(2, 2), "adamw", lr=0.1)) is torch.optim.AdamW
    base = create_optimizer_v2(nn.Linear(2, 2), "lookahead_sgd", lr=0.1)
    assert callable(nusam.NuSAM(base, rho=0.1).sync_lookahead)
