"""Stacks of expert matrices: each matrix has an ε of its own, and an idle expert none."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import nusam
from tests.conftest import assert_unperturbed, weights

RHO = 0.3


class TinyExperts(nn.Module):
    """As transformers 5 has them: one parameter for the matrices of all experts."""

    def __init__(self, experts, width, inner):
        super().__init__()
        self.up = nn.Parameter(0.5 * torch.randn(experts, inner, width))
        self.down = nn.Parameter(0.5 * torch.randn(experts, width, inner))

    def forward(self, x, expert):
        y = torch.zeros_like(x)
        for e in expert.unique():
            y[expert == e] = F.linear(torch.tanh(F.linear(x[expert == e], self.up[e])), self.down[e])
        return y


class Mixture(nn.Module):
    def __init__(self, experts=4, width=5, inner=7, kind=TinyExperts):
        super().__init__()
        self.stem, self.experts, self.head = nn.Linear(3, width), kind(experts, width, inner), nn.Linear(width, 2)

    def forward(self, x, expert):
        x = torch.tanh(self.stem(x))
        return self.head(x + self.experts(x, expert))


def mixture(**options):
    torch.manual_seed(0)
    return Mixture(**options).double()


def sample(step, idle=()):
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(12, 3, generator=generator, dtype=torch.float64), torch.randint(0, 2, (12,), generator=generator)
    awake = [e for e in range(4) if e not in idle]
    return x, torch.tensor(awake)[torch.randint(0, len(awake), (12,), generator=generator)], y


def loss_of(model, step, idle=()):
    x, expert, y = sample(step, idle)
    return F.cross_entropy(model(x, expert), y)


def by_hand(model, steps, idle):
    """ε of every matrix, a stack's too, by its singular value decomposition."""
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        model.zero_grad()
        loss_of(model, step, idle(step)).backward()
        before = weights(model)
        with torch.no_grad():
            for p in model.parameters():
                for M, G in zip(*((p, p.grad) if p.ndim == 3 else (p[None], p.grad[None])), strict=True):
                    if M.ndim == 2 and G.abs().max() > 0:
                        U, _, Vh = torch.linalg.svd(G)
                        M += RHO * torch.outer(U[:, 0], Vh[0])
        model.zero_grad()
        loss_of(model, step, idle(step)).backward()
        with torch.no_grad():
            for p, old in zip(model.parameters(), before, strict=True):
                p.copy_(old)
        base.step()


@pytest.mark.parametrize("ascent", ["auto", "gradient", "matrix-free"])
@pytest.mark.parametrize("idle", [lambda step: (), lambda step: (step % 3,)], ids=["all", "one idle"])
def test_steps_equal_a_singular_value_decomposition(ascent, idle):
    model = mixture()
    expected = copy.deepcopy(model)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    opt = nusam.NuSAM(base, RHO, model=model, ascent=ascent, power_iterations=300)
    for step in range(8):
        for _ in opt.passes():
            loss_of(model, step, idle(step)).backward()
        opt.step()
    by_hand(expected, 8, idle)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def test_an_idle_expert_is_not_perturbed_and_keeps_its_warm_start():
    model = mixture()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.0), RHO, model=model)
    before = weights(model)
    us = opt._ascent.state_of(next(t for t in opt._targets() if t.parameter is model.experts.up))["u"].clone()
    for name in opt.passes():
        if name == "descent":
            moved = [not torch.equal(a, b) for a, b in zip(model.experts.up, before[2], strict=True)]
            assert moved == [True, False, True, True]
        loss_of(model, 0, idle=(1,)).backward()
    found = opt._states[model.experts.up]["u"]
    assert torch.equal(found[1], us[1])
    assert not torch.equal(found[0], us[0])
    assert opt.metrics()["epsilon/experts.up"] == pytest.approx(RHO * 3**0.5)
    assert_unperturbed(model, before)


def test_coverage_and_memory_count_every_matrix():
    model = mixture()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    assert opt.coverage().share > 0.9
    assert not {"experts.up", "experts.down"} & opt.coverage().left_out.keys()
    assert opt.perturbation_numel() == 2 * 4 * (7 + 5) + (5 + 3) + (2 + 5)


def test_a_resumed_run_is_the_same_to_the_bit():
    model = mixture()
    opt = nusam.NuSAM(torch.optim.AdamW(model.parameters(), lr=0.01), RHO, model=model)

    def train(model, opt, steps):
        for step in steps:
            for _ in opt.passes():
                loss_of(model, step).backward()
            opt.step()

    train(model, opt, range(3))
    other = copy.deepcopy(model)
    resumed = nusam.NuSAM(torch.optim.AdamW(other.parameters(), lr=0.01), RHO, model=other)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(model, opt, range(3, 6))
    train(other, resumed, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


class Bank(TinyExperts):
    """The same by a name that says nothing."""


@pytest.mark.parametrize(
    ("options", "perturbed"),
    [
        ({}, False),
        ({"targets": lambda name, p: p.ndim == 2 or "experts" in name}, True),
        ({"targets": lambda name, p: "head" in name}, False),
        ({"placement": "forward"}, False),
    ],
)
def test_a_stack_is_known_by_its_module_or_named_by_targets(options, perturbed):
    model = mixture(kind=Bank)
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, **options)
    assert ("experts.up" not in opt.coverage().left_out) == perturbed


@pytest.mark.parametrize("prepare", [lambda m: m.bfloat16(), lambda m: m.experts.requires_grad_(False)])
def test_what_could_not_be_perturbed_exactly_is_left_out_and_named(prepare):
    model = mixture()
    prepare(model)
    opt = nusam.NuSAM(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), model=model)
    assert not {model.experts.up, model.experts.down} & {target.parameter for target in opt._targets()}


def moved_by_epsilon(model, opt, dtype=torch.float64):
    """The names of what the descent of a step finds perturbed."""
    x, expert, y = sample(0)
    before, moved = dict(zip(dict(model.named_parameters()), weights(model), strict=True)), set()
    for name in opt.passes():
        if name == "descent":
            moved |= {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        F.cross_entropy(model(x.to(dtype), expert).double(), y).backward()
    assert_unperturbed(model, list(before.values()), RHO)
    opt.step()
    return moved


STACKS, MATRICES = {"experts.up", "experts.down"}, {"stem.weight", "head.weight"}


@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_stacks_stay_known_when_the_model_is_let_go(convolutions, trained):
    model = mixture()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), RHO, model=model, convolutions=convolutions)
    if trained:
        moved_by_epsilon(model, opt)
    opt.detach()
    for _ in range(2):
        assert moved_by_epsilon(model, opt) == STACKS | MATRICES
        assert len(opt.coverage().left_out) == 2  # the biases
        opt.state_dict()


@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stacks_are_left_out_while_they_are_below_float32(convolutions, trained, dtype):
    model = mixture(inner=2)
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.01), RHO, model=model, convolutions=convolutions)
    if trained:
        moved_by_epsilon(model, opt)
    model.to(dtype)
    for _ in range(2):
        assert not moved_by_epsilon(model, opt, dtype) & STACKS  # the matrices have theirs in the forward
        assert opt.coverage().left_out.keys() >= STACKS
    model.double()
    assert moved_by_epsilon(model, opt) == STACKS | MATRICES


def test_a_step_in_the_backward_leaves_stacks_out():
    """As ``placement="forward"`` does, which it implies."""
    found = []
    for placement in ("auto", "forward"):
        model = mixture(inner=2)
        opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), RHO, model=model, placement=placement)
        nusam.step_in_backward(opt)
        for step in range(3):
            for _ in opt.passes():
                loss_of(model, step).backward()
            opt.step()
        assert opt.coverage().left_out.keys() >= STACKS
        found.append(weights(model))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_kernel_is_no_stack():
    model = nn.Sequential(nn.Conv1d(3, 4, 5), nn.Flatten(), nn.Linear(4, 2))
    everything = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model, targets=lambda name, p: True)
    assert "0.weight" in everything.coverage().left_out


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_mixtures_of_transformers_are_reached(family):
    transformers = pytest.importorskip("transformers")
    kinds = {
        "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}),
        "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", {"num_local_experts": 4}),
        "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {"num_experts": 4, "moe_intermediate_size": 16}),
    }
    config, kind, own = kinds[family]
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 40, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**small, **heads, **own)).float()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), RHO, model=model)
    assert opt.coverage().share > 0.95
    ids = torch.randint(0, 40, (2, 6))
    before = weights(model)
    for name in opt.passes():
        if name == "descent":
            assert sum(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)) >= 8
        model(input_ids=ids, labels=ids).loss.backward()
    assert_unperturbed(model, before)
    opt.step()
    assert any(key.startswith("epsilon/") and "experts" in key for key in opt.metrics())
