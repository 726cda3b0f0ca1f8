"""Trainers that keep state between calls, generate their own batches, or have an optimizer with modes."""

import random
from collections import defaultdict, deque
from functools import partial

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

import nusam
from nusam.integrations.accelerate import passes, sharpness_aware
from nusam.integrations.transformers import NuSAMTrainerMixin

STEPS = 6


class Net(nn.Module):
    """Tokens in, a label out."""

    def __init__(self, dropout=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(20, 8)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 3))
        self.calls = []

    def forward(self, ids, labels=None):
        logits = self.net(self.tokens(ids).mean(1))
        if self.training and torch.is_grad_enabled():
            self.calls.append(ids.clone())
        return {"loss": logits.sum() if labels is None else cross_entropy(logits, labels), "logits": logits}


class TwoAscents(nusam.NuSAM):
    """Repeats the ascent, as may happen where it finds the step to be another than the one it knows."""

    def passes(self, accumulate=False):
        for _ in range(2):
            with self.ascent(accumulate):
                yield "ascent"
        with self.descent(accumulate):
            yield "descent"


def samples(count=4 * STEPS):
    generator = torch.Generator().manual_seed(0)
    return [{"ids": torch.randint(0, 20, (5,), generator=generator), "labels": i % 3} for i in range(count)]


def trained(kind, folder, rho=0.05, model=None, method=nusam.NuSAM, dataset=None, **arguments):
    """A trainer of this kind after its training; ``rho=None`` is Trainer alone."""
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 0.0,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "max_grad_norm": 0.0,
    }
    kinds, options = (kind,), {}
    if rho is not None:
        kinds, options = (NuSAMTrainerMixin, kind), {"sharpness_aware": partial(method, rho=rho)}
    if rho is not None and issubclass(kind, NuSAMTrainerMixin):
        kinds = (kind,)
    dataset = samples() if dataset is None else dataset
    trainer = type("MyTrainer", kinds, {})(
        model or Net(),
        TrainingArguments(output_dir=str(folder), **{**settings, **arguments}),
        train_dataset=dataset,
        eval_dataset=dataset[:8],
        **options,
    )
    trainer.train()
    return trainer


def history(trainer, *names):
    return [{name: entry[name] for name in names if name in entry} for entry in trainer.state.log_history]


def assert_one_batch_in_every_pass(ours, plain, several=2):
    """At rate 0 every batch meets the same weights, so that the calls must be those of one pass, each repeated."""
    assert len(ours.model.calls) == several * len(plain.model.calls) > 0
    for index, ids in enumerate(ours.model.calls):
        assert torch.equal(ids, plain.model.calls[index // several])


# ---------------------------------------------------------------- inputs that are prepared


class Generating(Trainer):
    """Generates a buffer of batches every so many steps and takes them in turn, as TRL's trainers do."""

    every = 3

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._step, self._buffered, self.generated = 0, None, 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step += 1
        return loss

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        if not self.model.training:
            return inputs
        if self._step % self.every == 0:
            self.generated += 1
            with torch.no_grad():
                logits = self.model(inputs["ids"])["logits"]
            drawn = torch.multinomial(logits.softmax(1).repeat(1, 2), 5, replacement=True)
            self._buffered = [{**inputs, "ids": drawn + 3 * k} for k in range(self.every)]
        return self._buffered[self._step % self.every]


class Counting(Trainer):
    """Whose batch depends on how often it was prepared, and on Python's and numpy's generators."""

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        self.asked = getattr(self, "asked", 0) + 1
        inputs["ids"] = (inputs["ids"] + self.asked + random.randrange(20) + np.random.randint(20)) % 20
        return inputs


class Iterating(Trainer):
    """Takes further samples from an iterator of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.more = iter(torch.arange(400).remainder(20).view(-1, 4, 5))

    def compute_loss(self, model, inputs, **_):
        inputs["ids"] = next(self.more)
        return model(**inputs)["loss"]


class Writing(Trainer):
    """Writes into the batch, and takes it apart."""

    def compute_loss(self, model, inputs, **_):
        inputs["ids"].add_(3).remainder_(20)
        return model(inputs.pop("ids"), inputs.pop("labels"))["loss"]


class Alone(Trainer):
    """Its training step calls nobody's."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        self.done = getattr(self, "done", 0) + 1
        inputs["ids"] = (inputs["ids"] + self.done) % 20
        loss = model(**inputs)["loss"]
        self.accelerator.backward(loss)
        return loss.detach()


class InFront(NuSAMTrainerMixin, Trainer):
    """Overrides in front of the mixin what others override behind it."""

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        self.asked = getattr(self, "asked", 0) + 1
        return {**inputs, "ids": (inputs["ids"] + self.asked) % 20}

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.stepped = getattr(self, "stepped", 0) + 1
        return super().training_step(model, inputs, num_items_in_batch)


KINDS = [Trainer, Generating, Counting, Iterating, Writing, Alone, InFront]


@pytest.mark.parametrize("method", [nusam.NuSAM, nusam.SAM, TwoAscents])
@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_has_the_batch_that_one_pass_would_have(kind, method, tmp_path):
    def run(rho, method=nusam.NuSAM):
        random.seed(0)
        np.random.seed(0)
        # the generators are replayed by the optimizer, where it repeats an ascent itself
        return trained(kind, tmp_path, rho, Net(dropout=0.5 * repeats), method)

    repeats = method is not TwoAscents
    plain, ours = run(None if kind is not InFront else 0.0), run(1e-3, method)
    assert_one_batch_in_every_pass(ours, plain, several=3 if method is TwoAscents else 2)
    for name in ("_step", "generated", "asked", "done", "stepped"):
        assert getattr(ours, name, None) == getattr(plain, name, None)
    assert "_prepare_inputs" not in vars(ours)
    # dropout too: what is drawn for the batch is drawn in the first pass alone, and the masks are those of one pass
    losses = [[entry["loss"] for entry in history(trainer, "loss") if entry] for trainer in (ours, plain)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


@pytest.mark.parametrize("kind", [Generating, Counting, Alone])
def test_with_no_radius_training_is_the_trainers_own(kind, tmp_path):
    def run(rho):
        random.seed(0)
        np.random.seed(0)
        return trained(kind, tmp_path, rho, learning_rate=0.1, gradient_accumulation_steps=2)

    for a, b in zip(run(0.0).model.parameters(), run(None).model.parameters(), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- what is counted and logged


class Tallying(Trainer):
    """Gathers numbers in its loss, logs some at once and some with the next log, as TRL's trainers do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        self._tokens, self.last = 0, deque(maxlen=3)
        self.average = torch.zeros(())

    def compute_loss(self, model, inputs, return_outputs=False, **_):
        outputs = model(**inputs)
        if model.training:
            loss = outputs["loss"].item()
            self._metrics["train"]["mine"].append(loss)
            self._tokens += inputs["ids"].numel()
            self.state.num_input_tokens_seen += inputs["ids"].numel()
            self._metrics["train"]["tokens"] = [self._tokens]
            self.last.append(loss)
            self.average.mul_(0.9).add_(0.1 * loss)
            self.log({"at_once": loss})
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs = {**logs, **{name: sum(v) / len(v) for name, v in self._metrics["train"].items()}}
            self._metrics["train"].clear()
        super().log(logs, *args, **kwargs)


@pytest.mark.parametrize("method", [nusam.NuSAM, nusam.SAM, TwoAscents])
def test_what_a_loss_gathers_and_logs_is_of_the_first_pass_alone(method, tmp_path):
    plain, ours = trained(Tallying, tmp_path, None), trained(Tallying, tmp_path, 0.5, method=method)
    names = ("loss", "mine", "tokens", "at_once")
    for a, b in zip(history(ours, *names), history(plain, *names), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    assert ours._tokens == plain._tokens == ours.state.num_input_tokens_seen
    assert list(ours.last) == pytest.approx(list(plain.last), abs=1e-5)
    assert ours.average.item() == pytest.approx(plain.average.item(), abs=1e-5)
    assert all(entry["sharpness_gap"] > 0 for entry in history(ours, "sharpness_gap") if entry)


# ---------------------------------------------------------------- what can't be one batch


class OwnSamples(Trainer):
    """Generates inside the training step, from the model as it is in this pass."""

    by = "values"

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            tops = model(inputs["ids"])["logits"].mul(1e4).round().long().remainder(20)
        if self.by == "values":
            inputs["ids"] = tops
        elif self.by == "sizes":
            inputs["ids"] = inputs["ids"][:, : 1 + tops.sum().item() % 5]
        else:
            for _ in range(tops.sum().item() % 5):
                model(**inputs)
        loss = model(**inputs)["loss"]
        self.accelerator.backward(loss)
        return loss.detach()


@pytest.mark.parametrize("by", ["values", "sizes", "calls"])
@pytest.mark.parametrize("method", [nusam.NuSAM, nusam.SAM])
def test_a_step_that_generates_its_own_batch_in_each_pass_is_refused_before_anything_is_trained(by, method, tmp_path):
    model = Net()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match=r"MyTrainer calls its model on other inputs in the second pass.*_prepare_i"):
        trained(type("Own", (OwnSamples,), {"by": by}), tmp_path, 0.5, model, method, learning_rate=0.1)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert ((parameter - old).abs() <= torch.finfo(torch.float32).eps * (old.abs() + 0.5)).all()
    assert not model._forward_pre_hooks


def test_labels_of_the_models_own_are_allowed(tmp_path):
    class Teaching(Trainer):
        def compute_loss(self, model, inputs, **_):
            with torch.no_grad():
                labels = model(inputs["ids"])["logits"].mul(1e4).round().long().sum(1).remainder(3)
            return model(ids=inputs["ids"], labels=labels)["loss"]

    assert trained(Teaching, tmp_path, 0.5).state.global_step == STEPS


def test_a_step_in_front_of_the_mixin_that_runs_no_passes_is_refused(tmp_path):
    class Ignoring(NuSAMTrainerMixin, Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**self._prepare_inputs(inputs))["loss"]
            self.accelerator.backward(loss)
            return loss.detach()

    class Running(NuSAMTrainerMixin, Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            inputs = self._prepare_inputs(inputs)
            losses = {}
            for name in passes(self.optimizer, model):
                loss = model(**inputs)["loss"]
                self.accelerator.backward(loss)
                losses[name] = loss.detach()
            return losses["ascent"]

    model = Net()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match=r"MyTrainer\.training_step reaches neither NuSAMTrainerMixin's.*behind the"):
        trained(Ignoring, tmp_path, model=model, learning_rate=0.1)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    own, mixins = (trained(kind, tmp_path, learning_rate=0.1) for kind in (Running, Trainer))
    for a, b in zip(own.model.parameters(), mixins.model.parameters(), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- optimizers with modes


class Watching(Trainer):
    """Notes the weights at which it evaluates."""

    def evaluation_loop(self, *args, **kwargs):
        found = super().evaluation_loop(*args, **kwargs)
        self.evaluated = [*getattr(self, "evaluated", []), self.model.net[0].weight.detach().clone()]
        return found


@pytest.mark.parametrize("optim", ["schedule_free_adamw", "schedule_free_sgd"])
@pytest.mark.parametrize("evaluates", [True, False])
def test_a_schedule_free_base_trains_and_evaluates_where_it_does_alone(optim, evaluates, tmp_path):
    pytest.importorskip("schedulefree")
    options = {"optim": optim, "learning_rate": 0.1, "logging_steps": 2}
    if evaluates:
        options |= {"eval_strategy": "steps", "eval_steps": 2}
    plain, ours, perturbed = (trained(Watching, tmp_path, rho, **options) for rho in (None, 0.0, 0.3))
    for a, b in zip(ours.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)
    names = ("loss", "eval_loss")
    assert history(ours, *names) == history(plain, *names)
    assert "train" not in vars(perturbed.optimizer)
    if evaluates:
        assert len(perturbed.evaluated) == STEPS // 2
        opt = sharpness_aware(perturbed.optimizer)
        at_average = perturbed.model.net[0].weight.detach().clone()  # the last evaluation left it there
        perturbed.optimizer.train()
        assert not torch.equal(perturbed.model.net[0].weight, at_average)
        z = opt.base_optimizer.state[perturbed.model.net[0].weight]["z"]
        y, beta = perturbed.model.net[0].weight, 0.9
        torch.testing.assert_close(y, beta * at_average + (1 - beta) * z, rtol=0, atol=1e-5)


def test_accelerates_wrapper_reaches_the_modes_of_the_base():
    schedulefree = pytest.importorskip("schedulefree")
    from accelerate import Accelerator

    AcceleratorState._reset_state(reset_partial_state=True)
    ends = []
    for rho in (None, 0.0, 0.3):
        model = Net()
        base = schedulefree.SGDScheduleFree(model.parameters(), lr=0.1)
        accelerator = Accelerator(cpu=True)
        model, opt = accelerator.prepare(model, base if rho is None else nusam.NuSAM(base, rho=rho, model=model))
        opt.train()
        for _ in range(4):
            for _ in passes(opt, model) if rho is not None else [None]:
                accelerator.backward(model(torch.ones(2, 3, dtype=torch.long), torch.tensor([0, 1]))["loss"])
            opt.step()
            opt.zero_grad()
        fast = model.net[0].weight.detach().clone()
        opt.eval()
        assert not torch.equal(fast, model.net[0].weight)
        ends.append(model.net[0].weight.detach().clone())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[2])
