"""Saving, resuming, copying: the state is the base optimizer's, with our warm starts beside it."""

import copy
import io
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import nusam
from tests.conftest import mlp, train_step, weights
from tests.test_brute_force import BASES, METHODS, problem

N = 4
CASES = [(base, method) for base in BASES for method in METHODS if (base, method) != ("muon", "sam-on")]


def build(base, method):
    torch.manual_seed(1)
    model = problem(base).float()
    kind, options = METHODS[method]
    return model, kind(BASES[base](model.parameters()), rho=0.05, delay=2, model=model, seed=5, **options)


def steps(model, opt, start, stop):
    for step in range(start, stop):
        train_step(model, opt, step)


def resume_all(folder: Path) -> None:
    """What the second process does: load every case, go on, save the weights."""
    for base, method in CASES:
        model, opt = build(base, method)
        saved = torch.load(folder / f"{base}.{method}.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        opt.load_state_dict(saved["optimizer"])
        steps(model, opt, N, 2 * N)
        torch.save(weights(model), folder / f"{base}.{method}.resumed.pt")


@pytest.mark.slow
def test_resuming_in_a_new_process_is_bit_exact_for_every_method_and_base_optimizer(tmp_path):
    expected = {}
    for base, method in CASES:
        model, opt = build(base, method)
        steps(model, opt, 0, N)
        state = {"model": model.state_dict(), "optimizer": opt.state_dict()}
        torch.save(state, tmp_path / f"{base}.{method}.pt")
        steps(model, opt, N, 2 * N)
        expected[base, method] = weights(model)
    program = f"from pathlib import Path; from tests.test_state import resume_all; resume_all(Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])
    for (base, method), wanted in expected.items():
        resumed = torch.load(tmp_path / f"{base}.{method}.resumed.pt", weights_only=True)
        assert all(torch.equal(a, b) for a, b in zip(resumed, wanted, strict=True)), (base, method)


def test_the_base_optimizers_own_state_is_what_it_would_be_alone():
    """At ρ = 0 nothing is perturbed, and wrapped and bare training are the same, bit for bit."""
    for make in BASES.values():
        bare_model = problem("muon")
        wrapped_model = copy.deepcopy(bare_model)
        bare = make(bare_model.parameters())
        wrapped = nusam.NuSAM(make(wrapped_model.parameters()), rho=0.0)
        for step in range(3):
            bare.zero_grad()
            nn.functional.cross_entropy(*_logits(bare_model, step)).backward()
            bare.step()
            train_step(wrapped_model, wrapped, step)
        assert wrapped.state is wrapped.base_optimizer.state
        ours, theirs = wrapped.state_dict(), bare.state_dict()
        assert _equal(ours["state"], theirs["state"])
        for group, bare_group in zip(ours["param_groups"], theirs["param_groups"], strict=True):
            assert {k: v for k, v in group.items() if k in bare_group} == bare_group
            assert group.keys() - bare_group.keys() == {"rho", "nusam_steps"}


def _logits(model, step):
    from tests.conftest import batch

    x, y = batch(step, torch.float64)
    return model(x), y


def _equal(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_the_state_dict_has_the_standard_format_and_one_vector_more_per_matrix():
    model = mlp()
    opt = nusam.NuSAM(torch.optim.AdamW(model.parameters()))
    train_step(model, opt)
    saved = opt.state_dict()
    assert saved.keys() == {"state", "param_groups"}
    assert saved["state"][0].keys() == {"step", "exp_avg", "exp_avg_sq", "nusam_u"}
    assert saved["state"][0]["nusam_u"].shape == (9,)
    assert "nusam_u" not in saved["state"][1]  # a bias
    torch.save(saved, io.BytesIO())
    assert "nusam_u" not in opt.state[model[0].weight]  # apart from the base's in memory


def test_a_checkpoint_of_the_base_optimizer_alone_can_be_taken_up():
    model = mlp()
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        base.zero_grad()
        train_step(model, nusam.SAM(base, rho=0.0), step)
    opt = nusam.NuSAM(torch.optim.AdamW(model.parameters(), lr=1e-2), rho=0.3)
    saved = copy.deepcopy(base.state_dict())
    for group in saved["param_groups"]:
        del group["rho"]
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["rho"] == 0.3
    train_step(model, opt)
    assert opt.active


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda s: s["param_groups"][0]["params"].pop(), "don't match the optimizer's in number or size"),
        (lambda s: s["state"][0].update(nusam_u=torch.ones(2)), r"'u' of shape \(2,\) for a parameter that needs"),
        (lambda s: s["param_groups"][0].update(rho=-1.0), "rho must be a finite number of at least 0, got -1.0"),
    ],
)
def test_a_state_dict_that_does_not_fit_changes_nothing(damage, sentence):
    model = mlp()
    opt = nusam.NuSAM(torch.optim.AdamW(model.parameters()))
    train_step(model, opt)
    before, saved = copy.deepcopy(opt.state_dict()), copy.deepcopy(opt.state_dict())
    damage(saved)
    with pytest.raises(ValueError, match=sentence):
        opt.load_state_dict(saved)
    assert _equal(opt.state_dict(), before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_made_in_mid_training_go_on_as_the_original(method, copier):
    model, opt = build("adamw", method)
    torch.optim.lr_scheduler.StepLR(opt, 10)  # patches opt.step, as every schedule does
    steps(model, opt, 0, N)
    model_copy, opt_copy = copier((model, opt))
    assert opt_copy.param_groups[0]["params"][0] is model_copy[0].weight
    steps(model, opt, N, 2 * N)
    steps(model_copy, opt_copy, N, 2 * N)
    for a, b in zip(model.parameters(), model_copy.parameters(), strict=True):
        assert a is not b
        assert torch.equal(a, b)


def test_saving_and_copying_inside_a_pass_is_refused():
    model = mlp()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1))
    calls = {
        "state_dict": opt.state_dict,
        "load_state_dict": lambda: opt.load_state_dict({}),
        "copying": lambda: copy.deepcopy(opt),
        "pickling": lambda: pickle.dumps(opt),
        "add_param_group": lambda: opt.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]}),
    }
    for name in opt.passes():
        train = nn.functional.cross_entropy(*_float_logits(model))
        train.backward()
        for what, call in calls.items():
            with pytest.raises(RuntimeError, match=rf"{what}.* inside the {name} pass"):
                call()
    assert len(opt.param_groups) == 1


def _float_logits(model):
    from tests.conftest import batch

    x, y = batch()
    return model(x), y


def test_groups_added_later_are_perturbed_too():
    model = mlp()
    opt = nusam.NuSAM(torch.optim.AdamW(model[0].parameters()), rho=0.2)
    train_step(model, opt)
    opt.add_param_group({"params": model[3].parameters(), "rho": 0.4})
    train_step(model, opt)
    metrics = opt.metrics()
    assert metrics["epsilon/0.0"] == pytest.approx(0.2)
    assert metrics["epsilon/1.0"] == pytest.approx(0.4)
    assert opt.perturbation_numel() == 9 + 6 + 4 + 9


def test_groups_that_are_replaced_reach_the_base_optimizer():
    model = mlp()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1))
    opt.param_groups = [dict(group, lr=0.0) for group in opt.param_groups]
    assert opt.base_optimizer.param_groups is opt.param_groups
    before = weights(model)
    train_step(model, opt)
    assert torch.equal(model[0].bias, before[1])


def test_hooks_of_the_wrapper_run_once():
    model = mlp()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1))
    calls = []
    opt.register_step_pre_hook(lambda *_: calls.append("step pre"))
    opt.register_step_post_hook(lambda *_: calls.append("step post"))
    opt.register_state_dict_pre_hook(lambda _: calls.append("save pre"))
    opt.register_state_dict_post_hook(lambda _, saved: calls.append("save post"))
    opt.register_load_state_dict_pre_hook(lambda _, saved: calls.append("load pre"))
    opt.register_load_state_dict_post_hook(lambda _: calls.append("load post"))
    train_step(model, opt)
    opt.load_state_dict(opt.state_dict())
    assert calls == ["step pre", "step post", "save pre", "save post", "load pre", "load post"]


def test_a_run_that_was_never_perturbed_says_so_once(never_perturbed_warning):
    model = mlp()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), delay=100)
    train_step(model, opt)
    with pytest.warns(UserWarning, match="not been active in any of 1 steps"):
        opt.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.state_dict()

    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), delay=100)
    train_step(model, opt)
    with pytest.warns(UserWarning, match="check delay, rho and rho_schedule"):
        del opt


def test_a_run_that_was_perturbed_is_quiet(never_perturbed_warning):
    model = mlp()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), delay=1)
    steps(model, opt, 0, 2)
    saved = opt.state_dict()
    resumed = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), delay=1)
    resumed.load_state_dict(saved)
    resumed.state_dict()
    del opt, resumed


class ByHand(nn.Module):
    """Multiplies with weights that no layer of torch's holds, so that nobody knows at first who writes them."""

    def __init__(self):
        super().__init__()
        self.weight, self.layer = nn.Parameter(torch.randn(5, 6)), nn.Linear(5, 4)

    def forward(self, x):
        return self.layer(torch.tanh(nn.functional.linear(x, self.weight)))


class TiedAndTwice(nn.Module):
    """Matrices that no single use of one layer can serve, in whose forwards an ε can live all the same."""

    def __init__(self):
        super().__init__()
        self.table, self.cell = nn.Embedding(30, 32), nn.Linear(32, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 30, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.cell(self.cell(x).tanh()))


FORWARD = {"auto": {}, "forward": {"placement": "forward"}, "gradient": {"placement": "forward", "ascent": "gradient"}}


@pytest.mark.parametrize("at", [3, 4, 5])
@pytest.mark.parametrize("way", [*FORWARD, "step in backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["layers", "tied"])
def test_resuming_is_bit_exact_where_perturbations_live_in_forwards_of_layers_that_serve_none(kind, dtype, way, at):
    def built():
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8))
        model = (TiedAndTwice() if kind == "tied" else layers).to(dtype)
        opt = nusam.NuSAM(torch.optim.AdamW(model.parameters(), 1e-3), 0.1, model=model, **FORWARD.get(way, {}))
        if way not in FORWARD:
            nusam.step_in_backward(opt)
        return model, opt

    def train(model, opt, steps):
        for step in steps:
            torch.manual_seed(step)
            x = torch.randint(0, 30, (4, 6)) if kind == "tied" else torch.randn(16, 16).to(dtype) + 0.5
            for _ in opt.passes():
                (model(x) - 1).square().mean().backward()
            opt.step()

    whole, opt = built()
    train(whole, opt, range(8))
    half, before = built()
    train(half, before, range(at))
    resumed, after = built()
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(resumed, after, range(at, 8))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_resuming_is_bit_exact_for_weights_that_no_known_layer_holds(at):
    torch.manual_seed(0)
    model = ByHand()
    x, y = torch.randn(16, 6), torch.randint(0, 4, (16,))

    def optimizer(model):
        return nusam.NuSAM(torch.optim.AdamW(model.parameters(), lr=0.01), rho=0.3, model=model)

    def train(model, opt, count):
        for _ in range(count):
            for _ in opt.passes():
                nn.functional.cross_entropy(model(x), y).backward()
            opt.step()

    opt = optimizer(model)
    train(model, opt, at)
    other = copy.deepcopy(model)
    resumed = optimizer(other)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, opt, 6)
    train(other, resumed, 6)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def frozen_targets(model):
    model[0].weight.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return nusam.NuSAM(torch.optim.AdamW(trained, 1e-2), model=model, targets="frozen")


def two_passes_taken_as_one(model):
    model.append(nn.BatchNorm1d(3))
    return nusam.NuSAM(torch.optim.AdamW(model.parameters(), 1e-2), model=model, ascent_share=0.5)


@pytest.mark.parametrize("make", [frozen_targets, two_passes_taken_as_one])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.filterwarnings("ignore:.*takes two passes", "ignore:.*samples apart")
def test_a_new_optimizer_is_loaded_by_distributed_checkpoints_whatever_the_old_one_has_met(make, full):
    def train(model, opt, batches):
        if make is frozen_targets:
            for x, y in batches:
                for _ in opt.passes():
                    nn.functional.cross_entropy(model(x), y).backward()
                opt.step()
            return
        for _ in opt.one_pass(batches, lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1])):
            opt.step()

    def built():
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        return model, make(model)

    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 5, generator=generator), torch.arange(8) % 3) for _ in range(8)]
    options = StateDictOptions(full_state_dict=full)
    model, opt = built()
    train(model, opt, batches[:4])
    parameters, states = copy.deepcopy(get_state_dict(model, opt, options=options))
    resumed, anew = built()
    set_state_dict(resumed, anew, model_state_dict=parameters, optim_state_dict=states, options=options)
    train(model, opt, batches[4:])
    train(resumed, anew, batches[4:])
    for mine, theirs in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, theirs)
