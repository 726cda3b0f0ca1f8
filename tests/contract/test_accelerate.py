"""What accelerate's wrapper around an optimizer does to ours."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import nusam
from nusam.integrations.accelerate import LoaderAhead, one_pass, passes, sharpness_aware
from tests.contract.accelerate_loop import float16_on_cpu
from tests.contract.problem import Run, Trained, loader, scaler


@pytest.fixture(autouse=True)
def _anew():
    """What accelerate keeps for a whole process is forgotten, a loader that an earlier test left midway too."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    Accelerator(cpu=True)


@pytest.fixture
def prepared():
    def prepare(half=False):
        AcceleratorState._reset_state(reset_partial_state=True)
        trained = Trained.start(Run())
        accelerator = Accelerator(cpu=True)
        if half:
            float16_on_cpu(accelerator, scaler(Run(precision="float16")))
        model, opt = accelerator.prepare(trained.model, trained.wrap(trained.base(), trained.model))
        return trained, accelerator, model, opt

    return prepare


def test_a_closure_works_without_a_scaler(prepared):
    trained, accelerator, model, opt = prepared()
    x, y = next(iter(loader(Run())))

    def closure():
        opt.zero_grad()
        loss = model.loss(x, y)
        accelerator.backward(loss)
        return loss

    opt.step(closure)
    assert model.forwards == 2
    assert len(trained.rates) == 1


def test_a_closure_with_a_scaler_is_refused_and_changes_nothing(prepared):
    trained, accelerator, model, opt = prepared(half=True)
    x, y = next(iter(loader(Run())))

    def closure():
        opt.zero_grad()
        loss = model.loss(x, y)
        accelerator.backward(loss)
        return loss

    before = trained.weights
    with pytest.raises(AssertionError, match=r"did not use scaler\.scale"):  # GradScaler's own, which saw no loss yet
        opt.step(closure)
    closure()
    with pytest.raises(RuntimeError, match=r"GradScaler called step\(\) with a closure"):
        opt.step(closure)
    assert trained.rates == []
    assert all(torch.equal(a, b) for a, b in zip(trained.weights, before, strict=True))


def test_the_metrics_are_reached_through_the_wrapper(prepared):
    _, accelerator, model, opt = prepared()
    x, y = next(iter(loader(Run())))
    for _ in passes(opt, model):
        accelerator.backward(model.loss(x, y))
    opt.step()
    metrics = sharpness_aware(opt).metrics()
    assert metrics["epsilon/layers.0.weight"] == pytest.approx(0.05, rel=1e-5)
    assert isinstance(sharpness_aware(opt), nusam.NuSAM)


def test_fsdp1_is_refused():
    model = Trained.start(Run()).model
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    with pytest.raises(NotImplementedError, match=r"FSDP1.*use FSDP2, fsdp_version=2"):
        next(passes(opt, wrapped))


def test_another_optimizer_is_refused():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"must be one of nusam's, got SGD; wrap it before Accelerator\.prepare"):
        next(passes(torch.optim.SGD(model.parameters(), lr=0.1), model))


@pytest.mark.parametrize("kind", [nusam.NuSAM, nusam.SAM, nusam.SAMON])
def test_parameters_sharded_after_the_optimizer_was_built_are_perturbed_and_the_whole_ones_let_go(kind):
    """As Accelerator.prepare does it under FSDP2, whose whole matrices would stay alive beside their shards."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = Trained.start(Run()).model
        whole = list(model.parameters())
        opt = kind(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
        opt.load_state_dict(opt.state_dict())
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        opt.param_groups[0]["params"] = list(model.parameters())
        x, y = next(iter(loader(Run())))
        losses = []
        for _ in passes(opt, model):
            losses.append(torch.nn.functional.cross_entropy(model(x), y))
            losses[-1].backward()
        opt.step()
        assert losses[1] > losses[0]
        assert not opt._states.keys() & set(whole)
        assert any(name.startswith("epsilon/") for name in opt.metrics())
    finally:
        dist.destroy_process_group()


def test_deepspeed_is_refused():
    model = torch.nn.Linear(2, 2)
    opt = DeepSpeedOptimizerWrapper(nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1)))
    with pytest.raises(
        NotImplementedError, match=r"DeepSpeed steps inside its backward.*hand passes\(\) a nusam.Perturbation\(model\)"
    ):
        next(passes(opt, model))


@pytest.mark.parametrize("launch", [DistributedType.XLA, DistributedType.MEGATRON_LM])
def test_launches_that_add_up_gradients_behind_the_passes_are_refused(prepared, launch, monkeypatch):
    trained, _, model, opt = prepared()
    before = trained.weights
    monkeypatch.setattr(opt, "accelerator_state", SimpleNamespace(distributed_type=launch, num_processes=2))
    with pytest.raises(NotImplementedError, match=rf"gradients of {launch.value} processes in step\(\) alone.*use DDP"):
        next(passes(opt, model))
    monkeypatch.setattr(opt.accelerator_state, "num_processes", 1)
    assert next(passes(opt, model)) == "ascent"
    assert all(torch.equal(a, b) for a, b in zip(trained.weights, before, strict=True))


def test_a_compiled_model_is_looked_into():
    """accelerate compiles what it has sharded, and what it compiles is a module of another class."""

    class Compiled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self._orig_mod = inner

        def forward(self, *args):
            return self._orig_mod(*args)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(Trained.start(Run()).model, mesh=init_device_mesh("cpu", (1,)))
        opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
        model.set_requires_gradient_sync(False)  # as accelerate's accumulate() leaves it
        x, y = next(iter(loader(Run())))
        names = []
        for name in passes(opt, Compiled(model)):
            names.append(name)
            torch.nn.functional.cross_entropy(model(x), y).backward()
        assert names == ["ascent", "descent"]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("wrapped", ["loader", "iterator", "generator"])
@pytest.mark.parametrize("batches", [1, 2, 5])
def test_looking_ahead_does_not_end_the_loader_early(prepared, batches, wrapped):
    """accelerate steps at a loader's last batch, which it knows by what the loader gave last."""
    _, accelerator, *_ = prepared()
    prepare = {"loader": lambda it: it, "iterator": iter, "generator": lambda it: (batch for batch in it)}[wrapped]
    data = accelerator.prepare(torch.utils.data.DataLoader(list(range(batches * 2)), batch_size=2))
    for _ in range(2):
        plainly = [(batch.tolist(), accelerator.gradient_state.end_of_dataloader) for batch in data]
        ahead = LoaderAhead(prepare(data), accelerator)
        found, followers = [], []
        for batch in ahead:
            followers.append(ahead.peek())
            assert ahead.peek() is followers[-1]
            found.append((batch.tolist(), accelerator.gradient_state.end_of_dataloader))
            assert accelerator.gradient_state.in_dataloader
        assert found == plainly
        assert [None if f is None else f.tolist() for f in followers] == [x for x, _ in plainly[1:]] + [None]
        assert not accelerator.gradient_state.in_dataloader


def test_the_loader_of_a_loop_around_is_left_alone(prepared):
    _, accelerator, *_ = prepared()
    outer = accelerator.prepare(torch.utils.data.DataLoader([0]))
    for _ in outer:
        assert accelerator.gradient_state.end_of_dataloader
        for _ in (ahead := LoaderAhead([1, 2], accelerator)):
            ahead.peek()
            assert accelerator.gradient_state.end_of_dataloader


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_last_step_of_one_pass_has_the_micro_batches_that_are_left(clip):
    """Five batches in steps of two, as accelerate cuts them: two, two, one."""
    run = Run(share=1 / 4, batch=8)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    trained = Trained.start(run)
    model, opt, batches = accelerator.prepare(trained.model, trained.wrap(trained.base(), trained.model), loader(run))
    for _ in range(2):
        for _ in one_pass(opt, model, batches, lambda batch: model.loss(*batch), accelerator):
            if clip and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            opt.zero_grad()
    plain = Trained.start(run)
    plain_opt = plain.wrap(plain.base(), plain.model)
    for _ in range(2):
        losses = plain_opt.one_pass(loader(run), lambda batch: plain.model.loss(*batch) / 2, accumulate=True)
        for number, _ in enumerate(losses):
            if number in (1, 3, 4):
                if clip:
                    torch.nn.utils.clip_grad_norm_(plain.model.parameters(), clip)
                plain_opt.step()
                plain_opt.zero_grad()
    assert len(trained.rates) == len(plain.rates) == 6
    for a, b in zip(trained.weights, plain.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_loader_that_saves_its_place_is_refused_in_one_pass(prepared):
    _, accelerator, model, opt = prepared()
    batches = SimpleNamespace(use_stateful_dataloader=True, __iter__=lambda: iter([]))
    with pytest.raises(ValueError, match=r"one batch ahead.*skip_first_batches\.$"):
        next(one_pass(opt, model, batches, model.loss, accelerator))


def test_one_pass_refuses_what_passes_refuses(prepared):
    _, accelerator, model, _ = prepared()
    wrapped = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    with pytest.raises(NotImplementedError, match="FSDP1"):
        next(one_pass(opt, wrapped, [], model.loss, accelerator))
    with pytest.raises(TypeError, match="must be one of nusam's, got SGD"):
        next(one_pass(torch.optim.SGD(model.parameters(), lr=0.1), model, [], model.loss, accelerator))
    with pytest.raises(ValueError, match="rank-one"):
        next(one_pass(nusam.SAM(opt.base_optimizer, model=model), model, [], model.loss, accelerator))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_perturbation_runs_where_no_engine_steps_as_a_script_is_launched_either_way(accumulation):
    def trained(kind):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
        base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        batches = [torch.randn(8, 6, dtype=torch.float64) for _ in range(8)]
        if kind == "NuSAM":
            opt = nusam.NuSAM(base, model=model, ascent="matrix-free", placement="forward", ascent_share=1 / 2)
            model, opt = accelerator.prepare(model, opt)
            perturbed = opt
        else:
            model, opt = accelerator.prepare(model, base)
            perturbed = nusam.Perturbation(model, ascent_share=1 / 2)
        for x in batches:
            with accelerator.accumulate(model):
                for part in passes(perturbed, model, x):
                    accelerator.backward(model(part).square().mean())
                opt.step()
                opt.zero_grad()
        if kind == "Perturbation":
            assert perturbed.state_dict()["steps"] == len(batches) // accumulation
        return [parameter.detach() for parameter in model.parameters()]

    for mine, expected in zip(trained("Perturbation"), trained("NuSAM"), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)
