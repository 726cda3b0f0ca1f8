"""Whatever a forward keeps for the next one moves once a step, and both passes see it as it was."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import nusam
from nusam.guards.model_guard import ModelGuard
from tests.guards.stateful import KINDS, LARGE, AssignedStatistics, Fading, Queue, model_with

METHODS = {
    "SAM": (nusam.SAM, {}),
    "νSAM by gradients": (nusam.NuSAM, {"ascent": "gradient"}),
    "νSAM, matrix-free": (nusam.NuSAM, {"ascent": "matrix-free"}),
    "νSAM in the forward": (nusam.NuSAM, {"ascent": "gradient", "placement": "forward"}),
}
RHO = 0.3


def loss_of(model, step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return model(torch.randn(10, 6, generator=generator, dtype=torch.float64).to(dtype)).square().mean()


def state_of(model):
    """Buffers, frozen parameters and numbers, by name."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    tensors = {**dict(model.named_buffers()), **frozen}
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    numbers = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if type(value) in (int, bool)
    }
    return copies, numbers


def assert_same_state(model, expected, context):
    tensors, numbers = state_of(model)
    assert tensors.keys() == expected[0].keys()
    assert numbers == expected[1], context
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[0][name], rtol=0, atol=0, equal_nan=True, msg=f"{context}: {name}")


def twin(model, kind):
    """A copy; the old spectral norm keeps a weight that can't be copied."""
    if kind != "spectral norm, old":
        return copy.deepcopy(model)
    made = model_with(kind, dtype=model[0].weight.dtype)
    made.load_state_dict(model.state_dict())
    return made


def by_copies(model, kind, method, step):
    """Both passes on copies that begin with the same state: gradients of the descent, state after the ascent."""
    ascent, descent = twin(model, kind), twin(model, kind)
    loss_of(ascent, step).backward()
    trainable = {name: p for name, p in ascent.named_parameters() if p.grad is not None}
    total = torch.sqrt(sum(p.grad.square().sum() for p in trainable.values()))
    with torch.no_grad():
        for name, parameter in descent.named_parameters():
            if name not in trainable:
                continue
            gradient = trainable[name].grad
            if method is nusam.SAM:
                parameter += RHO * gradient / total
            elif gradient.ndim == 2 and gradient.any():
                U, _, Vh = torch.linalg.svd(gradient, full_matrices=False)
                parameter += RHO * torch.outer(U[:, 0], Vh[0])
    loss_of(descent, step).backward()
    return {name: p.grad for name, p in descent.named_parameters() if p.grad is not None}, state_of(ascent)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_state_moves_once_and_both_passes_begin_with_the_same(kind, method):
    model = model_with(kind)
    build, options = METHODS[method]
    if "forward" in method and "spectral" in kind:
        pytest.skip("reads a weight outside its layer, where no ε in the forward is")
    if build is nusam.NuSAM:
        options = {**options, "power_iterations": 200}
    trainable = [p for p in model.parameters() if p.requires_grad]
    opt = build(torch.optim.SGD(trainable, lr=0.05), rho=RHO, model=model, **options)
    for step in range(6):
        gradients, state = by_copies(model, kind, build, step)
        for _ in opt.passes():
            loss_of(model, step).backward()
        assert_same_state(model, state, f"step {step}")
        for name, parameter in model.named_parameters():
            if name in gradients:
                torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-7, atol=1e-9, msg=f"{step}: {name}")
        opt.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_moves_once_in_lower_precision(kind, dtype):
    if dtype is torch.bfloat16 and ("spectral" in kind or kind in ("observer", "codebook", "large codebook")):
        pytest.skip("torch has no bfloat16 kernel for it")
    model = model_with(kind, dtype=dtype)
    trainable = [p for p in model.parameters() if p.requires_grad]
    opt = nusam.NuSAM(torch.optim.SGD(trainable, lr=0.05), rho=RHO, model=model)
    for step in range(4):
        once = twin(model, kind)
        loss_of(once, step, dtype)
        for _ in opt.passes():
            loss_of(model, step, dtype).backward()
        assert_same_state(model, state_of(once), f"step {step}")
        opt.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", ["before the forward", "after the forward"])
def test_an_exception_in_the_descent_leaves_what_the_ascent_left(kind, moment):
    model = model_with(kind)
    trainable = [p for p in model.parameters() if p.requires_grad]
    opt = nusam.SAM(torch.optim.SGD(trainable, lr=0.0), rho=RHO, model=model)
    for step in range(3):
        once = twin(model, kind)
        loss_of(once, step)

        def body(step=step):
            for name in opt.passes():
                if name == "descent" and moment == "before the forward":
                    raise KeyboardInterrupt
                loss_of(model, step).backward()
                if name == "descent":
                    raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            body()
        assert_same_state(model, state_of(once), f"step {step}")


def test_a_broken_ascent_is_not_undone_by_a_later_descent():
    """What an ascent that was left early remembered is not put back in a step that has one pass only."""
    model = model_with("batch norm")
    opt = nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=RHO, model=model)
    for _ in opt.passes():
        loss_of(model, 0).backward()
        break
    opt.param_groups[0]["rho"] = 0.0  # from now on inactive
    once = copy.deepcopy(model)
    for _ in opt.passes():
        loss_of(model, 1).backward()
    loss_of(once, 1)
    assert_same_state(model, state_of(once), "inactive")


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_a_perturbation_touches_nothing(kind):
    model = model_with(kind)
    trainable = [p for p in model.parameters() if p.requires_grad]
    opt = nusam.SAM(torch.optim.SGD(trainable, lr=0.0), rho=RHO, model=model, delay=10)
    once = twin(model, kind)
    for _ in opt.passes():
        loss_of(model, 0).backward()
    loss_of(once, 0)
    assert_same_state(model, state_of(once), "inactive")


def test_an_ascent_whose_gradients_vanish_still_counts_once():
    """No weight is perturbed then, and yet there were two passes."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double()
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model, ascent="gradient")
    once = copy.deepcopy(model)
    for name in opt.passes():
        loss = loss_of(model, 0)
        (loss * (0.0 if name == "ascent" else 1.0)).backward()
    loss_of(once, 0)
    assert_same_state(model, state_of(once), "vanishing")


def test_buffers_that_move_in_place_stay_the_tensors_they_are():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), Queue(8), nn.Linear(8, 4)).double()
    before = {name: (id(b), b.data_ptr()) for name, b in model.named_buffers()}
    opt = nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model)
    for step in range(3):
        for _ in opt.passes():
            loss_of(model, step).backward()
        opt.step()
    assert {name: (id(b), b.data_ptr()) for name, b in model.named_buffers()} == before


class MadeByTheForward(nn.Module):
    """Has no buffer until its first forward, which asks whether there is one."""

    def forward(self, x):
        if not hasattr(self, "mean"):
            self.register_buffer("mean", torch.zeros_like(x[0]))
        with torch.no_grad():
            self.mean.lerp_(x.detach().mean(0), 0.5)
        return x - self.mean


def test_a_buffer_that_the_first_forward_makes():
    model = nn.Sequential(nn.Linear(6, 8), MadeByTheForward(), nn.Linear(8, 4)).double()
    opt = nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model)
    for step in range(4):
        once = copy.deepcopy(model)
        for _ in opt.passes():
            loss_of(model, step).backward()
        loss_of(once, step)
        assert_same_state(model, state_of(once), f"step {step}")
        opt.step()


def test_a_module_that_comes_later():
    model = nn.Sequential(nn.Linear(6, 8), nn.Identity(), nn.Linear(8, 4)).double()
    opt = nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model, delay=0)
    for step in range(6):
        if step == 3:  # no step that looks at everything anew
            model[1] = AssignedStatistics(8).double()
        if step == 4:
            model[1].mean = torch.ones(8, dtype=torch.float64)
        once = copy.deepcopy(model)
        for _ in opt.passes():
            loss_of(model, step).backward()
        loss_of(once, step)
        assert_same_state(model, state_of(once), f"step {step}")
        opt.step()


def test_buffers_that_can_not_be_written_are_left_alone():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("expanded", torch.ones(1, dtype=torch.float64).expand(8))
            self.register_buffer("nowhere", torch.empty(3, device="meta"))
            self.register_buffer("nothing", torch.empty(0))
            self.register_buffer("lazy", torch.nn.UninitializedBuffer())
            with torch.inference_mode():
                self.register_buffer("inferred", torch.ones(8, dtype=torch.float64))

        def forward(self, x):
            return x * self.expanded

    model = nn.Sequential(nn.Linear(6, 8), Odd(), nn.Linear(8, 4)).double()
    model[1].lazy = torch.nn.UninitializedBuffer()
    opt = nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model)
    for step in range(2):
        for _ in opt.passes():
            loss_of(model, step).backward()
        opt.step()


class Large(TorchDispatchMode):
    """Operations that read or write as many entries as a large buffer has, and those that wait for a device."""

    def __init__(self):
        super().__init__()
        self.seen, self.waits = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, torch.Tensor)]
        if "detach" not in name and any(t.numel() > LARGE for t in tensors):
            self.seen.append(name)
        if "_local_scalar_dense" in name or "equal" in name or "nonzero" in name:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def guarded(model, everything, move=lambda: None):
    """What the care for the model costs in one step, apart from the model's own passes."""
    guard = ModelGuard(model) if not hasattr(model, "guard") else model.guard
    vars(model)["guard"] = guard
    with Large() as counted:
        guard.before_ascent(everything)
    move()
    with counted:
        guard.after_ascent()
        with guard.descent(True):
            pass
    return counted


def test_large_buffers_and_frozen_weights_that_stand_still_are_read_only_where_everything_is_looked_at():
    model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300), nn.Linear(300, 300).requires_grad_(False))
    model.register_buffer("mask", torch.ones(300, 300))
    assert guarded(model, everything=True).seen
    ordinary = guarded(model, everything=False)
    assert ordinary.seen == ordinary.waits == []


def test_what_was_seen_to_move_is_copied_without_waiting():
    model = nn.Sequential(Fading(8, LARGE + 1))
    guarded(model, everything=True, move=lambda: model(torch.ones(2, 8)))
    before = model[0].kept.clone()
    counted = guarded(model, everything=False, move=lambda: model(torch.ones(2, 8)))
    assert counted.seen
    assert counted.waits == []
    assert torch.equal(model[0].kept, before * 0.9)


def test_a_large_buffer_that_begins_to_move_later_is_seen_by_its_version():
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_buffer("queue", torch.zeros(LARGE + 1))
    guarded(model, everything=True)
    guard = model.guard
    for round_ in range(3):
        guard.before_ascent(False)
        model.queue += 1
        guard.after_ascent()
        told = nullcontext() if round_ else pytest.warns(UserWarning, match="The model writes queue in its own forward")
        with told, guard.descent(True):
            if round_:
                assert (model.queue == round_).all()  # from the second time on
            model.queue += 1
        assert (model.queue == round_ + 1).all()


class LateQueue(nn.Module):
    """Large, and written from some step on: a buffer or a frozen parameter."""

    def __init__(self, frozen, through_data=False):
        super().__init__()
        self.layer, self.writes, self.through_data = nn.Linear(6, 4).double(), False, through_data
        queue = torch.zeros(LARGE + 4, dtype=torch.float64)
        if frozen:
            self.queue = nn.Parameter(queue, requires_grad=False)
        else:
            self.register_buffer("queue", queue)

    def forward(self, x):
        y = self.layer(x)
        if self.writes:
            with torch.no_grad():
                queue = self.queue.data if self.through_data else self.queue
                queue[:4] += y[0].detach()
        return y + self.queue[:4]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("begins", "through_data"), [(3, False), (4, False), (0, True), (2, True)])
@pytest.mark.parametrize("method", METHODS)
def test_what_moves_large_and_unseen_is_told_once_and_copied_from_then_on(frozen, begins, through_data, method):
    """Of a buffer that is looked at, and of what was seen in time, there is a copy and nothing to tell."""
    model = LateQueue(frozen, through_data)
    build, options = METHODS[method]
    opt = build(torch.optim.SGD(model.layer.parameters(), lr=0.05), rho=RHO, model=model, **options)
    told = begins == 3 or frozen
    for step in range(8):
        model.writes = step >= begins
        once = copy.deepcopy(model)
        loss_of(once, step)
        seen = []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in opt.passes():
                seen.append(model.queue[:4].clone())
                loss_of(model, step).backward()
        messages = [str(w.message) for w in caught if "The model writes queue in its own forward" in str(w.message)]
        assert len(messages) == (told and step == begins), step
        assert torch.equal(*seen) or messages
        assert torch.equal(model.queue, once.queue)
        opt.step()


def test_a_large_buffer_that_is_rewritten_with_what_it_holds_is_not_copied_for_ever():
    """DistributedDataParallel broadcasts buffers, which raises the version of masks too."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_buffer("mask", torch.ones(LARGE + 1))
    guarded(model, everything=True, move=lambda: model.mask.copy_(model.mask.clone()))
    assert guarded(model, everything=False, move=lambda: model.mask.copy_(model.mask.clone())).seen == []


@pytest.mark.filterwarnings("ignore:The model writes 1.queue in its own forward")
def test_no_buffer_of_a_former_step_is_kept_alive():
    import weakref

    model = nn.Sequential(nn.Linear(6, 8), Queue(8, LARGE), nn.Linear(8, 4)).double()
    opt = nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model)
    dead = []
    for step in range(4):
        model[1].queue = model[1].queue.clone()
        dead.append(weakref.ref(model[1].queue))
        for _ in opt.passes():
            loss_of(model, step).backward()
        opt.step()
    assert [ref() is None for ref in dead] == [True, True, True, False]


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_model_is_compiled_once_for_each_pass(how):
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), AssignedStatistics(8), Fading(8, 3), nn.Linear(8, 4))
    model.double()
    alone = copy.deepcopy(model)
    if how == "wrapped":
        compiled = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
        compiled = model
    opt = nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=RHO, model=compiled)
    for step in range(2):
        for _ in opt.passes():
            loss_of(compiled, step).backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(2, 4):
            for _ in opt.passes():
                loss_of(compiled, step).backward()
    for step in range(4):
        loss_of(alone, step)
    for (name, moved), expected in zip(model.named_buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(moved, expected, rtol=1e-12, atol=1e-12, msg=name)
    torch._dynamo.reset()


def test_copies_and_pickles_of_the_optimizer_do_not_carry_a_step():
    import pickle

    model = model_with("batch norm")
    opt = nusam.SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=RHO, model=model)
    for _ in opt.passes():
        loss_of(model, 0).backward()
    opt.step()
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        once = copy.deepcopy(other.model)
        assert other.model is not model
        for _ in other.passes():
            loss_of(other.model, 1).backward()
        loss_of(once, 1)
        assert_same_state(other.model, state_of(once), "copy")
