"""A loop of one's own on accelerate."""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from nusam.integrations.accelerate import one_pass, passes
from tests.contract.problem import BATCHES, Run, Trained, loader, scaler


class AccelerateLoop:
    can = frozenset({"accumulation", "bfloat16", "float16", "resume", "share", "one pass"})

    def train(self, run: Run) -> Trained:
        AcceleratorState._reset_state(reset_partial_state=True)  # one process, many accelerators
        trained = Trained.start(run)
        precision = "bf16" if run.precision == "bfloat16" else "no"
        accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=run.micro_batches)
        if run.precision == "float16":
            float16_on_cpu(accelerator, scaler(run))
        opt = trained.wrap(trained.base(), trained.model)
        model, opt, batches, schedule = accelerator.prepare(trained.model, opt, loader(run), trained.schedule(opt))
        first = 0
        if run.resume:
            accelerator.load_state(run.folder / "accelerate")
            first = schedule.scheduler.last_epoch // BATCHES

        def loss(batch):
            with accelerator.autocast():
                return model.loss(*batch)

        def in_passes(batches):
            for batch in batches:
                with accelerator.accumulate(model):
                    for part in passes(opt, model, *batch):
                        accelerator.backward(loss(part))
                    yield

        for _ in range(first, run.epochs):
            steps = one_pass(opt, model, batches, loss, accelerator) if run.one_pass else in_passes(batches)
            for _ in steps:
                if run.clip is not None and accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), run.clip)
                opt.step()
                schedule.step()
                opt.zero_grad()
        if run.folder is not None and not run.resume:
            accelerator.save_state(run.folder / "accelerate")
        return trained


def float16_on_cpu(accelerator: Accelerator, scaler: torch.amp.GradScaler) -> None:
    """What accelerate sets up itself on a GPU; on a CPU it leaves float16 out without a word."""
    accelerator.state._mixed_precision = "fp16"
    accelerator.native_amp = True
    accelerator.scaler = scaler
