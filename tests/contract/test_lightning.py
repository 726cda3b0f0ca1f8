"""What Lightning's automatic optimization does around the passes."""

import copy
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy

import nusam
from nusam.integrations.lightning import SharpnessAwareCallback
from tests.contract.lightning_loop import Module, trainer_on_cpu
from tests.contract.problem import Run, Trained, loader

pytestmark = pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning")


class Recorder(pl.Callback):
    """What is logged, batch by batch, and how often the hooks around a step run."""

    def __init__(self):
        self.logged, self.hooks = [], []

    def on_train_batch_end(self, trainer, *_):
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_before_optimizer_step(self, *_):
        self.hooks.append("step")

    def on_after_backward(self, *_):
        self.hooks.append("backward")


def fit(run, module=Module, **options):
    trained = Trained.start(run)
    recorder = Recorder()
    trainer = trainer_on_cpu(max_epochs=run.epochs, **options)
    trainer.callbacks.append(recorder)
    trainer.fit(module(trained), loader(run))
    return trained, trainer, recorder


def losses_by_hand(trained):
    """Of the first batch, by the plain loop: at the initial weights, and at the perturbed ones."""
    begun = Trained.start(trained.run)
    opt = begun.wrap(begun.base(), begun.model)
    x, y = next(iter(loader(trained.run)))
    losses = []
    for _ in opt.passes():
        loss = begun.model.loss(x, y)
        loss.backward()
        losses.append(loss.item())
    return losses


def test_the_gap_is_logged_and_the_loss_is_that_at_the_weights():
    trained, _, recorder = fit(Run(steps=5))
    ascent, descent = losses_by_hand(trained)
    first = recorder.logged[0]
    assert first["loss"] == pytest.approx(ascent)  # the descent pass logs the same name: it must not count
    assert first["sharpness_gap"] == pytest.approx(descent - ascent, rel=1e-4)
    assert descent > ascent
    assert (first["active"], first["rho"]) == (1.0, pytest.approx(0.05))


def test_the_gap_of_accumulated_batches_is_not_divided_by_their_number():
    run = Run(steps=5, micro_batches=2)
    trained, _, recorder = fit(run, accumulate_grad_batches=2)
    ascent, descent = losses_by_hand(trained)
    assert recorder.logged[0]["sharpness_gap"] == pytest.approx(descent - ascent, rel=1e-4)


def test_a_delay_is_logged():
    _, _, recorder = fit(Run(steps=5, delay=3))
    assert [logged["active"] for logged in recorder.logged] == [0, 0, 0, 1, 1]
    assert ["sharpness_gap" in logged for logged in recorder.logged] == [False] * 3 + [True] * 2


def test_clipping_and_its_hook_run_once_a_step():
    _, _, recorder = fit(Run(steps=5), gradient_clip_val=1.0)
    assert recorder.hooks == ["backward", "backward", "step"] * 5


def test_an_average_over_the_epoch_counts_every_batch_once():
    class Averaging(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("batches", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
            self.log_dict({"also": 1.0}, on_step=False, on_epoch=True, reduce_fx="sum")
            return loss

    _, trainer, _ = fit(Run(steps=5), Averaging)
    assert trainer.callback_metrics["batches"] == 5
    assert trainer.callback_metrics["also"] == 5


def test_nothing_is_left_behind():
    trained, trainer, _ = fit(Run(steps=5))
    loop = trainer.fit_loop.epoch_loop.automatic_optimization
    assert "_make_closure" not in vars(loop)
    assert not trained.opt._optimizer_step_pre_hooks
    assert "log" not in vars(trainer.lightning_module)
    assert trained.opt.model is trainer.lightning_module
    copy.deepcopy(trained.opt.state_dict())


@pytest.mark.parametrize("fatal", [4, 5], ids=["ascent", "descent"])
def test_an_exception_leaves_unperturbed_weights_and_no_trace(fatal):
    class Failing(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.trained.model.forwards == fatal + 1:
                self.trained.raised = True
                raise OverflowError
            return loss

    run = Run(steps=5)
    trained = Trained.start(run)
    trainer = trainer_on_cpu(max_epochs=1)
    with pytest.raises(OverflowError):
        trainer.fit(Failing(trained), loader(run))
    for weight, before in zip(trained.weights, trained.after[-1], strict=True):
        assert ((weight - before).abs() <= torch.finfo(torch.float32).eps * (before.abs() + 0.05)).all()
    assert "_make_closure" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)
    assert not trained.opt._optimizer_step_pre_hooks


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_skipped_batch_moves_nothing():
    class Skipping(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 2 else loss

    trained, _, _ = fit(Run(steps=5), Skipping)
    assert trained.model.forwards == 4 * 2 + 1
    assert all(torch.equal(a, b) for a, b in zip(trained.after[1], trained.after[2], strict=True))
    assert not torch.equal(trained.after[2][0], trained.after[3][0])


def test_dropout_draws_one_mask_for_both_passes():
    class Dropping(Module):
        masks: list = []  # noqa: RUF012

        def training_step(self, batch, batch_idx):
            self.masks.append(torch.nn.functional.dropout(torch.ones(64)))
            return super().training_step(batch, batch_idx)

    Dropping.masks.clear()
    fit(Run(steps=5), Dropping)
    ascents, descents = Dropping.masks[::2], Dropping.masks[1::2]
    assert all(torch.equal(a, d) for a, d in zip(ascents, descents, strict=True))
    assert not torch.equal(ascents[0], ascents[1])


@pytest.mark.parametrize("with_closure", [False, True])
def test_manual_optimization_runs_its_own_passes(with_closure):
    class Manual(Module):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            opt = self.optimizers()

            def closure():
                opt.zero_grad()
                self.manual_backward(self.net.loss(*batch))

            if with_closure:
                opt.step(closure)
                return
            for _ in opt.passes():
                self.manual_backward(self.net.loss(*batch))
            opt.step()

    trained, _, _ = fit(Run(steps=5), Manual)
    automatic, _, _ = fit(Run(steps=5))
    assert len(trained.rates) == 5
    for a, b in zip(trained.weights, automatic.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_callback_without_our_optimizer_is_refused():
    class Bare(Module):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters())

    with pytest.raises(TypeError, match=r"needs one of nusam's optimizers.*\['Adam'\]; return nusam\.NuSAM\("):
        fit(Run(steps=5), Bare)


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_a_strategy_that_keeps_the_gradients_is_refused(strategy):
    trainer = SimpleNamespace(strategy=strategy.__new__(strategy))
    with pytest.raises(NotImplementedError, match=rf"{strategy.__name__} keeps gradients.*use ModelParallelStrategy"):
        SharpnessAwareCallback().on_fit_start(trainer, None)


def test_under_ddp_the_optimizer_must_know_the_module():
    model = Trained.start(Run()).model
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        opt = nusam.NuSAM(torch.optim.SGD(model.parameters(), lr=0.1), model=model.layers)
        trainer = SimpleNamespace(strategy=SimpleNamespace(model=wrapped), optimizers=[opt])
        with pytest.raises(ValueError, match=r"got model=Sequential; build it.*model=self\.$"):
            SharpnessAwareCallback().on_fit_start(trainer, model)
        assert opt.model is model.layers
    finally:
        dist.destroy_process_group()


def test_a_lightning_that_builds_closures_elsewhere_is_refused(monkeypatch):
    monkeypatch.delattr("pytorch_lightning.loops.optimization.automatic._AutomaticOptimization._make_closure")
    with pytest.raises(RuntimeError, match=r"no _make_closure.*use manual optimization\.$"):
        fit(Run(steps=5))


def test_without_the_callback_float16_trains_unperturbed_and_the_end_says_so(never_perturbed_warning):
    from pytorch_lightning.plugins import MixedPrecision

    run = Run(steps=5)
    trained = Trained.start(run)
    trainer = trainer_on_cpu(max_epochs=1, plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))])
    trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, SharpnessAwareCallback)]
    trainer.fit(Module(trained), loader(run))
    assert trained.model.forwards == 5
    with pytest.warns(UserWarning, match="has not been active in any of"):
        trained.opt.state_dict()
