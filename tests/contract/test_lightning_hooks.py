"""Hooks that a LightningModule may override, searches that train on their own, and state that a step keeps."""

import itertools
import types

import pytest
import pytorch_lightning as pl
import torch
import torchmetrics
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.tuner import Tuner
from torch import nn
from torch.nn.functional import cross_entropy

import nusam
from nusam.integrations.lightning import SharpnessAwareCallback
from tests.contract.problem import Run, loader, scaler
from tests.contract.test_lightning import as_they_are

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
]

BATCHES = [(torch.randn(16, 6, generator=torch.Generator().manual_seed(i)), torch.arange(16) % 3) for i in range(12)]


class Model(pl.LightningModule):
    """A small network; ``rho=None`` is the base optimizer alone."""

    def __init__(self, rho=0.05, lr=0.1, kind=nusam.NuSAM, **options):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 3))
        self.rho, self.lr, self.kind, self.options = rho, lr, kind, options
        self.batch_size = 16
        self.gradients = []  # that a step is taken with

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self.net(x), y)

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append([None if p.grad is None else p.grad.clone() for p in self.net.parameters()])

    def configure_optimizers(self):
        base = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return base if self.rho is None else self.kind(base, rho=self.rho, model=self, **self.options)


def trainer(model, *callbacks, **options):
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    ours = [] if model.rho is None else [SharpnessAwareCallback()]
    return pl.Trainer(
        accelerator="cpu", devices=1, callbacks=[*ours, *callbacks], **{"max_epochs": 1, **quiet, **options}
    )


def fit(model, *callbacks, batches=BATCHES, **options):
    trainer(model, *callbacks, **options).fit(model, as_they_are(batches))
    return model


def everything(model):
    return [value.clone() for value in model.state_dict().values()]


def assert_same(one, other, tolerance=0.0):
    for a, b in zip(everything(one), everything(other), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def assert_same_gradients(one, other, tolerance=1e-6):
    assert len(one) == len(other) > 0
    for a, b in zip(itertools.chain(*one), itertools.chain(*other), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- optimizer_step


class Stepping(Model):
    """Overrides ``optimizer_step`` as Lightning's pages show it."""

    way = "keyword"

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.returned, self.losses = [], []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())  # once a batch, that of the first pass
        return loss

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        if self.way == "apart":
            self.returned.append(optimizer_closure())
            optimizer.step()
        elif self.way == "positional":
            self.returned.append(optimizer.step(optimizer_closure))
        else:
            self.returned.append(optimizer.step(closure=optimizer_closure))


@pytest.mark.parametrize("rho", [None, 0.0, 0.05])
@pytest.mark.parametrize("way", ["keyword", "positional", "apart"])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_step_returns_the_loss_at_the_weights(rho, way, accumulated):
    model = Stepping(rho)
    model.way = way
    fit(model, accumulate_grad_batches=accumulated)
    losses = [loss / accumulated for loss in model.losses[accumulated - 1 :: accumulated]]
    assert [loss.item() for loss in model.returned] == pytest.approx(losses)
    assert len(model.losses) == len(BATCHES)


@pytest.mark.parametrize("rho", [None, 0.05])
def test_under_a_scaler_a_step_returns_what_it_returns_alone(rho):
    model = fit(Stepping(rho), plugins=[MixedPrecision("16-mixed", "cpu", scaler(Run(precision="float16")))])
    assert model.returned == [None] * len(BATCHES)  # as Lightning has it, whose scaler steps without a closure


@pytest.mark.parametrize("rho", [None, 0.05])
@pytest.mark.parametrize("half", [False, True])
def test_a_skipped_step_returns_nothing(rho, half):
    class Skipping(Stepping):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    plugins = [MixedPrecision("16-mixed", "cpu", scaler(Run(precision="float16")))] if half else None
    model = fit(Skipping(rho), plugins=plugins)
    assert [i for i, loss in enumerate(model.returned) if loss is None] == (list(range(12)) if half else [1])


# ---------------------------------------------------------------- optimizer_zero_grad


X, Y = BATCHES[0]


@pytest.mark.parametrize("delay", [0, 1000])
@pytest.mark.parametrize("batch", [list(X.split(2)), (X, types.SimpleNamespace(y=Y)), [{"x": X, "y": Y}] * 3])
def test_a_batch_that_can_not_be_cut_leaves_the_weights_unperturbed(batch, delay):
    model = Model(ascent_share=1 / 4, delay=delay)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"ascent_share=0\.25 can't cut a (list|tuple), "):
        fit(model, batches=[batch])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert model.trainer.optimizers[0]._pass is None


def every_second(model, optimizer, batch_idx):
    if batch_idx % 2 == 0:
        optimizer.zero_grad()


def never(model, optimizer, batch_idx):
    pass


def some(model, optimizer, batch_idx):
    model.net[0].weight.grad = None
    for parameter in model.net[3].parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()


def halved(model, optimizer, batch_idx):
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0.5)


def clearing(clear):
    class Clearing(Model):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            clear(self, optimizer, batch_idx)

    return Clearing


@pytest.mark.parametrize("clear", [every_second, never, some, halved])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_what_is_cleared_is_what_the_hook_clears(clear, accumulated):
    plain = fit(clearing(clear)(None), accumulate_grad_batches=accumulated)
    assert_same(fit(clearing(clear)(0.0), accumulate_grad_batches=accumulated), plain)
    # at lr 0 and a radius that moves nothing in float32, two passes must leave the gradients that one does
    plain = fit(clearing(clear)(None, lr=0.0), accumulate_grad_batches=accumulated)
    two_passes = fit(clearing(clear)(1e-12, lr=0.0), accumulate_grad_batches=accumulated)
    assert_same_gradients(two_passes.gradients, plain.gradients)


@pytest.mark.parametrize("rho", [0.0, 1e-12])
def test_hooks_around_the_clearing_run_once_a_batch_and_find_the_gradients_of_the_step_before(rho):
    class Looking(pl.Callback):
        def __init__(self):
            self.found = []

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            self.found.append([p.grad if p.grad is None else p.grad.clone() for p in pl_module.net.parameters()])

    plain, ours = Looking(), Looking()
    fit(Model(None, lr=0.0), plain)
    fit(Model(rho, lr=0.0), ours)
    assert ours.found[0] == plain.found[0] == [None] * 6
    assert_same_gradients(ours.found[1:], plain.found[1:])


def test_a_skipped_batch_is_cleared_for_all_the_same():
    class Skipping(Model):
        cleared = 0

        def training_step(self, batch, batch_idx):
            return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)

        def optimizer_zero_grad(self, epoch, batch_idx, optimizer):
            self.cleared += 1
            optimizer.zero_grad()

    plain, ours = fit(Skipping(None)), fit(Skipping(0.0))
    assert_same(ours, plain)
    assert fit(Skipping(0.05)).cleared == plain.cleared == len(BATCHES)


@pytest.mark.parametrize("ascent", ["auto", "gradient"])
def test_a_hook_after_the_backward_finds_gradients_in_both_passes_and_may_change_them(ascent):
    class Masking(Model):
        """A wide layer, which a matrix-free ascent would serve, and whose first row is not to be trained."""

        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.net = nn.Sequential(nn.Linear(6, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 3))

        def on_after_backward(self):
            self.net[2].weight.grad[0] = 0

    model = fit(Masking(ascent=ascent))
    fresh = Masking()
    assert torch.equal(model.net[2].weight[0], fresh.net[2].weight[0])
    assert not torch.equal(model.net[2].weight[1], fresh.net[2].weight[1])
    assert_same(model, fit(Masking(ascent="gradient")))


# ---------------------------------------------------------------- averaged weights


@pytest.mark.filterwarnings("ignore:.*`lr_scheduler.step")
@pytest.mark.parametrize("rho", [0.0, 0.05])
def test_averaged_weights_get_their_batch_statistics(rho):
    """Lightning appends an epoch of forwards, without a backward, after the last one."""

    def averaged(rho):
        model = Model(rho)
        return fit(model, pl.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1), max_epochs=3)

    ours = averaged(rho)
    if rho == 0:
        assert_same(ours, averaged(None))
    means = []
    with torch.no_grad():
        for x, _ in BATCHES:
            means.append(ours.net[0](x).mean(0))
    # Lightning itself takes one more step behind them, with the gradients that are left
    torch.testing.assert_close(ours.net[1].running_mean, torch.stack(means).mean(0), rtol=0, atol=5e-3)
    assert ours.net[1].num_batches_tracked == len(BATCHES)


# ---------------------------------------------------------------- searches


class Searching(Model):
    def train_dataloader(self):
        x, y = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), self.batch_size)


def searched(model, accumulated, tmp_path, how="tuner", **options):
    """After a search that moves nothing: the gradients at the base's steps."""
    settings = {"min_lr": 1e-12, "max_lr": 1e-11, "early_stop_threshold": None, "update_attr": False}
    found = pl.callbacks.LearningRateFinder(**settings, num_training_steps=4)
    callbacks = {"before": [found], "behind": [found]}.get(how, [])
    runner = trainer(model, *callbacks, accumulate_grad_batches=accumulated, default_root_dir=tmp_path, **options)
    if how == "before":
        runner.callbacks.reverse()
    if how == "tuner":
        Tuner(runner).lr_find(model, **settings, num_training=4)
        assert all("_make_closure" not in vars(loop) for loop in [runner.fit_loop.epoch_loop.automatic_optimization])
        assert "optimizer_step" not in vars(runner.strategy)
    else:
        runner.fit(model)
    return model.gradients[:4]


@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("how", ["tuner", "before", "behind"])
@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("rho", [None, 0.0, 0.05])
def test_a_search_for_a_learning_rate_takes_the_steps_that_a_fit_takes(how, accumulated, rho, tmp_path):
    expected = Searching(rho, lr=1e-12)
    trainer(expected, accumulate_grad_batches=accumulated).fit(expected)
    found = searched(Searching(rho, lr=1e-12), accumulated, tmp_path, how)
    assert_same_gradients(found, expected.gradients[:4], tolerance=1e-5)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_search_without_our_optimizer_is_refused(tmp_path):
    class Bare(Searching):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    with pytest.raises(TypeError, match=r"needs one of nusam's optimizers"):
        searched(Bare(), 1, tmp_path)


@pytest.mark.parametrize("mode", ["power", pytest.param("binsearch", marks=pytest.mark.slow)])
def test_a_search_for_a_batch_size_runs_both_passes_and_puts_the_model_back(mode, tmp_path):
    class Full(Searching):
        """Of a device that holds 64 samples, in whichever pass."""

        passes = 0

        def training_step(self, batch, batch_idx):
            Full.passes += 1
            if len(batch[0]) > 64:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(batch, batch_idx)

    model = Full()
    before = everything(model)
    runner = trainer(model, default_root_dir=tmp_path)
    Tuner(runner).scale_batch_size(model, mode=mode, init_val=32, max_trials=2, steps_per_trial=2)
    assert 32 <= model.batch_size <= 64
    assert Full.passes >= 2 * len(model.gradients) > 0
    for a, b in zip(everything(model), before, strict=True):
        assert torch.equal(a, b)
    runner.fit(model)


# ---------------------------------------------------------------- manual optimization


class Adversarial(pl.LightningModule):
    """Two networks, each with an optimizer of its own."""

    automatic_optimization = False

    def __init__(self, rho, second=True, closures=False):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 3)
        self.rho, self.second, self.closures = rho, second, closures
        self.clipped = []

    def loss(self, batch, sign):
        return sign * cross_entropy(self.two(self.one(batch[0])), batch[1])

    def training_step(self, batch, batch_idx):
        for index, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            self.update(optimizer, batch, (1, -0.1)[index])
            self.untoggle_optimizer(optimizer)

    def update(self, optimizer, batch, sign):
        def closure():
            optimizer.zero_grad()
            loss = self.loss(batch, sign)
            self.manual_backward(loss)
            return loss

        if self.closures:
            loss = self.loss(batch, sign).item()
            returned = optimizer.step(closure)
            # as alone, where a scaler steps without the closure
            assert returned is None if self.half else returned.item() == pytest.approx(loss)
            return
        for _ in optimizer.passes() if isinstance(optimizer, nusam.SharpnessAware) else [None]:
            closure()
        optimizer.step()

    def on_before_optimizer_step(self, optimizer):
        self.clipped.append(1)

    def configure_optimizers(self):
        one, two = (torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.one, self.two))
        if self.rho is None:
            return one, two
        sharp = nusam.SAM(one, rho=self.rho, model=self)
        return sharp, nusam.SAM(two, rho=self.rho, model=self) if self.second else two


def by_hand(rho, second):
    """SAM on each of the networks in turn, by copies of the weights."""
    model = Adversarial(None)
    for batch in BATCHES:
        for part, sign, sharp in ((model.one, 1, True), (model.two, -0.1, second)):
            weights = list(part.parameters())
            before = [w.detach().clone() for w in weights]
            if sharp and rho:
                gradients = torch.autograd.grad(model.loss(batch, sign), weights)
                norm = torch.sqrt(sum(g.square().sum() for g in gradients))
                for w, g in zip(weights, gradients, strict=True):
                    w.data.add_(rho * g / norm)
            gradients = torch.autograd.grad(model.loss(batch, sign), weights)
            for w, old, g in zip(weights, before, gradients, strict=True):
                w.data.copy_(old - 0.1 * g)
    return model


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("closures", [False, True])
@pytest.mark.parametrize("second", [False, True], ids=["one of them ours", "both ours"])
def test_several_optimizers_in_manual_optimization(second, closures, half):
    model = Adversarial(0.3, second, closures)
    model.half = half
    plugins = [MixedPrecision("16-mixed", "cpu", scaler(Run(precision="float16")))] if half else None
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    runner = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[SharpnessAwareCallback()], plugins=plugins, **quiet)
    runner.fit(model, as_they_are(BATCHES))
    assert_same(model, by_hand(0.3, second), tolerance=2e-3 if half else 1e-6)
    assert len(model.clipped) == 2 * len(BATCHES)  # once a step, also around a closure
    assert "optimizer_step" not in vars(runner.strategy)


def test_a_manual_step_without_passes_is_the_base_optimizers():
    class Plain(Adversarial):
        def update(self, optimizer, batch, sign):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch, sign))
            optimizer.step()

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    model = Plain(0.3)
    runner = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[SharpnessAwareCallback()], **quiet)
    with pytest.warns(UserWarning, match=r"step\(\) has been called twice without passes"):
        runner.fit(model, as_they_are(BATCHES))
    assert_same(model, by_hand(0.0, True), tolerance=1e-6)


# ---------------------------------------------------------------- what a step keeps


class Keeping(Model):
    """Keeps what people keep: lists, counters, averages, metrics, an iterator; writes into its batch."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.outputs, self.steps, self.average = [], 0, torch.zeros(())
        self.accuracy = torchmetrics.MeanMetric()
        self.both = torchmetrics.MetricCollection([torchmetrics.SumMetric(), torchmetrics.CatMetric()])
        self.others = iter(torch.arange(480.0).view(-1, 1, 6).div(480).split(1))
        self.seen = []

    def training_step(self, batch, batch_idx):
        x, y = batch["x"], batch.pop("y")
        x.mul_(0.5).add_(next(self.others)[0])
        self.trace(x)
        loss = cross_entropy(self.net(x), y)
        self.steps += 1
        self.outputs.append(loss.detach())
        self.average = 0.9 * self.average + 0.1 * loss.detach() * self.steps
        self.accuracy.update(loss.detach())
        self.both.update(loss.detach())
        self.log("mean", self.accuracy)
        batch["loss"] = loss.item()  # for on_train_batch_end
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(batch["loss"])
        self.means = [self.accuracy.compute().item(), self.both["SumMetric"].compute().item()]
        self.found = self.both["CatMetric"].compute().tolist()

    def trace(self, x):
        Keeping.inputs.append(x.clone())


class TwoAscents(nusam.NuSAM):
    """Repeats the ascent, as may happen where it finds the step to be another than the one it knows."""

    def passes(self, accumulate=False):
        opt = self if "base_optimizer" in vars(self) else self._optimizer
        for _ in range(2):
            with opt.ascent(accumulate):
                yield "ascent"
        with opt.descent(accumulate):
            yield "descent"


@pytest.mark.parametrize("kind", [nusam.NuSAM, nusam.SAM, TwoAscents])
@pytest.mark.parametrize("placement", ["weights", "auto"])
def test_what_a_step_keeps_is_kept_once(kind, placement):
    """At lr 0 every batch is at the same weights, so that one pass and several must keep the same."""

    def kept(rho, kind=nusam.NuSAM):
        Keeping.inputs = []
        model = Keeping(rho, lr=0.0, kind=kind)
        if rho and kind is not nusam.SAM:
            model.options = {"placement": placement}
        fit(model, batches=[{"x": x.clone(), "y": y} for x, y in BATCHES])
        return model, Keeping.inputs

    plain, inputs = kept(None)
    ours, all_inputs = kept(0.5, kind)
    several = 3 if kind is TwoAscents else 2
    assert len(all_inputs) == several * len(inputs)
    for index, x in enumerate(all_inputs):
        assert torch.equal(x, inputs[index // several])  # one batch in every pass
    assert ours.steps == plain.steps == len(BATCHES)
    torch.testing.assert_close(ours.outputs, plain.outputs, rtol=1e-5, atol=0)  # weights come back to 1 ulp
    torch.testing.assert_close(ours.average, plain.average, rtol=1e-5, atol=0)
    assert ours.seen == pytest.approx(plain.seen)
    assert ours.means == pytest.approx(plain.means)
    assert ours.found == pytest.approx(plain.found)
    assert type(ours.others) is type(plain.others)
    assert torch.equal(next(ours.others), next(plain.others))


def test_the_loss_and_the_gap_are_taken_by_the_name_of_the_pass():
    class Logging(pl.Callback):
        def __init__(self):
            self.gaps = []

        def on_train_batch_end(self, trainer, pl_module, outputs, *_):
            self.gaps.append((outputs["loss"].item(), trainer.callback_metrics["sharpness_gap"].item()))

    class Counting(Model):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            Counting.losses.append(loss.item())
            return loss

    Counting.losses, logging = [], Logging()
    fit(Counting(0.5, kind=TwoAscents), logging)
    rows = [Counting.losses[i : i + 3] for i in range(0, len(Counting.losses), 3)]
    assert [row[0] for row in rows] == [row[1] for row in rows]
    for (loss, gap), row in zip(logging.gaps, rows, strict=True):
        assert loss == pytest.approx(row[0])
        assert gap == pytest.approx(row[2] - row[0], abs=1e-5)
        assert row[2] > row[0]


def test_a_step_that_writes_into_its_batch_now_and_then_is_refused_with_its_weights_unperturbed():
    class Writing(Model):
        def training_step(self, batch, batch_idx):
            if batch_idx == 5:
                batch[0].add_(1)
            return super().training_step(batch, batch_idx)

    model, before = Writing(), []
    runner = trainer(model)
    model.on_train_batch_start = lambda *_: before.append([p.detach().clone() for p in model.parameters()])
    with pytest.raises(RuntimeError, match="training_step wrote into a tensor of its batch, which it had not done"):
        runner.fit(model, as_they_are([(x.clone(), y) for x, y in BATCHES]))
    for parameter, old in zip(model.parameters(), before[5], strict=True):
        assert torch.equal(parameter, old)


def test_the_loader_of_the_battery_is_untouched():
    """The images that other tests share are not written into by a step that writes into its batch."""
    x, _ = next(iter(loader(Run())))
    assert x.max() <= 1


def test_an_ascent_that_the_optimizer_repeats_counts_once():
    """A wide layer that its loop uses beside itself for the first time in the seventh batch."""

    class Changing(Model):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            self.net = nn.Sequential(nn.Linear(6, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 3))
            self.names, self.kept = [], []

        def training_step(self, batch, batch_idx):
            names.append(batch_idx)
            loss = super().training_step(batch, batch_idx)
            self.kept.append(loss.item())
            return loss + 0.1 * self.net[2].weight.square().sum() if batch_idx == 6 else loss

    names = []
    ours = fit(Changing(0.3))
    assert [names.count(index) for index in range(12)] == [2] * 6 + [3] + [2] * 5
    assert len(ours.kept) == 12
    names.clear()
    expected = Changing(0.3)
    opt = expected.configure_optimizers()
    for index, batch in enumerate(BATCHES):
        for _ in opt.passes():
            expected.training_step(batch, index).backward()
        opt.step()
    assert_same(ours, expected, tolerance=1e-6)


def test_accumulation_without_the_callback_is_refused():
    model = Model()
    before = [p.clone() for p in model.parameters()]
    runner = trainer(model, accumulate_grad_batches=2)
    runner.callbacks = [callback for callback in runner.callbacks if not isinstance(callback, SharpnessAwareCallback)]
    with pytest.raises(ValueError, match=r"accumulate_grad_batches=2 .* add nusam.*SharpnessAwareCallback\(\)"):
        runner.fit(model, as_they_are(BATCHES))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
