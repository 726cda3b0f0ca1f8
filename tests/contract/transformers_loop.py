"""Hugging Face's Trainer."""

import torch
from accelerate.state import AcceleratorState
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import TensorDataset
from transformers import Trainer, TrainingArguments

from nusam.integrations.transformers import NuSAMTrainerMixin
from tests.contract.accelerate_loop import float16_on_cpu
from tests.contract.problem import LR, MOMENTUM, Net, Run, Trained, data, scaler


class NetWithLoss(Net):
    """As Trainer wants its models: the loss comes from the forward."""

    def forward(self, x, labels):
        logits = super().forward(x)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


class DigitsTrainer(NuSAMTrainerMixin, Trainer):
    """With the schedule that every loop has."""

    trained: Trained

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> LRScheduler:
        self.lr_scheduler = self.trained.schedule(self.optimizer)
        return super().create_scheduler(num_training_steps, optimizer)


def digits_trainer(trained: Trained, dataset: TensorDataset, **options) -> DigitsTrainer:
    """A Trainer that does what the run asks for."""
    run = trained.run
    arguments = TrainingArguments(
        output_dir=str(run.folder or "unused"),
        use_cpu=True,
        bf16=run.precision == "bfloat16",
        num_train_epochs=run.epochs,
        per_device_train_batch_size=run.batch,
        gradient_accumulation_steps=run.micro_batches,
        max_grad_norm=run.clip or 0.0,
        train_sampling_strategy="sequential",
        save_strategy="epoch" if run.folder is not None and not run.resume else "no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    trainer = DigitsTrainer(
        trained.model,
        arguments,
        train_dataset=[{"x": x, "labels": y} for x, y in dataset],
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": LR, "momentum": MOMENTUM}),
        sharpness_aware=trained.wrap,
        one_pass=run.one_pass,
    )
    trainer.trained = trained
    if run.precision == "float16":
        float16_on_cpu(trainer.accelerator, scaler(run))
    return trainer


class TransformersLoop:
    can = frozenset({"accumulation", "bfloat16", "float16", "resume", "share", "one pass"})

    def train(self, run: Run) -> Trained:
        AcceleratorState._reset_state(reset_partial_state=True)
        trained = Trained.start(run, NetWithLoss)
        digits_trainer(trained, data(run)).train(resume_from_checkpoint=run.resume)
        return trained
