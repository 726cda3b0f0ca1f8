"""One pass in Lightning: the batch behind is made ready once, and what a training step keeps counts once."""

import warnings

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import nusam
from nusam.integrations.lightning import SharpnessAwareCallback
from tests.contract.lightning_loop import Module, trainer_on_cpu
from tests.contract.plain_loop import PlainLoop
from tests.contract.problem import BATCHES, Run, Trained, loader, scaler

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

RUN = Run(share=1 / 4, one_pass=True, steps=10)


def fit(module=Module, run=RUN, batches=None, callbacks=(), val=None, **options):
    trained = Trained.start(run)
    trainer = trainer_on_cpu(one_pass=True, max_epochs=run.epochs, **options)
    trainer.callbacks.extend(callbacks)
    trainer.fit(module(trained), loader(run) if batches is None else batches, val)
    return trained, trainer


def assert_same(one, other, tolerance=1e-6):
    assert len(one.after) == len(other.after) > 0
    for a, b in zip(one.weights, other.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def in_a_plain_loop(epochs, breaks=False):
    """Over given batches, epoch by epoch; nothing waits where an epoch begins."""
    trained = Trained.start(RUN)
    opt = trained.wrap(trained.base(), trained.model)
    for batches in epochs:
        ahead = [*batches, list(loader(RUN))[len(batches)]] if breaks else batches  # whose ε is lost
        for _, _ in zip(batches, opt.one_pass(ahead, lambda batch: trained.model.loss(*batch)), strict=False):
            opt.step()
        opt._waiting = None
    return trained


class Ready(Module):
    """Hooks around the transfer that count and change what they see."""

    def __init__(self, trained):
        super().__init__(trained)
        self.before, self.after, self.moved = 0, 0, 0

    def on_before_batch_transfer(self, batch, dataloader_idx):
        self.before += self.trainer.training
        return [batch[0] + 0.1 * self.before, batch[1]]

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        self.moved += self.trainer.training
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.after += self.trainer.training
        return [batch[0] * (1 + 0.1 * self.after), batch[1]]


class Validating(Ready):
    def validation_step(self, batch, batch_idx):
        pass


class WithoutLength(IterableDataset):
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.mark.parametrize("kind", ["with a length", "without one", "one and the same"])
@pytest.mark.parametrize("validates", [False, True])
def test_a_batch_is_made_ready_once(kind, validates):
    batches = list(loader(RUN))
    if kind == "one and the same":
        batches = batches[:1] * BATCHES
    given = WithoutLength(batches) if kind == "without one" else batches
    options = {"val": DataLoader(batches, batch_size=None), "val_check_interval": 2} if validates else {}
    trained, trainer = fit(Validating if validates else Ready, batches=DataLoader(given, batch_size=None), **options)
    module = trainer.lightning_module
    assert (module.before, module.moved, module.after) == (10, 10, 10)
    numbers = [range(1, BATCHES + 1), range(BATCHES + 1, 2 * BATCHES + 1)]
    epochs = [
        [((x + 0.1 * n) * (1 + 0.1 * n), y) for n, (x, y) in zip(chosen, batches, strict=True)] for chosen in numbers
    ]
    assert_same(trained, in_a_plain_loop(epochs))


def test_a_limit_of_batches_ends_an_epoch():
    trained, _ = fit(run=RUN, limit_train_batches=3)
    assert_same(trained, in_a_plain_loop([list(loader(RUN))[:3]] * 2))


def test_an_epsilon_that_waits_for_a_batch_that_does_not_come_is_not_used():
    class Ending(Module):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 3 else None

    trained, _ = fit(Ending)
    assert_same(trained, in_a_plain_loop([list(loader(RUN))[:3]] * 2, breaks=True))


class Meter:
    def __init__(self):
        self.values = []


class Keeping(Module):
    """Counts, keeps, logs, draws, and writes into its batch."""

    def __init__(self, trained):
        super().__init__(trained)
        self.calls, self.indices = 0, []
        self.meter = Meter()
        self.numbers = iter(range(1000))
        self.looked = set()

    def training_step(self, batch, batch_idx):
        self.current = next(self.numbers)
        number = self.current
        self.calls += 1
        self.meter.values.append(len(batch[1]))
        self.indices.append(batch_idx)
        batch[0].add_(1)
        self.log("calls", 1.0, on_step=False, on_epoch=True, reduce_fx="sum")
        self.looked_at(batch_idx)
        loss = self.net.loss(*batch)
        assert self.current == number
        self.log("loss", loss)
        return loss

    def looked_at(self, batch_idx):
        SEEN.append((batch_idx, self.trained.opt._pass))


SEEN: list[tuple[int, str]] = []


def test_what_a_step_keeps_counts_once():
    SEEN.clear()
    batches = [[x - 1, y] for x, y in loader(RUN)]
    _, trainer = fit(Keeping, batches=DataLoader(WithoutLength(batches), batch_size=None))
    module = trainer.lightning_module
    assert module.calls == 10
    assert module.meter.values == [16] * 10
    assert module.indices == [*range(BATCHES)] * 2
    assert next(module.numbers) == 10
    assert trainer.callback_metrics["calls"] == BATCHES
    assert len(SEEN) > 10  # it was called for samples behind, with their own number
    assert {index for index, _ in SEEN} == set(range(BATCHES))


def test_what_is_logged_is_the_descents():
    logged = []

    class Recorder(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    fit(callbacks=[Recorder()])
    expected = Trained.start(RUN)
    opt = expected.wrap(expected.base(), expected.model)
    losses = []
    for _ in range(2):
        for value in opt.one_pass(loader(RUN), lambda batch: expected.model.loss(*batch)):
            losses.append(float(value))
            opt.step()
    assert [entry["loss"] for entry in logged] == pytest.approx(losses, rel=1e-5)
    assert {(entry["active"], round(entry["rho"], 6)) for entry in logged} == {(1.0, 0.05)}
    assert not any("sharpness_gap" in entry for entry in logged)


@pytest.mark.parametrize("logs", [False, True])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which the compiler looks at
def test_a_training_step_may_be_compiled(logs):
    """Lightning calls a compiled module's own training step inside a compiled function."""

    class Logging(Module):
        def training_step(self, batch, batch_idx):
            loss = self.net.loss(*batch)
            if logs:
                self.log("seen", loss)
            return loss

    torch._dynamo.reset()
    plain = PlainLoop().train(RUN)
    compiled, _ = fit(lambda trained: torch.compile(Logging(trained), backend="eager"))
    for a, b in zip(compiled.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_a_skipped_batch_moves_nothing_and_is_no_reason_to_lose_the_one_before():
    class Skipping(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 3 else loss

    trained, _ = fit(Skipping)
    expected = Trained.start(RUN)
    opt = expected.wrap(expected.base(), expected.model)
    batches = list(loader(RUN))
    for _ in range(2):
        for part in (batches[:3], batches[4:]):
            for _ in opt.one_pass(part, lambda batch: expected.model.loss(*batch)):
                opt.step()
            if len(part) == 3:  # Lightning steps without gradients
                opt.zero_grad()
                opt.step()
    assert_same(trained, expected)


def test_the_profiler_measures_the_batches_own_calls():
    trained, trainer = fit(profiler="simple")
    durations = trainer.profiler.recorded_durations
    (of_steps,) = [value for name, value in durations.items() if name.endswith(".training_step") and "Strategy" in name]
    assert len(of_steps) >= 10
    assert_same(trained, PlainLoop().train(RUN))


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_the_default_dtype_is_left_alone(precision):
    class Cast(Module):
        def training_step(self, batch, batch_idx):
            x, y = batch
            found.add(torch.get_default_dtype())
            return nn.functional.cross_entropy(self.net(x.to(self.net.layers[0].weight.dtype)).float(), y)

    found: set[torch.dtype] = set()
    fit(Cast, precision=precision)
    assert found == {torch.float64 if precision == "64-true" else torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("fatal", [7, 15, 21])
def test_an_exception_leaves_unperturbed_weights_and_no_trace(fatal):
    class Failing(Module):
        def training_step(self, batch, batch_idx):
            if len(seen) == fatal:
                raise OverflowError
            seen.append(batch_idx)
            return super().training_step(batch, batch_idx)

    seen: list[int] = []
    trained = Trained.start(RUN)
    trainer = trainer_on_cpu(one_pass=True, max_epochs=2)
    with pytest.raises(OverflowError):
        trainer.fit(Failing(trained), loader(RUN))
    before = trained.after[-1] if trained.after else Trained.start(RUN).weights
    assert all(torch.equal(a, b) for a, b in zip(trained.weights, before, strict=True))
    assert_nothing_is_left(trainer, trained)


def assert_nothing_is_left(trainer, trained):
    assert "_make_closure" not in vars(trainer.fit_loop.epoch_loop.automatic_optimization)
    assert "batch_to_device" not in vars(trainer.strategy)
    assert "convert_input" not in vars(trainer.strategy.precision_plugin)
    module = trainer.lightning_module
    assert not {"log", "_on_before_batch_transfer"} & vars(module).keys()
    assert not trained.opt._optimizer_step_pre_hooks


def test_nothing_is_left_behind():
    trained, trainer = fit()
    assert_nothing_is_left(trainer, trained)


# ---------------------------------------------------------------- what can't be had


def test_manual_optimization_is_refused():
    class Manual(Module):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for _ in self.optimizers().passes():
                self.manual_backward(self.net.loss(*batch))
            self.optimizers().step()

    with pytest.raises(ValueError, match=r"one_pass=True\) needs automatic optimization.*loop over self\.optimizers"):
        fit(Manual)


def test_a_scaler_is_refused():
    half = Run(share=1 / 4, precision="float16")
    plugins = [MixedPrecision("16-mixed", "cpu", scaler(half))]
    with pytest.raises(ValueError, match=r"one_pass=True\) can't be had in float16.*bf16-mixed"):
        fit(plugins=plugins)


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")
def test_a_step_that_draws_its_own_batches_is_refused():
    class Drawing(Module):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self.net.loss(*batch)

    with pytest.raises(NotImplementedError, match=r"dataloader_iter\) would take other batches"):
        fit(Drawing)


def test_a_method_that_has_no_one_pass_is_refused():
    class Bare(Module):
        def configure_optimizers(self):
            return nusam.SAM(torch.optim.SGD(self.parameters(), lr=0.1), model=self)

    with pytest.raises(ValueError, match="rank-one"):
        fit(Bare)


class Hooked(Module):
    def on_after_backward(self):
        pass


class Saving(DataLoader):
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("why", ["on_after_backward", "saves its place"])
def test_what_takes_two_passes_says_so_once(why):
    module = Hooked if why == "on_after_backward" else Module
    batches = Saving(list(loader(RUN)), batch_size=None) if why == "saves its place" else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained, _ = fit(module, batches=batches)
    (told,) = [str(w.message) for w in caught if "one_pass" in str(w.message)]
    assert why in told
    assert told.endswith("; every step takes two passes.")
    expected = Trained.start(RUN)
    opt = expected.wrap(expected.base(), expected.model)
    for _ in range(2):
        for x, y in loader(RUN):
            for xs, ys in opt.passes(x, y):
                expected.model.loss(xs, ys).backward()
            opt.step()
    assert_same(trained, expected)


def test_the_callback_alone_takes_one_pass_by_name():
    assert SharpnessAwareCallback(one_pass=True)._in_one_pass
    assert not SharpnessAwareCallback()._in_one_pass
