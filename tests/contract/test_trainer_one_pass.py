"""One pass in Hugging Face's Trainer: its own loss, for either batch, and the state of whoever trains."""

import random
import warnings
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import nusam
from nusam.integrations.transformers import NuSAMTrainerMixin

STEPS, B, SHARE = 12, 8, 1 / 4
METHOD = partial(nusam.NuSAM, rho=0.05, ascent_share=SHARE)


class Net(nn.Module):
    """Tokens in, a label out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(20, 8)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3))
        self.config = None

    def forward(self, ids, labels=None):
        logits = self.net(self.tokens(ids).mean(1))
        return {"loss": None if labels is None else cross_entropy(logits, labels), "logits": logits}


def samples(count=B * STEPS):
    generator = torch.Generator().manual_seed(0)
    return [{"ids": torch.randint(0, 20, (5,), generator=generator), "labels": i % 3} for i in range(count)]


def sentences(count=B * STEPS):
    """Of six tokens, of which each has another number that count."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(1, 20, (6,), generator=generator)
        length = int(torch.randint(2, 7, (1,), generator=generator))
        kept = torch.arange(6) < length
        labels = torch.where(kept, ids, -100)
        found.append({"input_ids": ids * kept, "attention_mask": kept.long(), "labels": labels})
    return found


def trained(folder, kind=Trainer, model=None, dataset=None, resume=None, callbacks=None, one_pass=True, **arguments):
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = {
        "per_device_train_batch_size": B,
        "num_train_epochs": 1,
        "learning_rate": 0.1,
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
    kinds = (kind,) if issubclass(kind, NuSAMTrainerMixin) else (NuSAMTrainerMixin, kind)
    trainer = type("MyTrainer", kinds, {})(
        model or Net(),
        TrainingArguments(output_dir=str(folder), **{**settings, **arguments}),
        train_dataset=dataset or samples(),
        callbacks=callbacks,
        sharpness_aware=METHOD,
        one_pass=one_pass,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def stacked(dataset, first=0):
    """Batches in order, as Trainer's collator makes them."""
    return [
        {name: torch.stack([torch.as_tensor(sample[name]) for sample in dataset[i : i + B]]) for name in dataset[0]}
        for i in range(first, len(dataset), B)
    ]


def wrapped(model):
    """With the groups of Trainer, in whose order the first singular vectors are drawn."""
    groups = [[p for p in model.parameters() if (p.ndim > 1) == of_matrices] for of_matrices in (True, False)]
    return METHOD(torch.optim.SGD([{"params": group} for group in groups], lr=0.1), model=model)


def in_a_plain_loop(batches, loss, model=None, epochs=1, micro_batches=1, before=lambda number: None):
    model = model or Net()
    opt = wrapped(model)
    for _ in range(epochs):
        opt._waiting = None  # an epoch that was broken off leaves one for a batch that did not come
        steps = opt.one_pass(batches, partial(loss, model), accumulate=True)
        for number in range(len(batches)):
            before(number)
            next(steps)
            if (number + 1) % micro_batches == 0:
                opt.step()
                opt.zero_grad()
    return model


def own(model, batch):
    return model(**batch)["loss"]


def assert_same(one, other, tolerance=1e-6):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_labels_are_smoothed_as_trainer_does_it(tmp_path):
    """By its label smoother, which takes the labels out of the batch."""

    def smoothed(model, batch):
        logits = model(batch["ids"])["logits"]
        return cross_entropy(logits, batch["labels"], label_smoothing=0.3)

    ours = trained(tmp_path, label_smoothing_factor=0.3)
    assert_same(ours.model, in_a_plain_loop(stacked(samples()), smoothed))


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_causal_language_model_has_a_mean_over_the_tokens_of_its_step(tmp_path, micro_batches):
    """Trainer counts the tokens of all micro-batches of a step, and hands their number to the model."""

    def model():
        torch.manual_seed(0)
        sizes = {"n_positions": 8, "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 20}
        return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))

    batches = stacked(sentences())
    counted = 0

    def count(number):
        nonlocal counted
        if number % micro_batches == 0:
            chosen = batches[number : number + micro_batches]
            counted = ours._get_num_items_in_batch(chosen, torch.device("cpu"))

    def loss(model, batch):
        return model(**batch, num_items_in_batch=counted).loss

    ours = trained(tmp_path, model=model(), dataset=sentences(), gradient_accumulation_steps=micro_batches)
    assert not ours.optimizer.optimizer._one_pass._refused
    plain = in_a_plain_loop(batches, loss, model(), micro_batches=micro_batches, before=count)
    assert_same(ours.model, plain, 2e-6)


def test_resuming_where_an_epsilon_waits_is_bit_exact(tmp_path):
    whole = trained(tmp_path / "whole")
    trained(tmp_path / "half", max_steps=7, save_strategy="steps", save_steps=7)
    resumed = trained(tmp_path / "half", max_steps=STEPS, resume=True)
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert "ahead" in str(torch.load(tmp_path / "half" / "checkpoint-7" / "optimizer.pt")["state"][0].keys())


def test_an_epsilon_that_waits_for_a_batch_that_does_not_come_is_not_used(tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, arguments, state, control, **_):
            control.should_epoch_stop = state.global_step % 5 == 0

    ours = trained(tmp_path, callbacks=[Stops()], num_train_epochs=2)
    assert ours.state.global_step == 10
    model = Net()
    opt = wrapped(model)
    for _ in range(2):
        opt._waiting = None
        for _, _ in zip(range(5), opt.one_pass(stacked(samples()), partial(own, model)), strict=False):
            opt.step()
    assert_same(ours.model, model)


class Keeping(NuSAMTrainerMixin, Trainer):
    """Counts, keeps and logs in its ``compute_loss``, draws from an iterator, and writes into its batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = 0
        self.sizes, self.seen = [], []
        self.average = torch.zeros(())
        self.numbers = iter(range(1000))
        self.random = random.Random(0)
        self.current = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        labels = inputs.pop("labels")
        number = next(self.numbers)
        self.current = number
        self.calls += 1
        self.average.mul_(0.5).add_(0.5 * self.calls)
        self.seen.append((number, self.random.random()))
        self.add_one(inputs["ids"])
        self.log({"calls": self.calls})
        value = cross_entropy(model(**inputs)["logits"], labels)
        assert self.current == number  # though another batch had its turn meanwhile
        self.sizes.append(len(labels))
        return value


def add_by_numpy(ids):
    ids.numpy()[...] += 1


WRITES = {"told": lambda ids: ids.add_(1), "through .data": lambda ids: ids.data.add_(1), "by numpy": add_by_numpy}


@pytest.mark.parametrize("way", WRITES)
def test_what_a_loss_keeps_counts_once(tmp_path, monkeypatch, way):
    monkeypatch.setattr(Keeping, "add_one", staticmethod(WRITES[way]), raising=False)
    dataset = [{**sample, "ids": sample["ids"] - 1} for sample in samples()]
    dataset = [{**sample, "ids": sample["ids"].clamp(min=0)} for sample in dataset]
    ours = trained(tmp_path, Keeping, dataset=dataset)
    assert ours.calls == STEPS
    assert ours.sizes == [B] * STEPS
    numbers = random.Random(0)
    assert ours.seen == [(number, numbers.random()) for number in range(STEPS)]
    average = 0.0
    for number in range(1, STEPS + 1):
        average = 0.5 * average + 0.5 * number
    assert float(ours.average) == pytest.approx(average)
    assert next(ours.numbers) == STEPS
    assert [entry["calls"] for entry in ours.state.log_history if "calls" in entry] == list(range(1, STEPS + 1))

    def loss(model, batch):
        return own(model, {**batch, "ids": batch["ids"] + 1})

    assert_same(ours.model, in_a_plain_loop(stacked(dataset), loss))


def test_what_is_logged_is_the_descents(tmp_path):
    ours = trained(tmp_path)
    logged = [entry for entry in ours.state.log_history if "loss" in entry]
    losses = []
    model = Net()
    opt = wrapped(model)
    for value in opt.one_pass(stacked(samples()), partial(own, model)):
        losses.append(float(value))
        opt.step()
    assert [entry["loss"] for entry in logged] == pytest.approx(losses, abs=1e-3)
    assert not any("sharpness_gap" in entry for entry in logged)
    assert {(entry["active"], entry["rho"]) for entry in logged} == {(1.0, 0.05)}


class Stepping(Trainer):
    def training_step(self, model, inputs, *args, **kwargs):
        return super().training_step(model, inputs, *args, **kwargs)


class Preparing(Trainer):
    def _prepare_inputs(self, inputs):
        return super()._prepare_inputs(inputs)


class InFront(NuSAMTrainerMixin, Trainer):
    def training_step(self, model, inputs, *args, **kwargs):
        return super().training_step(model, {**inputs}, *args, **kwargs)


class OtherBatches(NuSAMTrainerMixin, Trainer):
    def get_batch_samples(self, *args, **kwargs):
        batches, items = super().get_batch_samples(*args, **kwargs)
        return [dict(batch) for batch in batches], items


@pytest.mark.parametrize("kind", [Stepping, Preparing, InFront, OtherBatches])
def test_what_is_made_of_a_batch_elsewhere_takes_two_passes_and_says_so_once(kind, tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = trained(tmp_path, kind)
    (told,) = [str(w.message) for w in caught if "one_pass" in str(w.message)]
    assert told.startswith("one_pass=True can't be had, since ")
    assert told.endswith("; every step takes two passes.")
    assert_same(ours.model, trained(tmp_path, one_pass=False).model)


def test_a_step_of_several_backwards_is_refused(tmp_path):
    class Several(Trainer):
        def compute_loss(self, *args, **kwargs):
            value = super().compute_loss(*args, **kwargs)
            self.accelerator.backward(value)
            return value

    with pytest.raises(RuntimeError, match=r"one call of accelerator\.backward in a step, and MyTrainer makes 2; "):
        trained(tmp_path, Several)


def test_a_method_that_has_no_one_pass_is_refused_before_anything_is_trained(tmp_path):
    model = Net()
    before = [p.detach().clone() for p in model.parameters()]
    AcceleratorState._reset_state(reset_partial_state=True)

    class Ours(NuSAMTrainerMixin, Trainer):
        pass

    trainer = Ours(
        model,
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]),
        train_dataset=samples(),
        sharpness_aware=nusam.SAM,
        one_pass=True,
    )
    with pytest.raises(ValueError, match="rank-one"):
        trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_nothing_is_left_behind(tmp_path):
    ours = trained(tmp_path)
    assert "backward" not in vars(ours.accelerator)
    assert not any("_call_impl" in vars(module) or "forward" in vars(module) for module in ours.model.modules())


def test_float16_takes_two_passes_and_says_so(tmp_path):
    from tests.contract.accelerate_loop import float16_on_cpu

    class Half(NuSAMTrainerMixin, Trainer):
        def create_optimizer(self, *args, **kwargs):
            float16_on_cpu(self.accelerator, torch.amp.GradScaler("cpu", init_scale=2.0**10))
            return super().create_optimizer(*args, **kwargs)

    with pytest.warns(UserWarning, match="computes in float16"):
        ours = trained(tmp_path, Half)
    assert_same(ours.model, trained(tmp_path, Half, one_pass=False).model, 1e-3)
