"""What Hugging Face's Trainer does around the passes."""

import types
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainingArguments

import nusam
from nusam.integrations.transformers import NuSAMTrainerMixin
from tests.contract.problem import LR, Run, Trained, data, loader
from tests.contract.transformers_loop import NetWithLoss


class DigitsTrainer(NuSAMTrainerMixin, Trainer):
    pass


def trainer(folder, run=None, model=None, arguments=None, **options):
    AcceleratorState._reset_state(reset_partial_state=True)
    run = run or Run(steps=5)
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        num_train_epochs=run.epochs,
        per_device_train_batch_size=16,
        learning_rate=LR,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        **{"optim": "sgd", "max_grad_norm": 0.0, **(arguments or {})},
    )
    dataset = [{"x": x, "labels": y} for x, y in data(run)]
    return DigitsTrainer(model or NetWithLoss(), arguments, train_dataset=dataset, **options)


def logged(trained):
    return [entry for entry in trained.state.log_history if "loss" in entry]


def losses_by_hand(run):
    """Of the first step: the mean over its micro-batches at the weights, and at each one's perturbed weights."""
    torch.manual_seed(0)
    begun = Trained(run, NetWithLoss())
    opt = begun.wrap(begun.base(), begun.model)
    sums = {"ascent": 0.0, "descent": 0.0}
    for (x, y), _ in zip(loader(run), range(run.micro_batches), strict=False):
        for name in opt.passes(accumulate=True):
            loss = begun.model(x, y)["loss"] / run.micro_batches
            loss.backward()
            sums[name] += loss.item()
    return sums["ascent"], sums["descent"]


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_the_gap_is_logged_and_the_loss_is_that_at_the_weights(tmp_path, micro_batches):
    run = Run(steps=5, micro_batches=micro_batches)
    trained = trainer(tmp_path, run, arguments={"gradient_accumulation_steps": micro_batches})
    trained.train()
    ascent, descent = losses_by_hand(run)
    first = logged(trained)[0]
    assert first["loss"] == pytest.approx(ascent, abs=1e-4)
    assert first["sharpness_gap"] == pytest.approx(descent - ascent, rel=1e-3)
    assert first["sharpness_gap"] > 0
    assert (first["active"], first["rho"]) == (1.0, 0.05)


def test_the_delay_is_a_share_of_all_steps(tmp_path):
    trained = trainer(tmp_path, Run(steps=20), delay_ratio=0.25)
    trained.train()
    assert trained.model.forwards == 5 + 2 * 15
    assert ["sharpness_gap" in entry for entry in logged(trained)] == [False] * 5 + [True] * 15
    assert [entry["active"] for entry in logged(trained)] == [0.0] * 5 + [1.0] * 15


@pytest.mark.parametrize("ratio", [-0.1, 1.1, 10])
def test_a_delay_in_steps_is_refused_as_a_share(tmp_path, ratio):
    with pytest.raises(ValueError, match=rf"delay_ratio must be a share of the steps.*got {ratio}\.$"):
        trainer(tmp_path, delay_ratio=ratio)


def test_the_method_is_the_users(tmp_path):
    trained = trainer(tmp_path, sharpness_aware=partial(nusam.SAM, rho=0.3))
    trained.train()
    opt = trained.optimizer.optimizer
    assert isinstance(opt, nusam.SAM)
    assert isinstance(opt.base_optimizer, torch.optim.SGD)
    assert logged(trained)[0]["rho"] == 0.3
    assert opt.model is trained.model


@pytest.mark.parametrize("given", ["nusam", nusam.NuSAM(torch.optim.SGD([torch.nn.Parameter(torch.ones(2, 2))], lr=1))])
def test_what_is_no_method_is_refused(tmp_path, given):
    with pytest.raises(TypeError, match=r"sharpness_aware must be a method, such as .* got "):
        trainer(tmp_path, sharpness_aware=given)


class Stream(torch.utils.data.IterableDataset):
    """Of no length that anybody knows."""

    def __init__(self, run):
        self.run = run

    def __iter__(self):
        return iter([{"x": x, "labels": y} for x, y in data(self.run)][:48])


@pytest.mark.parametrize("one_pass", [False, True])
def test_a_stream_may_end_in_mid_training(tmp_path, one_pass):
    method = partial(nusam.NuSAM, ascent_share=1 / 4)
    trained = trainer(tmp_path, arguments={"max_steps": 7}, sharpness_aware=method, one_pass=one_pass)
    trained.train_dataset = Stream(Run(steps=5))
    trained.train()
    assert trained.state.global_step == 7


def halves(samples):
    """Two views, one half of the rows above the other."""
    x, y = (torch.stack([torch.as_tensor(one[name]) for one in samples]) for name in ("x", "labels"))
    return {"x": torch.cat([x, -x]), "labels": torch.cat([y, y])}


def fewer(samples):
    """As where sequences are packed into a row."""
    return {name: rows[: len(samples) // 4] for name, rows in halves(samples).items()}


@pytest.mark.parametrize("one_pass", [False, True])
@pytest.mark.parametrize(("collator", "rows"), [(halves, 32), (fewer, 4)])
def test_rows_that_are_no_samples_are_refused_with_a_share(tmp_path, collator, rows, one_pass):
    method = partial(nusam.NuSAM, ascent_share=1 / 4)
    trained = trainer(tmp_path, sharpness_aware=method, one_pass=one_pass, data_collator=collator)
    before = [p.clone() for p in trained.model.parameters()]
    with pytest.raises(ValueError, match=rf"DigitsTrainer's, which makes {rows} rows of 16 samples"):
        trained.train()
    assert all(torch.equal(p, q) for p, q in zip(trained.model.parameters(), before, strict=True))
    trainer(tmp_path, data_collator=collator).train()  # without a share


def closed(samples):
    """Labels in an object that nobody can look into."""
    x, y = (torch.stack([torch.as_tensor(one[name]) for one in samples]) for name in ("x", "labels"))
    return {"x": x, "labels": types.SimpleNamespace(y=y)}


@pytest.mark.parametrize("delay", [0, 1000])
@pytest.mark.parametrize("one_pass", [False, True])
def test_a_batch_that_can_not_be_cut_is_refused_at_the_first_step(tmp_path, one_pass, delay):
    method = partial(nusam.NuSAM, ascent_share=1 / 4, delay=delay)
    trained = trainer(tmp_path, sharpness_aware=method, one_pass=one_pass, data_collator=closed)
    before = [p.clone() for p in trained.model.parameters()]
    with pytest.raises(ValueError, match=r"can't cut a dict of x, labels, which holds a SimpleNamespace"):
        trained.train()
    assert all(torch.equal(p, q) for p, q in zip(trained.model.parameters(), before, strict=True))


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_last_batch_may_have_fewer_rows(tmp_path, workers, micro_batches):
    options = {"dataloader_num_workers": workers, "gradient_accumulation_steps": micro_batches}
    trained = trainer(tmp_path, arguments=options, sharpness_aware=partial(nusam.NuSAM, ascent_share=1 / 4))
    trained.train_dataset = trained.train_dataset[:40]
    trained.train()
    assert len(logged(trained)) == trained.state.global_step == -(-3 // micro_batches)


class Drawing(DigitsTrainer):
    """Draws its inputs from a batch, and keeps some for the step after."""

    def _prepare_inputs(self, inputs):
        self.prepared = [*getattr(self, "prepared", []), len(inputs["x"])]
        if len(self.prepared) % 2:
            self.kept = inputs | {"x": torch.randn_like(inputs["x"])}
        return super()._prepare_inputs(self.kept)

    def compute_loss(self, model, inputs, *args, **kwargs):
        seen.append(inputs["x"])
        return super().compute_loss(model, inputs, *args, **kwargs)


seen = []


def test_what_a_trainer_prepares_is_made_once_of_the_whole_batch_and_then_cut(tmp_path):
    seen.clear()
    trained = trainer(tmp_path, arguments={"max_steps": 4}, sharpness_aware=partial(nusam.NuSAM, ascent_share=1 / 4))
    trained.__class__ = Drawing
    trained.train()
    assert trained.prepared == [16] * 4  # once a step
    assert [len(x) for x in seen] == [4, 16] * 4
    assert all(torch.equal(part, whole[:4]) for part, whole in zip(seen[::2], seen[1::2], strict=True))
    assert torch.equal(seen[1], seen[3])  # what was kept
    assert not torch.equal(seen[3], seen[5])


class Generator(NetWithLoss):
    def generate(self, x):
        return x + self(x, torch.zeros(len(x)).long())["logits"].mean()


class Online(DigitsTrainer):
    """Generates its samples from the model as it is in this pass, in the loss as others do in their training step."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        with torch.no_grad():
            drawn = model.generate(inputs["x"])
        return super().compute_loss(model, inputs | {"x": drawn}, *args, **kwargs)


def test_samples_that_are_generated_in_each_pass_are_refused_with_a_share(tmp_path):
    model = Generator()
    before = [p.clone() for p in model.parameters()]
    trained = trainer(tmp_path, model=model, sharpness_aware=partial(nusam.NuSAM, ascent_share=1 / 4))
    trained.__class__ = Online
    with pytest.raises(RuntimeError, match=r"Online generates inside training_step.*use ascent_share=1\.$"):
        trained.train()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert "generate" not in vars(model)


def test_two_optimizers_of_ours_are_refused(tmp_path):
    model = NetWithLoss()
    opt = nusam.NuSAM(torch.optim.AdamW(model.parameters()), model=model)
    with pytest.raises(ValueError, match=r"got sharpness_aware= and, in optimizers=, a NuSAM; give one of them\.$"):
        trainer(tmp_path, model=model, optimizers=(opt, None), sharpness_aware=nusam.NuSAM)


def test_an_optimizer_of_ours_is_kept(tmp_path):
    model = NetWithLoss()
    opt = nusam.NuSAMNorm(torch.optim.AdamW(model.parameters()), rho=0.02, model=model)
    trained = trainer(tmp_path, model=model, optimizers=(opt, None))
    trained.train()
    trained.train()  # on what the first left, wrapped by accelerate
    assert trained.optimizer.optimizer is opt
    assert opt.state_dict()["param_groups"][0]["nusam_steps"] == 10


def test_labels_taken_out_for_smoothing_are_there_in_both_passes(tmp_path):
    class Taking(DigitsTrainer):
        """As Trainer takes them out for its label smoother, and many a user's compute_loss does."""

        def compute_loss(self, model, inputs, **_):
            labels = inputs.pop("labels")
            return model(inputs.pop("x"), labels)["loss"]

        def _prepare_inputs(self, inputs):
            return inputs  # no copy of Trainer's own

    plain = trainer(tmp_path)
    taking = trainer(tmp_path)
    taking.__class__ = Taking
    plain.train()
    taking.train()
    for a, b in zip(plain.model.parameters(), taking.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_evaluation_logs_nothing_of_ours(tmp_path):
    trained = trainer(tmp_path, eval_dataset=[{"x": x, "labels": y} for x, y in data(Run())])
    trained.train()
    assert "active" not in trained.evaluate()
    assert "active" not in trained.state.log_history[-1]


def test_a_loss_logged_before_training_is_left_alone(tmp_path):
    trained = trainer(tmp_path)
    trained.log({"loss": 1.0})
    assert "active" not in trained.state.log_history[-1]


def test_the_mixin_behind_trainer_is_refused():
    with pytest.raises(TypeError, match=r"Late has Trainer in front.*class Late\(NuSAMTrainerMixin, Trainer\)"):

        class Late(Trainer, NuSAMTrainerMixin):
            pass
