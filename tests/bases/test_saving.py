"""Every base steps, saves, loads and resumes bit-exactly under us, whatever the layout of its state dict."""

import copy
import inspect
import io

import numpy as np
import pytest
import pytorch_optimizer
import torch
from torch import nn

import nusam
from tests.bases.problem import closure_of, flat, net

REFUSED = {  # with a sentence at construction, each for a reason of its own
    "AdaDelta": "rho of its own",
    "Adadelta": "rho of its own",
    "AdaHessian": "second time",
    "SophiaH": "second time",
    "LBFGS": "LBFGS evaluates its closure several times",
}
WRAPPERS = {
    "Lookahead": lambda p: pytorch_optimizer.Lookahead(torch.optim.AdamW(p, lr=0.01), k=2),
    "Lookahead, pullback": lambda p: pytorch_optimizer.Lookahead(
        torch.optim.SGD(p, lr=0.1, momentum=0.9), k=2, pullback_momentum="pullback"
    ),
    "ScheduleFreeWrapper": lambda p: pytorch_optimizer.ScheduleFreeWrapper(torch.optim.SGD(p, lr=0.1)),
    "OrthoGrad": lambda p: pytorch_optimizer.OrthoGrad(torch.optim.AdamW(p, lr=0.01)),
    "TRAC": lambda p: pytorch_optimizer.TRAC(torch.optim.AdamW(p, lr=0.01)),
}


def classes():
    for module in (torch.optim, pytorch_optimizer):
        for name, kind in sorted(vars(module).items()):
            if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
                yield pytest.param(kind, id=f"{module.__name__}.{name}")


def constructed(kind, model):
    """With nothing but its defaults, or a learning rate where there is none; None if it asks for more."""
    parameters = list(model.parameters())
    matrices, vectors = ([p for p in parameters if (p.ndim == 2) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "use_muon": True}, {"params": vectors, "use_muon": False}]
    by_shape = "Muon" in kind.__name__ or kind.__name__ in ("AdaGO", "SpectralSphere")
    for options in ({}, {"lr": 0.01}):
        for candidate in (groups, matrices) if by_shape else (parameters, matrices):
            try:
                return kind(candidate, **options)
            except Exception:  # whatever it dislikes
                continue
    return None


def run(model, opt, steps):
    if hasattr(opt, "train"):
        opt.train()
    for _ in range(steps):
        opt.step(closure_of(model, opt))


def on_disk(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def containers(value):
    """What is in it, and of what the tensors are."""
    if isinstance(value, dict):
        return {key: containers(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [containers(entry) for entry in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or a != a


def seed_everything():
    """For bases that draw, some of them from numpy."""
    torch.manual_seed(5)
    np.random.seed(5)


def resumes_bit_exactly(make, wrap, fresh=net):
    """Whether 3 steps, a file and 3 steps are 6 steps, and the base alone does as much."""
    model = fresh()
    opt = wrap(make(model))
    run(model, opt, 3)
    middle = copy.deepcopy(model.state_dict())
    saved = on_disk(opt.state_dict())
    seed_everything()
    run(model, opt, 3)
    resumed = fresh()
    resumed.load_state_dict(middle)
    other = wrap(make(resumed))
    before = containers(saved)
    other.load_state_dict(saved)
    assert not isinstance(other, nusam.SharpnessAware) or same(before, containers(saved))
    seed_everything()
    run(resumed, other, 3)
    return torch.equal(flat(resumed), flat(model))


@pytest.mark.filterwarnings("ignore")  # what bases say of themselves
@pytest.mark.parametrize("kind", list(classes()))
def test_every_base_that_its_defaults_can_make(kind):
    if constructed(kind, net()) is None:
        pytest.skip(f"{kind} needs special arguments")
    if kind.__name__ in REFUSED:
        with pytest.raises(TypeError, match=REFUSED[kind.__name__]):
            nusam.SAM(constructed(kind, net()))
        return
    for fresh in (net, lambda: net().float()):
        try:
            alone = resumes_bit_exactly(lambda model: constructed(kind, model), lambda base: base, fresh)
        except (RuntimeError, ValueError) as error:
            why = f"{kind} fails alone: {error!r}"
            continue
        for wrap in (nusam.SAM, nusam.NuSAM):
            assert resumes_bit_exactly(lambda model: constructed(kind, model), wrap, fresh) or not alone
        return
    pytest.skip(why)


@pytest.mark.parametrize("wrap", [nusam.SAM, nusam.NuSAM, lambda base: nusam.NuSAM(base, rho=0.0)])
@pytest.mark.parametrize("base", WRAPPERS)
def test_bases_that_wrap_others(base, wrap):
    assert resumes_bit_exactly(lambda model: WRAPPERS[base](model.parameters()), wrap)


def made(name="Lookahead", **options):
    model = net()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "rho": 0.2}]
    return model, nusam.NuSAM(WRAPPERS[name](groups), rho=0.1, **options)


@pytest.mark.parametrize("name", ["Lookahead", "ScheduleFreeWrapper", "OrthoGrad"])
def test_steps_radii_and_warm_starts_are_saved_beside_a_foreign_state(name):
    model, opt = made(name)
    run(model, opt, 3)
    opt.param_groups[1]["rho"] = 0.3
    saved = opt.state_dict()
    assert {key.split("_")[0] for key in saved} <= {"state", "param", "nusam", "lookahead", "schedulefree", "base"}
    _, other = made(name)
    other.load_state_dict(on_disk(saved))
    assert [group["rho"] for group in other.param_groups] == [0.1, 0.3]
    assert other._progress.steps == 3
    for ours, theirs in zip(opt._states.values(), other._states.values(), strict=True):
        assert torch.equal(ours["u"], theirs["u"])


def test_a_foreign_state_that_the_base_saved_alone():
    _, opt = made()
    model = net()
    alone = WRAPPERS["Lookahead"]([{"params": model[0].parameters()}, {"params": model[2].parameters()}])
    run(model, alone, 3)
    opt.load_state_dict(alone.state_dict())
    assert [group["rho"] for group in opt.param_groups] == [0.1, 0.2]
    ours, theirs = (base.optimizer.state_dict()["state"] for base in (opt.base_optimizer, alone))
    assert same(containers(ours), containers(theirs))


def test_the_format_of_a_standard_base_is_as_ever():
    model = net()
    opt = nusam.NuSAM(torch.optim.AdamW(model.parameters(), lr=0.01))
    run(model, opt, 2)
    assert set(opt.state_dict()) == {"state", "param_groups"}


@pytest.mark.parametrize(("saves", "loads"), [("foreign", "standard"), ("standard", "foreign")])
@pytest.mark.parametrize("through_us", [True, False])
def test_a_state_of_another_layout_is_refused_in_a_sentence(saves, loads, through_us):
    makes = {"foreign": WRAPPERS["Lookahead"], "standard": lambda p: torch.optim.AdamW(p, lr=0.01)}
    model = net()
    opt = makes[saves](model.parameters())
    opt = nusam.SAM(opt) if through_us else opt
    run(model, opt, 2)
    saved = opt.state_dict()
    other = nusam.SAM(makes[loads](net().parameters()))
    with pytest.raises(ValueError, match=r"The state dict has no .*; load one of the same base optimizer\."):
        other.load_state_dict(saved)
    assert other._progress.steps == 0


def test_a_radius_in_a_foreign_state_that_is_none_is_refused():
    _, opt = made()
    saved = opt.state_dict()
    saved["param_groups"][0]["rho"] = -1.0
    with pytest.raises(ValueError, match="rho must be a finite number of at least 0, got"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("name", ["AdamW", *WRAPPERS])
def test_a_hook_before_loading_gets_a_dict_of_its_own(name):
    def hook(opt, state_dict):
        state_dict["note"] = 1
        state_dict["param_groups"][0]["rho"] = 0.25
        for entry in state_dict["state"].values():
            entry["note"] = 1
        state_dict["param_groups"].append("more")
        del state_dict["param_groups"][-1]

    model = net()
    make = WRAPPERS.get(name, lambda p: torch.optim.AdamW(p, lr=0.01))
    opt = nusam.NuSAM(make(model.parameters()))
    run(model, opt, 2)
    saved = opt.state_dict()
    before = containers(saved)
    opt.register_load_state_dict_pre_hook(hook)
    opt.load_state_dict(saved)
    assert same(before, containers(saved))
    assert opt.param_groups[0]["rho"] == 0.25
    replacing = nusam.NuSAM(make(net().parameters()))
    replacing.register_load_state_dict_pre_hook(lambda opt, _: saved)
    replacing.load_state_dict({"state": {}, "param_groups": []})
    assert replacing._progress.steps == 2


def test_a_base_that_takes_its_state_apart_while_loading_leaves_the_callers_alone():
    class Destructive(torch.optim.SGD):
        def load_state_dict(self, state_dict):
            super().load_state_dict(state_dict)
            state_dict.pop("state")
            state_dict["param_groups"][0].clear()

    model = nn.Linear(3, 2)
    opt = nusam.SAM(Destructive(model.parameters(), lr=0.1, momentum=0.9))
    saved = opt.state_dict()
    before = containers(saved)
    opt.load_state_dict(saved)
    assert same(before, containers(saved))
