"""What Lightning's automatic optimization does around the passes."""

import copy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.strategies import DeepSpeedStrategy, FSDPStrategy

import nusam
from nusam.integrations.lightning import SharpnessAwareCallback
from tests.contract.lightning_loop import Module, trainer_on_cpu
from tests.contract.problem import Run, Trained, loader, scaler

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


def fit(run, module=Module, *callbacks, **options):
    trained = Trained.start(run)
    recorder = Recorder()
    trainer = trainer_on_cpu(max_epochs=run.epochs, **options)
    trainer.callbacks.extend([*callbacks, recorder])
    trainer.fit(module(trained), loader(run))
    return trained, trainer, recorder


def as_they_are(batches):
    """A loader of these; a bare list would be one of loaders to Lightning."""
    return torch.utils.data.DataLoader(batches, batch_size=None)


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


def test_the_gap_follows_a_number_of_micro_batches_that_changes():
    class Still(Module):
        def configure_optimizers(self):
            settings = super().configure_optimizers()
            for group in settings["optimizer"].param_groups:
                group["lr"] = group["initial_lr"] = 0.0
            settings["lr_scheduler"]["scheduler"].base_lrs = [0.0, 0.0]
            return settings

    scheduler = pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 5})
    trained, trainer, recorder = fit(Run(steps=10), Still, scheduler)
    assert trainer.accumulate_grad_batches == 5
    torch.testing.assert_close(trained.after[0], trained.after[-1], rtol=0, atol=1e-6)
    gaps = [logged["sharpness_gap"] for logged in recorder.logged]
    assert gaps[9] == pytest.approx(gaps[4], rel=0.2)  # the last batch again, where only the warm start differs


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


@pytest.mark.parametrize("fatal", [4, 5], ids=["ascent", "descent"])
@pytest.mark.parametrize("is_first", [True, False], ids=["before ours", "behind ours"])
def test_what_a_callback_saves_in_on_exception_are_the_unperturbed_weights(fatal, is_first, tmp_path):
    class Failing(Module):
        def training_step(self, batch, batch_idx):
            if self.trained.model.forwards == fatal:
                raise OverflowError
            return super().training_step(batch, batch_idx)

    class Saving(pl.Callback):
        """As Lightning's OnExceptionCheckpoint."""

        def on_exception(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "saved.ckpt")

    run = Run(steps=5)
    trained = Trained.start(run)
    trainer = trainer_on_cpu(max_epochs=1)
    trainer.callbacks.insert(0 if is_first else 1, Saving())
    with pytest.raises(OverflowError):
        trainer.fit(Failing(trained), loader(run))
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=False)["state_dict"].values()
    for weight, before in zip(saved, trained.after[-1], strict=True):
        assert ((weight - before).abs() <= torch.finfo(torch.float32).eps * (before.abs() + 0.05)).all()


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("skipped", ["ascent", "descent"])
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_skipped_batch_moves_nothing(skipped, precision):
    class Skipping(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 2 and self.trained.opt._pass == skipped else loss

    run = Run(steps=5, precision=precision)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler(run))] if precision == "float16" else None
    trained, _, recorder = fit(run, Skipping, plugins=plugins)
    assert trained.model.forwards == 4 * 2 + (1 if skipped == "ascent" else 2)
    if precision == "float32":  # a step without gradients; under a scaler there is none
        weights = trained.after.pop(2)
        torch.testing.assert_close(weights, trained.after[1], rtol=0, atol=1e-8)
    assert len(trained.after) == 4
    assert not torch.equal(trained.after[1][0], trained.after[2][0])
    assert ["sharpness_gap" in logged for logged in recorder.logged][:2] == [True, True]


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("skipped", ["ascent", "descent"])
def test_a_skipped_micro_batch_leaves_what_the_others_accumulated(skipped):
    class Skipping(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx % 2 and self.trained.opt._pass == skipped else loss

    class Halves(Module):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0.5

    run = Run(steps=5, micro_batches=2)
    skipping, _, _ = fit(run, Skipping, accumulate_grad_batches=2)
    kept = Trained.start(run)
    trainer = trainer_on_cpu(max_epochs=1)
    trainer.fit(Halves(kept), as_they_are([batch for i, batch in enumerate(loader(run)) if i % 2 == 0]))
    assert len(skipping.after) == len(kept.after) == 5
    # of the first step: later ones start from singular vectors that a skipped batch may have moved
    torch.testing.assert_close(skipping.after[0], kept.after[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("delay", [0, 3])
def test_what_a_step_takes_out_of_its_batch_is_there_in_both_passes(delay):
    class Taking(Module):
        def training_step(self, batch, batch_idx):
            images = batch["images"].pop()
            return super().training_step((images, batch.pop("labels")), batch_idx)

    run = Run(steps=5, delay=delay)
    taking = Trained.start(run)
    batches = as_they_are([{"images": [x], "labels": y} for x, y in loader(run)])
    trainer_on_cpu(max_epochs=1).fit(Taking(taking), batches)
    plain, _, _ = fit(run)
    assert all(torch.equal(a, b) for a, b in zip(taking.weights, plain.weights, strict=True))


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")  # Lightning's, of its being experimental
def test_a_step_that_draws_its_own_batches_is_refused():
    class Drawing(Module):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self.net.loss(*batch)

    with pytest.raises(NotImplementedError, match=r"dataloader_iter\) would take other batches"):
        fit(Run(steps=5), Drawing)


@pytest.mark.slow
def test_lightning_under_its_other_name():
    """Where only ``lightning`` is installed; here the same modules, aliased."""
    script = """
import sys, pytorch_lightning
sys.modules["lightning"] = sys.modules["lightning.pytorch"] = pytorch_lightning
sys.modules["pytorch_lightning"] = None
from nusam.integrations.lightning import Callback, SharpnessAwareCallback
assert issubclass(SharpnessAwareCallback, Callback) and Callback is sys.modules["lightning.pytorch"].Callback
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


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
    run = Run(steps=5)
    trained = Trained.start(run)
    trainer = trainer_on_cpu(max_epochs=1, plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))])
    trainer.callbacks = [callback for callback in trainer.callbacks if not isinstance(callback, SharpnessAwareCallback)]
    with pytest.warns(UserWarning, match=r"step\(\) has been called twice without passes"):
        trainer.fit(Module(trained), loader(run))
    assert trained.model.forwards == 5
    with pytest.warns(UserWarning, match="has not been active in any of"):
        trained.opt.state_dict()
